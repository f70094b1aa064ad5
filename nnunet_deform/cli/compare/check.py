"""nnunet-deform compare check."""

from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import ExperimentFile, opened_comparison


def check(
    file: ExperimentFile,
    patient_sd: Annotated[
        float | None,
        typer.Option("--patient-sd", min=0, help="SD of patients' differences, in the primary metric's unit."),
    ] = None,
    training_sd: Annotated[
        float | None,
        typer.Option("--training-sd", min=0, help="SD between trainings of one arm on one fold, in the same unit."),
    ] = None,
) -> None:
    """Find what is wrong before anything runs; estimate time, disk space and detectable differences.

    Example: nnunet-deform compare check experiment.yaml
    """
    with opened_comparison(file) as comparison:
        from nnunet_deform.comparison.check import check_experiment
        from nnunet_deform.comparison.outlook import describe, look_ahead

        checked = check_experiment(comparison.source, comparison.folders)
        lines = describe(look_ahead(checked, patient_sd=patient_sd, training_sd=training_sd))
    print("\n".join([f"{file}: nothing is wrong.", *lines]))
