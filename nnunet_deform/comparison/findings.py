"""What an experiment has found so far, all but the images: gathered from its folders, or read from an archive."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_deform.comparison.collect import (
    Collected,
    collect,
    predicts_alone,
    test_commands,
    test_key,
    tolerances,
)
from nnunet_deform.comparison.cost import Cost, read_cost
from nnunet_deform.comparison.curves import Curve, read_curve
from nnunet_deform.comparison.declaration import Declared, declaration, read_declaration
from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.experiment_file import ExperimentFile
from nnunet_deform.comparison.files import read_json
from nnunet_deform.comparison.metrics import Region
from nnunet_deform.comparison.operators import Histories, read_histories
from nnunet_deform.comparison.prepare import find_dataset
from nnunet_deform.comparison.trainings import Record, Training, list_trainings, read_record


@dataclass(frozen=True)
class Facts:
    """Of one dataset in one configuration.

    labels: value of each class, or values of each region, by name; tolerances: of NSD in mm, by class;
    validation: the cases of each of the experiment's folds.
    """

    labels: Mapping[str, Region]
    ignore_label: int | None
    tolerances: Mapping[str, float]
    validation: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Findings:
    """
    source: the experiment file's text; trainings: all that it wants; records: of those that were begun;
    curves, histories: of losses and of what the operators did; facts: by dataset and configuration;
    costs: by :attr:`Training.arm_key`; test_commands: nnU-Net's, for the test set, by :func:`collect.test_key`;
    declared: the first declaration, None if there is no valid one; declaration: what the experiment says now.
    """

    experiment: Experiment
    source: str
    trainings: tuple[Training, ...]
    records: Mapping[Training, Record]
    collected: Collected
    curves: Mapping[Training, Curve]
    histories: Histories
    facts: Mapping[tuple[str, str], Facts]
    costs: Mapping[str, Cost]
    test_commands: Mapping[str, tuple[str, ...]]
    declared: Declared | None
    declaration: Mapping[str, Any]

    def of(self, dataset: str, configuration: str) -> list[Training]:
        return [t for t in self.trainings if (t.dataset, t.configuration) == (dataset, configuration)]


def gather(source: ExperimentFile, folders: Folders) -> Findings:
    """
    Raises:
        PreparationError, SplitError, TrainingError, CollectionError: see :func:`collect.collect`.
    """
    experiment = source.experiment
    collected = collect(experiment, folders, source.path)
    trainings = tuple(list_trainings(experiment, folders))
    records = {training: record for training in trainings if (record := read_record(training, folders))}
    curves = {training: read_curve(training.folder(folders.results)) for training in records}
    costs = {training.arm_key: cost for training in trainings if (cost := read_cost(training, folders))}
    return Findings(
        experiment=experiment,
        source=source.path.read_text(encoding="utf-8"),
        trainings=trainings,
        records=records,
        collected=collected,
        curves={training: curve for training, curve in curves.items() if curve[0]},
        histories=read_histories(records, folders.results),
        facts=dict(_facts(experiment, folders, trainings)),
        costs=costs,
        test_commands=_test_commands(experiment, folders, trainings, collected.test),
        declared=read_declaration(folders.output),
        declaration=declaration(experiment, source.path),
    )


def _facts(
    experiment: Experiment, folders: Folders, trainings: tuple[Training, ...]
) -> Iterator[tuple[tuple[str, str], Facts]]:
    first = {(t.dataset, t.configuration): t for t in reversed(trainings)}
    for (name, configuration), training in first.items():
        found = find_dataset(experiment.dataset(name, configuration), folders)
        if not found.splits_file.exists() or not found.plans_file(training.plans).exists():
            continue  # not prepared; the trainings are missing for that reason
        splits = read_json(found.splits_file)
        yield (
            (name, configuration),
            Facts(
                labels=found.labels,
                ignore_label=found.ignore_label,
                tolerances=tolerances(experiment, training, found),
                validation={fold: tuple(splits[fold]["val"]) for fold in experiment.folds},
            ),
        )


def _test_commands(
    experiment: Experiment, folders: Folders, trainings: tuple[Training, ...], test: pd.DataFrame
) -> dict[str, tuple[str, ...]]:
    keys = ("dataset", "configuration", "arm", "seed", "fold")
    tested = set(zip(*(test[key] for key in keys), strict=True))
    found = {}
    for training in trainings:
        alone = predicts_alone(experiment, training)
        fold = training.fold if alone else -1
        of_test = (training.dataset, training.configuration, training.arm, training.seed, fold)
        if of_test in tested and (alone or training.fold == experiment.folds[0]):
            dataset = find_dataset(experiment.dataset(training.dataset, training.configuration), folders)
            commands = test_commands(experiment, training, dataset, folders)
            found[test_key(experiment, training)] = tuple(
                " ".join(_portable(argument, folders) for argument in command) for command in commands
            )
    return found


def _portable(argument: str, folders: Folders) -> str:
    """Quoted for a shell, without what only this machine has in its paths."""
    for name, folder in (("output", folders.output), ("nnUNet_raw", folders.raw)):
        if Path(argument).is_relative_to(folder):
            return f'"${name}"/{shlex.quote(Path(argument).relative_to(folder).as_posix())}'
    return shlex.quote(argument)
