"""nnunet-deform check-images."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nnunet_deform.cli.messages import print_problems


def check_images(
    folder: Annotated[Path, typer.Argument(help="Searched with its subfolders.", exists=True, file_okay=False)],
) -> None:
    """Find truncated and damaged NIfTI files, which nnU-Net reads without an error.

    Example: nnunet-deform check-images imagesTr
    """
    from nnunet_deform.diagnosis.images import incomplete_images

    problems = list(incomplete_images(folder))
    print_problems(Console(soft_wrap=True, highlight=False), problems)
    if problems:
        raise typer.Exit(1)
    print(f"Every NIfTI file in {folder} is complete.")
