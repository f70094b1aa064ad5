"""Puts the report together."""

from __future__ import annotations

from pathlib import Path

from nnunet_deform.comparison.experiment import find_folders, load_experiment
from nnunet_deform.comparison.files import write_text
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.report.experiment import experiment_content
from nnunet_deform.comparison.report.page import render
from nnunet_deform.comparison.report.tables import write_tables


def build_report(file: Path) -> Path:
    """Collect what the experiment has so far, and write ``report/`` into its output folder.

    Args:
        file: the experiment.

    Returns:
        The HTML page.

    Raises:
        ExperimentError, PreparationError, SplitError, TrainingError, CollectionError: see there.
    """
    experiment = load_experiment(file)
    folders = find_folders(experiment, file)
    return write_report(folders.output / "report", experiment_content(experiment, folders, file))


def write_report(folder: Path, content: ReportContent) -> Path:
    """The tables and the page, in ``folder``.

    Returns:
        The HTML page.
    """
    page = render(content)
    write_tables(folder, content)
    write_text(folder / "report.html", page)
    return folder / "report.html"
