"""Puts the report together."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd

from nnunet_deform.comparison.archive import read_archive
from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
from nnunet_deform.comparison.files import write_text
from nnunet_deform.comparison.findings import gather
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.report.experiment import experiment_content, volume_readers
from nnunet_deform.comparison.report.page import render
from nnunet_deform.comparison.report.results import results_content
from nnunet_deform.comparison.report.sections import dataset_parts
from nnunet_deform.comparison.report.tables import write_tables
from nnunet_deform.comparison.results import Results


def build_report(file: Path, archive: Path | None = None) -> Path:
    """Collect what the experiment has so far, and write ``report/`` into its output folder.

    Args:
        file: the experiment; archive: of it, whose findings the report is made of instead, with the pictures of the
            predictions that lie in the experiment's folders.

    Returns:
        The HTML page.

    Raises:
        ExperimentError, PreparationError, SplitError, TrainingError, CollectionError, ArchiveError: see there.
    """
    source = load_experiment(file)
    folders = find_folders(source)
    findings = gather(source, folders) if archive is None else read_archive(archive)
    command = f"nnunet-deform compare run {file.name}" + ("" if archive is None else f" --archive {archive.name}")
    content = experiment_content(findings, command, volume_readers(source.experiment, folders))
    return write_report(folders.output / "report", content)


def build_archive_report(archive: Path, folder: Path) -> Path:
    """The report of an archive, without pictures, into ``folder``.

    Returns:
        The HTML page.

    Raises:
        ArchiveError, ExperimentError: see there.
    """
    return write_report(folder, experiment_content(read_archive(archive), "nnunet-deform compare run experiment.yaml"))


def build_results_report(folder: Path, results: Results, table: pd.DataFrame, command: str) -> Path:
    """Of results trained elsewhere, into a new ``folder``, which appears complete or not at all.

    Args:
        table: of :func:`results.score_results`.
        command: the one that makes the report.

    Returns:
        The HTML page.
    """
    content = results_content(results, table, command)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        page = write_report(partial, content)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / page.name


def write_report(folder: Path, content: ReportContent) -> Path:
    """The tables and the page, in ``folder``.

    Returns:
        The HTML page.
    """
    parts = [dataset_parts(content, dataset) for dataset in content.analysis.datasets]
    page = render(content, parts)
    write_tables(folder, content, parts)
    write_text(folder / "report.html", page)
    return folder / "report.html"
