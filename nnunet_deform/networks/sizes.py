"""Inputs of any size for networks with strides, and the unit of nnU-Net's memory estimate."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

# What autograd keeps of nnU-Net's PlainConvUNet, in elements, for each element that nnU-Net's memory estimate counts.
STORED_PER_COUNTED = 1.85


def padded_size(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The next multiple of the total stride on each axis."""
    total_stride = [math.prod(along) for along in zip(*strides, strict=True)]
    return [s + -s % total for s, total in zip(size, total_stride, strict=True)]


def pad_to_strides(x: Tensor, strides: Sequence[Sequence[int]]) -> Tensor:
    """[B, C, *spatial] with zeros at the end of each axis, up to the next multiple of the total stride.

    Raises:
        ValueError: the number of spatial axes is not the strides'.
    """
    ndim = len(strides[0])
    if x.ndim != ndim + 2:
        raise ValueError(f"input has shape {tuple(x.shape)}; this network needs {ndim} spatial axes.")
    missing = [padded - s for padded, s in zip(padded_size(x.shape[2:], strides), x.shape[2:], strict=True)]
    if any(missing):
        return F.pad(x, [p for m in reversed(missing) for p in (0, m)])
    return x


def crop_to_input(
    logits: Tensor | list[Tensor], size: Sequence[int], strides: Sequence[Sequence[int]]
) -> Tensor | list[Tensor]:
    """Logits of a padded input without the padding: those at full resolution, or one for each level from there on.

    Args:
        logits: [B, classes, *spatial], or a list of them.
        size: the input's before padding.
        strides: of each level to the one before.
    """
    if isinstance(logits, Tensor):
        return logits[(..., *map(slice, size))]
    cropped = []
    # The coarsest level has no logits.
    for level_logits, stride in zip(logits, strides[:-1], strict=True):
        size = [math.ceil(s / step) for s, step in zip(size, stride, strict=True)]
        cropped.append(level_logits[(..., *map(slice, size))])
    return cropped
