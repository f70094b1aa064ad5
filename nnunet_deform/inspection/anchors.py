"""Anchors in the scan, and how far they move from patch to patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def positions(anchors: np.ndarray, corners: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """[patches, K, ndim], coordinates in (0, 1) relative to the patch -> voxels of the image that the patches are of.

    A coordinate of (i + 0.5) / size is the centre of voxel i.

    Args:
        corners: [patches, ndim], of each patch in the image; size: of the patches.
    """
    return anchors * np.array(size) - 0.5 + corners[:, None]


@dataclass(frozen=True)
class Movement:
    """How far anchors are, in mm, from their mean place in the patch: over patches of a case (within), and the cases'
    means (between; NaN with one case). Root mean square over anchors. mean: [K, ndim], in sides of the patch."""

    within: float
    between: float
    mean: np.ndarray


def movement(cases: Sequence[np.ndarray], size: Sequence[int], spacing: Sequence[float]) -> Movement:
    """
    Args:
        cases: [patches, K, ndim] each, relative to the patch.
        size: of the patches in voxels; spacing: mm.
    """
    side = np.array(size) * np.array(spacing)
    means = [anchors.mean(0) for anchors in cases]
    about = np.concatenate([anchors - mean for anchors, mean in zip(cases, means, strict=True)]) * side
    of_means = (np.stack(means) - np.mean(means, 0)) * side

    def rms(moved: np.ndarray) -> float:
        return float(np.sqrt((moved**2).sum(-1).mean()))

    return Movement(rms(about), rms(of_means) if len(cases) > 1 else float("nan"), np.mean(means, 0))
