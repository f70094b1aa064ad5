"""What vision transformers are made of: attention, its MLP, and the way from a map to windows and back."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens, [B, N, C] -> the same; fused, so that no N x N map is kept.

    Args:
        channels: C, a multiple of ``heads``.
        heads: of channels / heads each.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: of attention weights.
    """

    def __init__(self, channels: int, heads: int, *, qkv_bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.output(attended.transpose(1, 2).flatten(2))


class TransformerMLP(nn.Sequential):
    """Linear layer, GELU, linear layer over the last axis, [..., C] -> the same; dropout after both."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
            nn.Dropout(dropout),
        )


def channels_first(x: Tensor) -> Tensor:
    """[B, *grid, C] -> [B, C, *grid], contiguous, so that a convolution's gradient has the strides of its weight, as
    DistributedDataParallel wants it."""
    return x.movedim(-1, 1).contiguous()


def channels_last(x: Tensor) -> Tensor:
    """[B, C, *grid] -> [B, *grid, C]."""
    return x.movedim(1, -1)


def padded_at_end(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, *grid, C] with zeros at the end of each axis of the grid, up to ``size``."""
    missing = [s - g for s, g in zip(size, x.shape[1:-1], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [0, 0, *(p for m in reversed(missing) for p in (0, m))])


def cropped_at_end(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, *grid, C] without what exceeds ``size`` at the end of each axis of the grid."""
    return x[(slice(None), *map(slice, size))]


def to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """[B, *grid, C] -> [B, windows, tokens of a window, C]; the window divides the grid."""
    ndim = len(window)
    counts = [g // w for g, w in zip(x.shape[1:-1], window, strict=True)]
    split = x.reshape(x.shape[0], *(n for pair in zip(counts, window, strict=True) for n in pair), x.shape[-1])
    order = (0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    return split.permute(order).reshape(x.shape[0], math.prod(counts), math.prod(window), x.shape[-1])


def from_windows(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_windows`: [B, windows, tokens of a window, C] -> [B, *grid, C]."""
    ndim = len(window)
    counts = [g // w for g, w in zip(grid, window, strict=True)]
    split = windows.reshape(windows.shape[0], *counts, *window, windows.shape[-1])
    order = (0, *(axis for a in range(1, ndim + 1) for axis in (a, ndim + a)), 2 * ndim + 1)
    return split.permute(order).reshape(windows.shape[0], *grid, windows.shape[-1])
