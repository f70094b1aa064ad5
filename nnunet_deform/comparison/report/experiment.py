"""From an experiment's findings to what the report is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_deform.comparison import operators
from nnunet_deform.comparison.analysis import DatasetAnalysis, analyse
from nnunet_deform.comparison.collect import Collected
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.declaration import differences, digest
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.files import read_json
from nnunet_deform.comparison.findings import Findings
from nnunet_deform.comparison.prepare import DatasetFolders, find_dataset
from nnunet_deform.comparison.report.content import DatasetContent, Provenance, ReportContent, Volumes
from nnunet_deform.comparison.report.pictures import read_volumes
from nnunet_deform.comparison.trainings import Record, Training, list_trainings

_NNUNETS_EPOCHS, _NNUNETS_ITERATIONS = 1000, 250


def experiment_content(
    findings: Findings, command: str, sources: Mapping[tuple[str, str], OutOfFold] | None = None
) -> ReportContent:
    """What the experiment has so far.

    Args:
        command: the one that makes all this; sources: by dataset and configuration, see :func:`volume_readers`.
    """
    experiment, collected, records = findings.experiment, findings.collected, findings.records
    design = design_of(experiment)
    analysis = analyse(design, collected.cases, collected.missing)
    workers = experiment.resources.augmentation
    trained = [line for training in findings.trainings if training in records for line in records[training].commands]
    tested = [line for lines in findings.test_commands.values() for line in lines]
    return ReportContent(
        name=experiment.name,
        design=design,
        analysis=analysis,
        cases=collected.cases,
        test=collected.test,
        datasets={
            (dataset.dataset, dataset.configuration): _dataset_content(
                findings, dataset, (sources or {}).get((dataset.dataset, dataset.configuration))
            )
            for dataset in analysis.datasets
        },
        command=command,
        source=findings.source,
        commands=(*trained, *tested),
        environment={} if workers is None else {"nnUNet_n_proc_DA": str(workers)},
        provenance=tuple(_provenance(records)),
        measured=(
            f"Measured on {experiment.device}, one process an arm: median of three training steps on a real batch, "
            f"prediction of one case of median size {'with' if experiment.mirroring else 'without'} mirroring."
        ),
        operators=operators.last_epochs(findings.histories),
        cautions=tuple(_cautions(findings)),
    )


def _declared_when(findings: Findings) -> str:
    if findings.declared is None:
        return (
            "Nothing shows that all this was declared before the first training: the experiment's declared.json is "
            "missing or was changed."
        )
    date, sha256, declared = findings.declared
    when = f"on {date} (SHA-256 {sha256[:12]})"
    first = min((record.started for record in findings.records.values()), default=None)
    if first is not None and first < date:
        when += f", AFTER the first training had begun ({first}). What is decided below was not decided in advance."
    elif digest(findings.declaration) == sha256:
        when += ", before the first training."
    else:
        when += ", before the first training, and CHANGED afterwards. What is decided below was not decided in advance."
    changes = differences(declared, findings.declaration)
    return f"What is compared was declared {when}" + "".join(f" {change}." for change in changes)


def _cautions(findings: Findings) -> list[str]:
    found = [_declared_when(findings)]
    budget = findings.experiment.budget
    epochs = budget.epochs or _NNUNETS_EPOCHS
    iterations = budget.iterations or _NNUNETS_ITERATIONS
    share = epochs * iterations / (_NNUNETS_EPOCHS * _NNUNETS_ITERATIONS)
    if share < 1:
        found.append(
            f"Trainings were of {epochs} epochs of {iterations} iterations, {share:.2g} of nnU-Net's own "
            f"{_NNUNETS_EPOCHS} of {_NNUNETS_ITERATIONS}. What is found holds for this budget: an arm that learns "
            "slowly at first may be better in the end."
        )
    for training, why in findings.collected.missing.items():
        found.append(f"No scores of {training}: {why}.")
    return found


def _dataset_content(findings: Findings, dataset: DatasetAnalysis, source: OutOfFold | None) -> DatasetContent:
    experiment = findings.experiment
    mine = findings.of(dataset.dataset, dataset.configuration)
    arms = [arm.name for arm in experiment.arms]
    costs = {t.arm: findings.costs[t.arm_key] for t in mine if t.arm_key in findings.costs}
    facts = findings.facts.get((dataset.dataset, dataset.configuration))
    return DatasetContent(
        labels={} if facts is None else facts.labels,
        ignore_label=None if facts is None else facts.ignore_label,
        tolerances={} if facts is None else facts.tolerances,
        patients_mapped=experiment.dataset(dataset.dataset, dataset.configuration).patients is not None,
        volumes=source,
        page=None if source is None else source.page,
        costs=costs,
        curves={arm: [findings.curves[t] for t in mine if t.arm == arm and t in findings.curves] for arm in arms},
        operators=operators.diagnose(
            {arm.name: arm.trainer for arm in experiment.arms},
            operators.of_dataset(findings.histories, dataset.dataset, dataset.configuration),
        ),
        cautions=tuple(_not_tested_or_measured(experiment, dataset, findings.collected, costs)),
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


def volume_readers(experiment: Experiment, folders: Folders) -> dict[tuple[str, str], OutOfFold]:
    """By dataset and configuration: of the first seed's predictions, as far as they lie in ``folders``.

    Raises:
        PreparationError: a dataset is not found.
    """
    by_dataset: dict[tuple[str, str], dict[tuple[str, int], Training]] = {}
    for training in list_trainings(experiment, folders):
        if training.seed == experiment.seeds.first:
            mine = by_dataset.setdefault((training.dataset, training.configuration), {})
            mine[training.arm, training.fold] = training
    return {
        (name, configuration): OutOfFold(
            find_dataset(experiment.dataset(name, configuration), folders), trainings, folders
        )
        for (name, configuration), trainings in by_dataset.items()
    }


class OutOfFold:
    """The trainings that have not seen a case, and the files of it. Called, it is a ``ReadVolumes``."""

    def __init__(
        self, found: DatasetFolders, by_arm_and_fold: Mapping[tuple[str, int], Training], folders: Folders
    ) -> None:
        self._found, self._by_arm_and_fold, self._folders = found, by_arm_and_fold, folders
        folds = {fold for _, fold in by_arm_and_fold}
        splits = read_json(found.splits_file) if found.splits_file.exists() else []
        self._fold_of = {case: fold for fold, split in enumerate(splits) for case in split["val"] if fold in folds}

    @property
    def labels(self) -> Path:
        """The folder of true segmentations."""
        return self._found.raw / "labelsTr"

    def training(self, arm: str, case: str) -> Training:
        return self._by_arm_and_fold[arm, self._fold_of[case]]

    def image(self, case: str) -> Path:
        """The file of its first channel."""
        image = self._found.raw / "imagesTr" / f"{case}_0000{self._found.file_ending}"
        if not image.exists():  # a dataset that lists its files elsewhere
            image = Path(read_json(self._found.raw / "dataset.json")["dataset"][case]["images"][0])
        return image

    def inspected(self, arm: str) -> Path:
        """Where the pages of an arm's cases are, of ``nnunet-deform inspect``, relative to the report."""
        training = next(t for (name, _), t in self._by_arm_and_fold.items() if name == arm)
        return Path("inspect", training.arm_key)

    def page(self, arm: str, case: str) -> str | None:
        """A ``FindPage``."""
        page = self.inspected(arm) / case / "inspect.html"
        return page.as_posix() if (self._folders.output / "report" / page).exists() else None

    def __call__(self, arm: str, case: str) -> Volumes | None:
        training, ending = self.training(arm, case), self._found.file_ending
        prediction = training.folder(self._folders.results) / "validation" / f"{case}{ending}"
        if not prediction.exists():
            return None
        reader = PlansManager(str(self._found.plans_file(training.plans))).image_reader_writer_class()
        return read_volumes(self.image(case), self.labels / f"{case}{ending}", prediction, reader)


def _provenance(records: Mapping[Training, Record]) -> list[Provenance]:
    """What trainings were made from: one for all that agree."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for training, record in records.items():
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
