"""nnunet-deform inspect."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnunet_deform.cli.devices import DeviceOption, device_or_fail
from nnunet_deform.cli.messages import fail, require_nnunetv2
from nnunet_deform.cli.models import CheckpointOption, FoldOption, ModelOption


def inspect(
    model: ModelOption,
    source: Annotated[
        Path,
        typer.Option("-i", "--input", help="A case's file of the first channel (_0000), or a folder of cases."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder that gets a folder for each case.")],
    fold: FoldOption = "0",
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class or region, once for each. Default: the three largest of the prediction."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="A folder of true segmentations: adds errors and Dice.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A second model folder, of the same fold, shown beside the first.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option("--previous", help="A cascade's predictions of its first stage, for its second one.")
    ] = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    mirroring: Annotated[
        bool, typer.Option("--mirroring/--no-mirroring", help="Predict with mirrored images as well, as nnU-Net does.")
    ] = True,
    device: DeviceOption = None,
) -> None:
    """Show what a trained network sees: activation maps, receptive field, and what its operators do.

    Any model of nnU-Net. Writes a page, pictures, maps over the scan and numbers for each case.

    Example: nnunet-deform inspect -m nnUNetTrainerDeformUX__nnUNetPlans__3d_fullres -i imagesTs -o looked_at
    """
    require_nnunetv2()
    from nnunet_deform.inspection.command import inspect_cases
    from nnunet_deform.inspection.model import InspectionError, load_model
    from nnunet_deform.processes.commands import Interrupts

    chosen = device_or_fail(device)
    try:
        with Interrupts():
            models = [
                load_model(folder, fold=fold, checkpoint=checkpoint, device=chosen, mirroring=mirroring)
                for folder in (model, against)
                if folder is not None
            ]
            with _progress() as show:
                pages = inspect_cases(
                    models,
                    source,
                    output,
                    classes=classes or (),
                    labels=labels,
                    previous=previous,
                    on_progress=show,
                )
    except InspectionError as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise fail("interrupted; cases that were finished are kept, and nothing of the others.") from None
    for page in pages:
        print(f"Page: {page}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the remaining time, on standard error."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        current = ""

        def show(case: str, done: int, total: int) -> None:
            nonlocal current
            if case != current:
                progress.reset(task, total=total, description=case)
                current = case
            progress.update(task, completed=done)

        yield show
