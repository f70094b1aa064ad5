"""An experiment's findings as a folder of small text files, to keep under version control, to send, and to go on from.

    experiment.yaml      as it was
    declared.json        the first declaration
    archive.json         what the experiment says now, classes, tolerances and folds of its datasets
    trainings/<arm>_seed<S>_fold<F>.json  its record, losses and what its operators did
    trainings/<arm>_seed<S>_fold<F>.csv   its scores out of fold; only finished trainings have this file
    trainings/<arm>_seed<S>_fold<F>_test.csv  scores of the test set, where trainings predict it by themselves
    test/<arm>.csv       the same, where an arm's folds predict it together
    costs/<arm>.json

Arms are named as in :attr:`Training.arm_key`. Models, predictions and images are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_deform.comparison.collect import Collected, check_scores, columns, describe_scores, predicts_alone
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.declaration import read_declaration
from nnunet_deform.comparison.experiment import Experiment
from nnunet_deform.comparison.experiment_file import load_experiment
from nnunet_deform.comparison.files import read_json, write_csv, write_json, write_text
from nnunet_deform.comparison.findings import Facts, Findings
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.scoring import score_columns
from nnunet_deform.comparison.trainings import (
    Record,
    Training,
    name_trainings,
    refuse_other_settings,
    to_record,
)

FORMAT = 1
_COUNTS = ("voxels_truth", "voxels_prediction")


class ArchiveError(RuntimeError):
    """A folder that is no archive, is damaged, or is of another experiment; the message is for the user."""


def write_archive(findings: Findings, folder: Path) -> None:
    """Add what has been found to an archive, new or of the same experiment. What it already has of a training is kept.

    Raises:
        ArchiveError: the folder holds something else, or another result of the same training.
        TrainingError: it has a training with other settings than the experiment now says.
    """
    there = read_archive(folder) if _is_of(findings.experiment.name, folder) else None
    archived = {} if there is None else {training.key: record for training, record in there.records.items()}
    scored = set() if there is None else {t.key for t in there.records if t not in there.collected.missing}
    for training in findings.trainings:
        if (record := archived.get(training.key)) is not None:
            refuse_other_settings(training, record)
            _refuse_another_result(training, findings.records.get(training), record, folder)
    if there is None and findings.declared is not None:
        date, sha256, content = findings.declared
        write_json(folder / "declared.json", {"date": date, "sha256": sha256, "content": content})
    write_text(folder / "experiment.yaml", findings.source)
    for training, record in findings.records.items():
        if training.key not in scored:
            _write_training(findings, training, record, folder)
    for arm_key, cost in findings.costs.items():
        if there is None or arm_key not in there.costs:
            write_json(folder / "costs" / f"{arm_key}.json", asdict(cost))
    for training in findings.trainings:
        rows, file = _test_rows(findings, training), _test_file(findings.experiment, training, folder)
        if len(rows) and not file.exists():
            write_csv(file, rows[["patient", *score_columns()]])
    commands = {} if there is None else there.test_commands
    write_json(folder / "archive.json", _contents(findings, {**commands, **findings.test_commands}))


def is_archive(folder: Path) -> bool:
    return (folder / "archive.json").exists()


def _is_of(name: str, folder: Path) -> bool:
    """Whether there is an archive of the experiment.

    Raises:
        ArchiveError: there is something else.
    """
    if is_archive(folder):
        there = _read_contents(folder)["name"]
        if there != name:
            raise ArchiveError(
                f"{folder} is an archive of the experiment {there!r}, not of {name!r}; name another folder."
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArchiveError(f"{folder} is neither empty nor an archive; name another folder.")
    return False


def _refuse_another_result(training: Training, mine: Record | None, archived: Record, folder: Path) -> None:
    if mine is not None and mine.finished and archived.finished and mine.summary != archived.summary:
        raise ArchiveError(
            f"{folder} has another result of {training}, finished {archived.finished}, than the one here, finished "
            f"{mine.finished}; keep one of them, or name another folder."
        )


def _contents(findings: Findings, test_commands: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": findings.experiment.name,
        "declaration": findings.declaration,
        "datasets": [
            {
                "dataset": dataset,
                "configuration": configuration,
                "labels": dict(facts.labels),
                "ignore_label": facts.ignore_label,
                "tolerances": dict(facts.tolerances),
                "validation": {str(fold): list(cases) for fold, cases in facts.validation.items()},
            }
            for (dataset, configuration), facts in findings.facts.items()
        ],
        "test_commands": {arm_key: list(commands) for arm_key, commands in test_commands.items()},
    }


def _write_training(findings: Findings, training: Training, record: Record, folder: Path) -> None:
    file = folder / "trainings" / training.key
    if training not in findings.collected.missing:
        cases = findings.collected.cases
        rows = _rows_of_arm(cases, training)
        rows = rows[(rows["seed"] == training.seed) & (rows["fold"] == training.fold)]
        write_csv(file.with_name(f"{file.name}.csv"), rows[["patient", *score_columns()]])
    history = findings.histories.get(training, {})
    content = {
        "record": asdict(record),
        "losses": findings.curves.get(training, ([], [], [])),
        "operators": {str(epoch): values for epoch, values in history.items()},
    }
    write_json(file.with_name(f"{file.name}.json"), content)


def _test_file(experiment: Experiment, training: Training, folder: Path) -> Path:
    if predicts_alone(experiment, training):
        return folder / "trainings" / f"{training.key}_test.csv"
    return folder / "test" / f"{training.arm_key}.csv"


def _test_rows(findings: Findings, training: Training) -> pd.DataFrame:
    rows = _rows_of_arm(findings.collected.test, training)
    if predicts_alone(findings.experiment, training):
        rows = rows[(rows["seed"] == training.seed) & (rows["fold"] == training.fold)]
    return rows


def _rows_of_arm(table: pd.DataFrame, training: Training) -> pd.DataFrame:
    keys = ("dataset", "configuration", "arm")
    return table[(table[list(keys)] == [getattr(training, key) for key in keys]).all(axis=1)]


def read_archive(folder: Path) -> Findings:
    """
    Raises:
        ArchiveError: it is none, or damaged, or its trainings are of different folds, plans or datasets; every fault in
            its scores is named.
        ExperimentError: its experiment.yaml cannot be used.
    """
    contents = _read_contents(folder)
    source = load_experiment(folder / "experiment.yaml")
    experiment = source.experiment
    try:
        facts = {
            (about["dataset"], about["configuration"]): Facts(
                labels={name: tuple(v) if isinstance(v, list) else v for name, v in about["labels"].items()},
                ignore_label=about["ignore_label"],
                tolerances=about["tolerances"],
                validation={int(fold): tuple(cases) for fold, cases in about["validation"].items()},
            )
            for about in contents["datasets"]
        }
        names = {name for name, _ in facts}
        by_id = {d.id: next(n for n in names if d.id in (n, int(n[len("Dataset") :][:3]))) for d in experiment.datasets}
        declaration, commands = contents["declaration"], contents["test_commands"]
    except (KeyError, TypeError, ValueError, StopIteration):
        raise _damaged(folder / "archive.json", "its datasets are not those of experiment.yaml") from None
    reading = _Reading(folder, facts)
    trainings = tuple(name_trainings(experiment, by_id))
    for training in trainings:
        reading.add(training)
        reading.add_test(training, predicts_alone(experiment, training), _test_file(experiment, training, folder))
    for arm_key in dict.fromkeys(training.arm_key for training in trainings):
        reading.add_cost(arm_key)
    reading.refuse_faults()
    return Findings(
        experiment=experiment,
        source=source.path.read_text(encoding="utf-8"),
        trainings=trainings,
        records=reading.records,
        collected=Collected(_joined(reading.cases), _joined(reading.test), reading.missing),
        curves=reading.curves,
        histories=reading.histories,
        facts=facts,
        costs=reading.costs,
        test_commands={arm_key: tuple(lines) for arm_key, lines in commands.items()},
        declared=read_declaration(folder),
        declaration=declaration,
    )


def _read_contents(folder: Path) -> dict[str, Any]:
    file = folder / "archive.json"
    if not is_archive(folder):
        raise ArchiveError(f"{folder} is no archive of an experiment: there is no archive.json.")
    try:
        contents = dict(read_json(file))
        form, _ = contents["format"], contents["name"]
    except (ValueError, TypeError, KeyError):
        raise _damaged(file, "it is not JSON with a format and a name") from None
    if form != FORMAT:
        raise ArchiveError(f"{file} has format {form!r}; this version reads {FORMAT}.")
    return contents


def _damaged(file: Path, why: str) -> ArchiveError:
    return ArchiveError(f"{file} is damaged: {why}.")


class _Reading:
    """What has been read of an archive so far."""

    def __init__(self, folder: Path, facts: Mapping[tuple[str, str], Facts]) -> None:
        self._folder = folder
        self._facts = facts
        self._faults: list[str] = []
        self._origins: dict[tuple[str, str], tuple[Training, str]] = {}
        self.records: dict[Training, Record] = {}
        self.missing: dict[Training, str] = {}
        self.curves: dict[Training, tuple[list[int], list[float], list[float]]] = {}
        self.histories: dict[Training, dict[int, dict[str, float]]] = {}
        self.cases: list[pd.DataFrame] = []
        self.test: list[pd.DataFrame] = []
        self.costs: dict[str, Cost] = {}
        self._tested: set[Path] = set()

    def add(self, training: Training) -> None:
        file = self._folder / "trainings" / f"{training.key}.json"
        if not file.exists():
            self.missing[training] = "not in the archive"
            return
        try:
            content = read_json(file)
            record = to_record(content["record"])
            losses = tuple(content["losses"])
            history = {int(epoch): values for epoch, values in content["operators"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _damaged(file, "it is not JSON with record, losses and operators") from None
        self._compare_origin(training, record)
        self.records[training] = record
        if losses[0]:
            self.curves[training] = losses
        if history:
            self.histories[training] = history
        scores = file.with_suffix(".csv")
        if scores.exists():
            facts = self._facts[training.dataset, training.configuration]
            table = self._read_table(scores)
            expected = facts.validation.get(training.fold, ())
            self._faults += check_scores(table, expected, tuple(facts.labels), str(training))
            self.cases.append(describe_scores(table, training, training.fold))
        else:
            self.missing[training] = f"failed: {record.failed}" if record.failed else "started, not finished"

    def _compare_origin(self, training: Training, record: Record) -> None:
        """With the first of the dataset, and with the first on the same plans."""
        origins = {
            "folds": ((training.dataset, "folds"), record.splits),
            "versions of dataset.json": ((training.dataset, "dataset"), record.dataset),
            "plans": ((training.dataset, training.plans), record.plans),
        }
        for what, (place, mine) in origins.items():
            first, theirs = self._origins.setdefault(place, (training, mine))
            if mine != theirs:
                self._faults.append(
                    f"{training} and {first} were trained with different {what}, so they cannot be compared."
                )

    def add_cost(self, arm_key: str) -> None:
        file = self._folder / "costs" / f"{arm_key}.json"
        if file.exists():
            try:
                self.costs[arm_key] = Cost(**read_json(file))
            except (ValueError, TypeError):
                raise _damaged(file, "it is not JSON with the figures of a cost") from None

    def add_test(self, training: Training, alone: bool, file: Path) -> None:
        """
        Args:
            alone: whether the training predicted by itself; file: see :func:`_test_file`.
        """
        if file in self._tested or not file.exists():
            return  # an arm's folds have one file together
        self._tested.add(file)
        table = self._read_table(file)
        labels = tuple(self._facts[training.dataset, training.configuration].labels)
        self._faults += check_scores(table, list(table["case"]), labels, f"{training}, test set")
        self.test.append(describe_scores(table, training, training.fold if alone else -1))

    def _read_table(self, file: Path) -> pd.DataFrame:
        try:
            text = pd.read_csv(file, dtype=str)
            if lacking := [name for name in ("patient", *score_columns()) if name not in text]:
                raise _damaged(file, f"it lacks the columns {', '.join(lacking)}")
            # Python's own conversion, unlike pandas', keeps every bit.
            return text.astype(dict.fromkeys(METRICS, float) | dict.fromkeys(_COUNTS, int))
        except ValueError as error:
            raise _damaged(file, f"it is no table of scores ({error})") from None

    def refuse_faults(self) -> None:
        if self._faults:
            raise ArchiveError("\n".join([f"{self._folder} does not fit together:", *self._faults]))


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)[columns()] if tables else pd.DataFrame(columns=columns())
