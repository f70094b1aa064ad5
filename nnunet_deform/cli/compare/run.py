"""nnunet-deform compare run."""

from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import AcceptVersions, ExperimentFile, opened_comparison
from nnunet_deform.cli.messages import fail


def run(
    file: ExperimentFile,
    accept_versions: AcceptVersions = False,
    archive: Annotated[
        Path | None,
        typer.Option(
            "--archive",
            help="Keep scores and records of each finished training in this folder, as small text files. Trainings "
            "that it has already, from another machine perhaps, are not repeated.",
        ),
    ] = None,
    inspect: Annotated[
        bool,
        typer.Option("--inspect", help="Make inspect's pages of each arm's worst case; the report links to them."),
    ] = False,
) -> None:
    """Plan, preprocess, train, predict, score and report; continues where an earlier run stopped.

    Example: nnunet-deform compare run experiment.yaml
    """
    with opened_comparison(file, accept_versions=accept_versions, archive=archive) as comparison:
        from nnunet_deform.comparison.report import build_report

        failures = comparison.run()
        if inspect:
            from nnunet_deform.comparison.inspections import inspect_worst_cases

            failures += inspect_worst_cases(file)
        page = build_report(file, archive)
    print(f"Report: {page}")
    if failures:
        raise fail("\n".join(["the report is incomplete, because these failed:", *failures]))
