"""What can be known of an experiment before anything is planned, preprocessed or trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nnunet_deform.comparison.experiment import Dataset, ExperimentError, Folders, Place
from nnunet_deform.comparison.experiment_file import ExperimentFile
from nnunet_deform.comparison.prepare import (
    DatasetFolders,
    PreparationError,
    check_configuration,
    check_plans,
    check_test_set,
    check_tolerances,
    find_dataset,
    patients_of,
)
from nnunet_deform.comparison.splits import Split, SplitError, find_splits
from nnunet_deform.comparison.trainings import Training, TrainingError, is_done, list_trainings


@dataclass(frozen=True)
class Checked:
    """An experiment without faults. datasets, splits, patients: in its order, the folds as they are or will be written,
    and the patient of each case or None; done: trainings that are complete."""

    source: ExperimentFile
    folders: Folders
    datasets: tuple[DatasetFolders, ...]
    splits: tuple[list[Split], ...]
    patients: tuple[dict[str, str] | None, ...]
    trainings: tuple[Training, ...]
    done: frozenset[Training]


class _Faults:
    """One sentence for each, with its line."""

    def __init__(self, source: ExperimentFile) -> None:
        self._source = source
        self._found: dict[str, None] = {}

    def add(self, place: Place, words: str) -> None:
        self._found[self._source.fault(place, words)] = None

    @contextmanager
    def at(self, *place: int | str) -> Iterator[None]:
        try:
            yield
        except (PreparationError, SplitError) as error:
            self.add(place, str(error))
        except OSError as error:
            self.add(place, f"{error.filename} cannot be read ({error.strerror}).")

    def refuse(self) -> None:
        if self._found:
            raise ExperimentError("\n".join(self._found))


def find_datasets(source: ExperimentFile, folders: Folders) -> list[DatasetFolders]:
    """In the experiment's order.

    Raises:
        ExperimentError: one is not found, or listed by number and by name.
    """
    faults, found = _Faults(source), []
    for number, dataset in enumerate(source.experiment.datasets):
        with faults.at("datasets", number, "id"):
            here = find_dataset(dataset, folders)
            found.append(here)
            listed = [(d.name, e.configuration) for d, e in zip(found, source.experiment.datasets, strict=False)]
            if listed[-1] in listed[:-1]:
                faults.add(("datasets", number, "id"), f"{here.name} is listed twice, by number and by name.")
    faults.refuse()
    return found


def check_experiment(source: ExperimentFile, folders: Folders, *, trains_here: bool = True) -> Checked:
    """Reads only; takes seconds.

    Args:
        trains_here: whether the experiment's device must be on this machine.

    Raises:
        ExperimentError: everything that is wrong, one line for each fault.
    """
    from nnunet_deform.diagnosis import lookup  # imports every trainer, which jobs that do not check need not wait for

    experiment, faults = source.experiment, _Faults(source)
    datasets = find_datasets(source, folders)
    for number, arm in enumerate(experiment.arms):
        problem = lookup.variant_problem(arm.trainer, experiment.trainer_name(arm, experiment.seeds.first))
        if problem is not None:
            faults.add(("arms", number, "trainer"), problem)
    if trains_here and (problem := _device_problem(experiment.device)) is not None:
        faults.add(("device",), problem)
    splits, patients = [], []
    for number, (dataset, found) in enumerate(zip(experiment.datasets, datasets, strict=True)):
        _check_dataset(source, faults, number, dataset, found, folders)
        with faults.at("datasets", number, "patients"):
            patients.append(patients_of(dataset, found, source.path))
            with faults.at("datasets", number, "splits"):
                arguments = (found.cases, patients[-1], dataset.splits, experiment.folds)
                splits.append(find_splits(found.splits_file, *arguments))
    faults.refuse()
    trainings = list_trainings(experiment, folders)
    by_name = {found.name: found for found in datasets}
    done = set()
    for training in trainings:
        try:
            if is_done(training, by_name[training.dataset], folders):
                done.add(training)
        except TrainingError as error:
            faults.add(_place_of(source, training, error), str(error))
            break  # mostly the same is wrong with others
    faults.refuse()
    return Checked(source, folders, tuple(datasets), tuple(splits), tuple(patients), tuple(trainings), frozenset(done))


def _check_dataset(
    source: ExperimentFile, faults: _Faults, number: int, dataset: Dataset, found: DatasetFolders, folders: Folders
) -> None:
    with faults.at("datasets", number, "tolerance"):
        check_tolerances(dataset, found)
    with faults.at("datasets", number, "test"):
        check_test_set(dataset, found)
    usable = {}
    for position, arm in enumerate(source.experiment.arms):
        with faults.at("arms", position, "plans"):
            check_plans(arm, found)
            usable[arm.plans] = True
    for plans in usable:
        with faults.at("datasets", number, "configuration"):
            check_configuration(plans, dataset, found, folders)


def _device_problem(device: str) -> str | None:
    import torch

    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in there and not there[device]():
        return (
            f"this machine has no {device} device that torch can use; run the experiment where there is one, or set "
            "device: cpu."
        )
    return None


def _place_of(source: ExperimentFile, training: Training, error: TrainingError) -> Place:
    experiment = source.experiment
    arm = [arm.name for arm in experiment.arms].index(training.arm)
    dataset = experiment.datasets.index(experiment.dataset(training.dataset, training.configuration))
    if error.setting == "plans":
        changed_batch = experiment.datasets[dataset].batch_size is not None
        return ("datasets", dataset, "batch_size") if changed_batch else ("arms", arm, "plans")
    if error.setting == "trainer":
        return ("arms", arm, "trainer")
    return (error.setting,) if error.setting else ("arms", arm)
