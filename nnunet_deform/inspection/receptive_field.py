"""The effective receptive field: how much each voxel of the image moves one voxel's logit.

W. Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016:
|d logit / d image| of an output voxel, here summed over the image's channels and averaged over several output voxels,
each in the middle of a patch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ReceptiveField:
    """values: [*patch size], mean |d logit / d image| at each distance from the output voxel, which is at
    :func:`centre` of the patch; channels: [C], each input channel's share of it, together 1, or all 0 where the logit
    depends on nothing."""

    values: np.ndarray
    channels: np.ndarray


def centre(size: Sequence[int]) -> tuple[int, ...]:
    """The voxel that :func:`receptive_field` looks at in a patch of this size."""
    return tuple(s // 2 for s in size)


def patch_around(image: Tensor, voxel: Sequence[int], size: Sequence[int]) -> Tensor:
    """The part of an image [C, *spatial] that has ``voxel`` at its :func:`centre`: [C, *size], with zeros, as nnU-Net
    pads, where it is beyond the image."""
    before = centre(size)
    starts = [v - b for v, b in zip(voxel, before, strict=True)]
    inner, padding = [], []
    for start, length, limit in zip(starts, size, image.shape[1:], strict=True):
        low, high = max(start, 0), min(start + length, limit)
        inner.append(slice(low, max(low, high)))
        padding.append((low - start, start + length - max(low, high)))
    flat = [number for pair in reversed(padding) for number in pair]
    return F.pad(image[(slice(None), *inner)], flat)


def receptive_field(network: nn.Module, patches: Sequence[Tensor], head: int) -> ReceptiveField:
    """
    Args:
        network: [1, C, *size] -> logits [1, heads, *size]; in the mode it is in.
        patches: [C, *size] each, all of one size, see :func:`patch_around`.
        head: the logit's index.

    Raises:
        ValueError: no patch.
    """
    if not patches:
        raise ValueError("there is no patch to look at; give at least one.")
    size = patches[0].shape[1:]
    total = torch.zeros(patches[0].shape)
    for patch in patches:
        x = patch[None].detach().clone().requires_grad_(True)
        with torch.enable_grad(), torch.autocast("cuda") if x.is_cuda else nullcontext():
            logit = network(x)[(0, head, *centre(size))]
        # A network that ignores its image has a constant output.
        if logit.requires_grad:
            (gradient,) = torch.autograd.grad(logit, x, allow_unused=True)
            if gradient is not None:
                total += gradient[0].abs().float().cpu()
    by_channel = total.flatten(1).sum(1)
    share = by_channel / by_channel.sum() if by_channel.sum() > 0 else by_channel
    return ReceptiveField((total.sum(0) / len(patches)).numpy(), share.numpy())


def radius_of_share(values: np.ndarray, spacing: Sequence[float], share: float = 0.5) -> float:
    """The radius in mm of the smallest ball about the :func:`centre` that holds a share of the sum of all values; NaN
    where they are all 0.

    Args:
        values: [*spatial], not negative.
        spacing: mm, one for each axis.
        share: in (0, 1].

    Raises:
        ValueError: a share outside.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1.")
    squared = np.zeros(values.shape)
    for axis, (c, step) in enumerate(zip(centre(values.shape), spacing, strict=True)):
        shape = [-1 if a == axis else 1 for a in range(values.ndim)]
        squared = squared + ((np.arange(values.shape[axis]) - c) * step).reshape(shape) ** 2
    radii, inverse = np.unique(np.sqrt(squared).round(9), return_inverse=True)
    mass = np.cumsum(np.bincount(inverse.ravel(), weights=values.ravel().astype(float)))
    if not mass[-1] > 0:
        return float("nan")
    # Less a rounding error, so that a share of 1 is reached.
    return float(radii[np.argmax(mass >= share * mass[-1] * (1 - 1e-12))])
