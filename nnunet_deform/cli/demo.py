"""nnunet-deform demo."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnunet_deform.cli.messages import fail, require_nnunetv2


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where to keep the data, the model and the figure: a new or empty folder. Default: a temporary one."
        ),
    ] = None,
) -> None:
    """Make a phantom CT dataset and run nnU-Net's commands on it with DeformUX-Net, on a CPU, in minutes.

    Example: nnunet-deform demo --folder demo
    """
    from nnunet_deform.demo import DemoError, run_demo

    require_nnunetv2()
    try:
        run_demo(folder=folder, console=Console())
    except DemoError as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise fail("interrupted; nothing was kept.") from None
