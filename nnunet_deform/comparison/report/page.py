"""The report's page."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from nnunet_deform import __version__
from nnunet_deform.comparison.analysis import Hypothesis
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.report.cautions import cautions
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.report.sections import dataset_section
from nnunet_deform.comparison.report.tables import hypothesis_cells
from nnunet_deform.comparison.report.words import p_value, sentence, summary
from nnunet_deform.comparison.trainings import now


def render(content: ReportContent) -> str:
    """One self-contained HTML page."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(
        files("nnunet_deform.comparison.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    band = content.bands[content.primary]
    return template.render(
        content=content,
        date=now(),
        version=__version__,
        summary=summary(content.analysis),
        cautions=cautions(content),
        hypotheses=[(h, hypothesis_cells(h), sentence(h, band)) for h in content.analysis.hypotheses],
        operator_cautions=[_operator_caution(content, h) for h in content.analysis.hypotheses],
        metrics=list(METRICS.values()),
        p_value=p_value,
        datasets=[dataset_section(content, dataset, n) for n, dataset in enumerate(content.analysis.datasets)],
        packages=", ".join(f"{name} {version(name)}" for name in ("monai", "scipy", "numpy", "pandas")),
    )


def _operator_caution(content: ReportContent, hypothesis: Hypothesis) -> str | None:
    operators = content.of(hypothesis.dataset, hypothesis.configuration).operators
    return operators and operators.cautions.get(frozenset((hypothesis.first, hypothesis.second)))
