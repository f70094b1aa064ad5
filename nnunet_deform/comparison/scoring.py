"""All metrics of files with predictions and files with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_deform.comparison.metrics import METRICS, Region, Structure


@dataclass(frozen=True)
class CaseFiles:
    """One case's labels and prediction."""

    case: str
    truth: Path
    prediction: Path


def score_columns() -> list[str]:
    """Of a table of scores, without what tells trainings and datasets apart."""
    return ["case", "label", *METRICS, "voxels_truth", "voxels_prediction"]


def score_case(
    files: CaseFiles, *, reader: BaseReaderWriter, tolerances: Mapping[Region, float], ignore_label: int | None
) -> list[dict[str, Any]]:
    """One row a class, with every metric.

    Args:
        reader: nnU-Net's for these files.
        tolerances: of each class, as a label or a region's labels, mm.
        ignore_label: voxels that do not count, in either mask.
    """
    truth, properties = reader.read_seg(str(files.truth))
    prediction, _ = reader.read_seg(str(files.prediction))
    valid = np.ones(truth.shape, dtype=bool) if ignore_label is None else truth != ignore_label
    rows = []
    for region, tolerance in tolerances.items():
        masks = [(region_or_label_to_mask(array, region) & valid)[0] for array in (truth, prediction)]
        structure = Structure(*masks, tuple(properties["spacing"]), tolerance)
        rows.append(
            {
                "case": files.case,
                "label": region,
                **{name: metric.of(structure) for name, metric in METRICS.items()},
                "voxels_truth": np.count_nonzero(structure.truth),
                "voxels_prediction": np.count_nonzero(structure.prediction),
            }
        )
    return rows


def score_files(
    cases: Sequence[CaseFiles],
    *,
    reader: BaseReaderWriter,
    tolerances: Mapping[Region, float],
    ignore_label: int | None = None,
    processes: int = 1,
) -> pd.DataFrame:
    """
    Returns:
        :func:`score_columns`; one row a case and class, labels as in ``tolerances``.
    """
    score = partial(score_case, reader=reader, tolerances=tolerances, ignore_label=ignore_label)
    if processes > 1:
        with get_context("spawn").Pool(processes) as pool:
            scored = pool.map(score, cases)
    else:
        scored = [score(files) for files in cases]
    return pd.DataFrame([row for rows in scored for row in rows], columns=score_columns())


def summarised_files(summary: Path, file_ending: str) -> list[CaseFiles]:
    """What a summary.json of nnU-Net is about. The folder may have been moved since: predictions lie beside it."""
    found = []
    for entry in load_summary_json(str(summary))["metric_per_case"]:
        prediction = summary.parent / Path(entry["prediction_file"]).name
        case = prediction.name.removesuffix(file_ending)
        found.append(CaseFiles(case, Path(entry["reference_file"]), prediction))
    return found
