r"""nnFormer: a U-shaped transformer of local windows, whole coarse maps, and attention to the encoder for skips.

H.-Y. Zhou, J. Guo, Y. Zhang, X. Han, L. Yu, L. Wang, Y. Yu, "nnFormer: Volumetric Medical Image Segmentation via a 3D
Transformer", IEEE TIP 2023, arXiv:2109.03201. Written from the paper and from what the released code does.

With x the tokens of a level, LN a LayerNorm over channels, B a learnt bias for each offset between two tokens, M a
mask, r the encoder's tokens and u those expanded from the level below:

    A(q, k, v) = W softmax(q k^T / sqrt(d) + B + M) v                                       in windows
    x <- x + A(LN x),  x <- x + MLP(LN x)                                                   window block
    x = u + r,  x <- x + A(LN u, W_k LN r, W_v LN r),  x <- x + MLP(LN x)                   skip attention, the same LN
    x_{l+1} = conv(LN GELU x_l),  u_l = transposed conv(LN x_{l+1})                         merging, expanding

The second block of each level shifts its windows by half. The two coarse levels attend over the whole map.

Differences from the released code:

- The token grid, the windows and the strides follow nnU-Net's plan, in 3D and 2D, and halve with ceil; the released
  code has one file for each of three crops. In 2D it is our generalisation.
- The index into the table of biases is exact. The released one multiplies by wrong widths, so that offsets share an
  entry and, in windows of four, 115 of 343 are ever read; the number of parameters is the same.
- Padding never takes part as keys, and shifted windows always have their mask (the released ACDC code has none).
  Windows are shifted on the axes where they are smaller than the map; the released code decides for all axes at once.
- The decoder mirrors the encoder's heads, also at width 96, where the released BraTS code has twice as many.
- It starts from scratch; the released trainers load weights of a 2D Swin transformer by default.
- Coarse heads are always built, and not trained without deep supervision.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn

from nnunet_deform.layers.transformer import (
    TransformerMLP,
    channels_first,
    channels_last,
    cropped_at_end,
    from_windows,
    padded_at_end,
    to_windows,
)
from nnunet_deform.networks.padding import AnySizeNetwork, SegmentationHead, Strides
from nnunet_deform.networks.rivals.geometry import (
    Sizes,
    cropped_to,
    drop_path_rates,
    expanding_conv,
    halving_conv,
    token_grids,
    total_stride,
)
from nnunet_deform.networks.topology import require_patch

DEPTH = 2
HEAD_WIDTH = 32
LARGEST_DROP_PATH = 0.2
# Added to the logits of pairs that must not attend. Not -inf: a query in the padding may see nothing but padding.
MASKED = -100.0


class Windows(nn.Module):
    """How the map of a level is cut into windows, shifted or not: what its blocks share.

    Args:
        grid: size of the level's map.
        window: size of a window, on no axis larger than the grid.

    Attributes:
        index: [N, N], of each pair of a window's N tokens into the table of biases.
        mask, shifted_mask: [windows, N, N], 0 or ``MASKED``; None where every pair may attend.
    """

    def __init__(self, grid: Sequence[int], window: Sequence[int]) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.window = tuple(window)
        self.padded = tuple(g + -g % w for g, w in zip(grid, window, strict=True))
        self.shift = tuple(w // 2 if w < g else 0 for g, w in zip(grid, window, strict=True))
        self.register_buffer("index", _relative_index(self.window), persistent=False)
        self.register_buffer("mask", self._mask([0] * len(grid)), persistent=False)
        self.register_buffer("shifted_mask", self._mask(self.shift), persistent=False)

    def _mask(self, shift: Sequence[int]) -> Tensor | None:
        if not any(shift) and self.padded == self.grid:
            return None
        region = torch.zeros(1, *self.padded, 1, dtype=torch.long)
        inside = torch.ones(1, *self.padded, 1, dtype=torch.bool)
        for axis, (g, p, s) in enumerate(zip(self.grid, self.padded, shift, strict=True)):
            along = [1] * region.ndim
            along[axis + 1] = p
            position = torch.arange(p)
            # What the cyclic shift has brought from the map's start to its end is another region.
            region = 2 * region + (position >= p - s).long().view(along)
            inside = inside & ((position + s) % p < g).view(along)
        regions = to_windows(region, self.window)[0]
        keys = to_windows(inside, self.window)[0].transpose(1, 2)
        allowed = (regions == regions.transpose(1, 2)) & keys
        return torch.where(allowed, 0.0, MASKED)

    def cut(self, x: Tensor, shifted: bool) -> Tensor:
        """[B, *grid, C] -> [B, windows, N, C]."""
        x = padded_at_end(x, self.padded)
        if shifted and any(self.shift):
            x = x.roll([-s for s in self.shift], tuple(range(1, x.ndim - 1)))
        return to_windows(x, self.window)

    def join(self, windows: Tensor, shifted: bool) -> Tensor:
        """[B, windows, N, C] -> [B, *grid, C]."""
        x = from_windows(windows, self.window, self.padded)
        if shifted and any(self.shift):
            x = x.roll(self.shift, tuple(range(1, x.ndim - 1)))
        return cropped_at_end(x, self.grid)


def _relative_index(window: Sequence[int]) -> Tensor:
    tokens = torch.stack(torch.meshgrid(*map(torch.arange, window), indexing="ij")).flatten(1)
    index = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.long)
    for positions, w in zip(tokens, window, strict=True):
        index = index * (2 * w - 1) + positions[:, None] - positions[None] + w - 1
    return index


class WindowAttention(nn.Module):
    """A of the equations, [B, *grid, C] -> the same.

    Args:
        channels: C, a multiple of ``heads``.
        heads: of the attention.
        window: size of a window.
        own_queries: whether queries are projected from the tokens; without it they are given.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int], *, own_queries: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.project = nn.Linear(channels, (3 if own_queries else 2) * channels)
        self.output = nn.Linear(channels, channels)
        self.bias_table = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor, windows: Windows, shifted: bool, queries: Tensor | None = None) -> Tensor:
        projected = self.project(x)
        if queries is not None:
            projected = torch.cat((queries.to(projected.dtype), projected), dim=-1)
        tokens = windows.cut(projected, shifted)
        # [3, B, windows, heads, N, C / heads]
        query, key, value = tokens.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        logits = (query * self.scale) @ key.transpose(-2, -1)
        bias = self.bias_table[windows.index].permute(2, 0, 1)
        # In the logits' type: in half precision a float32 bias would make the largest map of the network float32.
        logits = logits + bias.to(logits.dtype)
        mask = windows.shifted_mask if shifted else windows.mask
        if mask is not None:
            logits = logits + mask[:, None].to(logits.dtype)
        attended = logits.softmax(dim=-1).to(value.dtype) @ value
        return self.output(windows.join(attended.transpose(2, 3).flatten(3), shifted))


class WindowBlock(nn.Module):
    """The window block, [B, *grid, C] -> the same."""

    def __init__(self, channels: int, heads: int, window: Sequence[int], drop_path: float, *, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, own_queries=True)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = TransformerMLP(channels, 4 * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm(x), windows, self.shifted))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class SkipAttentionBlock(nn.Module):
    """The decoder's first block of a level: queries of the expanded tokens, keys and values of the encoder's."""

    def __init__(self, channels: int, heads: int, window: Sequence[int], drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, own_queries=False)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = TransformerMLP(channels, 4 * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, expanded: Tensor, skip: Tensor, windows: Windows) -> Tensor:
        attended = self.attention(self.norm(skip), windows, shifted=False, queries=self.norm(expanded))
        x = expanded + skip + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class NormedConv(nn.Module):
    """Convolution, GELU if wanted, LayerNorm: [B, in, *spatial] -> [B, out, *spatial / stride]."""

    def __init__(self, conv: nn.Module, *, activation: bool) -> None:
        super().__init__()
        self.conv = conv
        self.activation = nn.GELU() if activation else nn.Identity()
        self.norm = nn.LayerNorm(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(self.norm(channels_last(self.activation(self.conv(x)))))


class Merging(nn.Module):
    """To the level below, [B, *grid, C] -> [B, *ceil(grid / stride), 2 C]."""

    def __init__(self, channels: int, kernel_size: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = halving_conv(channels, 2 * channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.conv(channels_first(self.norm(F.gelu(x)))))


class Expanding(nn.Module):
    """To the level above, of size ``grid``: [B, *coarse, C] -> [B, *grid, C / 2]."""

    def __init__(self, channels: int, stride: Sequence[int], grid: Sequence[int]) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.norm = nn.LayerNorm(channels)
        self.conv = expanding_conv(channels, channels // 2, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(cropped_to(self.conv(channels_first(self.norm(x))), self.grid))


class NnFormer(AnySizeNetwork):
    """nnFormer for patches of one size, [B, input_channels, *patch_size] -> logits [B, num_classes, *patch_size].

    With deep supervision a list: at full resolution, and coarser by the first and the first two of ``down_strides``.

    Args:
        patch_size: in voxels.
        embed_strides: the two strides whose product is what a token stands for.
        down_strides: of the three mergings.
        down_kernels: of their convolutions, odd.
        window_sizes: of the four levels, in tokens, on no axis larger than the level's grid.
        output_strides: of each of the logits to the one before.
        width: of the finest level's tokens, doubled from level to level; a multiple of 64 is the authors' choice (192).
        head_width: of each head; widths are multiples of it.
        decoder_heads: of the decoder's three levels, finest first, where they are not the encoder's.

    Raises:
        ValueError: (forward) the images have another size.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_size: Sequence[int],
        embed_strides: Strides,
        down_strides: Strides,
        down_kernels: Sizes,
        window_sizes: Sizes,
        output_strides: Strides,
        width: int = 192,
        head_width: int = HEAD_WIDTH,
        decoder_heads: Sequence[int] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        ndim = len(patch_size)
        super().__init__([[1] * ndim, *embed_strides], output_strides, deep_supervision)
        self.patch_size = patch_size
        token = total_stride(embed_strides)
        grids = token_grids(patch_size, [token, *down_strides])
        widths = [width * 2**level for level in range(4)]
        heads = [channels // head_width for channels in widths]

        conv_op = convert_dim_to_conv_op(ndim)
        first = [min(step, 2) for step in token]
        second = [step // a for step, a in zip(token, first, strict=True)]
        self.embedding = nn.Sequential(
            *(
                NormedConv(conv_op(inputs, outputs, 3, tuple(stride), 1), activation=activation)
                for inputs, outputs, stride, activation in (
                    (input_channels, width // 2, first, True),
                    (width // 2, width // 2, [1] * ndim, True),
                    (width // 2, width, second, True),
                    (width, width, [1] * ndim, False),
                )
            )
        )
        self.windows = nn.ModuleList(map(Windows, grids, window_sizes))
        rates = iter(drop_path_rates(LARGEST_DROP_PATH, 4 * DEPTH))
        self.encoder = nn.ModuleList(
            nn.ModuleList(
                WindowBlock(channels, heads[level], window_sizes[level], next(rates), shifted=block % 2 == 1)
                for block in range(DEPTH)
            )
            for level, channels in enumerate(widths)
        )
        self.norms = nn.ModuleList(map(nn.LayerNorm, widths))
        self.merging = nn.ModuleList(map(Merging, widths[:-1], down_kernels, down_strides))
        self.expanding = nn.ModuleList(map(Expanding, widths[1:], down_strides, grids[:-1]))
        rates = iter(drop_path_rates(LARGEST_DROP_PATH, 3 * DEPTH))
        decoder_heads = heads[:-1] if decoder_heads is None else decoder_heads
        # Made coarsest first, where the rates start.
        levels = [
            nn.ModuleList(
                (
                    SkipAttentionBlock(widths[level], decoder_heads[level], window_sizes[level], next(rates)),
                    WindowBlock(widths[level], decoder_heads[level], window_sizes[level], next(rates), shifted=True),
                )
            )
            for level in (2, 1, 0)
        ]
        self.upward = nn.ModuleList(levels[::-1])
        self.heads = nn.ModuleList(
            SegmentationHead(expanding_conv(channels, num_classes, token, bias=True)) for channels in widths[:-1]
        )
        self.freeze_unused(self.heads[1:])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        require_patch("nnFormer's division into windows", x.shape[2:], self.patch_size, self.strides)
        return super().forward(x)

    def logits(self, x: Tensor) -> list[Tensor]:
        x = channels_last(self.embedding(x))
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.merging[level - 1](x)
            for block in blocks:
                x = block(x, self.windows[level])
            skips.append(self.norms[level](x))
        x = skips.pop()
        wanted = 3 if self.decoder.deep_supervision else 1
        outputs = []
        for level in (2, 1, 0):
            attention, block = self.upward[level]
            x = block(attention(self.expanding[level](x), skips[level], self.windows[level]), self.windows[level])
            if level < wanted:
                outputs.insert(0, self.heads[level](channels_first(x)))
        return outputs
