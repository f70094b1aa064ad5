"""From nnU-Net's predictions to one tidy table, and the refusal of anything that does not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.files import fingerprint, read_json, write_json, write_table
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.prepare import DatasetFolders, check_tolerances, find_dataset, patients_of
from nnunet_deform.comparison.scoring import Classes, score_columns, score_files, summarised_files
from nnunet_deform.comparison.splits import check_splits, read_splits
from nnunet_deform.comparison.trainings import Training, is_done, list_trainings, read_record


def columns() -> list[str]:
    """Of a table of scores from several trainings."""
    case, *scores = score_columns()
    return ["dataset", "configuration", "arm", "seed", "fold", case, "patient", *scores]


class CollectionError(RuntimeError):
    """Scores that contradict each other; one sentence for each."""


@dataclass(frozen=True)
class Collected:
    """cases: one row a training, case and class, out of fold, with :func:`columns`; test: the same of the test set,
    fold -1 where it was predicted by the ensemble of the folds; missing: why a training has no scores, by its words."""

    cases: pd.DataFrame
    test: pd.DataFrame
    missing: dict[Training, str]


def predicts_alone(experiment: Experiment, training: Training) -> bool:
    """Whether each training predicts the test set by itself, and not an arm's folds together."""
    return experiment.dataset(training.dataset, training.configuration).test == "trainings"


def test_key(experiment: Experiment, training: Training) -> str:
    """Names the test predictions that a training takes part in."""
    return training.key if predicts_alone(experiment, training) else training.arm_key


def test_folder(experiment: Experiment, training: Training, folders: Folders) -> Path:
    """Where they lie."""
    return folders.output / "test" / test_key(experiment, training)


def _test_folds(experiment: Experiment, training: Training) -> tuple[int, ...]:
    return (training.fold,) if predicts_alone(experiment, training) else experiment.folds


def test_commands(
    experiment: Experiment, training: Training, found: DatasetFolders, folders: Folders
) -> list[list[str]]:
    """nnU-Net's commands that predict imagesTs with a training or an arm's folds, and evaluate that."""
    folder, processes = test_folder(experiment, training, folders), str(experiment.resources.processes)
    predict = ["nnUNetv2_predict", "-d", training.dataset, "-i", str(found.raw / "imagesTs"), "-o", str(folder)]
    predict += ["-c", training.configuration, "-tr", training.trainer, "-p", training.plans]
    predict += ["-f", *(str(fold) for fold in _test_folds(experiment, training)), "-device", experiment.device]
    predict += ["-npp", processes, "-nps", processes]
    predict += [] if experiment.mirroring else ["--disable_tta"]
    evaluate = ["nnUNetv2_evaluate_folder", str(found.raw / "labelsTs"), str(folder), "-np", processes]
    evaluate += ["-djfile", str(folder / "dataset.json"), "-pfile", str(folder / "plans.json")]
    evaluate += ["-o", str(folder / "summary.json")]
    return [predict, evaluate]


def write_ensemble(experiment: Experiment, training: Training, folders: Folders) -> None:
    """Note in an empty :func:`test_folder` what its predictions will be made from."""
    write_json(test_folder(experiment, training, folders) / "made_from.json", _ensemble(experiment, training, folders))


def is_predicted(experiment: Experiment, training: Training, folders: Folders) -> bool:
    """Whether the test set was predicted by the trainings as they are, and evaluated."""
    folder = test_folder(experiment, training, folders)
    files = folder / "summary.json", folder / "made_from.json"
    return all(file.exists() for file in files) and read_json(files[1]) == _ensemble(experiment, training, folders)


def _ensemble(experiment: Experiment, training: Training, folders: Folders) -> dict[str, Any]:
    folds = _test_folds(experiment, training)
    records = [read_record(replace(training, fold=fold), folders) for fold in folds]
    return {"folds": list(folds), "checkpoints": [record and record.checkpoint for record in records]}


def scores_file(training: Training, folders: Folders) -> Path:
    return folders.output / "scores" / f"{training.key}.parquet"


def tolerances(experiment: Experiment, training: Training, found: DatasetFolders) -> dict[str, float]:
    """NSD's tolerance of each class in mm.

    Raises:
        PreparationError: the experiment names classes that the dataset does not have, or leaves some out.
    """
    dataset = experiment.dataset(training.dataset, training.configuration)
    check_tolerances(dataset, found)
    stated = dataset.tolerance
    if stated is None:
        stated = min(read_json(found.plans_file(training.plans))["original_median_spacing_after_transp"])
    return dict(stated) if isinstance(stated, dict) else dict.fromkeys(found.labels, float(stated))


def _read_scores(file: Path, summary: Path, tolerance: dict[str, float]) -> pd.DataFrame | None:
    """None where there are none of these predictions with these tolerances and with every metric."""
    if not file.exists() or not summary.exists():
        return None
    table = pd.read_parquet(file)
    complete = set(METRICS) <= set(table) and table.attrs == _made_from(summary, tolerance)
    return table if complete else None


def _made_from(summary: Path, tolerance: dict[str, float]) -> dict[str, Any]:
    return {"summary": fingerprint(summary), "tolerances": tolerance}


def _score(experiment: Experiment, training: Training, found: DatasetFolders, summary: Path, file: Path) -> None:
    by_name = tolerances(experiment, training, found)
    if _read_scores(file, summary, by_name) is not None:
        return
    table = score_files(
        summarised_files(summary, found.file_ending),
        reader=PlansManager(str(found.plans_file(training.plans))).image_reader_writer_class(),
        classes=Classes(found.labels, found.ignore_label),
        tolerances=by_name,
        processes=experiment.resources.processes,
    )
    table.attrs = _made_from(summary, by_name)  # kept in the file
    write_table(file, table)


def score_training(experiment: Experiment, training: Training, found: DatasetFolders, folders: Folders) -> None:
    """Write the scores of a finished training's validation cases, if they are not there with these tolerances."""
    _score(experiment, training, found, training.summary(folders.results), scores_file(training, folders))


def scores_file_of_test(training: Training, folders: Folders) -> Path:
    """
    Args:
        training: the one that predicts alone, or the first of the arm's folds.
    """
    return folders.output / "scores" / f"{training.key}_test.parquet"


def score_test(experiment: Experiment, training: Training, found: DatasetFolders, folders: Folders) -> None:
    """Write the scores of test predictions, if they are not there with these tolerances."""
    summary = test_folder(experiment, training, folders) / "summary.json"
    _score(experiment, training, found, summary, scores_file_of_test(training, folders))


def collect(experiment: Experiment, folders: Folders, file: Path) -> Collected:
    """All scores of the experiment so far.

    Raises:
        CollectionError: scores do not fit together; every fault is named.
        PreparationError: a dataset is not found, or see :func:`tolerances`.
        SplitError: the folds or the patients do not fit, see there.
        TrainingError: trainings from other folds or plans.
    """
    out_of_fold, test, faults = [], [], []
    missing: dict[Training, str] = {}
    datasets: dict[str, DatasetFolders] = {}
    patients_by_dataset: dict[str, dict[str, str]] = {}
    for dataset in experiment.datasets:
        found = find_dataset(dataset, folders)
        datasets[found.name] = found
        patients = patients_of(dataset, found, file)
        patients_by_dataset[found.name] = patients or {case: case for case in found.cases}
        if found.splits_file.exists():  # the patients may be newer than the last run
            check_splits(read_splits(found.splits_file), found.cases, patients, experiment.folds, found.splits_file)
    for training in list_trainings(experiment, folders):
        found = datasets[training.dataset]
        if not found.splits_file.exists() or not found.plans_file(training.plans).exists():
            missing[training] = "the dataset is not prepared"
            continue
        if not is_done(training, found, folders):
            record = read_record(training, folders)
            started = "started, not finished" if record else "not started"
            missing[training] = f"failed: {record.failed}" if record and record.failed else started
            continue
        tolerance = tolerances(experiment, training, found)
        table = _read_scores(scores_file(training, folders), training.summary(folders.results), tolerance)
        if table is None:
            missing[training] = "trained, not scored with the experiment's tolerances (compare run scores it)"
            continue
        expected = read_json(found.splits_file)[training.fold]["val"]
        faults += check_scores(table, expected, tuple(found.labels), str(training))
        patients = patients_by_dataset[training.dataset]
        out_of_fold.append(describe_scores(table, training, training.fold).assign(patient=table["case"].map(patients)))
        summary = test_folder(experiment, training, folders) / "summary.json"
        of_test = _read_scores(scores_file_of_test(training, folders), summary, tolerance)
        if of_test is not None and is_predicted(experiment, training, folders):
            # Which cases these are nnU-Net has checked.
            faults += check_scores(of_test, list(of_test["case"]), tuple(found.labels), f"{training}, test set")
            of_cases = of_test["case"].map(patients).fillna(of_test["case"])  # not all mappings name test cases
            fold = training.fold if predicts_alone(experiment, training) else -1
            test.append(describe_scores(of_test, training, fold).assign(patient=of_cases))
    if faults:
        raise CollectionError("\n".join(faults))
    empty = pd.DataFrame(columns=columns())
    return Collected(
        cases=pd.concat(out_of_fold, ignore_index=True)[columns()] if out_of_fold else empty,
        test=pd.concat(test, ignore_index=True)[columns()] if test else empty,
        missing=missing,
    )


def describe_scores(table: pd.DataFrame, training: Training, fold: int) -> pd.DataFrame:
    """The same rows with the columns that tell trainings apart; fold: -1 for an ensemble of folds."""
    return table.assign(
        dataset=training.dataset,
        configuration=training.configuration,
        arm=training.arm,
        seed=training.seed,
        fold=fold,
    )


def check_scores(table: pd.DataFrame, cases: Sequence[str], labels: Sequence[str], what: str) -> list[str]:
    """Faults of one training's scores, one sentence each.

    Args:
        table: columns case, label, the metrics, voxels_truth, voxels_prediction.
        cases: the fold's validation cases.
        labels: the dataset's classes.
        what: the training, in words.
    """
    faults = []
    if lacking := sorted(set(cases) - set(table["case"])):
        faults.append(f"{what}: no scores of {lacking}.")
    if foreign := sorted(set(table["case"]) - set(cases)):
        faults.append(f"{what}: scores of {foreign}, which are not among the fold's validation cases.")
    twice = table[table.duplicated(["case", "label"])]
    if len(twice):
        faults.append(f"{what}: the case {twice['case'].iloc[0]!r} is scored twice ({twice['label'].iloc[0]}).")
    found = set(table["label"])
    if found != set(labels):
        faults.append(f"{what}: scores of the classes {sorted(found)}; the dataset has {sorted(labels)}.")
    present = (table["voxels_truth"] + table["voxels_prediction"]) > 0
    for name in METRICS:
        wrong = table[present != np.isfinite(table[name])]
        if len(wrong):
            row = wrong.iloc[0]
            faults.append(f"{what}: {name} of {row['label']} in {row['case']!r} is {row[name]}.")
    return faults
