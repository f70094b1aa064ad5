"""What the page says of one dataset: figures, and the cells of its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from nnunet_deform.comparison.analysis import DatasetAnalysis
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.parts import Pairs, Part, SizePart, by_fold, by_size, whole
from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.report.cases import case_table
from nnunet_deform.comparison.report.content import DatasetContent, ReportContent
from nnunet_deform.comparison.report.pictures import arm_row, case_rows, legend, pair_rows
from nnunet_deform.comparison.report.words import number_format, with_interval


@dataclass(frozen=True)
class DatasetParts:
    """pairs: the declared ones of complete arms, or the first arm with each other; folds, sizes: on the primary metric;
    test: on each metric, empty without test scores."""

    pairs: Pairs
    folds: tuple[Part, ...]
    sizes: tuple[SizePart, ...]
    test: dict[str, Part]


def dataset_parts(content: ReportContent, dataset: DatasetAnalysis) -> DatasetParts:
    pairs: dict[tuple[str, str], bool] = {}
    if dataset.arms:
        declared = [pair for pair in content.design.hypotheses if set(pair) <= set(dataset.arms)]
        primary = dataset.metrics[content.design.primary]
        for pair in declared or [(dataset.arms[0], other) for other in dataset.arms[1:]]:
            pairs[pair] = primary.contrast(*pair).paired_starts
    table = content.scores_of(dataset)
    mine = table[table["arm"].isin(dataset.arms)]
    test = _as_one_fold(content.test_of(dataset))
    tested = list(dict.fromkeys(test["arm"]))
    arguments = (dataset.arms, pairs, content.design.primary, content.design.alpha)
    return DatasetParts(
        pairs=pairs,
        folds=tuple(by_fold(mine, *arguments)),
        sizes=tuple(by_size(mine, *arguments)) if len(mine) else (),
        test={name: whole(test, tested, pairs, name, content.design.alpha) for name in METRICS} if tested else {},
    )


def _as_one_fold(test: pd.DataFrame) -> pd.DataFrame:
    """Every training has predicted the same cases, whichever fold it was trained on: each is a seed of one fold."""
    return test.assign(seed=test.groupby(["seed", "fold"]).ngroup(), fold=-1)


def dataset_section(
    content: ReportContent, dataset: DatasetAnalysis, parts: DatasetParts, number: int
) -> dict[str, Any]:
    """
    Args:
        number: of the dataset, for identifiers.
    """
    mine = content.of(dataset.dataset, dataset.configuration)
    section: dict[str, Any] = {
        "id": f"d{number}",
        "analysis": dataset,
        "title": dataset.title,
        "tolerance": _tolerance(mine),
        "metrics": [],
        "costs": [(arm, _cost_cells(mine.costs[arm])) for arm in content.design.arms if arm in mine.costs],
        "test": _test_rows(parts),
        "test_alone": (content.test_of(dataset)["fold"] >= 0).any(),
        "test_pairs": _pair_rows(parts.test.values()),
        "operators": _operators_section(content, mine, number),
        "curves": None,
        "pareto": None,
        "rows": [],
    }
    if any(mine.curves.values()):
        section["curves"] = figures.learning_curves(content.design.arms, mine.curves, f"curves{number}")
    if not dataset.arms:
        return section
    declared = {
        (h.first, h.second): h.contrast
        for h in content.analysis.hypotheses
        if (h.dataset, h.configuration) == (dataset.dataset, dataset.configuration)
    }
    primary = dataset.metrics[content.design.primary]
    section["primary"] = primary
    section["ranking"] = None
    # The primary metric's figures stand above, the others' in their own part.
    for name, metric in sorted(dataset.metrics.items(), key=lambda item: item[0] != content.design.primary):
        prefix = f"{name}{number}"
        is_primary = name == content.design.primary
        section["metrics"].append(
            {
                "metric": metric,
                "band": content.design.bands.get(name),
                "number": number_format(metric.metric),
                "signed": number_format(metric.metric, "+"),
                "with_interval": [
                    with_interval(metric.metric, metric.means[p], metric.intervals[:, p])
                    for p in range(len(dataset.arms))
                ],
                "by_class": [
                    [
                        with_interval(metric.metric, metric.by_class[p, c], metric.by_class_intervals[:, p, c])
                        for c in range(len(dataset.labels))
                    ]
                    for p in range(len(dataset.arms))
                ],
                "distributions": figures.distributions(dataset, metric, f"distributions-{prefix}"),
                "classes": figures.classes(dataset, metric, f"classes-{prefix}"),
                "differences": figures.paired_differences(
                    dataset,
                    metric,
                    {pair: declared.get(pair) if is_primary else None for pair in content.design.hypotheses},
                    content.design.bands.get(name),
                    f"differences-{prefix}",
                )
                if metric.contrasts
                else None,
            }
        )
    if primary.ranking is not None:
        section["ranking"] = figures.ranking_stability(dataset.arms, primary.ranking, f"ranking-{number}")
    if set(mine.costs) & set(dataset.arms):
        section["pareto"] = figures.pareto(dataset, primary, mine.costs, f"pareto-{number}")
    learned = set(dataset.arms) - set(dataset.failed)
    comparable = [pair for pair in parts.pairs if set(pair) <= learned]
    sizes = [part for part in parts.sizes if part.label is None]
    for key, chosen in (("sizes", sizes), ("folds", parts.folds)):
        section[key] = _parts_section(content, dataset, chosen, comparable, f"{key}-{number}")
    section["size_bounds"] = [(part.name, part.structures) for part in sizes]
    section["cases"] = case_table(content, dataset)
    if mine.volumes is not None:
        section["rows"] = case_rows(dataset, primary, mine)
        section["further_rows"] = [
            arm_row(dataset, primary, mine),
            *pair_rows(dataset, primary, mine, comparable),
        ]
        section["legend"] = legend(mine)
    return section


def _parts_section(
    content: ReportContent,
    dataset: DatasetAnalysis,
    parts: Sequence[Part],
    comparable: Sequence[tuple[str, str]],
    name: str,
) -> dict[str, Any]:
    """A figure of the pairs of arms that learned, and cells of arms and of all pairs, a column a part."""
    metric = METRICS[content.design.primary]
    drawn = [replace(p, contrasts=tuple(c for c in p.contrasts if (c.first, c.second) in comparable)) for p in parts]
    has_figure = any(part.contrasts for part in drawn)
    of_arms = [{mean.arm: with_interval(metric, mean.value, mean.interval) for mean in part.means} for part in parts]
    return {
        "names": [part.name for part in parts],
        "figure": figures.parts(drawn, metric, content.design.bands.get(content.design.primary), name)
        if has_figure
        else None,
        "arms": [(arm, [cells.get(arm, "-") for cells in of_arms]) for arm in dataset.arms],
        "pairs": _pair_rows(parts),
    }


def _pair_rows(parts: Iterable[Part]) -> list[tuple[str, list[str]]]:
    """Each pair, and its difference in each part."""
    cells = [
        {f"{c.first} - {c.second}": with_interval(METRICS[c.metric], c.mean, c.interval, "+") for c in part.contrasts}
        for part in parts
    ]
    pairs = list(dict.fromkeys(pair for part in cells for pair in part))
    return [(pair, [part.get(pair, "-") for part in cells]) for pair in pairs]


def _test_rows(parts: DatasetParts) -> list[tuple[str, int, int, list[str]]]:
    """Arm, numbers of cases and of patients, and each metric's mean with its interval."""
    by_arm = zip(*(part.means for part in parts.test.values()), strict=True)
    return [
        (
            means[0].arm,
            means[0].cases,
            means[0].patients,
            [with_interval(METRICS[name], m.value, m.interval) for name, m in zip(parts.test, means, strict=True)],
        )
        for means in by_arm
    ]


def _tolerance(content: DatasetContent) -> str:
    """In words; empty where it is not known."""
    values = set(content.tolerances.values())
    if len(values) <= 1:
        return "".join(f"{value:g} mm" for value in values)
    return ", ".join(f"{value:g} mm ({label})" for label, value in content.tolerances.items())


def _operators_section(content: ReportContent, mine: DatasetContent, number: int) -> dict[str, Any] | None:
    """What the operators of a dataset's arms did, and which contrasts are empty; None where no arm wrote of any."""
    if mine.operators is None or not mine.operators.panels:
        return None
    return {
        "figure": figures.operator_values(content.design.arms, mine.operators.panels, f"operators{number}"),
        "rows": mine.operators.rows,
        "cautions": [
            (*(arm for arm in content.design.arms if arm in pair), words)
            for pair, words in mine.operators.cautions.items()
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
