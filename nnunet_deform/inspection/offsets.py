"""Where deformable convolutions sample: positions, lengths in mm, and how they are distributed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunet_deform.networks.observation import Offsets

# Of histograms, in voxels of the level; what is beyond the ends is counted in the last bins.
EDGES = np.linspace(-3, 3, 61)


def lengths(observation: Offsets, spacing: Sequence[float]) -> Tensor:
    """Mean |offset| over taps in mm, [B, *spatial].

    Args:
        spacing: mm of the level's input, one for each axis.
    """
    steps = torch.tensor(spacing, dtype=torch.float32, device=observation.values.device)
    scaled = observation.values.float() * steps.view(1, 1, -1, *[1] * len(spacing))
    return torch.linalg.vector_norm(scaled, dim=2).mean(1)


def sampling_positions(
    observation: Offsets, sample: int, voxel: Sequence[int], strides: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the layer reads for one voxel of the patch, without and with offsets, [taps, ndim] each, in voxels of the
    patch.

    Args:
        sample: of the batch.
        voxel: of the patch; the layer's voxel that contains it is taken.
        strides: of the layer's input to the patch, one for each axis.
    """
    own = observation.stride or (1,) * len(strides)
    sizes = observation.values.shape[3:]
    index = [min(v // (s * o), n - 1) for v, s, o, n in zip(voxel, strides, own, sizes, strict=True)]
    taps = np.stack(np.meshgrid(*(np.arange(k) - k // 2 for k in observation.kernel_size), indexing="ij"), -1)
    regular = np.array(index) * np.array(own) + taps.reshape(-1, len(strides))
    moved = regular + observation.values[(sample, slice(None), slice(None), *index)].float().cpu().numpy()
    # Voxel i of a level covers voxels i * stride to (i + 1) * stride - 1 of the patch.
    step = np.array(strides)
    return (regular + 0.5) * step - 0.5, (moved + 0.5) * step - 0.5


def histograms(observation: Offsets) -> np.ndarray:
    """Counts of offsets by axis, [ndim, len(EDGES) - 1], over samples, taps and voxels."""
    values = observation.values.float().movedim(2, 0).flatten(1).cpu().numpy()
    clipped = np.clip(values, EDGES[0], EDGES[-1])
    return np.stack([np.histogram(axis, EDGES)[0] for axis in clipped])
