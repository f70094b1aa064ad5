"""nnunet-deform compare report."""

from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import comparison_errors
from nnunet_deform.cli.messages import fail


def report(
    file: Annotated[
        Path, typer.Argument(metavar="EXPERIMENT.yaml|ARCHIVE", help="The experiment file, or an archive of one.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The folder for an archive's report. Default: report, in the archive."),
    ] = None,
) -> None:
    """Write the report of what is finished.

    Example: nnunet-deform compare report experiment.yaml
    """
    with comparison_errors():
        from nnunet_deform.comparison.report import build_archive_report, build_report

        if file.is_dir():
            page = build_archive_report(file, output or file / "report")
        elif output is None:
            page = build_report(file)
        else:
            raise fail("an experiment's report goes into its output folder; -o is for that of an archive.")
    print(f"Report: {page}")
