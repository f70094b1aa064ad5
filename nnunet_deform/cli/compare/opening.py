"""What the commands on an experiment share: its arguments, how it is opened, and what is said of its faults."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nnunet_deform.cli.messages import fail, require_nnunetv2

if TYPE_CHECKING:
    from nnunet_deform.comparison.run import Comparison

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment file.")]
AcceptVersions = Annotated[
    bool,
    typer.Option(
        "--accept-versions",
        help="Go on although earlier trainings used other versions of packages that make training data or networks.",
    ),
]
Arm = Annotated[
    str, typer.Option("--arm", help="Dataset, configuration and arm, for example Dataset501_X-3d_fullres/stock.")
]


@contextlib.contextmanager
def comparison_errors(interrupted: str = "the same command continues where it stopped") -> Iterator[None]:
    """One clear message and exit code 1 for what a user can mend."""
    require_nnunetv2()
    try:
        import monai  # noqa: F401
        import pydantic  # noqa: F401
    except ImportError as error:
        raise fail(f"{error.name} is not installed; run: pip install 'nnunet-deform[compare]'") from None
    from nnunet_deform.comparison.archive import ArchiveError
    from nnunet_deform.comparison.collect import CollectionError
    from nnunet_deform.comparison.experiment import ExperimentError
    from nnunet_deform.comparison.prepare import PreparationError
    from nnunet_deform.comparison.results import ResultsError
    from nnunet_deform.comparison.run import RunError
    from nnunet_deform.comparison.scoring import ScoringError
    from nnunet_deform.comparison.splits import SplitError
    from nnunet_deform.comparison.trainings import TrainingError
    from nnunet_deform.processes.commands import CommandError

    known = (ArchiveError, CommandError, CollectionError, ExperimentError, PreparationError, ResultsError)
    known += (RunError, ScoringError, SplitError, TrainingError)
    try:
        yield
    except known as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise fail(f"interrupted; {interrupted}.") from None


@contextlib.contextmanager
def opened_comparison(
    file: Path, *, accept_versions: bool = False, archive: Path | None = None
) -> Iterator["Comparison"]:
    """The experiment, while signals end its commands too."""
    with comparison_errors():
        from nnunet_deform.comparison.run import Comparison
        from nnunet_deform.processes.commands import Interrupts

        with Interrupts() as interrupts:
            yield Comparison(file, Console(), interrupts, accept_versions=accept_versions, archive=archive)
