"""The command line: activation, status, the demo and export. Training and prediction stay nnU-Net's own commands."""

import contextlib
import io
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nnunet_deform import __version__, activation

app = typer.Typer(
    name="nnunet-deform",
    help="New segmentation networks for nnU-Net v2. After [bold]enable[/bold], train and predict with nnU-Net's own "
    "commands, for example: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerDeformUX",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _fail(message: str) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/bold red] {escape(message)}", highlight=False)
    return typer.Exit(1)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"nnunet-deform {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def env() -> None:
    """Print the shell line that makes nnU-Net find our trainers: eval "$(nnunet-deform env)"."""
    print(activation.export_line())


@app.command()
def enable() -> None:
    """Make nnU-Net find our trainers in this Python environment, in every shell, until disable."""
    try:
        path = activation.enable()
    except activation.ActivationError as error:
        raise _fail(str(error)) from None
    print(f"Enabled: wrote {path}\nnnunet-deform disable removes it; do that before you uninstall nnunet-deform.")


@app.command()
def disable() -> None:
    """Undo enable."""
    try:
        path = activation.disable()
    except activation.ActivationError as error:
        raise _fail(str(error)) from None
    print(f"Disabled: removed {path}" if path else f"Nothing to do: {activation.pth_path()} does not exist.")


@app.command()
def status(
    trainer: Annotated[
        list[str] | None, typer.Argument(help="Trainers to explain, besides ours.", show_default=False)
    ] = None,
) -> None:
    """Say what is installed and active, look up every trainer as nnU-Net does, and explain what is wrong.

    Plans in nnUNet_preprocessed and models in nnUNet_results are looked at, too.
    """
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"nnunet-deform {__version__}, Python {platform.python_version()}")
    for package in ("nnunetv2", "torch", "dynamic-network-architectures"):
        with contextlib.suppress(PackageNotFoundError):
            console.print(f"{package} {version(package)}")
    try:
        activation.check_nnunetv2()
    except activation.ActivationError as error:
        raise _fail(str(error)) from None
    enabled = Path(activation.pth_path())
    console.print(f"enabled for this environment: {enabled if enabled.exists() else 'no'}")

    # First, because with other versions the imports below may fail.
    versions = activation.version_problems()
    _print_problems(console, versions)
    from nnunet_deform import diagnosis

    problems = [*activation.problems(), *_print_trainers(console)]
    problems += [diagnosis.explain_missing_trainer(name) for name in trainer or () if diagnosis.lookup(name) is None]
    problems += _print_backends(console)
    problems += [*diagnosis.plan_problems(), *diagnosis.checkpoint_problems()]
    for note in diagnosis.checkpoint_notes():
        console.print(f"[bold yellow]Note:[/bold yellow] {escape(note)}")
    _print_problems(console, problems)
    if versions or problems:
        raise typer.Exit(1)
    console.print("[bold green]All is well:[/bold green] nnU-Net finds every trainer.")


def _print_problems(console: Console, problems: list[str]) -> None:
    for problem in problems:
        console.print(f"[bold red]Problem:[/bold red] {escape(problem)}")


def _print_trainers(console: Console) -> list[str]:
    from nnunet_deform import diagnosis, trainers

    table = Table("trainer", "nnU-Net's look-up")
    problems = []
    for name in trainers.__all__:
        found = diagnosis.lookup(name)
        if found is None:
            table.add_row(name, "[red]not found[/red]")
        elif found is getattr(trainers, name):
            table.add_row(name, "found")
        else:
            table.add_row(name, f"[red]another class, {found.__module__}[/red]")
            problems.append(
                f"nnU-Net finds another class named {name}, in {found.__module__}; remove that copy, or the path that "
                f"leads to it from {activation.VARIABLE}."
            )
    console.print(table)
    return problems


def _print_backends(console: Console) -> list[str]:
    import torch

    from nnunet_deform.ops import backends_for, choose_backend

    table = Table("device", "backend", "state")
    problems = []
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    for device in devices:
        tensors = (
            torch.zeros(1, 16, 4, 4, 4, device=device),
            torch.zeros(1, 81, 4, 4, 4, device=device),
            torch.zeros(16, 1, 3, 3, 3, device=device),
        )
        try:
            chosen, _ = choose_backend(*tensors)
        except (ValueError, RuntimeError) as error:
            table.add_row(device, "-", "[red]none[/red]")
            problems.append(f"On {device}: {error}")
            continue
        for name, reason in backends_for(*tensors).items():
            state = "used" if name == chosen else "available"
            table.add_row(device, name, state if reason is None else f"cannot run: {escape(reason)}")
    console.print(table)
    return problems


@app.command()
def check_images(
    folder: Annotated[
        Path, typer.Argument(help="Looked through with all folders below.", exists=True, file_okay=False)
    ],
) -> None:
    """Find truncated and damaged NIfTI files, which nnU-Net would read without a word."""
    from nnunet_deform.images import incomplete_images

    problems = list(incomplete_images(folder))
    _print_problems(Console(soft_wrap=True, highlight=False), problems)
    if problems:
        raise typer.Exit(1)
    print(f"Every NIfTI file in {folder} is complete.")


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where to keep the data, the model and the figure; must be new or empty. Default: temporary."
        ),
    ] = None,
) -> None:
    """Make a phantom CT dataset and run nnU-Net's commands on it with DeformUX-Net, on a CPU, in minutes."""
    from nnunet_deform.demo import DemoError, run_demo

    try:
        activation.check_nnunetv2()
        run_demo(folder=folder, console=Console())
    except (activation.ActivationError, DemoError) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        raise _fail("interrupted; nothing was kept.") from None


@app.command()
def export(
    model: Annotated[
        Path, typer.Option("-m", "--model", help="nnU-Net's model folder, <trainer>__<plans>__<configuration>.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write.")],
    fold: Annotated[str, typer.Option("-f", "--fold", help='A number or "all".')] = "0",
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Its name in the fold's folder.")] = (
        "checkpoint_final.pth"
    ),
) -> None:
    """Write a trained network as ONNX, checked with ONNX Runtime, with what is needed to use it in the metadata."""
    from nnunet_deform.export import ExportError, export_onnx

    try:
        activation.check_nnunetv2()
        # nnU-Net and the exporter print what they do.
        with contextlib.redirect_stdout(io.StringIO()):
            metadata = export_onnx(model, output, fold=fold, checkpoint=checkpoint)
    except (activation.ActivationError, ExportError) as error:
        raise _fail(str(error)) from None
    print(f"Wrote {output}: patch {metadata['patch_size']}, spacing {metadata['spacing']}, opset 18.")
