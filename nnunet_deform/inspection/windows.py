"""nnU-Net's sliding window, for maps of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_deform.inspection.model import Case, Model

Slicer = tuple[Any, ...]


@dataclass(frozen=True)
class Windows:
    """image: padded to at least one patch, [C, *spatial]; inner: where the case's data is in it; slicers: of each
    patch, over channels and axes, an integer on the axis of slices in 2D; ndim: axes of a patch."""

    image: Tensor
    inner: Slicer
    slicers: list[Slicer]
    ndim: int

    def patch(self, slicer: Slicer) -> Tensor:
        """[1, C, *patch size]."""
        return self.image[slicer][None]

    def corners(self) -> np.ndarray:
        """Of each patch, [patches, 3], in voxels of the case's preprocessed data."""
        padding = [s.start or 0 for s in self.inner[1:]]
        starts = [[s.start if isinstance(s, slice) else s for s in slicer[1:]] for slicer in self.slicers]
        return np.array(starts) - np.array(padding)


def windows(model: Model, case: Case) -> Windows:
    """As nnU-Net's predictor makes them."""
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    image, inner = pad_nd_image(case.data, model.patch_size, "constant", {"value": 0}, True, None)
    slicers = model.predictor._internal_get_sliding_window_slicers(image.shape[1:])
    return Windows(image, inner, slicers, len(model.patch_size))


class Stitched:
    """The mean of patches' maps, weighted towards their centres as nnU-Net's logits are.

    Args:
        channels: of the maps.
    """

    def __init__(self, found: Windows, patch_size: Sequence[int], channels: int) -> None:
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian

        self._inner = found.inner
        self._sum = torch.zeros(channels, *found.image.shape[1:])
        self._weights = torch.zeros(found.image.shape[1:])
        self._gaussian = compute_gaussian(
            tuple(patch_size),
            sigma_scale=1.0 / 8,
            value_scaling_factor=10,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def add(self, slicer: Slicer, maps: Tensor) -> None:
        """maps: [channels, *patch size]."""
        self._sum[slicer] += maps.float().cpu() * self._gaussian
        self._weights[slicer[1:]] += self._gaussian

    def result(self) -> Tensor:
        """[channels, *spatial] of the case's preprocessed data."""
        return (self._sum / self._weights)[(slice(None), *self._inner[1:])]


def to_case_grid(model: Model, case: Case, maps: Tensor) -> np.ndarray:
    """Maps on the preprocessed grid, [N, *spatial], in the case's own voxels, [N, Z, Y, X]: resampled as nnU-Net does
    with probabilities, zeros beyond its crop."""
    p, geometry = model.predictor, case.geometry
    resampled = p.configuration_manager.resampling_fn_probabilities(
        maps.numpy(), geometry.cropped, geometry.resampled_spacing, [geometry.spacing[a] for a in geometry.transpose]
    )
    out = np.zeros((len(maps), *case.properties["shape_before_cropping"]), np.float32)
    box = tuple(slice(c, c + n) for c, n in zip(geometry.corner, geometry.cropped, strict=True))
    out[(slice(None), *box)] = np.asarray(resampled)
    return out.transpose(0, *(axis + 1 for axis in np.argsort(geometry.transpose)))
