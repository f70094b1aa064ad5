"""The experiment file: what is compared, on what, at what cost, and which hypotheses were declared before the run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from nnunet_deform.comparison.metrics import METRICS

_TRAINER = re.compile(r"nnUNetTrainer[\w.+-]*")
_DATASET = re.compile(r"Dataset\d{3}_[^*?\[\]/\\]+")
_LENGTH_OR_SEED = re.compile(r"_(\d+epochs|\d+iters|seed\d+|unmirrored)(?=_|$)")

MOST_HYPOTHESES = 6

Place = tuple[int | str, ...]


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}.")
    return name


MetricName = Annotated[str, AfterValidator(_known_metric)]


class ExperimentError(ValueError):
    """The experiment file cannot be used; one line for each fault, ``file:line: place: what is wrong``."""


class SettingError(ValueError):
    """What is wrong with settings; places start from the one that is checked."""

    def __init__(self, *faults: tuple[Place, str]) -> None:
        super().__init__(
            "; ".join(f"{'.'.join(map(str, place))}: {words}" if place else words for place, words in faults)
        )
        self.faults = faults


def _fold(fold: Any) -> Any:
    if fold == "all":
        raise SettingError(
            (
                (),
                "fold 'all' trains on every case, so nothing is left to score it on; give numbers, for example "
                "[0, 1, 2, 3, 4].",
            )
        )
    return fold


def _folds(folds: Any) -> Any:
    # What a function has returned is Python's, no longer JSON's, and a list is then no tuple.
    return tuple(folds) if isinstance(folds, list) else _fold(folds)


def _pair(pair: Any) -> Any:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(arm, str) for arm in pair):
        raise SettingError(((), "a hypothesis is a pair of arms, such as [new, stock]."))
    return tuple(pair)


# Upper bounds are far above what anyone trains; beyond are slips, which would fail much later.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*$", max_length=80)]
Fold = Annotated[int, Field(ge=0, le=999), BeforeValidator(_fold)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Pair = Annotated[tuple[str, str], BeforeValidator(_pair)]
Millimetres = Annotated[float, Field(gt=0, le=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Dataset(_Strict):
    """id: nnU-Net's number or name; batch_size: train with a copy of each plan that has this batch;
    patients: CSV or JSON that maps case to patient; splits: number of folds, if there is no splits_final.json yet;
    tolerance: of NSD in mm, one for all or one a class; None is the smallest voxel side of the median spacing;
    test: predict and score imagesTs with labelsTs, which no decision may rest on: true with the ensemble of each arm's
    folds under the first seed, "trainings" with every training by itself."""

    id: int | str
    configuration: Name = "3d_fullres"
    batch_size: Annotated[int, Field(ge=1, le=10_000)] | None = None
    patients: Path | None = None
    splits: Annotated[int, Field(ge=2, le=1000)] = 5
    tolerance: Millimetres | dict[str, Millimetres] | None = None
    test: bool | Literal["trainings"] = False

    @field_validator("id", mode="before")
    @classmethod
    def _number_or_full_name(cls, identifier: Any) -> Any:
        if isinstance(identifier, str) and identifier.isdecimal() and len(identifier) <= 5:
            identifier = int(identifier)
        number = type(identifier) is int and 0 < identifier < 1000
        if not number and not (isinstance(identifier, str) and _DATASET.fullmatch(identifier)):
            given = "this" if isinstance(identifier, list | dict | None) else repr(identifier)
            raise SettingError(
                (
                    (),
                    f"{given} is neither a dataset's number, from 1 to 999, nor its full name, such as "
                    "Dataset004_Hippocampus.",
                )
            )
        return identifier

    @field_validator("test", mode="before")
    @classmethod
    def _ensemble_or_trainings(cls, test: Any) -> Any:
        if not isinstance(test, bool) and test != "trainings":
            given = "this" if isinstance(test, list | dict | None) else repr(test)
            raise SettingError(
                ((), f"{given} is none of false, true (the ensemble of an arm's folds) and trainings (each by itself).")
            )
        return test

    @field_validator("tolerance", mode="before")
    @classmethod
    def _one_or_one_a_class(cls, tolerance: Any) -> Any:
        each = tolerance if isinstance(tolerance, dict) else {None: tolerance}
        faults = []
        for label, value in each.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if tolerance is not None and not (number and 0 < value <= 1000):
                given = "this" if isinstance(value, list | dict | None) else repr(value)
                words = f"{given} is no tolerance; give millimetres, one number or one for each class."
                faults.append((() if label is None else (label,), words))
        if faults:
            raise SettingError(*faults)
        return tolerance


class Arm(_Strict):
    """A trainer (a recipe suffix is part of its name) on a plan."""

    name: Name
    trainer: str
    plans: Name = "nnUNetPlans"

    @field_validator("trainer")
    @classmethod
    def _without_length_or_seed(cls, trainer: str) -> str:
        if not _TRAINER.fullmatch(trainer) or "__" in trainer:
            raise ValueError(f"{trainer!r} is not a trainer's name; they begin with nnUNetTrainer and have no '__'.")
        if found := _LENGTH_OR_SEED.search(trainer):
            raise ValueError(
                f"{trainer!r} fixes {found[0]!r} by name; write the trainer without it, because length, seeds and "
                "mirroring are the experiment's and the same for every arm."
            )
        return trainer


class Seeds(_Strict):
    """first: for every arm and fold; repeats: further seeds, on ``folds`` (None: all), for ``arms`` (None: all)."""

    first: Seed = 1
    repeats: tuple[Seed, ...] = ()
    folds: Annotated[tuple[Fold, ...] | None, BeforeValidator(_folds)] = None
    arms: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Seeds:
        if len({self.first, *self.repeats}) != 1 + len(self.repeats):
            raise ValueError(f"the seeds {[self.first, *self.repeats]} are not all different.")
        return self


class Budget(_Strict):
    """The same for every arm. None: each trainer's own."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

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
    draws: Annotated[int, Field(ge=1000, le=1_000_000)] = 10_000
    seed: Seed = 0


class Resources(_Strict):
    """processes: of preprocessing, export and scoring; augmentation: worker processes of a training, 0 for bit-equal
    runs, None as nnU-Net chooses."""

    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    augmentation: Annotated[int, Field(ge=0, le=1024)] | None = None


class Experiment(_Strict):
    """See ``nnunet-deform compare init`` for a commented example.

    mirroring: whether predictions average over mirrored images, as nnU-Net's own validation does;
    hypotheses: pairs of arms, declared before the run, on the ``primary`` metric and every dataset: they share alpha.
    All other pairs are exploratory.
    """

    name: Name
    datasets: Annotated[tuple[Dataset, ...], Field(min_length=1)]
    arms: Annotated[tuple[Arm, ...], Field(min_length=2)]
    folds: Annotated[tuple[Fold, ...], Field(min_length=1), BeforeValidator(_folds)] = (0, 1, 2, 3, 4)
    seeds: Seeds = Seeds()
    budget: Budget = Budget()
    mirroring: bool = True
    primary: MetricName = "Dice"
    hypotheses: Annotated[tuple[Pair, ...], Field(min_length=1)]
    statistics: Statistics = Statistics()
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    resources: Resources = Resources()
    checkpoint: Literal["checkpoint_final"] = "checkpoint_final"
    raw: Path | None = None
    preprocessed: Path | None = None
    results: Path | None = None
    output: Path | None = None

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

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Experiment:
        # An arm with another's name is missed under its own.
        if faults := list(self._repeated()) or list(self._dangling()):
            raise SettingError(*faults)
        return self

    def _repeated(self) -> Iterator[tuple[Place, str]]:
        if len(set(self.folds)) != len(self.folds):
            yield ("folds",), f"{list(self.folds)} names a fold twice."
        for number, arm in enumerate(self.arms):
            for other in self.arms[:number]:
                if other.name == arm.name:
                    yield ("arms", number, "name"), f"two arms are named {arm.name!r}."
                elif (other.trainer, other.plans) == (arm.trainer, arm.plans):
                    words = f"the arms {other.name!r} and {arm.name!r} are the same trainer on the same plans."
                    yield ("arms", number), words
        datasets = [(str(dataset.id), dataset.configuration) for dataset in self.datasets]
        for number, dataset in enumerate(datasets):
            if dataset in datasets[:number]:
                yield ("datasets", number, "id"), "a dataset is listed twice with the same configuration."
        pairs = [frozenset(pair) for pair in self.hypotheses]
        for number, pair in enumerate(pairs):
            if len(pair) == 1:
                yield ("hypotheses", number), f"{self.hypotheses[number][0]!r} is compared with itself."
            elif pair in pairs[:number]:
                yield ("hypotheses", number), "a pair is declared twice."

    def _dangling(self) -> Iterator[tuple[Place, str]]:
        names = [arm.name for arm in self.arms]
        used = [(("hypotheses", number), name) for number, pair in enumerate(self.hypotheses) for name in pair]
        used += [(("seeds", "arms", number), name) for number, name in enumerate(self.seeds.arms or ())]
        for place, name in dict.fromkeys(used):
            if name not in names:
                yield place, f"there is no arm {name!r}; the arms are {', '.join(names)}."
        for number, fold in enumerate(self.seeds.folds or ()):
            if fold not in self.folds:
                yield ("seeds", "folds", number), f"fold {fold} is not among the folds {list(self.folds)}."

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
