"""The end-to-end run: phantom, then nnU-Net's own commands, then a table and a picture.

Everything happens inside a work folder that is published under its final name only when the run is complete. The
commands run there as their working directory and get relative paths, so nothing they write names the work folder.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nnunet_deform import activation
from nnunet_deform.demo.figure import save_figure
from nnunet_deform.demo.phantom import DATASET_NAME, LABELS, LARGEST_ORGANS, write_phantom_dataset
from nnunet_deform.processes.commands import (
    CommandError,
    Interrupts,
    describe_exit,
    find_command,
    last_lines,
    run_command,
)

REQUIRED_DICE = 0.6

_NUM_TRAIN, _NUM_TEST = 10, 4
_EPOCHS, _ITERATIONS = 6, 10
_TRAINER = f"nnUNetTrainerDeformUX_AdamW_{_EPOCHS}epochs{_ITERATIONS}iters_seed0_unmirrored"

_STEPS = 7


class DemoError(RuntimeError):
    """The demo cannot start, failed, or missed its Dice bar; the message is one sentence for the user."""


@dataclass(frozen=True)
class DemoResult:
    """What a successful demo leaves.

    folder: nnU-Net's three folders, predictions, logs, summary.json and the figure; figure: the PNG in it;
    page: of ``nnunet-deform inspect`` for one test case;
    dice: mean over the test cases by class; seconds: of the whole run.
    """

    folder: Path
    figure: Path
    page: Path
    dice: dict[str, float]
    seconds: float


def _check_target(folder: Path) -> None:
    try:
        if folder.exists() and not folder.is_dir():
            raise DemoError(f"{folder} is a file; give a folder that is empty or does not exist.")
        if folder.exists() and any(folder.iterdir()):
            raise DemoError(f"The folder {folder} is not empty; give one that is empty or does not exist.")
        if not folder.parent.is_dir():
            raise DemoError(f"The folder {folder.parent} does not exist; create it first or give another place.")
    except OSError as error:
        raise DemoError(f"Cannot look into {folder} ({error.strerror}); give another place.") from error


@contextmanager
def _workspace(folder: Path, interrupts: Interrupts) -> Iterator[Path]:
    """A hidden work folder that becomes ``folder`` when the block succeeds and is deleted when it does not.

    An existing, empty ``folder`` may be a mount point or somebody's working directory, so it is not replaced: the work
    folder lies inside and its entries are moved up.
    """
    existed = folder.is_dir()
    work = (folder if existed else folder.parent) / f".{folder.name}.unfinished-{secrets.token_hex(4)}"
    try:
        try:
            work.mkdir()
        except OSError as error:
            raise DemoError(f"Cannot write in {work.parent} ({error.strerror}); give another place.") from error
        yield work
        with interrupts.held():
            if existed:
                for entry in list(work.iterdir()):
                    entry.rename(folder / entry.name)
                work.rmdir()
            else:
                work.rename(folder)
    except BaseException:
        with interrupts.held():
            shutil.rmtree(work, ignore_errors=True)
        raise


def _environment() -> dict[str, str]:
    """The user's environment with every nnU-Net setting replaced, so that their folders and trainers stay out of it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    return kept | {
        "nnUNet_raw": "nnUNet_raw",
        "nnUNet_preprocessed": "nnUNet_preprocessed",
        "nnUNet_results": "nnUNet_results",
        "nnUNet_extTrainer": activation.extension_folder(),
        "nnUNet_def_n_proc": "1",  # a worker's start, importing torch, costs more than the work of these small cases
        "nnUNet_n_proc_DA": "1",
        "nnUNet_compile": "f",
        # OpenMP threads wait in a loop for milliseconds by default, and training becomes many times slower when another
        # program needs the cores. This is a tenth of a millisecond or so, which costs nothing when the cores are free.
        "GOMP_SPINCOUNT": "20000",
        # glibc gives large blocks back at once, and every step then pays for the same pages again.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "PYTHONUNBUFFERED": "1",
    }


class _Runner:
    """Runs the steps of one demo in its work folder and shows how far they are."""

    def __init__(self, work: Path, console: Console, interrupts: Interrupts) -> None:
        self.work = work
        self.console = console
        self._interrupts = interrupts
        self._environment = _environment()
        self._step = 0
        (work / "logs").mkdir()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._step += 1
        started = time.monotonic()
        self.console.print(f"[bold]{self._step}/{_STEPS} {title}[/bold]")
        yield
        self.console.print(f"    done in {time.monotonic() - started:.0f} s")

    def command(self, *argv: str, epochs: int | None = None, **environment: str) -> None:
        """Run one nnU-Net command with its output in ``logs/``.

        Args:
            argv: name and arguments.
            epochs: length of the training, for the progress bar.
            environment: variables set for this command only.

        Raises:
            DemoError: the command is missing or failed; the end of its output has been printed.
        """
        try:
            find_command(argv[0])
        except CommandError as error:
            raise DemoError(str(error)) from None
        self.console.print(f"    $ {shlex.join(argv)}", style="cyan", markup=False, highlight=False, soft_wrap=True)
        log = self.work / "logs" / f"{argv[0]}.log"
        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        live = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        with live as progress:
            task = progress.add_task("starting", total=epochs)

            def show(line: str) -> None:
                # The bar is a courtesy: if nnU-Net words its output differently one day, only the bar stands still.
                if epochs is not None and (epoch := re.search(r"\bEpoch (\d+)\s*$", line)):
                    progress.update(task, completed=int(epoch[1]))
                if epochs is not None and (loss := re.search(r"\btrain_loss (\S+)", line)):
                    progress.advance(task)
                    done = int(progress.tasks[0].completed)
                    self.console.print(f"    epoch {done} of {epochs}: training loss {escape(loss[1])}")
                if line.strip():
                    progress.update(task, description=line.strip()[:100])

            code = run_command(
                argv,
                log=log,
                cwd=self.work,
                environment=self._environment | environment,
                interrupts=self._interrupts,
                on_line=show,
            )
        if code != 0:
            self._report_failure(argv[0], code, log)

    def _report_failure(self, name: str, code: int, log: Path) -> None:
        self.console.print(f"The last lines of {name}:")
        self.console.print(Text(last_lines(log)))
        raise DemoError(
            f"{name} ended {describe_exit(code)}; its last lines are above, and the demo's files have been removed."
        )


def _describe_plan(work: Path) -> str:
    plans = json.loads((work / "nnUNet_preprocessed" / DATASET_NAME / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plan = plans["configurations"]["3d_fullres"]
    patch = "x".join(str(n) for n in plan["patch_size"])
    return (
        f"nnU-Net's own plan, unchanged: patch {patch}, batch {plan['batch_size']}. The network has its full width;"
        f" only the training is short, {_EPOCHS} epochs of {_ITERATIONS} steps with the AdamW recipe."
    )


def _read_dice(summary: Path) -> dict[str, list[float]]:
    """Dice of each test case by class; NaN where a class is in neither truth nor prediction."""
    cases = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
    return {
        name: [float(case["metrics"][str(value)]["Dice"]) for case in cases]
        for name, value in LABELS.items()
        if name != "background"
    }


def _table(dice: dict[str, list[float]]) -> Table:
    count = len(next(iter(dice.values())))
    table = Table(title=f"Dice on {count} held-out test cases")
    table.add_column("class")
    for heading in ("mean", "lowest", "highest", "required"):
        table.add_column(heading, justify="right")
    for name, values in dice.items():
        required = f"{REQUIRED_DICE:.2f}" if name in LARGEST_ORGANS else "-"
        table.add_row(name, *(f"{v:.3f}" for v in (sum(values) / count, min(values), max(values))), required)
    return table


def _run_steps(runner: _Runner) -> dict[str, float]:
    """All steps; returns the mean Dice by class."""
    work, console = runner.work, runner.console
    raw = Path("nnUNet_raw") / DATASET_NAME
    trained = ("-tr", _TRAINER, "-device", "cpu")

    with runner.step(f"make the phantom: {_NUM_TRAIN} training and {_NUM_TEST} test cases"):
        (work / "nnUNet_raw").mkdir()
        write_phantom_dataset(work / "nnUNet_raw", _NUM_TRAIN, _NUM_TEST)
    with runner.step("plan and preprocess"):
        runner.command(
            *("nnUNetv2_plan_and_preprocess", "-d", "501", "--verify_dataset_integrity"),
            *("-c", "3d_fullres", "-np", "1", "-npfp", "1"),
        )
        console.print(Padding(Text(_describe_plan(work)), (0, 0, 0, 4)))
    with runner.step("train fold 0 and validate: without mirroring, to save time"):
        # Augmentation in the training process itself: two runs on one machine then end in the same weights.
        runner.command("nnUNetv2_train", "501", "3d_fullres", "0", *trained, epochs=_EPOCHS, nnUNet_n_proc_DA="0")
    with runner.step("predict the test cases: final checkpoint, without mirroring"):
        runner.command(
            *("nnUNetv2_predict", "-d", "501", "-i", str(raw / "imagesTs"), "-o", "predictions"),
            *("-c", "3d_fullres", "-f", "0", *trained, "--disable_tta", "-npp", "0", "-nps", "0"),
        )
    with runner.step("evaluate"):
        plans = Path("nnUNet_preprocessed") / DATASET_NAME / "nnUNetPlans.json"
        runner.command(
            *("nnUNetv2_evaluate_folder", str(raw / "labelsTs"), "predictions", "-djfile", str(raw / "dataset.json")),
            *("-pfile", str(plans), "-o", "summary.json", "-np", "1"),
        )
        dice = _read_dice(work / "summary.json")
    with runner.step("draw the first test case"):
        truth = min((work / raw / "labelsTs").iterdir())
        name = truth.name.removesuffix(".nii.gz")
        save_figure(
            work / "demo.png",
            image=work / raw / "imagesTs" / f"{name}_0000.nii.gz",
            truth=truth,
            prediction=work / "predictions" / truth.name,
            title=f"DeformUX-Net after {_EPOCHS * _ITERATIONS} steps on a CPU: test case {name}",
            dice={key: values[0] for key, values in dice.items()},
        )
    with runner.step("look inside the network, at that case"):
        model = Path("nnUNet_results") / DATASET_NAME / f"{_TRAINER}__nnUNetPlans__3d_fullres"
        runner.command(
            *("nnunet-deform", "inspect", "-m", str(model), "-i", str(raw / "imagesTs" / f"{name}_0000.nii.gz")),
            *("--labels", str(raw / "labelsTs"), "-o", "inspect", "--class", "liver"),
            *("--device", "cpu", "--no-mirroring"),
        )
    console.print(_table(dice))
    return {key: sum(values) / len(values) for key, values in dice.items()}


def run_demo(folder: Path | None = None, *, console: Console | None = None) -> DemoResult:
    """Train, predict and score DeformUX-Net on a phantom with stock nnU-Net commands, on the CPU, in about 5 minutes.

    The user's own nnU-Net folders and settings are not touched. When the run fails or is interrupted (SIGINT, SIGTERM,
    SIGHUP), its processes are ended and its files deleted; a run that misses the Dice bar is complete and stays.

    Args:
        folder: where the result goes; must be empty or not exist. None: a new temporary folder.
        console: where progress is printed; None: standard output.

    Raises:
        DemoError: the folder is unsuitable, a command failed, or an organ of ``LARGEST_ORGANS`` has a mean test Dice
            below ``REQUIRED_DICE``.
    """
    console = console or Console()
    started = time.monotonic()
    with Interrupts() as interrupts:
        if folder is None:
            target = Path(tempfile.gettempdir(), f"nnunet-deform-demo-{secrets.token_hex(4)}")
        else:
            target = Path(folder).expanduser().resolve()
        _check_target(target)
        with _workspace(target, interrupts) as work:
            dice = _run_steps(_Runner(work, console, interrupts))
    seconds = time.monotonic() - started
    console.print(f"Finished in {seconds / 60:.1f} minutes. Everything is in {target}", markup=False, soft_wrap=True)
    console.print(f"Picture: {target / 'demo.png'}", markup=False, soft_wrap=True)
    (page,) = (target / "inspect").glob("*/inspect.html")
    console.print(f"Inside the network: {page}", markup=False, soft_wrap=True)
    missed = [name for name in LARGEST_ORGANS if not dice[name] >= REQUIRED_DICE]
    if missed:
        scores = ", ".join(f"{name} {dice[name]:.3f}" for name in missed)
        raise DemoError(f"The demo ran, but these organs missed the required Dice of {REQUIRED_DICE}: {scores}.")
    return DemoResult(folder=target, figure=target / "demo.png", page=page, dice=dice, seconds=seconds)
