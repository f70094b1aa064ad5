"""A trained model, as commands take it."""

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    Path, typer.Option("-m", "--model", help="nnU-Net's model folder, <trainer>__<plans>__<configuration>.")
]
FoldOption = Annotated[str, typer.Option("-f", "--fold", help='A number or "all".')]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="Its name in the fold's folder.")]
