"""The experiment file: what is compared, on what, at what cost, and which hypotheses were declared before the run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nnunet_deform.comparison.metrics import METRICS

_TRAINER = re.compile(r"nnUNetTrainer[\w.+-]*")
_DATASET = re.compile(r"Dataset\d{3}_[^*?\[\]/\\]+")
_LENGTH_OR_SEED = re.compile(r"_(\d+epochs|\d+iters|seed\d+|unmirrored)(?=_|$)")

MOST_HYPOTHESES = 6

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*$")]


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}.")
    return name


MetricName = Annotated[str, AfterValidator(_known_metric)]


class ExperimentError(ValueError):
    """The experiment file cannot be used; one line for each fault, ``file:line: place: what is wrong``."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Strict):
    """id: nnU-Net's number or name; batch_size: train with a copy of each plan that has this batch;
    patients: CSV or JSON that maps case to patient; splits: number of folds, if there is no splits_final.json yet;
    tolerance: of NSD in mm, one for all or one a class; None is the smallest voxel side of the median spacing;
    test: predict and score imagesTs with labelsTs, which no decision may rest on."""

    id: int | str
    configuration: Name = "3d_fullres"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    patients: Path | None = None
    splits: Annotated[int, Field(ge=2)] = 5
    tolerance: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    test: bool = False

    @field_validator("id")
    @classmethod
    def _number_or_full_name(cls, identifier: int | str) -> int | str:
        if isinstance(identifier, str) and identifier.isdigit():
            return int(identifier)
        if isinstance(identifier, str) and not _DATASET.fullmatch(identifier):
            raise ValueError(
                f"{identifier!r} is neither a dataset's number nor its full name, such as Dataset004_Hippocampus."
            )
        return identifier


class Arm(_Strict):
    """A trainer (a recipe suffix is part of its name) on a plan."""

    name: Name
    trainer: str
    plans: Name = "nnUNetPlans"

    @field_validator("trainer")
    @classmethod
    def _without_length_or_seed(cls, trainer: str) -> str:
        if not _TRAINER.fullmatch(trainer) or "__" in trainer:
            raise ValueError(f"{trainer!r} is no trainer's name; they begin with nnUNetTrainer and have no '__'.")
        if found := _LENGTH_OR_SEED.search(trainer):
            raise ValueError(
                f"{trainer!r} fixes {found[0]!r} by name; write the trainer without it, because length, seeds and "
                "mirroring are the experiment's and the same for every arm."
            )
        return trainer


class Seeds(_Strict):
    """first: for every arm and fold; repeats: further seeds, on ``folds`` (None: all), for ``arms`` (None: all)."""

    first: Annotated[int, Field(ge=0)] = 1
    repeats: tuple[Annotated[int, Field(ge=0)], ...] = ()
    folds: tuple[int, ...] | None = None
    arms: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Seeds:
        if len({self.first, *self.repeats}) != 1 + len(self.repeats):
            raise ValueError(f"the seeds {[self.first, *self.repeats]} are not all different.")
        return self


class Budget(_Strict):
    """The same for every arm. None: each trainer's own."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    iterations: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _iterations_need_epochs(self) -> Budget:
        if self.iterations is not None and self.epochs is None:
            raise ValueError("iterations (per epoch) need epochs, too.")
        return self


class Statistics(_Strict):
    """alpha: level of the whole family; band: differences within +-band count as equal, of the primary metric in its
    unit, None is the metric's own; draws: of the ranking's bootstrap; seed: of its random numbers."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    band: Annotated[float, Field(gt=0)] | None = None
    draws: Annotated[int, Field(ge=1000)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 0


class Resources(_Strict):
    """processes: of preprocessing, export and scoring; augmentation: worker processes of a training, 0 for bit-equal
    runs, None as nnU-Net chooses."""

    processes: Annotated[int, Field(ge=1)] = 1
    augmentation: Annotated[int, Field(ge=0)] | None = None


class Experiment(_Strict):
    """See ``nnunet-deform compare init`` for a commented example.

    mirroring: whether predictions average over mirrored images, as nnU-Net's own validation does;
    hypotheses: pairs of arms, declared before the run, on the ``primary`` metric and every dataset: they share alpha.
    All other pairs are exploratory.
    """

    name: Name
    datasets: Annotated[tuple[Dataset, ...], Field(min_length=1)]
    arms: Annotated[tuple[Arm, ...], Field(min_length=2)]
    folds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    seeds: Seeds = Seeds()
    budget: Budget = Budget()
    mirroring: bool = True
    primary: MetricName = "Dice"
    hypotheses: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    statistics: Statistics = Statistics()
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    resources: Resources = Resources()
    checkpoint: Literal["checkpoint_final"] = "checkpoint_final"
    raw: Path | None = None
    preprocessed: Path | None = None
    results: Path | None = None
    output: Path | None = None

    @field_validator("folds", mode="before")
    @classmethod
    def _no_fold_all(cls, folds: Any) -> Any:
        if folds == "all" or (isinstance(folds, list) and "all" in folds):
            raise ValueError(
                "fold 'all' trains on every case, so nothing is left to score it on; give numbers, for example "
                "[0, 1, 2, 3, 4]."
            )
        if isinstance(folds, list) and len(set(map(str, folds))) != len(folds):
            raise ValueError(f"{folds} names a fold twice.")
        return folds

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _no_best_checkpoint(cls, checkpoint: Any) -> Any:
        if checkpoint != "checkpoint_final":
            raise ValueError(
                f"{checkpoint!r} would be chosen by the very cases it is scored on; only checkpoint_final is allowed."
            )
        return checkpoint

    @field_validator("hypotheses")
    @classmethod
    def _a_handful(cls, hypotheses: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        if len(hypotheses) > MOST_HYPOTHESES:
            raise ValueError(
                f"{len(hypotheses)} hypotheses share alpha, so that hardly any can be decided; declare at most "
                f"{MOST_HYPOTHESES}. The report shows all other pairs of arms as exploratory."
            )
        return hypotheses

    @field_validator("arms")
    @classmethod
    def _distinct_arms(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        for position, arm in enumerate(arms):
            for other in arms[:position]:
                if other.name == arm.name:
                    raise ValueError(f"two arms are named {arm.name!r}.")
                if (other.trainer, other.plans) == (arm.trainer, arm.plans):
                    raise ValueError(f"the arms {other.name!r} and {arm.name!r} are the same trainer on the same plan.")
        return arms

    @field_validator("datasets")
    @classmethod
    def _distinct_datasets(cls, datasets: tuple[Dataset, ...]) -> tuple[Dataset, ...]:
        named = [(str(dataset.id), dataset.configuration) for dataset in datasets]
        if len(set(named)) != len(named):
            raise ValueError("a dataset is listed twice with the same configuration.")
        return datasets

    @model_validator(mode="after")
    def _references_exist(self) -> Experiment:
        names = {arm.name for arm in self.arms}
        for pair in self.hypotheses:
            for name in pair:
                if name not in names:
                    raise ValueError(f"hypotheses: there is no arm {name!r}; the arms are {sorted(names)}.")
            if pair[0] == pair[1]:
                raise ValueError(f"hypotheses: {pair[0]!r} is compared with itself.")
        if len({frozenset(pair) for pair in self.hypotheses}) != len(self.hypotheses):
            raise ValueError("hypotheses: a pair is declared twice.")
        for name in self.seeds.arms or ():
            if name not in names:
                raise ValueError(f"seeds.arms: there is no arm {name!r}; the arms are {sorted(names)}.")
        for fold in self.seeds.folds or ():
            if fold not in self.folds:
                raise ValueError(f"seeds.folds: fold {fold} is not among the folds {list(self.folds)}.")
        return self

    def dataset(self, name: str, configuration: str) -> Dataset:
        """By the full name of its folder."""
        number = int(name[len("Dataset") :][:3])
        return next(d for d in self.datasets if d.id in (number, name) and d.configuration == configuration)

    def band(self, metric: str) -> float:
        """Within which differences count as equal, in the metric's unit."""
        stated = self.statistics.band if metric == self.primary else None
        return METRICS[metric].band if stated is None else stated

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def paired_starts(self, first: str, second: str) -> bool:
        """Whether two arms are a network and an ablation, a twin or another recipe of it, on the same plans: such
        networks start from the same weights at a seed, wherever they have the same parameters.

        By the trainers' names, which are alike up to the first underscore. Where a name misleads nothing is wrong, only
        fewer (alike) or more (not alike) trainings are needed: both analyses hold for arms of either sort.
        """
        one, two = self.arm(first), self.arm(second)
        return one.plans == two.plans and one.trainer.split("_")[0] == two.trainer.split("_")[0]

    def trainer_name(self, arm: Arm, seed: int) -> str:
        """The class that nnU-Net is told to train: the arm's trainer with this experiment's suffixes."""
        name = arm.trainer
        if self.budget.epochs is not None:
            name += f"_{self.budget.epochs}epochs"
            if self.budget.iterations is not None:
                name += f"{self.budget.iterations}iters"
        return f"{name}_seed{seed}" + ("" if self.mirroring else "_unmirrored")

    def trainings(self) -> Iterator[tuple[Dataset, Arm, int, int]]:
        """Dataset, arm, seed and fold of every training, fold by fold, so that arms stay comparable at any time."""
        repeated_arms = set(self.seeds.arms or [arm.name for arm in self.arms])
        repeated_folds = set(self.folds if self.seeds.folds is None else self.seeds.folds)
        for dataset in self.datasets:
            for fold in self.folds:
                for arm in self.arms:
                    yield dataset, arm, self.seeds.first, fold
            for seed in self.seeds.repeats:
                for fold in self.folds:
                    for arm in self.arms:
                        if fold in repeated_folds and arm.name in repeated_arms:
                            yield dataset, arm, seed, fold


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders and the experiment's own, all absolute."""

    raw: Path
    preprocessed: Path
    results: Path
    output: Path


def find_folders(experiment: Experiment, file: Path) -> Folders:
    """Relative paths in the file start from the file's folder. raw and preprocessed default to nnU-Net's environment
    variables, output to a folder beside the file with the experiment's name, results to a folder in there.

    Raises:
        ExperimentError: a folder is given nowhere, or raw does not exist.
    """
    base = file.resolve().parent

    def stated(key: str) -> Path:
        given: Path | None = getattr(experiment, key)
        variable = f"nnUNet_{key}"
        if given is not None:
            return base / given.expanduser()
        if os.environ.get(variable):
            return Path(os.environ[variable]).resolve()
        raise ExperimentError(f"{file}: set {key}: in the file, or the environment variable {variable}.")

    output = base / (experiment.output or Path(experiment.name)).expanduser()
    results = output / "nnUNet_results" if experiment.results is None else base / experiment.results.expanduser()
    folders = Folders(stated("raw"), stated("preprocessed"), results, output)
    if not folders.raw.is_dir():
        raise ExperimentError(f"{file}: the folder of raw datasets {folders.raw} does not exist.")
    return folders


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, which PyYAML would let overwrite each other silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            value = self.construct_object(key, deep=True)
            if value in seen:
                raise yaml.MarkedYAMLError(problem=f"{value!r} is set twice", problem_mark=key.start_mark)
            seen.add(value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """027 is dataset 27, as everywhere in nnU-Net, and not the octal 23 of YAML 1.1."""
        return int(node.value) if node.value.isdigit() else int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _line(node: yaml.Node | None, place: tuple[int | str, ...]) -> int:
    """Line of the innermost part of ``place`` that the file has."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        # Anything else is a branch of a union in pydantic's path, which the file does not have.
    return line


def _place(place: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


_WORDS = {
    "extra_forbidden": "is no setting here; check the spelling",
    "missing": "is missing",
}


def load_experiment(file: Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        ExperimentError: it cannot be read, or see :func:`parse_experiment`.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ExperimentError(f"cannot read {file} ({error.strerror}).") from error
    return parse_experiment(text, file)


def parse_experiment(text: str, file: Path) -> Experiment:
    """
    Args:
        file: where the text stands, for messages.

    Raises:
        ExperimentError: it is no YAML, or does not fit; every fault with its line.
    """
    try:
        tree = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ExperimentError(f"{where}: {error.problem}.") from None
    if not isinstance(content, dict):
        raise ExperimentError(f"{file}:1: an experiment is a mapping with name, datasets, arms and hypotheses.")
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            message = _WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            place = fault["loc"]
            if not place and ": " in message:  # a check of the whole names its place itself
                key, message = message.split(": ", 1)
                place = tuple(key.split("."))
            faults.append(f"{file}:{_line(tree, place)}: {_place(place)}: {message}")
        raise ExperimentError("\n".join(faults)) from None


_DEFAULT = """\
# One experiment of nnunet-deform. Run it (again, after any interruption) with
#   nnunet-deform compare run {file}
name: {name}

datasets:
  - id: {dataset}
    configuration: {configuration}
    # batch_size: 2          # train every arm with a copy of its plan that has this batch
    # patients: patients.csv # lines "case,patient": folds never separate a patient, statistics count patients
    # tolerance: 1.0         # mm, of NSD, or one a class; default: the smallest voxel side of the median spacing
    test: {test}

# A network, its twin without the new operator, and nnU-Net's own two, all with nnU-Net's own recipe.
arms:
  - {{name: stock, trainer: nnUNetTrainer}}
  - {{name: ResEncM, trainer: nnUNetTrainer, plans: nnUNetResEncUNetMPlans}}
  - {{name: DeformUX, trainer: nnUNetTrainerDeformUX}}
  - {{name: DeformUX-off, trainer: nnUNetTrainerDeformUX_opOff}}
  # With a recipe suffix, to tell network and recipe apart:
  # - {{name: stock-AdamW, trainer: nnUNetTrainer_AdamW}}
  # - {{name: LightMedSeg, trainer: nnUNetTrainerLightMedSeg}}

folds: [0, 1, 2, 3, 4]

# How much trainings of one arm differ by chance must be known: both arms of a hypothesis need at least six trainings
# beyond the first of each fold, as three seeds on three folds give.
seeds:
  first: 1
  repeats: [2, 3]
  folds: [0, 1, 2]

# The same for every arm; left out, each trainer's own (1000 epochs of 250 iterations).
# budget: {{epochs: 100, iterations: 250}}

mirroring: true # predictions average over mirrored images, as nnU-Net's; 8 times the cost in 3D

# Declared before the run: the pairs that are tested on the primary metric, at most six. All else is exploratory.
primary: Dice
hypotheses:
  - [DeformUX, ResEncM]
  - [DeformUX, DeformUX-off]

statistics:
  alpha: 0.05
  # band: 0.005           # smaller differences of the primary metric count as equal; default: the metric's own
  draws: 10000

device: {device}
resources:
  processes: 2
"""


def default_experiment(
    dataset: int | str, file: Path, *, configuration: str = "3d_fullres", test: bool = False, device: str = "cuda"
) -> str:
    """The text of a good first experiment file."""
    return _DEFAULT.format(
        file=file.name,
        name=f"comparison_{dataset}",
        dataset=dataset,
        configuration=configuration,
        test=str(test).lower(),
        device=device,
    )
