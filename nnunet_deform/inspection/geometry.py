"""Where a voxel of nnU-Net's preprocessed image lies in the case, and in the world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """Preprocessing transposes axes, crops, and resamples; images are indexed by voxel centres.

    transpose: of the case's array axes by preprocessing; corner: of the crop, and cropped: its size, in transposed
    voxels; resampled: size after resampling; spacing: mm of the case's array axes; origin: mm, of voxel 0, and
    direction: 3 x 3, both in the world's x, y, z, the direction's columns being the steps along the array's axes from
    last to first, as in SimpleITK.
    """

    transpose: tuple[int, int, int]
    corner: tuple[int, int, int]
    cropped: tuple[int, int, int]
    resampled: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    @property
    def resampled_spacing(self) -> tuple[float, ...]:
        """mm, of the preprocessed image's axes."""
        return tuple(
            self.spacing[axis] * cropped / resampled
            for axis, cropped, resampled in zip(self.transpose, self.cropped, self.resampled, strict=True)
        )

    def to_case(self, points: np.ndarray) -> np.ndarray:
        """Voxels of the preprocessed image, [..., 3] -> voxels of the case's array."""
        scale = np.array(self.cropped) / np.array(self.resampled)
        cropped = (np.asarray(points, float) + 0.5) * scale - 0.5 + np.array(self.corner)
        return cropped[..., np.argsort(self.transpose)]

    def from_case(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels of the case's array, [..., 3] -> voxels of the preprocessed image."""
        scale = np.array(self.cropped) / np.array(self.resampled)
        cropped = np.asarray(voxels, float)[..., list(self.transpose)] - np.array(self.corner)
        return (cropped + 0.5) / scale - 0.5

    def to_world(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels of the case's array, [..., 3] -> mm in the world's x, y, z."""
        xyz = np.asarray(voxels, float)[..., ::-1] * np.array(self.spacing[::-1])
        return xyz @ np.array(self.direction).reshape(3, 3).T + np.array(self.origin)
