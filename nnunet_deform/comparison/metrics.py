"""Scores of a prediction: Dice from nnU-Net's own evaluation, surface metrics from MONAI, one implementation for all.

Rule for empty structures. Absent from truth and prediction: no score (NaN), as in nnU-Net, counted in the report.
Absent from one of them: Dice 0, NSD 0, and HD95 the diagonal of the image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

Region = int | tuple[int, ...]


@dataclass(frozen=True)
class Metric:
    """perfect: the best value; unit: of the values; decimals: for tables."""

    name: str
    higher_is_better: bool
    perfect: float
    unit: str
    decimals: int


METRICS = {
    "Dice": Metric("Dice", True, 1.0, "", 4),
    "NSD": Metric("NSD", True, 1.0, "", 4),
    "HD95": Metric("HD95", False, 0.0, "mm", 2),
}


def surface_scores(
    truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """Normalised surface Dice and the 95th percentile of the Hausdorff distance.

    NSD is the share of both surfaces, by area at sub-voxel resolution, that lies within ``tolerance`` of the other
    (arXiv:1809.04430). HD95 is the larger of the two directed 95th percentiles between border voxels' centres.

    Args:
        truth, prediction: masks [Z, Y, X]; an axis of length 1 is left out.
        spacing: mm, in the axes' order.
        tolerance: mm.

    Returns:
        NSD and HD95 (mm), by the module's rule where a mask is empty.
    """
    if not truth.any() and not prediction.any():
        return float("nan"), float("nan")
    if not truth.any() or not prediction.any():
        return 0.0, math.hypot(*(n * step for n, step in zip(truth.shape, spacing, strict=True)))
    # Importing MONAI takes more time than everything else of `compare` together, and most steps score nothing.
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    union = truth | prediction
    window = tuple(
        slice(used[0], used[-1] + 1)
        for used in (
            np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != axis)))
            for axis in range(union.ndim)
        )
    )
    kept = [axis for axis, length in enumerate(truth.shape) if length > 1]
    masks = [
        torch.from_numpy(np.pad(mask[window].reshape([mask[window].shape[a] for a in kept]), 1))[None, None]
        for mask in (prediction, truth)
    ]
    arguments: dict[str, Any] = {"include_background": True, "spacing": [spacing[axis] for axis in kept]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of an argument that it sets itself
        nsd = compute_surface_dice(*masks, class_thresholds=[tolerance], use_subvoxels=True, **arguments)
        hd95 = compute_hausdorff_distance(*masks, percentile=95, **arguments)
    return nsd.item(), hd95.item()


def score_case(
    entry: dict[str, Any], *, reader: BaseReaderWriter, tolerances: dict[Region, float], ignore_label: int | None
) -> list[dict[str, Any]]:
    """One row a class, with the Dice that nnU-Net wrote and our surface metrics.

    Args:
        entry: of ``metric_per_case`` in nnU-Net's summary.json, class keys as labels or tuples of labels.
        reader: nnU-Net's for these files.
        tolerances: of each class, mm.
        ignore_label: voxels that do not count, in either mask.
    """
    truth, properties = reader.read_seg(entry["reference_file"])
    prediction, _ = reader.read_seg(entry["prediction_file"])
    valid = np.ones(truth.shape, dtype=bool) if ignore_label is None else truth != ignore_label
    rows = []
    for region, scores in entry["metrics"].items():
        masks = ((region_or_label_to_mask(array, region) & valid)[0] for array in (truth, prediction))
        nsd, hd95 = surface_scores(*masks, properties["spacing"], tolerances[region])
        rows.append(
            {
                "label": region,
                "Dice": scores["Dice"],
                "NSD": nsd,
                "HD95": hd95,
                "voxels_truth": int(scores["n_ref"]),
                "voxels_prediction": int(scores["n_pred"]),
            }
        )
    return rows


def score_folder(
    summary: Path,
    *,
    reader: BaseReaderWriter,
    file_ending: str,
    tolerances: dict[Region, float],
    ignore_label: int | None = None,
    processes: int = 1,
) -> pd.DataFrame:
    """All metrics of the predictions that a summary.json of nnU-Net is about.

    Returns:
        Columns case, label, Dice, NSD, HD95, voxels_truth, voxels_prediction; one row a case and class.
    """
    entries = load_summary_json(str(summary))["metric_per_case"]
    for entry in entries:
        # The folder may have been moved since, and the predictions lie beside their summary.
        entry["prediction_file"] = str(summary.parent / Path(entry["prediction_file"]).name)
    score = partial(score_case, reader=reader, tolerances=tolerances, ignore_label=ignore_label)
    if processes > 1:
        with get_context("spawn").Pool(processes) as pool:
            scored = pool.map(score, entries)
    else:
        scored = [score(entry) for entry in entries]
    cases = [Path(entry["prediction_file"]).name.removesuffix(file_ending) for entry in entries]
    return pd.DataFrame([{"case": case, **row} for case, rows in zip(cases, scored, strict=True) for row in rows])
