"""What every network does with its levels: check them, and take images of any size."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def check_topology(
    network: str,
    n_stages: int,
    features_per_stage: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    ndim: int,
) -> None:
    """Raises ValueError, naming the value, unless these describe at least two levels of a U-shaped network."""
    if n_stages < 2:
        raise ValueError(f"n_stages={n_stages}: {network} needs at least 2, one level below full resolution.")
    for name, per_stage in (
        ("features_per_stage", features_per_stage),
        ("kernel_sizes", kernel_sizes),
        ("strides", strides),
    ):
        if len(per_stage) != n_stages:
            raise ValueError(f"{name}={per_stage} has {len(per_stage)} values for n_stages={n_stages}.")
    for name, per_stage in (("kernel_sizes", kernel_sizes), ("strides", strides)):
        if any(len(along) != ndim for along in per_stage):
            raise ValueError(f"{name}={per_stage} must have {ndim} values at each level, one for each axis.")
    if any(k % 2 == 0 for along in kernel_sizes for k in along):
        raise ValueError(f"kernel_sizes={kernel_sizes} must be odd, to keep the spatial size.")
    if any(step != 1 for step in strides[0]):
        raise ValueError(f"strides[0]={strides[0]} must be all ones: level 0 is full resolution.")


def padded_size(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The next multiple of the total stride on each axis."""
    total_stride = [math.prod(along) for along in zip(*strides, strict=True)]
    return [s + -s % total for s, total in zip(size, total_stride, strict=True)]


def pad_to_levels(x: Tensor, strides: Sequence[Sequence[int]]) -> Tensor:
    """[B, C, *spatial] with zeros at the end of each axis, up to a multiple of the total stride.

    Raises:
        ValueError: x has another number of spatial axes than the strides.
    """
    ndim = len(strides[0])
    if x.ndim != ndim + 2:
        raise ValueError(f"input has shape {tuple(x.shape)}; this network needs {ndim} spatial axes.")
    missing = [padded - s for padded, s in zip(padded_size(x.shape[2:], strides), x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [p for m in reversed(missing) for p in (0, m)])


def require_patch(part: str, size: Sequence[int], patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Raises ValueError, naming the part of a network that was made for the patch, unless an image of ``size`` is
    padded to the size that the patch is padded to."""
    if padded_size(size, strides) != padded_size(patch_size, strides):
        raise ValueError(
            f"the input has size {list(size)}, but {part} was made for patches of {list(patch_size)}; give it patches "
            "of that size."
        )


def crop_to_image(
    logits: Tensor | list[Tensor], size: Sequence[int], strides: Sequence[Sequence[int]]
) -> Tensor | list[Tensor]:
    """Logits of a padded image, one or a list from level 0 on, without the padding."""
    if isinstance(logits, Tensor):
        return logits[(..., *map(slice, size))]
    cropped = []
    for level_logits, stride in zip(logits, strides[: len(logits)], strict=True):
        size = [math.ceil(s / step) for s, step in zip(size, stride, strict=True)]
        cropped.append(level_logits[(..., *map(slice, size))])
    return cropped
