"""The trainings of an experiment: where each lies, how far it is, and what it was made from."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.files import fingerprint, read_json, write_json
from nnunet_deform.comparison.prepare import DatasetFolders, PreparationError, find_dataset, plans_name

# What makes training data and networks; another release of these may be another training.
TRAINING_PACKAGES = (
    *("nnunet-deform", "nnunetv2", "dynamic-network-architectures", "batchgenerators", "batchgeneratorsv2", "timm"),
)
PACKAGES = (*TRAINING_PACKAGES, "torch", "numpy", "scipy", "SimpleITK", "monai")


class TrainingError(RuntimeError):
    """Results that may not be mixed: other folds, other plans, or a training of some other run.

    setting: of the experiment that has changed since; None where something else has.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class Training:
    """One run of nnUNetv2_train. trainer and plans are the full names nnU-Net is given."""

    dataset: str
    configuration: str
    arm: str
    trainer: str
    plans: str
    seed: int
    fold: int

    @property
    def key(self) -> str:
        """Names its record, log and scores; unique in an experiment."""
        return f"{self.arm_key}_seed{self.seed}_fold{self.fold}"

    @property
    def arm_key(self) -> str:
        """The same of the arm on its dataset; names its costs and test predictions."""
        return f"{self.dataset}-{self.configuration}/{self.arm}"

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}, fold {self.fold} of {self.dataset} ({self.configuration})"

    def model_folder(self, results: Path) -> Path:
        return results / self.dataset / f"{self.trainer}__{self.plans}__{self.configuration}"

    def folder(self, results: Path) -> Path:
        return self.model_folder(results) / f"fold_{self.fold}"

    def summary(self, results: Path) -> Path:
        return self.folder(results) / "validation" / "summary.json"

    def command(self, results: Path, device: str) -> list[str]:
        """nnUNetv2_train, from where an earlier run stopped."""
        arguments = ["nnUNetv2_train", self.dataset, self.configuration, str(self.fold)]
        arguments += ["-tr", self.trainer, "-p", self.plans, "-device", device]
        folder = self.folder(results)
        if (folder / "checkpoint_final.pth").exists():
            # Continuing a finished training would write its checkpoint anew.
            return [*arguments, "--val"]
        return [*arguments, "--c"] if list(folder.glob("checkpoint_*.pth")) else arguments


@dataclass(frozen=True)
class Record:
    """What a training was made from; one JSON file in the experiment's ``records``.

    splits, plans, dataset: fingerprints of splits_final.json, the plans file and dataset.json; seconds: of all its runs
    together, validation included; finished: when its validation was complete; failed: how its last run ended, if badly;
    summary, checkpoint: fingerprints of what it left.
    """

    splits: str
    plans: str
    dataset: str
    versions: dict[str, str]
    machine: str
    commands: tuple[str, ...] = ()
    started: str = ""
    finished: str | None = None
    failed: str | None = None
    seconds: float = 0.0
    summary: str | None = None
    checkpoint: str | None = None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def list_trainings(experiment: Experiment, folders: Folders) -> list[Training]:
    """All trainings of the experiment, in the order in which they run.

    Raises:
        PreparationError: a dataset is not found, or listed twice under different ids.
    """
    names = {dataset.id: find_dataset(dataset, folders).name for dataset in experiment.datasets}
    listed = [(names[dataset.id], dataset.configuration) for dataset in experiment.datasets]
    if twice := [name for position, (name, c) in enumerate(listed) if (name, c) in listed[:position]]:
        raise PreparationError(f"{twice[0]} is listed twice with the same configuration, by number and by name.")
    return name_trainings(experiment, names)


def name_trainings(experiment: Experiment, names: Mapping[int | str, str]) -> list[Training]:
    """The same without the datasets.

    Args:
        names: full names of the datasets by the experiment's ids.
    """
    return [
        Training(
            dataset=names[dataset.id],
            configuration=dataset.configuration,
            arm=arm.name,
            trainer=experiment.trainer_name(arm, seed),
            plans=plans_name(arm, dataset),
            seed=seed,
            fold=fold,
        )
        for dataset, arm, seed, fold in experiment.trainings()
    ]


def record_file(training: Training, folders: Folders) -> Path:
    return folders.output / "records" / f"{training.key}.json"


def read_record(training: Training, folders: Folders) -> Record | None:
    file = record_file(training, folders)
    if not file.exists():
        return None
    return to_record(read_json(file))


def to_record(content: Mapping[str, Any]) -> Record:
    """From what a JSON file has of it."""
    return Record(**{**content, "commands": tuple(content["commands"])})


def write_record(training: Training, folders: Folders, record: Record) -> None:
    write_json(record_file(training, folders), asdict(record))


def _describe_machine(device: str) -> str:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].strip() if names else model
    return f"{model}, {platform.system()}"


def installed_versions() -> dict[str, str]:
    """Of :data:`PACKAGES` and Python."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "python": platform.python_version()}


def refuse_other_versions(records: Mapping[Training, Record]) -> None:
    """
    Raises:
        TrainingError: one of these trainings was begun with other releases of what makes training data and networks.
    """
    installed = installed_versions()
    for training, record in records.items():
        then = record.versions
        changed = [
            f"{name} {then[name]}, not {installed[name]}"
            for name in TRAINING_PACKAGES
            if then.get(name, installed[name]) != installed[name]
        ]
        if changed:
            raise TrainingError(
                f"mixed versions: {training} was made with {'; '.join(changed)}, which may change data or networks; "
                "install the old release, start again in another output folder, or continue anyway with "
                "--accept-versions."
            )


def current_record(training: Training, found: DatasetFolders, device: str) -> Record:
    """What the training would be made from now."""
    return Record(
        splits=fingerprint(found.splits_file),
        plans=fingerprint(found.plans_file(training.plans)),
        dataset=fingerprint(found.preprocessed / "dataset.json"),
        versions=installed_versions(),
        machine=_describe_machine(device),
    )


def is_done(training: Training, found: DatasetFolders, folders: Folders) -> bool:
    """Whether the training and its validation are complete and may be used.

    Raises:
        TrainingError: the folder holds a training of some other run, or one from other folds or plans, or its finished
            results have changed.
    """
    record = read_record(training, folders)
    folder = training.folder(folders.results)
    if record is None:
        if list(folder.glob("checkpoint_*.pth")):
            raise TrainingError(
                f"{folder} was not trained by this experiment (it has no record of it); move it away, or choose "
                "another results folder."
            )
        return False
    refuse_other_origin(training, record, found)
    if record.finished is None:
        return False
    summary = training.summary(folders.results)
    if not summary.exists() or fingerprint(summary) != record.summary:
        raise TrainingError(
            f"{summary} is gone or has changed since {training} was finished (checkpoint_best, perhaps, by "
            "--val_best); put it back, or move the fold and its record away to train it again."
        )
    return True


def refuse_other_origin(training: Training, record: Record, found: DatasetFolders) -> None:
    """
    Raises:
        TrainingError: the training was made with other settings than the experiment's, or from other folds or plans
            than those that are there.
    """
    refuse_other_settings(training, record)
    for what, file, then in (
        ("splits", found.splits_file, record.splits),
        ("plans", found.plans_file(training.plans), record.plans),
    ):
        if fingerprint(file) != then:
            raise TrainingError(
                f"mixed {what}: {training} was trained with another {file.name} than the one that is there now; put "
                f"the old {file} back, or start anew in another output folder."
            )


_LENGTH = re.compile(r"_(\d+)epochs(?:(\d+)iters)?(?=_|$)")


def refuse_other_settings(training: Training, record: Record) -> None:
    """The experiment's settings are in the names of trainer and plans, which the commands of a training have.

    Raises:
        TrainingError: the training was made with other settings.
    """
    command = shlex.split(record.commands[0]) if record.commands else []
    if not {"-tr", "-p"} <= set(command):
        return
    then, plans = (command[command.index(option) + 1] for option in ("-tr", "-p"))
    if (then, plans) == (training.trainer, training.plans):
        return
    told = None
    for setting, of_name in (("budget", _length), ("mirroring", _mirroring), ("trainer", _recipe)):
        if of_name(then) != of_name(training.trainer):
            told = setting, of_name(then), of_name(training.trainer)
            break
    setting, before, after = told or ("plans", plans, training.plans)
    raise TrainingError(
        f"{training} was begun with {before}, and the experiment now says {after}; put {setting} back, or start anew "
        "with another name or output.",
        setting,
    )


def _length(trainer: str) -> str:
    found = _LENGTH.search(trainer)
    if found is None:
        return "the trainer's own length"
    return f"{found[1]} epochs" + (f" of {found[2]} iterations" if found[2] else "")


def _mirroring(trainer: str) -> str:
    return "predictions without mirroring" if trainer.endswith("_unmirrored") else "mirrored predictions"


def _recipe(trainer: str) -> str:
    return re.sub(r"_seed\d+$", "", _LENGTH.sub("", trainer.removesuffix("_unmirrored")))


def has_complete_summary(training: Training, results: Path, validation_cases: Sequence[str], ending: str) -> bool:
    """Whether nnU-Net's validation reached its end."""
    file = training.summary(results)
    try:
        entries = read_json(file)["metric_per_case"]
    except (FileNotFoundError, ValueError):  # killed before, or in the middle of, writing it
        return False
    scored = {Path(entry["prediction_file"]).name.removesuffix(ending) for entry in entries}
    return scored == set(validation_cases)


def begin(training: Training, found: DatasetFolders, folders: Folders, command: list[str], device: str) -> Record:
    """Write the record before the first command of a training, or add a command to it."""
    record = read_record(training, folders) or replace(current_record(training, found, device), started=now())
    record = replace(record, commands=(*record.commands, shlex.join(command)), failed=None)
    write_record(training, folders, record)
    return record


def finish(training: Training, folders: Folders, record: Record, seconds: float) -> Record:
    record = replace(
        record,
        finished=now(),
        seconds=record.seconds + seconds,
        summary=fingerprint(training.summary(folders.results)),
        checkpoint=fingerprint(training.folder(folders.results) / "checkpoint_final.pth"),
    )
    write_record(training, folders, record)
    return record


def fail(training: Training, folders: Folders, record: Record, seconds: float, how: str | None) -> None:
    """``how`` is None when the user interrupted it."""
    write_record(training, folders, replace(record, failed=how, seconds=record.seconds + seconds))
