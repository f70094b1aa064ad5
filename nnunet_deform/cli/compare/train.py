"""nnunet-deform compare train."""

from typing import Annotated

import typer

from nnunet_deform.cli.compare.opening import AcceptVersions, ExperimentFile, opened_comparison


def train(
    file: ExperimentFile,
    job: Annotated[str, typer.Option("--job", help="The training's number or name, as compare jobs lists it.")],
    accept_versions: AcceptVersions = False,
) -> None:
    """Train, validate and score one training: one job on a cluster. A finished one is left alone.

    Example: nnunet-deform compare train experiment.yaml --job 0
    """
    with opened_comparison(file, accept_versions=accept_versions) as comparison:
        comparison.train_alone(comparison.find_training(job))
