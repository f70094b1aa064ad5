"""The report's tables: for programs as CSV and Parquet, for papers as LaTeX, and what their cells say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_deform.comparison.analysis import Analysis, DatasetAnalysis, Hypothesis
from nnunet_deform.comparison.files import write_text
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.parts import SizePart
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.report.sections import DatasetParts
from nnunet_deform.comparison.report.words import number_format, p_value, sentence, with_interval
from nnunet_deform.comparison.verdicts import Contrast


def write_tables(folder: Path, content: ReportContent, parts: Sequence[DatasetParts]) -> None:
    """Write cases.parquet and .csv, arms.csv and .tex, contrasts.csv, parts.csv, hypotheses.csv and .tex where any are
    declared, and operators.csv where operators wrote of themselves.

    Args:
        parts: of each dataset of the analysis.
    """
    folder.mkdir(parents=True, exist_ok=True)
    analysis = content.analysis
    everything = pd.concat([content.cases.assign(set="out of fold"), content.test.assign(set="test")])
    everything.to_parquet(folder / "cases.parquet", index=False)
    everything.to_csv(folder / "cases.csv", index=False)
    arms = pd.DataFrame([row for dataset in analysis.datasets for row in _arm_rows(dataset)])
    arms.to_csv(folder / "arms.csv", index=False)
    contrasts = pd.DataFrame([row for dataset in analysis.datasets for row in _contrast_rows(dataset)])
    contrasts.to_csv(folder / "contrasts.csv", index=False)
    rows = [row for d, of_dataset in zip(analysis.datasets, parts, strict=True) for row in _part_rows(d, of_dataset)]
    pd.DataFrame(rows).to_csv(folder / "parts.csv", index=False)
    _write_latex(folder / "arms.tex", _latex_arms(analysis))
    if analysis.hypotheses:
        hypotheses = pd.DataFrame(
            [_hypothesis_row(h, content.design.bands[content.design.primary]) for h in analysis.hypotheses]
        )
        hypotheses.to_csv(folder / "hypotheses.csv", index=False)
        cells = pd.DataFrame([hypothesis_cells(hypothesis) for hypothesis in analysis.hypotheses])
        names = hypotheses[["dataset", "configuration", "first", "second"]]
        _write_latex(folder / "hypotheses.tex", pd.concat([names, cells], axis=1))
    if content.operators is not None:
        content.operators.to_csv(folder / "operators.csv", index=False)


def _write_latex(file: Path, table: pd.DataFrame) -> None:
    write_text(file, table.to_latex(index=False, escape=True))


def _arm_rows(dataset: DatasetAnalysis) -> list[dict[str, Any]]:
    rows = []
    for name, metric in dataset.metrics.items():
        for position, arm in enumerate(dataset.arms):
            classes = dict(
                zip((f"mean of {label}" for label in dataset.labels), metric.by_class[position], strict=True)
            )
            rows.append(
                {
                    "dataset": dataset.dataset,
                    "configuration": dataset.configuration,
                    "arm": arm,
                    "metric": name,
                    "mean": metric.means[position],
                    "low": metric.intervals[0, position],
                    "high": metric.intervals[1, position],
                    "trainings": dataset.trainings[arm],
                    "structures absent": dataset.absent,
                    "absent, predicted": dataset.drawn[arm],
                    **classes,
                }
            )
    return rows


def _contrast_rows(dataset: DatasetAnalysis) -> list[dict[str, Any]]:
    rows = []
    for metric in dataset.metrics.values():
        for label, contrasts in [("all", metric.contrasts), *metric.by_class_contrasts.items()]:
            for position, c in enumerate(contrasts):
                row = {
                    "dataset": dataset.dataset,
                    "configuration": dataset.configuration,
                    "class": label,
                    "metric": c.metric,
                    "first": c.first,
                    "second": c.second,
                    **_figures_of(c),
                }
                rows.append({**row, "p Holm over pairs": metric.p_holm[position]} if label == "all" else row)
    return rows


def _part_rows(dataset: DatasetAnalysis, parts: DatasetParts) -> Iterator[dict[str, Any]]:
    """Each pair in each fold, on structures of each size and on the test set."""
    kinds = (("fold", parts.folds), ("size", parts.sizes), ("test set", parts.test.values()))
    for kind, of_kind in kinds:
        for part in of_kind:
            sized = isinstance(part, SizePart)
            for c in part.contrasts:
                yield {
                    "dataset": dataset.dataset,
                    "configuration": dataset.configuration,
                    "of": kind,
                    "part": part.name,
                    "class": (part.label or "all") if sized else "all",
                    "structures": part.structures if sized else None,
                    "smallest (voxels)": part.voxels[0] if sized else None,
                    "largest (voxels)": part.voxels[1] if sized else None,
                    "metric": c.metric,
                    "first": c.first,
                    "second": c.second,
                    **_figures_of(c),
                }


def _figures_of(c: Contrast) -> dict[str, float | bool]:
    return {
        "cases": c.cases,
        "patients": c.patients,
        "folds": c.folds,
        "paired starts": c.paired_starts,
        "mean difference": c.mean,
        "median difference": c.median,
        "standard error": c.se,
        "degrees of freedom": c.freedom,
        "of trainings": min(c.training_freedoms),
        "share of trainings in variance": c.trainings_share,
        "low": c.interval[0],
        "high": c.interval[1],
        "p": c.p,
        "smallest detectable": c.detectable,
        "rank-biserial": c.rank_biserial,
        "p signed-rank": c.p_ranks,
    }


def _hypothesis_row(hypothesis: Hypothesis, band: float) -> dict[str, Any]:
    verdict, c = hypothesis.verdict, hypothesis.contrast
    row = {
        "dataset": hypothesis.dataset,
        "configuration": hypothesis.configuration,
        "first": hypothesis.first,
        "second": hypothesis.second,
        "verdict": verdict.kind.value,
        "winner": verdict.winner or "",
        "reason": "" if verdict.reason is None else verdict.reason.value,
        "sentence": sentence(hypothesis, band),
    }
    if c is not None:
        low, high = c.equivalence
        row |= {
            **_figures_of(c),
            "family": c.family,
            "p for family": c.p_adjusted,
            "p of equivalence for family": c.p_equivalence,
            "equivalence low": low,
            "equivalence high": high,
        }
    return row


def hypothesis_cells(hypothesis: Hypothesis) -> dict[str, str]:
    """For readers; where the arms have no fold in common there are dashes."""
    c = hypothesis.contrast
    names = ("difference", "interval", "p", "trainings' share", "rank-biserial", "smallest detectable")
    if c is None:
        values = ("-",) * len(names)
    else:
        metric = METRICS[c.metric]
        signed = number_format(metric, "+")
        interval = f"{signed(c.interval[0])} to {signed(c.interval[1])}"
        share = f"{100 * c.trainings_share:.0f} %" if c.trainings_known else "not known"
        found = number_format(metric)(c.detectable)
        values = (signed(c.mean), interval, p_value(c.p_adjusted), share, f"{c.rank_biserial:+.2f}", found)
    return {**dict(zip(names, values, strict=True)), "verdict": hypothesis.verdict.kind.value}


def _latex_arms(analysis: Analysis) -> pd.DataFrame:
    rows = []
    for dataset in analysis.datasets:
        for position, arm in enumerate(dataset.arms):
            row = {"dataset": dataset.dataset, "configuration": dataset.configuration, "arm": arm}
            for name, metric in dataset.metrics.items():
                row[name] = with_interval(metric.metric, metric.means[position], metric.intervals[:, position])
            rows.append(row)
    return pd.DataFrame(rows, columns=["dataset", "configuration", "arm", *METRICS])
