"""What must lie in nnU-Net's folders before the first training: plans, preprocessed cases, folds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_deform.comparison.experiment import Arm, Dataset, Experiment, Folders
from nnunet_deform.comparison.files import read_json, write_json
from nnunet_deform.comparison.splits import Split, ensure_splits, load_patients

# nnU-Net's planners by the plans they write. Other plans must exist before the run.
PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}

# What they plan; whether images are large enough for the second and third is known afterwards.
CONFIGURATIONS = ("3d_fullres", "3d_lowres", "3d_cascade_fullres", "2d")

RunCommand = Callable[[list[str]], None]


class PreparationError(RuntimeError):
    """A dataset, plan or configuration is not as the experiment needs it."""


@dataclass(frozen=True)
class DatasetFolders:
    """Where one dataset lies in nnU-Net's folders.

    labels: value of each class, or values of each region, by name; without background and ignore label.
    """

    name: str
    raw: Path
    preprocessed: Path
    labels: dict[str, int | tuple[int, ...]]
    ignore_label: int | None
    file_ending: str
    cases: tuple[str, ...]
    test_cases: tuple[str, ...]

    @property
    def splits_file(self) -> Path:
        return self.preprocessed / "splits_final.json"

    def plans_file(self, plans: str) -> Path:
        return self.preprocessed / f"{plans}.json"


def find_dataset(dataset: Dataset, folders: Folders) -> DatasetFolders:
    """Look a dataset up by its number or name.

    Raises:
        PreparationError: none or several have it, or it has no labels to train on.
    """
    pattern = f"Dataset{dataset.id:03d}_*" if isinstance(dataset.id, int) else dataset.id
    found = sorted(path for path in folders.raw.glob(pattern) if path.is_dir())
    if len(found) != 1:
        what = "no dataset" if not found else f"{len(found)} datasets"
        raise PreparationError(f"{folders.raw} has {what} {pattern}; put one there or correct the experiment's id.")
    raw = found[0]
    if not (raw / "dataset.json").is_file():
        raise PreparationError(f"{raw} has no dataset.json, so it is no dataset of nnU-Net.")
    try:
        description = read_json(raw / "dataset.json")
        ending, of_labels = str(description["file_ending"]), dict(description["labels"])
    except (ValueError, TypeError, KeyError):
        raise PreparationError(
            f"{raw / 'dataset.json'} is damaged: it is not JSON with labels and file_ending."
        ) from None
    cases, test_cases = (
        tuple(sorted(path.name.removesuffix(ending) for path in (raw / part).glob(f"*{ending}")))
        for part in ("labelsTr", "labelsTs")
    )
    if not cases:
        raise PreparationError(f"{raw / 'labelsTr'} has no *{ending} file.")
    labels = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in of_labels.items()
        if name not in ("background", "ignore")
    }
    return DatasetFolders(
        name=raw.name,
        raw=raw,
        preprocessed=folders.preprocessed / raw.name,
        labels=labels,
        ignore_label=of_labels.get("ignore"),
        file_ending=ending,
        cases=cases,
        test_cases=test_cases,
    )


def plans_name(arm: Arm, dataset: Dataset) -> str:
    """The plan that an arm is trained with: its own, or a copy with the dataset's batch size."""
    return arm.plans if dataset.batch_size is None else f"{arm.plans}_batch{dataset.batch_size}"


def patients_of(dataset: Dataset, found: DatasetFolders, file: Path) -> dict[str, str] | None:
    """Case to patient, or None where the experiment ``file`` gives no mapping.

    Raises:
        SplitError: the mapping does not fit.
    """
    if dataset.patients is None:
        return None
    return load_patients(file.parent / dataset.patients, found.cases, found.test_cases if dataset.test else ())


def check_tolerances(dataset: Dataset, found: DatasetFolders) -> None:
    """
    Raises:
        PreparationError: the experiment's tolerances are of other classes than the dataset's.
    """
    if isinstance(dataset.tolerance, dict) and set(dataset.tolerance) != set(found.labels):
        raise PreparationError(
            f"the tolerances of {found.name} are for {sorted(dataset.tolerance)}; it has the classes "
            f"{sorted(found.labels)}."
        )


def check_test_set(dataset: Dataset, found: DatasetFolders) -> None:
    """
    Raises:
        PreparationError: the experiment asks for a test set that the dataset does not have.
    """
    for part in ("imagesTs", "labelsTs") if dataset.test else ():
        if not (found.raw / part).is_dir():
            raise PreparationError(f"{found.raw / part} does not exist; set test: false for this dataset.")


def check_plans(arm: Arm, found: DatasetFolders) -> None:
    """
    Raises:
        PreparationError: an arm's plans do not exist and are none that are made.
    """
    if arm.plans not in PLANNERS and not found.plans_file(arm.plans).exists():
        raise PreparationError(
            f"{found.plans_file(arm.plans)} does not exist; make these plans first, or use one of {sorted(PLANNERS)}."
        )


def check_configuration(plans: str, dataset: Dataset, found: DatasetFolders, folders: Folders) -> None:
    """Whether plans have or will have the dataset's configuration, and can be preprocessed and copied.

    Raises:
        PreparationError: not so.
    """
    if not found.plans_file(plans).exists():
        if dataset.configuration not in CONFIGURATIONS:
            raise PreparationError(
                f"nnU-Net's planners make no configuration {dataset.configuration!r}; they make "
                f"{', '.join(CONFIGURATIONS)}."
            )
        return
    folder = data_folder(plans, dataset, found)
    if not is_preprocessed(folder, found.cases):
        _refuse_if_trained(found, folders, folder)
    if dataset.batch_size is not None:
        _batch_copy(found, plans, dataset.batch_size, dataset.configuration)


def prepare_dataset(
    experiment: Experiment, dataset: Dataset, folders: Folders, file: Path, run: RunCommand
) -> list[Split]:
    """Plan, preprocess what is not preprocessed, and write the folds; everything that is there is kept.

    Args:
        run: runs one of nnU-Net's commands.

    Raises:
        PreparationError, SplitError: see there; what can be known before is in :mod:`nnunet_deform.comparison.check`.
    """
    found = find_dataset(dataset, folders)
    processes = str(experiment.resources.processes)
    base_plans = list(dict.fromkeys(arm.plans for arm in experiment.arms))
    patients = patients_of(dataset, found, file)
    splits = ensure_splits(found.splits_file, found.cases, patients, dataset.splits, experiment.folds)
    number = found.name[len("Dataset") :][:3]
    missing = [name for name in base_plans if not found.plans_file(name).exists()]
    if missing:
        if not (found.preprocessed / "dataset_fingerprint.json").exists():
            run(["nnUNetv2_extract_fingerprint", "-d", number, "--verify_dataset_integrity", "-np", processes])
        for name in missing:
            run(["nnUNetv2_plan_experiment", "-d", number, "-pl", PLANNERS[name]])
    for name in base_plans:
        folder = data_folder(name, dataset, found)
        if not is_preprocessed(folder, found.cases):
            _refuse_if_trained(found, folders, folder)
            arguments = ["-d", number, "-plans_name", name, "-c", dataset.configuration, "-np", processes]
            run(["nnUNetv2_preprocess", *arguments])
            if not is_preprocessed(folder, found.cases):
                raise PreparationError(f"nnUNetv2_preprocess has left cases out of {folder}; see its log.")
        if dataset.batch_size is not None:
            file, plans = _batch_copy(found, name, dataset.batch_size, dataset.configuration)
            if not file.exists():
                write_json(file, plans)
    return splits


def data_folder(plans: str, dataset: Dataset, found: DatasetFolders) -> Path:
    """Of the cases that are preprocessed for existing plans.

    Raises:
        PreparationError: the plans do not have the dataset's configuration.
    """
    configuration = _configuration(found.plans_file(plans), dataset.configuration)
    return found.preprocessed / configuration["data_identifier"]


def _configuration(plans: Path, name: str) -> dict[str, Any]:
    try:
        configurations = dict(read_json(plans)["configurations"])
    except (ValueError, TypeError, KeyError):
        raise PreparationError(f"{plans} is damaged: it is not JSON with configurations.") from None
    if name not in configurations:
        raise PreparationError(f"{plans} has no configuration {name!r}; it has {sorted(configurations)}.")
    configuration = dict(configurations[name])
    while "inherits_from" in configuration:
        parent = configurations[configuration.pop("inherits_from")]
        configuration = {**parent, **configuration}
    return configuration


def is_preprocessed(folder: Path, cases: tuple[str, ...]) -> bool:
    # nnU-Net writes a case's properties last.
    return all((folder / f"{case}.pkl").exists() for case in cases)


def _refuse_if_trained(found: DatasetFolders, folders: Folders, folder: Path) -> None:
    """nnU-Net deletes the folder before it preprocesses, which would break a training on it."""
    started = sorted((folders.results / found.name).glob("*/fold_*/checkpoint_*.pth"))
    if started and folder.exists():
        raise PreparationError(
            f"{folder} lacks cases that the dataset has, but {started[0].parent} was already trained with it; put the "
            "dataset back as it was, or start an experiment with another output folder."
        )


def _batch_copy(found: DatasetFolders, base: str, batch_size: int, configuration: str) -> tuple[Path, dict[str, Any]]:
    """Where a copy of plans with another batch stands, and what is in it."""
    plans = read_json(found.plans_file(base))
    plans["plans_name"] = f"{base}_batch{batch_size}"
    plans["configurations"][configuration]["batch_size"] = batch_size
    file = found.plans_file(plans["plans_name"])
    if file.exists() and read_json(file) != json.loads(json.dumps(plans)):
        raise PreparationError(
            f"{file} is not a copy of {base} with batch {batch_size}: one of the two has changed since. Move the copy "
            "away, with all results that rest on it."
        )
    return file, plans
