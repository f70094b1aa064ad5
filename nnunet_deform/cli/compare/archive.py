"""nnunet-deform compare archive."""

from pathlib import Path
from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import ExperimentFile, comparison_errors


def archive(
    file: ExperimentFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder: new, or an archive to add to.")],
) -> None:
    """Keep scores, records and costs of what is finished as small text files, to commit or to send.

    Example: nnunet-deform compare archive experiment.yaml -o archive
    """
    with comparison_errors():
        from nnunet_deform.comparison.archive import write_archive
        from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
        from nnunet_deform.comparison.findings import gather

        source = load_experiment(file)
        findings = gather(source, find_folders(source))
        write_archive(findings, output)
    finished = len(findings.trainings) - len(findings.collected.missing)
    print(f"Wrote {output}: {finished} of {len(findings.trainings)} trainings.")
