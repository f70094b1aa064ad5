"""Runs an experiment with nnU-Net's own commands, and goes on where an earlier run stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from nnunet_deform import activation
from nnunet_deform.comparison.archive import is_archive, read_archive, write_archive
from nnunet_deform.comparison.check import check_experiment, find_datasets
from nnunet_deform.comparison.collect import (
    is_predicted,
    predicts_alone,
    score_test,
    score_training,
    test_commands,
    test_folder,
    write_ensemble,
)
from nnunet_deform.comparison.cost import costs_file
from nnunet_deform.comparison.declaration import declaration, declare
from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.experiment_file import ExperimentFile, find_folders, load_experiment
from nnunet_deform.comparison.files import read_json, write_text
from nnunet_deform.comparison.findings import gather
from nnunet_deform.comparison.prepare import DatasetFolders, find_dataset, prepare_dataset
from nnunet_deform.comparison.trainings import (
    Training,
    begin,
    fail,
    finish,
    has_complete_summary,
    is_done,
    list_trainings,
    now,
    read_record,
    refuse_other_origin,
    refuse_other_versions,
)
from nnunet_deform.processes.commands import Interrupts, describe_exit, last_lines, run_command

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunError(RuntimeError):
    """The experiment cannot run, or something in it failed; the message is for the user."""


def _ignore(_line: str) -> None:
    pass


class Comparison:
    """An experiment file with its folders, and the commands that it needs."""

    def __init__(
        self,
        file: Path,
        console: Console,
        interrupts: Interrupts,
        *,
        accept_versions: bool = False,
        archive: Path | None = None,
    ) -> None:
        """
        Args:
            accept_versions: train although earlier trainings were made with other releases of what makes them.
            archive: a folder of :mod:`archive` to which :meth:`run` adds each finished training; what it has already is
                not trained again.

        Raises:
            ExperimentError: see there.
            ArchiveError: the archive cannot be used.
        """
        self.source: ExperimentFile = load_experiment(file)
        self.file = self.source.path
        self.experiment: Experiment = self.source.experiment
        self.folders: Folders = find_folders(self.source)
        self.datasets: dict[str, DatasetFolders] = {
            found.name: found for found in find_datasets(self.source, self.folders)
        }
        self.trainings = list_trainings(self.experiment, self.folders)
        self._console = console
        self._interrupts = interrupts
        self._accept_versions = accept_versions
        self._archive = archive
        self._archived = read_archive(archive) if archive is not None and is_archive(archive) else None
        self._locks: tuple[int, ...] = ()

    def _environment(self) -> dict[str, str]:
        resources = self.experiment.resources
        ours = activation.extension_folder()
        paths = [path for path in os.environ.get(activation.VARIABLE, "").split(os.pathsep) if path and path != ours]
        environment = {
            **os.environ,
            "nnUNet_raw": str(self.folders.raw),
            "nnUNet_preprocessed": str(self.folders.preprocessed),
            "nnUNet_results": str(self.folders.results),
            activation.VARIABLE: os.pathsep.join([*paths, ours]),
            "nnUNet_def_n_proc": str(resources.processes),
            "PYTHONUNBUFFERED": "1",
        }
        if self.experiment.device == "cpu":
            # Waiting OpenMP threads would otherwise spin for milliseconds and starve other programs.
            environment.setdefault("GOMP_SPINCOUNT", "20000")
        return environment

    def _command(
        self, argv: list[str], log: Path, on_line: Callable[[str], None] = _ignore, **environment: str
    ) -> None:
        """Run one of nnU-Net's commands.

        Raises:
            RunError: it failed; its end has been printed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._console.print(f"$ {shlex.join(argv)}", style="cyan", markup=False, highlight=False, soft_wrap=True)
        code = run_command(
            argv,
            log=log,
            cwd=self.folders.output,
            environment=self._environment() | environment,
            interrupts=self._interrupts,
            on_line=on_line,
            pass_fds=self._locks,
        )
        if code != 0:
            self._console.print(f"The last lines of {log}:", markup=False, soft_wrap=True)
            self._console.print(Text(last_lines(log)))
            raise RunError(f"{argv[0]} ended {describe_exit(code)}; its whole output is in {log}")

    @contextmanager
    def locked(self, part: str | None = None) -> Iterator[None]:
        """Keep others away from the whole run, or from one part of it, a training's key for example. The commands
        inherit the lock, so that it also lasts while one still runs whose parent was killed.

        Raises:
            RunError: another process has the lock.
        """
        file = self.folders.output / ".lock"
        if part is not None:
            file = self.folders.output / "records" / f"{part}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        outer = self._locks
        with file.open("w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(
                        f"{file} is held by a run or job of this experiment, or by a command that a killed one has "
                        "left; wait for it or end it (fuser names it, on its machine)."
                    ) from None
                self._locks = (*outer, lock.fileno())
            try:
                yield
            finally:
                self._locks = outer

    def prepare(self) -> None:
        """Plan, preprocess, make folds; then declare what is going to be compared. A refusal leaves nothing behind.

        Raises:
            ExperimentError, RunError, PreparationError: see there.
        """
        # Not the device: on a cluster this runs where there may be none.
        check_experiment(self.source, self.folders, trains_here=False)
        with self.locked():
            self._prepare()

    def _prepare(self) -> None:
        for dataset in self.experiment.datasets:
            logs = self.folders.output / "logs" / find_dataset(dataset, self.folders).name

            def run(argv: list[str], logs: Path = logs) -> None:
                words = "_".join(part for part in argv if not part.startswith("-"))
                # Planning crashes where nnU-Net is told to use no worker.
                self._command(argv, logs / f"{words}.log", nnUNet_n_proc_DA="1")

            prepare_dataset(self.experiment, dataset, self.folders, self.file, run)
        # After all that may be refused, and before the first training.
        declare(self.folders.output, declaration(self.experiment, self.file), now())
        # A sign for schedulers, newer than the experiment file.
        write_text(self.folders.output / "prepared", f"{now()}\n")

    def find_training(self, job: str) -> Training:
        """By number or name (:attr:`Training.key`); names stay valid when the experiment grows.

        Raises:
            RunError: there is none.
        """
        jobs = {name: t for i, t in enumerate(self.trainings) for name in (str(i), t.key)}
        if job not in jobs:
            raise RunError(
                f"there is no job {job}; the {len(self.trainings)} trainings go from 0 ({self.trainings[0].key}) to "
                f"{len(self.trainings) - 1} ({self.trainings[-1].key})."
            )
        return jobs[job]

    def find_arm(self, name: str) -> list[Training]:
        """One of :meth:`arms`, by :attr:`Training.arm_key`.

        Raises:
            RunError: there is none.
        """
        arms = {arm[0].arm_key: arm for arm in self.arms()}
        if name not in arms:
            raise RunError(f"there is no arm {name}; there are {', '.join(arms)}.")
        return arms[name]

    def validation_cases(self, training: Training) -> list[str]:
        return read_json(self.datasets[training.dataset].splits_file)[training.fold]["val"]

    def is_done(self, training: Training) -> bool:
        """
        Raises:
            TrainingError: see :func:`nnunet_deform.comparison.trainings.is_done`.
        """
        return is_done(training, self.datasets[training.dataset], self.folders)

    def train_alone(self, training: Training) -> None:
        """:meth:`train` as one job of many. A refusal leaves nothing behind.

        Raises:
            RunError: the experiment is not prepared, another job has the training, or see :meth:`train`.
            TrainingError: see :meth:`train`.
        """
        if not self.datasets[training.dataset].splits_file.exists():
            raise RunError(f"there are no folds of {training.dataset} yet; run compare prepare {self.file} first.")
        self.is_done(training)
        with self.locked(training.key):
            self.train(training)

    def train(self, training: Training, on_line: Callable[[str], None] = _ignore) -> None:
        """Train and validate one fold, from where it stopped, and score its predictions, those of the test set, too, if
        each training makes its own.

        Raises:
            RunError: the training failed; its record says how.
            TrainingError: see :func:`nnunet_deform.comparison.trainings.is_done` and ``refuse_other_versions`` there.
        """
        found = self.datasets[training.dataset]
        if not self.is_done(training):
            self._refuse_other_versions()
            command = training.command(self.folders.results, self.experiment.device)
            record = begin(training, found, self.folders, command, self.experiment.device)
            started = time.monotonic()
            cases = self.validation_cases(training)
            # Killed between the end of the validation and our note of it, there is nothing left to do.
            if not has_complete_summary(training, self.folders.results, cases, found.file_ending):
                workers = self.experiment.resources.augmentation
                log = self.folders.output / "logs" / f"{training.key}_{len(record.commands)}.log"
                try:
                    self._command(
                        command, log, on_line, **({} if workers is None else {"nnUNet_n_proc_DA": str(workers)})
                    )
                except BaseException as error:
                    how = str(error) if isinstance(error, RunError) else None
                    fail(training, self.folders, record, time.monotonic() - started, how)
                    raise
                if not has_complete_summary(training, self.folders.results, cases, found.file_ending):
                    how = f"nnUNetv2_train ended well, but not every case of the fold was predicted; see {log}"
                    fail(training, self.folders, record, time.monotonic() - started, how)
                    raise RunError(how)
            finish(training, self.folders, record, time.monotonic() - started)
        score_training(self.experiment, training, found, self.folders)
        if predicts_alone(self.experiment, training):
            self._predict_test(training)

    def _refuse_other_versions(self) -> None:
        if not self._accept_versions:
            mine = {training: read_record(training, self.folders) for training in self.trainings}
            archived = {} if self._archived is None else self._archived.records
            refuse_other_versions({**archived, **{training: record for training, record in mine.items() if record}})

    def arms(self) -> list[list[Training]]:
        """Each arm's trainings with the first seed on a dataset, one a fold."""
        found: dict[str, list[Training]] = {}
        for training in self.trainings:
            if training.seed == self.experiment.seeds.first:
                found.setdefault(training.arm_key, []).append(training)
        return list(found.values())

    def has_test_set(self, training: Training) -> bool:
        """Whether the experiment asks for the test set of the training's dataset."""
        return bool(self.experiment.dataset(training.dataset, training.configuration).test)

    def predict_test(self, arm: list[Training]) -> None:
        """Predict and score imagesTs with the ensemble of an arm's folds, or with each of them, as the experiment says.

        Args:
            arm: one of :meth:`arms`.

        Raises:
            RunError: a command failed, the experiment does not ask for it, or a fold is not trained.
        """
        first = arm[0]
        if not self.has_test_set(first):
            raise RunError(f"the experiment does not ask for a test set of {first.dataset}; set test: true there.")
        self._refuse_unfinished(arm)
        for training in arm if predicts_alone(self.experiment, first) else [first]:
            self._predict_test(training)

    def _predict_test(self, training: Training) -> None:
        experiment, found = self.experiment, self.datasets[training.dataset]
        folder = test_folder(experiment, training, self.folders)
        if not is_predicted(experiment, training, self.folders):
            with self.locked(f"{training.key}_test"):
                shutil.rmtree(folder, ignore_errors=True)
                write_ensemble(experiment, training, self.folders)
                for command in test_commands(experiment, training, found, self.folders):
                    self._command(command, self.folders.output / "logs" / f"{training.key}_test_{command[0]}.log")
        score_test(experiment, training, found, self.folders)

    def _refuse_unfinished(self, trainings: list[Training]) -> None:
        for training in trainings:
            if not self.is_done(training):
                raise RunError(f"{training} is not finished; train it first (--job {training.key}).")

    def measure_cost(self, arm: list[Training]) -> None:
        """Measure an arm, if that has not been done, in a process of its own.

        Args:
            arm: one of :meth:`arms`.

        Raises:
            RunError: the measurement failed, or the first fold is not trained.
        """
        training = arm[0]
        self._refuse_unfinished([training])
        file = costs_file(training, self.folders)
        if not file.exists():
            arguments = [training.dataset, training.configuration, str(training.fold), training.trainer]
            arguments += [training.plans, self.experiment.device, str(self.experiment.mirroring), str(file)]
            command = [sys.executable, "-m", "nnunet_deform.comparison.cost", *arguments]
            self._command(command, self.folders.output / "logs" / f"{training.key}_cost.log")

    def run(self) -> list[str]:
        """Everything but the report; goes on with the other trainings when one fails. A refusal leaves nothing behind.

        Returns:
            What failed, one sentence each.

        Raises:
            ExperimentError, RunError, PreparationError, TrainingError: see there.
        """
        checked = check_experiment(self.source, self.folders)
        if len(checked.done) < len(self.trainings):
            self._refuse_other_versions()
        with self.locked():
            return self._run()

    def _run(self) -> list[str]:
        self._prepare()
        elsewhere = self._done_elsewhere()
        self._keep()
        failures: list[str] = []
        here = [training for training in self.trainings if training not in elsewhere]
        todo = [training for training in here if not self.is_done(training)]
        self._console.print(f"{len(self.trainings)} trainings, {len(self.trainings) - len(todo)} of them done.")
        with self._showing(todo) as clock:
            for training in here:
                if training not in todo:
                    self.train(training)  # scores it, if that is still missing
                    continue
                clock.start(training)
                # the lock: a cluster's job may have it
                with _noting(failures, str(training)), self.locked(training.key):
                    self.train(training, clock.read)
                clock.stop()
                self._keep()
        # The report is worth having without these.
        for arm in self.arms():
            alone = predicts_alone(self.experiment, arm[0])  # then they have
            if self.has_test_set(arm[0]) and not alone and all(t in here and self.is_done(t) for t in arm):
                with _noting(failures, f"test set with {arm[0].arm_key}"):
                    self.predict_test(arm)
        for arm in self.arms():
            if arm[0] in here and self.is_done(arm[0]):
                with _noting(failures, f"cost of {arm[0].arm_key}"):
                    self.measure_cost(arm)
        self._keep()
        return failures

    def _keep(self) -> None:
        """Add what is finished to the archive, if there is one."""
        if self._archive is not None:
            write_archive(gather(self.source, self.folders), self._archive)

    def _done_elsewhere(self) -> set[Training]:
        """Those that the archive has and this machine has not.

        Raises:
            TrainingError: they are of other settings, folds or plans than the experiment now has.
        """
        if self._archived is None:
            return set()
        missing = self._archived.collected.missing
        archived = {t.key: record for t, record in self._archived.records.items() if t not in missing}
        found = set()
        for training in self.trainings:
            if training.key in archived and read_record(training, self.folders) is None:
                refuse_other_origin(training, archived[training.key], self.datasets[training.dataset])
                found.add(training)
        return found

    @contextmanager
    def _showing(self, todo: list[Training]) -> Iterator[_Clock]:
        description = TextColumn("{task.description}", markup=False)
        columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        live = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        known: dict[str, list[float]] = {}
        for training in self.trainings:
            record = read_record(training, self.folders)
            if record and record.finished and record.seconds:
                known.setdefault(training.arm, []).append(record.seconds)
        with live as progress:
            yield _Clock(todo, known, self.experiment.budget.epochs, progress, self._console)


@contextmanager
def _noting(failures: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except RunError as error:
        failures.append(f"{what}: {error}")


class _Clock:
    """How far the trainings are, and how long the rest will take."""

    def __init__(
        self,
        todo: list[Training],
        known: dict[str, list[float]],
        epochs: int | None,
        progress: Progress,
        console: Console,
    ) -> None:
        self._todo = todo
        self._known = known
        self._epochs = epochs
        self._progress = progress
        self._console = console
        self._position = 0
        self._started = time.monotonic()
        self._all = progress.add_task("trainings", total=len(todo))
        self._one = progress.add_task("starting", total=epochs)

    def start(self, training: Training) -> None:
        self._started = time.monotonic()
        self._progress.reset(self._one, description=str(training), total=self._epochs)

    def read(self, line: str) -> None:
        # A courtesy: if nnU-Net words its output differently one day, only the bar stands still.
        if epoch := re.search(r"\bEpoch (\d+)\s*$", line):
            self._progress.update(self._one, completed=int(epoch[1]))
            self._show_rest(self._fraction(int(epoch[1])))

    def _fraction(self, epoch: int) -> float:
        return 0.0 if self._epochs is None else epoch / self._epochs

    def stop(self) -> None:
        training = self._todo[self._position]
        seconds = time.monotonic() - self._started
        self._known.setdefault(training.arm, []).append(seconds)
        self._position += 1
        self._progress.update(self._all, completed=self._position)
        rest = format_seconds(self.remaining(0.0))
        self._console.print(
            f"{self._position} of {len(self._todo)}: {training}, {format_seconds(seconds)}; about {rest} left"
        )

    def remaining(self, fraction: float) -> float:
        """Seconds; a training takes what others of its arm took, or the mean of all; ``fraction`` of one is done."""
        every = [seconds for times in self._known.values() for seconds in times]
        total = 0.0
        for offset, training in enumerate(self._todo[self._position :]):
            times = self._known.get(training.arm, every)
            if not times and offset == 0 and fraction > 0:
                times = every = [(time.monotonic() - self._started) / fraction]
            if times:
                total += sum(times) / len(times) * (1 - (fraction if offset == 0 else 0))
        return total

    def _show_rest(self, fraction: float) -> None:
        rest = self.remaining(fraction)
        if rest:
            self._progress.update(self._all, description=f"trainings, about {format_seconds(rest)} left")


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
