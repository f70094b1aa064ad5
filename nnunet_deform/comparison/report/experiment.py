"""From an experiment and its folders to what the report is made of."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_deform.comparison import operators
from nnunet_deform.comparison.analysis import DatasetAnalysis, analyse
from nnunet_deform.comparison.collect import Collected, collect, test_commands, tolerances
from nnunet_deform.comparison.cost import Cost, read_cost
from nnunet_deform.comparison.declaration import declaration, differences, digest, read_declaration
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.files import read_json
from nnunet_deform.comparison.prepare import DatasetFolders, find_dataset
from nnunet_deform.comparison.report.content import DatasetContent, Provenance, ReportContent, Volumes
from nnunet_deform.comparison.report.figures import read_curve
from nnunet_deform.comparison.report.pictures import read_volumes
from nnunet_deform.comparison.trainings import Record, Training, list_trainings, read_record

_NNUNETS_EPOCHS, _NNUNETS_ITERATIONS = 1000, 250


def experiment_content(experiment: Experiment, folders: Folders, file: Path) -> ReportContent:
    """What the experiment has so far.

    Args:
        file: the experiment's.

    Raises:
        PreparationError, SplitError, TrainingError, CollectionError: see there.
    """
    collected = collect(experiment, folders, file.resolve())
    design = design_of(experiment)
    analysis = analyse(design, collected.cases, collected.missing)
    trainings = list_trainings(experiment, folders)
    records = {training: read_record(training, folders) for training in trainings}
    histories = operators.read_histories(trainings, folders.results)
    workers = experiment.resources.augmentation
    return ReportContent(
        name=experiment.name,
        design=design,
        analysis=analysis,
        cases=collected.cases,
        test=collected.test,
        datasets={
            (dataset.dataset, dataset.configuration): _dataset_content(
                experiment, folders, dataset, collected, trainings, histories
            )
            for dataset in analysis.datasets
        },
        command=f"nnunet-deform compare run {file.name}",
        source=file.read_text(encoding="utf-8"),
        commands=tuple(_commands(experiment, folders, collected, records)),
        environment={} if workers is None else {"nnUNet_n_proc_DA": str(workers)},
        provenance=tuple(_provenance(records)),
        measured=(
            f"Measured on {experiment.device}, one process an arm: median of three training steps on a real batch, "
            f"prediction of one case of median size {'with' if experiment.mirroring else 'without'} mirroring."
        ),
        operators=operators.last_epochs(histories),
        cautions=tuple(_cautions(experiment, file, folders, collected, records.values())),
    )


def _commands(
    experiment: Experiment, folders: Folders, collected: Collected, records: Mapping[Training, Record | None]
) -> list[str]:
    """nnU-Net's, of all trainings and of the test sets that have scores."""
    found = [command for record in records.values() if record for command in record.commands]
    tested = set(zip(*(collected.test[key] for key in ("dataset", "configuration", "arm", "seed")), strict=True))
    for training in records:
        key = (training.dataset, training.configuration, training.arm, training.seed)
        if key in tested and training.fold == experiment.folds[0]:
            dataset = find_dataset(experiment.dataset(training.dataset, training.configuration), folders)
            commands = test_commands(experiment, training, dataset, folders)
            found += [" ".join(_portable(argument, folders) for argument in command) for command in commands]
    return found


def _portable(argument: str, folders: Folders) -> str:
    """Quoted for a shell, without what only this machine has in its paths."""
    for name, folder in (("output", folders.output), ("nnUNet_raw", folders.raw)):
        if Path(argument).is_relative_to(folder):
            return f'"${name}"/{shlex.quote(Path(argument).relative_to(folder).as_posix())}'
    return shlex.quote(argument)


def _declared_when(experiment: Experiment, file: Path, folders: Folders, records: Iterable[Record | None]) -> str:
    content = declaration(experiment, file)
    stored = read_declaration(folders.output)
    if stored is None:
        return (
            "Nothing shows that all this was declared before the first training: "
            f"{folders.output / 'declared.json'} is missing or was changed."
        )
    date, sha256, declared = stored
    when = f"on {date} (SHA-256 {sha256[:12]})"
    first = min((record.started for record in records if record), default=None)
    if first is not None and first < date:
        when += f", AFTER the first training had begun ({first}). What is decided below was not decided in advance."
    elif digest(content) == sha256:
        when += ", before the first training."
    else:
        when += ", before the first training, and CHANGED afterwards. What is decided below was not decided in advance."
    changes = differences(declared, content)
    return f"What is compared was declared {when}" + "".join(f" {change}." for change in changes)


def _cautions(
    experiment: Experiment,
    file: Path,
    folders: Folders,
    collected: Collected,
    records: Iterable[Record | None],
) -> list[str]:
    found = [_declared_when(experiment, file, folders, records)]
    epochs = experiment.budget.epochs or _NNUNETS_EPOCHS
    iterations = experiment.budget.iterations or _NNUNETS_ITERATIONS
    share = epochs * iterations / (_NNUNETS_EPOCHS * _NNUNETS_ITERATIONS)
    if share < 1:
        found.append(
            f"Trainings were of {epochs} epochs of {iterations} iterations, {share:.2g} of nnU-Net's own "
            f"{_NNUNETS_EPOCHS} of {_NNUNETS_ITERATIONS}. What is found holds for this budget: an arm that learns "
            "slowly at first may be better in the end."
        )
    for training, why in collected.missing.items():
        found.append(f"No scores of {training}: {why}.")
    return found


def _dataset_content(
    experiment: Experiment,
    folders: Folders,
    dataset: DatasetAnalysis,
    collected: Collected,
    trainings: Sequence[Training],
    histories: operators.Histories,
) -> DatasetContent:
    mine = [t for t in trainings if (t.dataset, t.configuration) == (dataset.dataset, dataset.configuration)]
    of_arm = {t.arm: t for t in mine if (t.seed, t.fold) == (experiment.seeds.first, experiment.folds[0])}
    found = find_dataset(experiment.dataset(dataset.dataset, dataset.configuration), folders)
    costs = {arm: cost for arm, training in of_arm.items() if (cost := read_cost(training, folders)) is not None}
    curves = {
        arm: [curve for t in mine if t.arm == arm and (curve := read_curve(t.folder(folders.results)))[0]]
        for arm in of_arm
    }
    return DatasetContent(
        labels=found.labels,
        ignore_label=found.ignore_label,
        tolerances=tolerances(experiment, mine[0], found),
        patients_mapped=experiment.dataset(dataset.dataset, dataset.configuration).patients is not None,
        volumes=_reader_of_volumes(experiment, found, of_arm, folders),
        costs=costs,
        curves=curves,
        operators=operators.diagnose(
            {arm.name: arm.trainer for arm in experiment.arms},
            operators.of_dataset(histories, dataset.dataset, dataset.configuration),
        ),
        cautions=tuple(_not_tested_or_measured(experiment, dataset, collected, costs)),
    )


def _not_tested_or_measured(
    experiment: Experiment, dataset: DatasetAnalysis, collected: Collected, costs: Mapping[str, Cost]
) -> list[str]:
    """Complete arms whose test predictions or cost are missing."""
    asked = experiment.dataset(dataset.dataset, dataset.configuration).test
    test = collected.test
    tested = set(test[(test["dataset"] == dataset.dataset) & (test["configuration"] == dataset.configuration)]["arm"])
    lacking = {
        "test scores (compare run predicts with the folds as they are)": [
            arm for arm in dataset.arms if asked and arm not in tested
        ],
        "cost (compare run measures it)": [arm for arm in dataset.arms if arm not in costs],
    }
    return [
        f"{dataset.title}: {', '.join(arms)} {'has' if len(arms) == 1 else 'have'} no {what}."
        for what, arms in lacking.items()
        if arms
    ]


def _reader_of_volumes(
    experiment: Experiment, found: DatasetFolders, of_arm: Mapping[str, Training], folders: Folders
) -> Callable[[str, str], Volumes | None]:
    """Of the first seed's predictions."""
    fold_of = {
        case: fold
        for fold, split in enumerate(read_json(found.splits_file))
        for case in split["val"]
        if fold in experiment.folds
    }

    def read(arm: str, case: str) -> Volumes | None:
        training, ending = of_arm[arm], found.file_ending
        folder = training.model_folder(folders.results) / f"fold_{fold_of[case]}" / "validation"
        prediction = folder / f"{case}{ending}"
        if not prediction.exists():
            return None
        image = found.raw / "imagesTr" / f"{case}_0000{ending}"
        if not image.exists():  # a dataset that lists its files elsewhere
            image = Path(read_json(found.raw / "dataset.json")["dataset"][case]["images"][0])
        reader = PlansManager(str(found.plans_file(training.plans))).image_reader_writer_class()
        return read_volumes(image, found.raw / "labelsTr" / f"{case}{ending}", prediction, reader)

    return read


def _provenance(records: Mapping[Training, Record | None]) -> list[Provenance]:
    """What trainings were made from: one for all that agree."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for training, record in records.items():
        if record is not None:
            versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
            key = (training.dataset, training.plans, record.splits, record.plans, record.dataset, versions)
            rows.setdefault((*key, record.machine), []).append(training.arm)
    return [
        Provenance(
            dataset=dataset,
            plans=plans,
            trainings=f"{len(arms)}: {', '.join(dict.fromkeys(arms))}",
            splits=splits,
            plans_file=plans_file,
            dataset_file=dataset_file,
            versions=versions,
            machine=machine,
        )
        for (dataset, plans, splits, plans_file, dataset_file, versions, machine), arms in rows.items()
    ]
