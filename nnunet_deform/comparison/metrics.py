"""The registry of metrics: all that scoring, statistics and report need to know of one is its entry here.

Rule for empty structures. Absent from truth and prediction: no score (NaN), as in nnU-Net, counted in the report.
Absent from one of them: the metric's worst value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Region = int | tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """A class or region of one case.

    truth, prediction: masks [Z, Y, X], of which an axis of length 1 is left out; spacing: mm, in the axes' order;
    tolerance: mm, of NSD.
    """

    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, ...]
    tolerance: float

    @property
    def axes(self) -> list[int]:
        """Those along which the image has more than one voxel."""
        return [axis for axis, length in enumerate(self.truth.shape) if length > 1]

    @property
    def diagonal(self) -> float:
        """Of the image, mm."""
        return math.hypot(*(self.truth.shape[axis] * self.spacing[axis] for axis in self.axes))

    @cached_property
    def for_monai(self) -> dict[str, Any]:
        """MONAI's arguments y_pred, y (masks [1, 1, ...] with a border of one voxel around what either holds) and
        spacing."""
        union = self.truth | self.prediction
        window = []
        for axis in self.axes:
            used = np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != axis)))
            window.append(slice(used[0], used[-1] + 1))
        import torch

        def tensor(mask: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.pad(mask.squeeze()[tuple(window)], 1))[None, None]

        return {
            "y_pred": tensor(self.prediction),
            "y": tensor(self.truth),
            "include_background": True,
            "spacing": [float(self.spacing[axis]) for axis in self.axes],
        }


@dataclass(frozen=True)
class Metric:
    """
    name: heads its columns; compute: from a structure that truth and prediction have; worst: of one that only one of
    them has; perfect: the best value; unit: of the values; decimals: for tables; band: differences within +-band count
    as equal unless an experiment says otherwise; about: what it is, for the report's readers.
    """

    name: str
    compute: Callable[[Structure], float]
    worst: Callable[[Structure], float]
    higher_is_better: bool
    perfect: float
    unit: str
    decimals: int
    band: float
    about: str

    def of(self, structure: Structure) -> float:
        """By the module's rule where a mask is empty."""
        in_truth, in_prediction = structure.truth.any(), structure.prediction.any()
        if in_truth and in_prediction:
            return float(self.compute(structure))
        return float(self.worst(structure)) if in_truth or in_prediction else float("nan")


def _dice(structure: Structure) -> float:
    both = np.count_nonzero(structure.truth & structure.prediction)
    return 2 * both / (np.count_nonzero(structure.truth) + np.count_nonzero(structure.prediction))


# Importing MONAI takes more time than everything else of `compare` together, and most steps score nothing.
def _nsd(structure: Structure) -> float:
    from monai.metrics import compute_surface_dice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of an argument that it sets itself
        tolerances = [structure.tolerance]
        return compute_surface_dice(**structure.for_monai, class_thresholds=tolerances, use_subvoxels=True).item()


def _hd95(structure: Structure) -> float:
    from monai.metrics import compute_hausdorff_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return compute_hausdorff_distance(**structure.for_monai, percentile=95).item()


def _zero(_: Structure) -> float:
    return 0.0


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="Dice",
            compute=_dice,
            worst=_zero,
            higher_is_better=True,
            perfect=1.0,
            unit="",
            decimals=4,
            band=0.005,  # half a point, what is usually called no difference
            about="Dice: overlap as nnU-Net's own evaluation computes it, at worst 0.",
        ),
        Metric(
            name="NSD",
            compute=_nsd,
            worst=_zero,
            higher_is_better=True,
            perfect=1.0,
            unit="",
            decimals=4,
            band=0.005,
            about=(
                "NSD: normalised surface Dice (arXiv:1809.04430), the share of both surfaces, by area at sub-voxel "
                "resolution, that lies within the tolerance of the other, at worst 0; MONAI's."
            ),
        ),
        Metric(
            name="HD95",
            compute=_hd95,
            worst=lambda structure: structure.diagonal,
            higher_is_better=False,
            perfect=0.0,
            unit="mm",
            decimals=2,
            band=0.1,  # a tenth of a usual voxel's side, finer than any border is drawn
            about=(
                "HD95: 95th percentile of the Hausdorff distance, the larger of the two directed ones, between the "
                "centres of border voxels, at worst the image's diagonal; MONAI's."
            ),
        ),
    )
}
