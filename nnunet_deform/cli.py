"""The command line: activation, status, plans, demo, export, comparison. Training and prediction stay nnU-Net's."""

import contextlib
import io
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Column, Table

from nnunet_deform import __version__, activation

if TYPE_CHECKING:
    from nnunet_deform.comparison.run import Comparison
    from nnunet_deform.plans.planners import Choice, NetworkPlanner
    from nnunet_deform.selftest import Finding

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
    problems += [problem for name in trainer or () if (problem := diagnosis.trainer_problem(name)) is not None]
    problems += _print_backends(console)
    problems += [*diagnosis.plan_problems(), *diagnosis.checkpoint_problems()]
    for note in (*diagnosis.checkpoint_notes(), *diagnosis.command_notes()):
        console.print(f"[bold yellow]Note:[/bold yellow] {escape(note)}")
    # A broken look-up is one problem, whatever was looked for.
    _print_problems(console, list(dict.fromkeys(problems)))
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
        try:
            found = diagnosis.lookup(name)
        except diagnosis.BrokenLookup as error:
            table.add_row(name, "[red]look-up breaks off[/red]")
            problems.append(str(error))
            continue
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

    from nnunet_deform import diagnosis
    from nnunet_deform.ops import backends_for, choose_backend
    from nnunet_deform.ops.backends import preflight, trial_due

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
        trial = trial_due(*tensors)
        verdict = None if trial is None else preflight.recalled(trial)
        untried = trial is not None and verdict is None
        try:
            # Which would try it now.
            chosen = "triton" if untried else choose_backend(*tensors)[0]
        except (ValueError, RuntimeError) as error:
            table.add_row(device, "-", "[red]none[/red]")
            problems.append(f"On {device}: {error}")
            continue
        reasons = backends_for(*tensors)
        if verdict is not None and verdict.fault is not None:
            reasons["triton"] = f"it {verdict.fault} in its preflight; {preflight.SELFTEST} tries it again"
        if device == "cuda" and (note := diagnosis.gpu_note(chosen, reasons)) is not None:
            console.print(f"[bold yellow]Note:[/bold yellow] {escape(note)}")
        for name, reason in reasons.items():
            state = "used" if name == chosen else "available"
            if untried and name == chosen:
                state = "used, if it passes its preflight"
            table.add_row(device, name, state if reason is None else f"cannot run: {escape(reason)}")
    console.print(table)
    _print_preflights(console)
    return problems


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


class Device(str, Enum):
    """What torch computes on."""

    CUDA = "cuda"
    CPU = "cpu"
    MPS = "mps"


@app.command()
def selftest(
    device: Annotated[
        Device | None, typer.Option("--device", help="Default: the GPU if there is one.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the report here, to attach to an issue.", dir_okay=False),
    ] = None,
) -> None:
    """Try every operator, backend and network of ours on this machine, in minutes. Run this first."""
    if output is not None and not output.absolute().parent.is_dir():
        raise _fail(f"-o {output}: there is no folder {output.absolute().parent}; make it, or name another file.")
    # nnU-Net prints where its folders are.
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunet_deform import selftest as tests
    chosen = tests.best_device() if device is None else device.value
    if (reason := tests.unavailable(chosen)) is not None:
        raise _fail(f"--device {chosen}: {reason}")

    started = time.monotonic()
    checks = tests.checks_for(chosen)
    found = []
    console = Console(soft_wrap=True, highlight=False)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"self-test on {chosen}", total=len(checks))
        for check, finding in zip(checks, tests.findings(checks), strict=True):
            found.append(finding)
            progress.update(bar, advance=1, description=f"{check.group}, {check.name}")
    report = tests.report(chosen, found, time.monotonic() - started)
    for group in dict.fromkeys(finding.group for finding in found):
        console.print(_findings_table(group, [finding for finding in found if finding.group == group]))
    about = report["about"]
    machine = "; ".join(about.get("gpus", [])) or f"{about['processor']}, {report['threads']} of {about['cores']} cores"
    versions = f"torch {about['torch']}, Triton {about['triton']}, nnunet-deform {about['nnunet-deform']}"
    console.print(escape(f"{machine}; {versions}"))
    faults = [f for f in found if f.fault is not None]
    for finding in faults:
        where = f"{finding.group}, {finding.name}" + (f", {finding.column}" if finding.column else "")
        console.print(f"[bold red]Fails:[/bold red] {escape(where)}: {escape(finding.fault)}.")
    if output is not None:
        try:
            tests.write(report, output)
        except OSError as error:
            raise _fail(f"cannot write {output} ({error.strerror}); name another file with -o.") from None
        console.print(f"Wrote {output}")
    done = sum(finding.skipped is None for finding in found)
    if faults:
        advice = (
            "attach the report to an issue"
            if output
            else "run it again with -o report.json and attach that to an issue"
        )
        console.print(
            f"[bold red]{len(faults)} of {done} checks fail[/bold red] in {report['seconds']:.0f} s; please {advice}."
        )
        raise typer.Exit(1)
    console.print(f"[bold green]All {done} checks pass[/bold green] in {report['seconds']:.0f} s on {chosen}.")


def _findings_table(group: str, found: list["Finding"]) -> Table:
    """One row for each name, with a tick, a cross or a dash in each column; or, where there are times, these."""
    measured = [finding for finding in found if "rows" in finding.figures]
    if measured:
        table = Table(group, "forward", "+ backward", "times as fast", "extra memory")
        for finding in measured:
            table.add_row(f"[bold]{finding.name}[/bold]")
            first, *_ = finding.figures["rows"].values()
            for contender, row in finding.figures["rows"].items():
                milliseconds = (f"{row[key]:.2f} ms" for key in ("forward_ms", "forward_backward_ms"))
                ratio = first["forward_backward_ms"] / row["forward_backward_ms"]
                memory = "-" if row["extra_memory"] is None else f"{row['extra_memory']:.1f} inputs"
                table.add_row(contender, *milliseconds, f"{ratio:.1f}", memory)
        return table
    columns = list(dict.fromkeys(f.column for f in found))
    table = Table(Column(group, overflow="fold"), *columns)
    for name in dict.fromkeys(f.name for f in found):
        cells = {f.column: f for f in found if f.name == name}
        table.add_row(name, *(_mark(cells.get(column)) for column in columns))
    return table


def _mark(finding: "Finding | None") -> str:
    if finding is None or finding.skipped is not None:
        return "[dim]-[/dim]"
    return "[green]\N{CHECK MARK}[/green]" if finding.fault is None else "[bold red]\N{BALLOT X}[/bold red]"


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


class Arch(str, Enum):
    """The keys of nnunet_deform.plans.planners.PLANNERS, which takes seconds to import."""

    DEFORMUX = "deformux"
    LIGHTMEDSEG = "lightmedseg"
    MAGIC = "magic"
    MAGIC_RESENC = "magic-resenc"


class Preset(str, Enum):
    """The keys of nnunet_deform.plans.planners.PRESETS."""

    M = "M"
    L = "L"
    XL = "XL"


@app.command()
def plan(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The dataset's number or name.")],
    arch: Annotated[Arch, typer.Option("--arch", help="The network.")],
    base: Annotated[str, typer.Option("--base", help="The plan to start from.")] = "nnUNetPlans",
    preset: Annotated[
        Preset | None,
        typer.Option("--preset", help="Fit patch and batch to 8, 24 or 40 GB, as nnU-Net's ResEnc presets."),
    ] = None,
    vram: Annotated[float | None, typer.Option("--vram", help="Fit patch and batch to so many GB.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plan of this name.")] = False,
) -> None:
    """Write a plan with one of our networks, for nnU-Net's own trainers (-p). Default: the base's patch and batch."""
    if preset is not None and vram is not None:
        raise _fail(f"--preset {preset.value} and --vram {vram:g} are two memory targets; give one.")
    try:
        activation.check_nnunetv2()
    except activation.ActivationError as error:
        raise _fail(str(error)) from None
    # nnU-Net prints where its folders are.
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunet_deform.plans.planners import PLANNERS, PRESETS, PlanError
    planner_class = PLANNERS[arch.value]
    try:
        planner = planner_class(
            dataset,
            vram if preset is None else PRESETS[preset.value],
            plans_name=f"nnUNet{planner_class.label}{'' if preset is None else preset.value}Plans",
            base_plans_name=base,
            overwrite=overwrite,
        )
        planner.plan_experiment()
    except PlanError as error:
        raise _fail(str(error)) from None
    _print_plan(planner)


def _print_plan(planner: "NetworkPlanner") -> None:
    from nnunet_deform.plans.preprocessed import preprocessed_folders, preprocessing_commands

    base = planner.base_plans["plans_name"]
    table = Table(
        *(Column(name, overflow="fold") for name in ("configuration", "plan", "patch", "batch", "levels", "GB"))
    )

    def cells(choice: "Choice") -> list[str]:
        gigabytes = "no estimate" if choice.gigabytes is None else f"{choice.gigabytes:.1f}"
        patch = " x ".join(map(str, choice.patch_size))
        return [patch, str(choice.batch_size), str(choice.levels), gigabytes]

    for configuration in planner.configurations:
        table.add_row(configuration.name, planner.plans_identifier, *cells(configuration.ours))
        table.add_row("", base, *cells(configuration.base))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if planner.refits:
        print(f"Patch and batch: as large as {planner.UNet_vram_target_GB:g} GB allow, by nnU-Net's search.")
    else:
        print(f"Patch and batch: those of {base}, so that only the network differs; --preset or --vram fits them.")
    for configuration in planner.configurations:
        if configuration.ours.levels < configuration.unet_levels:
            print(
                f"{configuration.name}: {configuration.ours.levels} levels, as many as {planner.label} has, in the "
                f"place of a U-Net's {configuration.unet_levels}."
            )
        if configuration.ours.levels < 3:
            print(
                f"{configuration.name}: with {configuration.ours.levels} levels nnU-Net's deep supervision gives NaN; "
                "train with nnUNetTrainerNoDeepSupervision, or with our trainers."
            )
    print(
        "GB: as nnU-Net's planner counts them, the GPU for which it would plan a network that keeps as much for the "
        "backward pass, in mixed precision."
    )
    print(f"Wrote {planner.target}")

    folders = preprocessed_folders(planner.folder, planner.plans, base, planner.dataset)
    for folder in folders:
        state = "preprocessed already" if folder.complete else f"{folder.present} of {folder.expected} cases are there"
        print(f"{folder.identifier} ({', '.join(folder.configurations)}): {state}")
    commands = preprocessing_commands(planner.dataset_id, folders)
    if commands:
        print(f"To preprocess what is missing: {' && '.join(commands)}")
    else:
        print("Nothing is missing.")


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


_Processes = Annotated[
    int | None,
    typer.Option("-np", "--processes", help="That score cases side by side. Default: nnU-Net's, at most one a core."),
]
_Tolerance = Annotated[
    list[str] | None,
    typer.Option(
        "--tolerance",
        help="Of NSD: one number of mm, or CLASS=MM for each class. Default: the smallest voxel side of the median "
        "spacing.",
    ),
]
_DatasetJson = Annotated[
    Path | None,
    typer.Option(
        "--dataset-json", help="Which classes, regions and ignore label there are. Default: the one beside the files."
    ),
]


def _processes(stated: int | None) -> int:
    if stated is not None:
        return stated
    from nnunetv2.configuration import default_num_processes

    return min(default_num_processes, os.cpu_count() or 1)


@contextlib.contextmanager
def _scoring_progress(total: int | None) -> Iterator[Callable[[], None]]:
    """What is to be called after each case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=total)
        yield lambda: progress.advance(task)


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="A folder of predicted segmentations.", show_default=False)],
    labels: Annotated[Path, typer.Argument(help="The folder with the true ones, of the same names.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The CSV file to write.")],
    dataset_json: _DatasetJson = None,
    tolerance: _Tolerance = None,
    processes: _Processes = None,
) -> None:
    """Score a folder of predictions case by case: Dice as nnU-Net's, surface Dice (NSD) and HD95."""
    with _comparison_errors("nothing was written"):
        from nnunet_deform.comparison.files import write_text
        from nnunet_deform.comparison.metrics import METRICS
        from nnunet_deform.comparison.scoring import score_folder, some

        if not output.parent.is_dir():
            raise _fail(f"there is no folder {output.parent} to write {output.name} into.")
        with _scoring_progress(None) as advance:
            scored = score_folder(
                predictions,
                labels,
                dataset_json=dataset_json,
                tolerance=tolerance or (),
                processes=_processes(processes),
                on_case=advance,
            )
        write_text(output, scored.table.to_csv(index=False))
    console = Console(soft_wrap=True, highlight=False)
    means = scored.table.fillna({name: metric.perfect for name, metric in METRICS.items()}).groupby("label", sort=False)
    heads = [f"{name} ({metric.unit})" if metric.unit else name for name, metric in METRICS.items()]
    rows = Table("class", *heads, "NSD's tolerance (mm)")
    for name, row in means[list(METRICS)].mean().iterrows():
        values = [f"{row[metric.name]:.{metric.decimals}f}" for metric in METRICS.values()]
        rows.add_row(escape(str(name)), *values, f"{scored.tolerances[name]:g}")
    console.print(rows)
    neither = int(scored.table["Dice"].isna().sum())
    if neither:
        print(f"{neither} structures are in neither labels nor prediction: empty in the file, perfect in these means.")
    if scored.unpredicted:
        names = some(scored.unpredicted)
        console.print(f"[bold yellow]Note:[/bold yellow] labels without a prediction, left out: {escape(names)}.")
    print(f"Wrote {output}: {scored.table['case'].nunique()} cases.")


compare = typer.Typer(
    help="Compare networks rigorously: one experiment file, every arm, paired statistics, a report. Needs the extra "
    "[bold]compare[/bold].",
    no_args_is_help=True,
)
app.add_typer(compare, name="compare")

_ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment file.")]
_AcceptVersions = Annotated[
    bool,
    typer.Option(
        "--accept-versions",
        help="Go on although earlier trainings were made with other releases of what makes training data or networks.",
    ),
]


@contextlib.contextmanager
def _comparison_errors(interrupted: str = "the same command goes on where it stopped") -> Iterator[None]:
    """One clear message and exit code 1 for what a user can mend."""
    try:
        activation.check_nnunetv2()
        try:
            import monai  # noqa: F401
            import pydantic  # noqa: F401
        except ImportError as error:
            raise _fail(f"{error.name} is not installed; run: pip install 'nnunet-deform[compare]'") from None
        from nnunet_deform.commands import CommandError
        from nnunet_deform.comparison.archive import ArchiveError
        from nnunet_deform.comparison.collect import CollectionError
        from nnunet_deform.comparison.experiment import ExperimentError
        from nnunet_deform.comparison.prepare import PreparationError
        from nnunet_deform.comparison.results import ResultsError
        from nnunet_deform.comparison.run import RunError
        from nnunet_deform.comparison.scoring import ScoringError
        from nnunet_deform.comparison.splits import SplitError
        from nnunet_deform.comparison.trainings import TrainingError
    except activation.ActivationError as error:
        raise _fail(str(error)) from None
    known = (ArchiveError, CommandError, CollectionError, ExperimentError, PreparationError, ResultsError)
    known += (RunError, ScoringError, SplitError, TrainingError)
    try:
        yield
    except known as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        raise _fail(f"interrupted; {interrupted}.") from None


@contextlib.contextmanager
def _opened_comparison(
    file: Path, *, accept_versions: bool = False, archive: Path | None = None
) -> Iterator["Comparison"]:
    """The experiment, while signals end its commands too."""
    with _comparison_errors():
        from nnunet_deform.commands import Interrupts
        from nnunet_deform.comparison.run import Comparison

        with Interrupts() as interrupts:
            yield Comparison(file, Console(), interrupts, accept_versions=accept_versions, archive=archive)


@compare.command("init")
def compare_init(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="nnU-Net's number or name of the dataset.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("experiment.yaml"),
    configuration: Annotated[str, typer.Option("-c", "--configuration")] = "3d_fullres",
    device: Annotated[str, typer.Option("--device", help="cuda, cpu or mps.")] = "cuda",
) -> None:
    """Write a good first experiment file for a dataset."""
    with _comparison_errors():
        from nnunet_deform.comparison.experiment_file import default_experiment, parse_experiment
        from nnunet_deform.comparison.files import write_text

        if output.exists():
            raise _fail(f"{output} exists; give another name with -o.")
        identifier = int(dataset) if dataset.isdigit() else dataset
        text = default_experiment(identifier, output, configuration=configuration, device=device)
        parse_experiment(text, output)  # the options may not fit
        write_text(output, text)
    print(f"Wrote {output}. Look at its arms and hypotheses, then: nnunet-deform compare check {output}")


@compare.command("check")
def compare_check(
    file: _ExperimentFile,
    patient_sd: Annotated[
        float | None,
        typer.Option("--patient-sd", min=0, help="SD of patients' differences, in the primary metric's unit."),
    ] = None,
    training_sd: Annotated[
        float | None,
        typer.Option("--training-sd", min=0, help="SD between trainings of one arm on one fold, in the same unit."),
    ] = None,
) -> None:
    """Find what is wrong before anything runs, and tell time, disk space and what differences can be found."""
    with _opened_comparison(file) as comparison:
        from nnunet_deform.comparison.check import check_experiment
        from nnunet_deform.comparison.outlook import describe, look_ahead

        checked = check_experiment(comparison.source, comparison.folders)
        lines = describe(look_ahead(checked, patient_sd=patient_sd, training_sd=training_sd))
    print("\n".join([f"{file}: nothing is wrong.", *lines]))


@compare.command("run")
def compare_run(
    file: _ExperimentFile,
    accept_versions: _AcceptVersions = False,
    archive: Annotated[
        Path | None,
        typer.Option(
            "--archive",
            help="Keep scores and records of each finished training in this folder, as small text files. Trainings "
            "that it has already, from another machine perhaps, are not repeated.",
        ),
    ] = None,
) -> None:
    """Plan, preprocess, train, predict, score and report; goes on where an earlier run stopped."""
    with _opened_comparison(file, accept_versions=accept_versions, archive=archive) as comparison:
        from nnunet_deform.comparison.report import build_report

        failures = comparison.run()
        page = build_report(file, archive)
    print(f"Report: {page}")
    if failures:
        raise _fail("\n".join(["the report is incomplete, because these failed:", *failures]))


@compare.command("jobs")
def compare_jobs(file: _ExperimentFile) -> None:
    """List the trainings, numbered, with how far each is: for a cluster's job array."""
    with _opened_comparison(file) as comparison:
        for number, training in enumerate(comparison.trainings):
            print(f"{number}\t{'done' if comparison.is_done(training) else 'to do'}\t{training.key}")


@compare.command("prepare")
def compare_prepare(file: _ExperimentFile) -> None:
    """Only plan, preprocess and write the folds: the first job on a cluster."""
    with _opened_comparison(file) as comparison:
        comparison.prepare()


@compare.command("train")
def compare_train(
    file: _ExperimentFile,
    job: Annotated[str, typer.Option("--job", help="Its number or name, of compare jobs.")],
    accept_versions: _AcceptVersions = False,
) -> None:
    """Train, validate and score one training: one job on a cluster. A finished one is left alone."""
    with _opened_comparison(file, accept_versions=accept_versions) as comparison:
        comparison.train_alone(comparison.find_training(job))


_Arm = Annotated[
    str, typer.Option("--arm", help="Dataset, configuration and arm, for example Dataset501_X-3d_fullres/stock.")
]


@compare.command("predict")
def compare_predict(file: _ExperimentFile, arm: _Arm) -> None:
    """Predict and score the test set with an arm's folds: one job on a cluster."""
    with _opened_comparison(file) as comparison:
        comparison.predict_test(comparison.find_arm(arm))


@compare.command("cost")
def compare_cost(file: _ExperimentFile, arm: _Arm) -> None:
    """Measure an arm's parameters, memory and times: one job on a cluster."""
    with _opened_comparison(file) as comparison:
        comparison.measure_cost(comparison.find_arm(arm))


@compare.command("workflow")
def compare_workflow(file: _ExperimentFile) -> None:
    """Write the experiment as a Snakemake workflow, for one machine or a SLURM cluster."""
    with _opened_comparison(file) as comparison:
        from nnunet_deform.comparison.workflow import PROFILES, write_workflow

        folder = write_workflow(comparison)
    print(f"Wrote {folder}. Look at its profiles, then run one of these where Snakemake is installed:")
    for name in PROFILES:
        print(f"  {shlex.join(['snakemake', '-s', str(folder / 'Snakefile'), '--profile', str(folder / name)])}")


@compare.command("archive")
def compare_archive(
    file: _ExperimentFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder: new, or an archive to add to.")],
) -> None:
    """Keep scores, records and costs of what is finished as small text files, to commit or to send."""
    with _comparison_errors():
        from nnunet_deform.comparison.archive import write_archive
        from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
        from nnunet_deform.comparison.findings import gather

        source = load_experiment(file)
        findings = gather(source, find_folders(source))
        write_archive(findings, output)
    finished = len(findings.trainings) - len(findings.collected.missing)
    print(f"Wrote {output}: {finished} of {len(findings.trainings)} trainings.")


@compare.command("report")
def compare_report(
    file: Annotated[
        Path, typer.Argument(metavar="EXPERIMENT.yaml|ARCHIVE", help="The experiment file, or an archive of one.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The folder for an archive's report. Default: report, in the archive."),
    ] = None,
) -> None:
    """Write the report of what is finished."""
    with _comparison_errors():
        from nnunet_deform.comparison.report import build_archive_report, build_report

        if file.is_dir():
            page = build_archive_report(file, output or file / "report")
        elif output is None:
            page = build_report(file)
        else:
            raise _fail("an experiment's report goes into its output folder; -o is for that of an archive.")
    print(f"Report: {page}")


@compare.command("results")
def compare_results(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Model folders of nnU-Net, or folders of predictions with --labels. The first is the baseline of the "
            "others.",
            show_default=False,
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="Number or name: models may then be given by name, without their path."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            help="The folder of true segmentations. Default for models: gt_segmentations of nnUNet_preprocessed, or "
            "labelsTr of nnUNet_raw.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Of each folder, in order; folders of one name are trainings of one arm."),
    ] = None,
    fold: Annotated[
        list[int] | None, typer.Option("-f", "--fold", help="Once for each. Default: all that every arm has.")
    ] = None,
    patients: Annotated[
        Path | None, typer.Option("--patients", help='CSV ("case,patient") or JSON. Default: each case a patient.')
    ] = None,
    primary: Annotated[str, typer.Option("--primary", help="The metric that is decided on.")] = "Dice",
    band: Annotated[
        float | None,
        typer.Option("--band", help="Differences within +-band of it count as equal. Default: the metric's."),
    ] = None,
    tolerance: _Tolerance = None,
    dataset_json: _DatasetJson = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write; it must not exist.")] = Path(
        "comparison"
    ),
    processes: _Processes = None,
) -> None:
    """Compare results that are there already, with the same statistics and report. No experiment file needed."""
    with _comparison_errors("nothing was written"):
        from nnunet_deform.commands import Interrupts
        from nnunet_deform.comparison.report import build_results_report
        from nnunet_deform.comparison.results import find_results, score_results

        if output.exists():
            raise _fail(f"{output} exists; give another folder with -o.")
        if not output.resolve().parent.is_dir():
            raise _fail(f"there is no folder {output.resolve().parent} to write {output.name} into.")
        with Interrupts():
            workers = _processes(processes)
            results = find_results(
                folders,
                dataset=dataset,
                labels=labels,
                dataset_json=dataset_json,
                names=name or (),
                folds=fold or (),
                patients=patients,
                primary=primary,
                band=band,
                tolerance=tolerance or (),
                processes=workers,
            )
            with _scoring_progress(sum(map(len, results.files.values()))) as advance:
                table = score_results(results, processes=workers, on_case=advance)
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            page = build_results_report(output, results, table, command)
    print(f"Report: {page}")
