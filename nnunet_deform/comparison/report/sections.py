"""What the page says of one dataset: figures, and the cells of its tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from nnunet_deform.comparison.analysis import DatasetAnalysis, MetricAnalysis
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.evidence import estimate
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.report.content import DatasetContent, ReportContent
from nnunet_deform.comparison.report.pictures import picture
from nnunet_deform.comparison.report.tables import number_format, with_interval


def dataset_section(content: ReportContent, dataset: DatasetAnalysis, number: int) -> dict[str, Any]:
    """
    Args:
        number: of the dataset, for identifiers.
    """
    mine = content.of(dataset.dataset, dataset.configuration)
    section: dict[str, Any] = {
        "analysis": dataset,
        "title": dataset.title,
        "metrics": [],
        "costs": [(arm, _cost_cells(mine.costs[arm])) for arm in content.arms if arm in mine.costs],
        "test": _test_rows(content.test_of(dataset), content.alpha),
        "operators": _operators_section(content, mine, number),
    }
    if any(mine.curves.values()):
        section["curves"] = figures.learning_curves(content.arms, mine.curves, f"curves{number}")
    if not dataset.arms:
        return section
    declared = {
        (h.first, h.second): h.contrast
        for h in content.analysis.hypotheses
        if (h.dataset, h.configuration) == (dataset.dataset, dataset.configuration)
    }
    primary = dataset.metrics[content.primary]
    section["primary"] = primary
    for name, metric in dataset.metrics.items():
        prefix = f"{name}{number}"
        is_primary = name == content.primary
        section["metrics"].append(
            {
                "metric": metric,
                "number": number_format(metric.metric),
                "signed": number_format(metric.metric, "+"),
                "with_interval": [with_interval(metric, position) for position in range(len(dataset.arms))],
                "distributions": figures.distributions(dataset, metric, f"distributions-{prefix}"),
                "differences": figures.paired_differences(
                    dataset,
                    metric,
                    {pair: declared.get(pair) if is_primary else None for pair in content.hypotheses},
                    content.bands.get(name),
                    f"differences-{prefix}",
                ),
            }
        )
    if primary.ranking is not None:
        section["ranking"] = figures.ranking_stability(dataset.arms, primary.ranking, f"ranking-{number}")
    if set(mine.costs) & set(dataset.arms):
        section["pareto"] = figures.pareto(dataset, primary, mine.costs, f"pareto-{number}")
    section["overlays"] = _overlays(dataset, primary, mine)
    return section


def _operators_section(content: ReportContent, mine: DatasetContent, number: int) -> dict[str, Any] | None:
    """What the operators of a dataset's arms did, and which contrasts are empty; None where no arm wrote of any."""
    if mine.operators is None or not mine.operators.panels:
        return None
    return {
        "figure": figures.operator_values(content.arms, mine.operators.panels, f"operators{number}"),
        "rows": mine.operators.rows,
        "cautions": [
            (*(arm for arm in content.arms if arm in pair), words) for pair, words in mine.operators.cautions.items()
        ],
    }


def _cost_cells(cost: Cost) -> list[str]:
    return [
        f"{cost.parameters / 1e6:.3f}",
        f"{cost.macs / 1e9:.2f}",
        f"{cost.peak_bytes / 1e9:.2f}",
        f"{cost.seconds_per_iteration:.3g}",
        f"{cost.seconds_per_case:.3g}",
    ]


def _test_rows(table: pd.DataFrame, alpha: float) -> list[tuple[str, int, int, list[str]]]:
    """Arm, numbers of cases and of patients, and each metric's mean with its interval."""
    rows = []
    for arm in dict.fromkeys(table["arm"]):
        mine = table[table["arm"] == arm].fillna({name: metric.perfect for name, metric in METRICS.items()})
        of_cases = mine.groupby(["case", "patient"])[list(METRICS)].mean()
        patients = list(of_cases.index.get_level_values("patient"))
        of_patients = of_cases.groupby("patient").mean().to_numpy(dtype=float)
        result = estimate([of_patients.T[:, :, None]])
        low, high = result.interval(alpha)
        cells = []
        for position, metric in enumerate(METRICS.values()):
            number = number_format(metric)
            cells.append(f"{number(float(result.mean[position]))} [{number(low[position])}, {number(high[position])}]")
        rows.append((arm, len(of_cases), len(set(patients)), cells))
    return rows


def _overlays(dataset: DatasetAnalysis, primary: MetricAnalysis, mine: DatasetContent) -> list[dict[str, Any]]:
    """The worst and the median case by the arms' mean score, one slice of each arm's prediction."""
    scored = np.flatnonzero(~np.isnan(primary.scores).all(axis=0))
    if mine.volumes is None or not scored.size:
        return []
    mean = np.nanmean(primary.scores[:, scored], axis=0)
    order = scored[np.argsort(mean if primary.metric.higher_is_better else -mean)]
    rows = []
    for title, position in (("worst", order[0]), ("median", order[len(order) // 2])):
        case = dataset.cases[position]
        pictures = []
        for index, arm in enumerate(dataset.arms):
            volumes = mine.volumes(arm, case)
            pictures.append(
                {
                    "arm": arm,
                    "score": number_format(primary.metric)(primary.scores[index, position]),
                    "url": None if volumes is None else picture(volumes, mine),
                }
            )
        rows.append({"title": title, "case": case, "pictures": pictures})
    return rows
