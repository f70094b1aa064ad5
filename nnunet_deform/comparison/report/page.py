"""The report's page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np

from nnunet_deform import __version__
from nnunet_deform.comparison.analysis import Hypothesis
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.ranking import rank_across
from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.report.cautions import cautions
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.report.sections import DatasetParts, dataset_section
from nnunet_deform.comparison.report.tables import hypothesis_cells
from nnunet_deform.comparison.report.words import p_value, scope, sentence, summary
from nnunet_deform.comparison.trainings import now
from nnunet_deform.pages import style, template

_PACKAGE = "nnunet_deform.comparison.report"


def render(content: ReportContent, parts: Sequence[DatasetParts]) -> str:
    """One self-contained HTML page.

    Args:
        parts: of each dataset of the analysis.
    """
    band, analysis = content.design.bands[content.design.primary], content.analysis
    return template(_PACKAGE, "template.html").render(
        content=content,
        date=now(),
        version=__version__,
        style=style(),
        script=files(_PACKAGE).joinpath("page.js").read_text(encoding="utf-8"),
        scope=scope(analysis),
        summary=summary(analysis),
        verdicts=figures.verdicts(analysis.hypotheses, band, "verdicts") if analysis.hypotheses else None,
        cautions=cautions(content),
        hypotheses=[(h, hypothesis_cells(h), sentence(h, band)) for h in analysis.hypotheses],
        operator_cautions=[_operator_caution(content, h) for h in analysis.hypotheses],
        metrics=list(METRICS.values()),
        primary=METRICS[content.design.primary],
        p_value=p_value,
        across=_ranks_across(content),
        datasets=[
            dataset_section(content, dataset, of_dataset, number)
            for number, (dataset, of_dataset) in enumerate(zip(analysis.datasets, parts, strict=True))
        ],
        packages=", ".join(f"{name} {version(name)}" for name in ("monai", "scipy", "numpy", "pandas")),
    )


def _operator_caution(content: ReportContent, hypothesis: Hypothesis) -> str | None:
    operators = content.of(hypothesis.dataset, hypothesis.configuration).operators
    return operators and operators.cautions.get(frozenset((hypothesis.first, hypothesis.second)))


def _ranks_across(content: ReportContent) -> dict[str, Any] | None:
    """Of the arms that are complete on every dataset; None with one dataset or one arm."""
    datasets = content.analysis.datasets
    arms = [arm for arm in content.design.arms if all(arm in dataset.arms for dataset in datasets)]
    if len(datasets) < 2 or len(arms) < 2:
        return None
    means = [[d.metrics[content.design.primary].means[d.arms.index(arm)] for arm in arms] for d in datasets]
    sign = 1 if datasets[0].metrics[content.design.primary].metric.higher_is_better else -1
    ranks = rank_across(sign * np.array(means))
    order = np.argsort(ranks.means, kind="stable")
    return {
        "titles": [dataset.title for dataset in datasets],
        "rows": [(arms[a], ranks.means[a], ranks.ranks[:, a]) for a in order],
        "p": ranks.p,
    }
