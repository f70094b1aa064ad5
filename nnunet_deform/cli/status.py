"""nnunet-deform status."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nnunet_deform import __version__, activation
from nnunet_deform.cli.messages import print_note, print_problems, require_nnunetv2


def status(
    trainer: Annotated[
        list[str] | None,
        typer.Argument(help="Names of trainers to explain if nnU-Net does not find them.", show_default=False),
    ] = None,
) -> None:
    """Say what is installed and active, look up every trainer as nnU-Net does, and explain what is wrong.

    Plans in nnUNet_preprocessed and models in nnUNet_results are looked at, too.

    Example: nnunet-deform status nnUNetTrainerMAGIC_AdamW
    """
    from nnunet_deform.diagnosis import installation

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"nnunet-deform {__version__}, Python {platform.python_version()}")
    for package in ("nnunetv2", "torch", "dynamic-network-architectures"):
        with contextlib.suppress(PackageNotFoundError):
            console.print(f"{package} {version(package)}")
    require_nnunetv2()
    enabled = Path(activation.pth_path())
    console.print(f"enabled for this environment: {enabled if enabled.exists() else 'no'}")

    # First, because with other versions the imports below may fail.
    versions = installation.version_problems()
    print_problems(console, versions)
    from nnunet_deform.diagnosis import lookup, models

    problems = [*installation.activation_problems(), *_print_trainers(console)]
    problems += [problem for name in trainer or () if (problem := lookup.trainer_problem(name)) is not None]
    problems += _print_backends(console)
    problems += [*models.plan_problems(), *models.checkpoint_problems()]
    for note in (*models.checkpoint_notes(), *lookup.command_notes()):
        print_note(console, note)
    # A broken look-up is one problem, whatever was looked for.
    print_problems(console, list(dict.fromkeys(problems)))
    if versions or problems:
        raise typer.Exit(1)
    console.print("[bold green]All is well:[/bold green] nnU-Net finds every trainer.")


def _print_trainers(console: Console) -> list[str]:
    from nnunet_deform.diagnosis.lookup import look_up_ours

    table = Table("trainer", "nnU-Net's look-up")
    looked_up = look_up_ours()
    for trainer in looked_up:
        state = escape(trainer.state)
        table.add_row(trainer.name, state if state == "found" else f"[red]{state}[/red]")
    console.print(table)
    return [trainer.problem for trainer in looked_up if trainer.problem is not None]


def _print_backends(console: Console) -> list[str]:
    from nnunet_deform.diagnosis.backends import survey

    table = Table("device", "backend", "state")
    devices = survey()
    for device in devices:
        if device.problem is not None:
            table.add_row(device.name, "-", "[red]none[/red]")
        if device.note is not None:
            print_note(console, device.note)
        for backend, state in device.states.items():
            table.add_row(device.name, backend, escape(state))
    console.print(table)
    _print_preflights(console)
    return [device.problem for device in devices if device.problem is not None]


def _print_preflights(console: Console) -> None:
    from nnunet_deform.ops.backends import preflight

    table = Table("preflight of triton on", "with", "of", "verdict", "date")
    for record in preflight.remembered():
        trial = preflight.Trial(**{name: record[name] for name in preflight.Trial.__annotations__})
        packages = ("torch", "triton", "nnunet-deform")
        versions = ", ".join(f"{package} {record[package]}" for package in packages)
        verdict = "passed" if record["fault"] is None else f"[red]{escape(record['fault'])}[/red]"
        table.add_row(escape(record["gpu"]), escape(versions), trial.what, verdict, record["date"])
    if table.row_count:
        console.print(table)
