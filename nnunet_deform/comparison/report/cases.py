"""Every case's scores, small enough to lie in the page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_deform.comparison.analysis import DatasetAnalysis
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.report.words import number_format
from nnunet_deform.comparison.scores import Scores

_WITHOUT_SCRIPT = 20  # worst cases that a page has whose script does not run


@dataclass(frozen=True)
class CaseTable:
    """number: of all cases; rows: cells of the worst ones; data: of all, as JSON that may stand in a script."""

    number: int
    rows: tuple[tuple[str, ...], ...]
    data: str


def case_table(content: ReportContent, dataset: DatasetAnalysis) -> CaseTable:
    """Out of fold, complete arms, mean over an arm's trainings; classes one by one for the primary metric only."""
    table = content.scores_of(dataset)
    scores = Scores(table[table["arm"].isin(dataset.arms)], dataset.arms)
    one_each = scores.table.drop_duplicates("case").set_index("case").loc[list(scores.cases)]
    voxels = scores.table.drop_duplicates(["case", "label"]).groupby("case")["voxels_truth"].sum()
    choices: list[dict[str, Any]] = []
    for name, metric in METRICS.items():
        values = np.nanmean(scores.of_cases(name), axis=1)  # [arms, cases, questions]
        questions = [f"{name}, mean of classes", *(f"{name}, {label}" for label in dataset.labels)]
        if len(dataset.labels) == 1 or name != content.design.primary:
            questions = questions[:1]
        for position, question in enumerate(questions):
            rounded = np.round(values[..., position] * 10**metric.decimals)
            choices.append(
                {
                    "name": question,
                    "decimals": metric.decimals,
                    "higher": metric.higher_is_better,
                    "scores": [[None if np.isnan(v) else int(v) for v in arm] for arm in rounded],
                }
            )
    choices.sort(key=lambda choice: not choice["name"].startswith(f"{content.design.primary},"))
    data = {
        "arms": dataset.arms,
        "cases": scores.cases,
        "patients": scores.patients,
        "folds": one_each["fold"].tolist(),
        "voxels": voxels.loc[list(scores.cases)].tolist(),
        "choices": choices,
    }
    metric = dataset.metrics[content.design.primary]
    mean = metric.scores.mean(axis=0)
    number = number_format(metric.metric)
    rows = [
        (
            *(str(data[key][case]) for key in ("cases", "patients", "folds", "voxels")),
            *(number(value) for value in metric.scores[:, case]),
        )
        for case in np.argsort(mean if metric.metric.higher_is_better else -mean, kind="stable")[:_WITHOUT_SCRIPT]
    ]
    # "<" ends a script early only as part of a tag, and JSON may have it escaped.
    text = json.dumps(data, separators=(",", ":"), default=str).replace("<", "\\u003c")
    return CaseTable(len(scores.cases), tuple(rows), text)
