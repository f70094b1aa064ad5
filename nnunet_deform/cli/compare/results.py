"""nnunet-deform compare results."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import comparison_errors
from nnunet_deform.cli.messages import fail
from nnunet_deform.cli.scoring import DatasetJson, Processes, Tolerance, processes_or_default, scoring_progress


def results(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Model folders of nnU-Net, or folders of predictions with --labels. The first is the baseline of the "
            "others.",
            show_default=False,
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="Number or name: models may then be given by name, without their path."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            help="The folder of true segmentations. Default for models: gt_segmentations of nnUNet_preprocessed, or "
            "labelsTr of nnUNet_raw.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="A name for each folder, in order; the same name means trainings of one arm."),
    ] = None,
    fold: Annotated[
        list[int] | None,
        typer.Option("-f", "--fold", help="A fold, repeatable. Default: all that every arm has."),
    ] = None,
    patients: Annotated[
        Path | None, typer.Option("--patients", help='CSV ("case,patient") or JSON. Default: each case a patient.')
    ] = None,
    primary: Annotated[str, typer.Option("--primary", help="The metric that decides.")] = "Dice",
    band: Annotated[
        float | None,
        typer.Option("--band", help="Differences up to this count as equivalent. Default: the metric's."),
    ] = None,
    tolerance: Tolerance = None,
    dataset_json: DatasetJson = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write; it must not exist.")] = Path(
        "comparison"
    ),
    processes: Processes = None,
) -> None:
    """Compare existing results with the same statistics and report; no experiment file needed.

    Example: nnunet-deform compare results predictions/stock predictions/mine --labels labelsTs
    """
    with comparison_errors("nothing was written"):
        from nnunet_deform.comparison.report import build_results_report
        from nnunet_deform.comparison.results import find_results, score_results
        from nnunet_deform.processes.commands import Interrupts

        if output.exists():
            raise fail(f"{output} exists; give another folder with -o.")
        if not output.resolve().parent.is_dir():
            raise fail(f"there is no folder {output.resolve().parent} to write {output.name} into.")
        with Interrupts():
            workers = processes_or_default(processes)
            results = find_results(
                folders,
                dataset=dataset,
                labels=labels,
                dataset_json=dataset_json,
                names=name or (),
                folds=fold or (),
                patients=patients,
                primary=primary,
                band=band,
                tolerance=tolerance or (),
                processes=workers,
            )
            with scoring_progress(sum(map(len, results.files.values()))) as advance:
                table = score_results(results, processes=workers, on_case=advance)
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            page = build_results_report(output, results, table, command)
    print(f"Report: {page}")
