"""What the commands that score segmentations share: options, and a bar."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Processes = Annotated[
    int | None,
    typer.Option("-np", "--processes", help="How many score cases. Default: nnU-Net's number, at most one a core."),
]
Tolerance = Annotated[
    list[str] | None,
    typer.Option(
        "--tolerance",
        help="Of NSD, in mm: one number, or CLASS=MM for each class. Default: the smallest voxel side of the median "
        "spacing.",
    ),
]
DatasetJson = Annotated[
    Path | None,
    typer.Option(
        "--dataset-json", help="Names the classes, regions and ignore label. Default: the one beside the files."
    ),
]


def processes_or_default(stated: int | None) -> int:
    """What the user stated, or else nnU-Net's number, at most one a core."""
    if stated is not None:
        return stated
    from nnunetv2.configuration import default_num_processes

    return min(default_num_processes, os.cpu_count() or 1)


@contextlib.contextmanager
def scoring_progress(total: int | None) -> Iterator[Callable[[], None]]:
    """What is to be called after each case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=total)
        yield lambda: progress.advance(task)
