"""Experiments whose truth is known, judged as real ones are: how often a verdict is wrong, and how often it is found.

Differences are in units of the SD of patients' true differences. Every experiment has hypotheses about pairs of arms of
their own, the hardest case for a family: errors of hypotheses that share an arm come together. For speed verdicts are
counted from estimates of many experiments at once; where unrelated arms stand beside, they are those of the analysis's
functions about tables of scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from nnunet_deform.comparison.analysis import pair_contrasts, pair_scores
from nnunet_deform.comparison.design import Design
from nnunet_deform.comparison.evidence import Estimate, estimate
from nnunet_deform.comparison.statistics import rank_biserial
from nnunet_deform.comparison.verdicts import REQUIRED_PATIENTS, REQUIRED_TRAINING_FREEDOM, Kind, Reason, judge

ALPHA = 0.05
FAMILIES = (1, 6)
_SCORED_AT_ONCE = 500_000  # numbers of one arm; more no longer fit into a processor's cache
_PAIRS_FOR_POWER = 24_000  # of which the share that is found has a standard error of at most 0.3 points


@dataclass(frozen=True)
class World:
    """What experiments are drawn from.

    shape: of the patients' true differences, "normal", "skewed" (to the left, exponential), "heavy" (Student's t with
    3 degrees of freedom) or "ties" (six of ten patients score the same in every training, others in steps of a tenth);
    cases: of each patient; training_sds: of either arm; correlation: between trainings of both arms with the same seed,
    None where starts are not paired and arms are two samples; rest: SD of what is neither patient nor training;
    others: whether arms that are in no hypothesis stand beside, see :data:`OTHERS`.
    """

    patients: int
    shape: str = "normal"
    folds: int = 3
    seeds: int = 3
    training_sds: tuple[float, float] = (0.15, 0.15)
    correlation: float | None = None
    cases: int = 1
    rest: float = 0.3
    others: bool = False

    @property
    def decides(self) -> bool:
        """Whether a verdict is given, by the rules of :mod:`verdicts`."""
        freedom = self.folds * (self.seeds - 1)
        return self.patients >= REQUIRED_PATIENTS and freedom >= REQUIRED_TRAINING_FREEDOM

    @property
    def se(self) -> float:
        """True standard error of the estimate."""
        one, two = self.training_sds
        of_trainings = one**2 + two**2 - 2 * (self.correlation or 0.0) * one * two
        of_patients = 1.0 + (0.0 if self.cases == 1 else _CASE_SD**2 / self.cases)
        rest = 0.0 if self.shape == "ties" else 2 * self.rest**2 / (self.seeds * self.cases)
        return float(np.sqrt((of_patients + rest) / self.patients + of_trainings / (self.folds * self.seeds)))


_CASE_SD = 0.5
_DIFFERING = 0.4

# Arms in no hypothesis: how much better they are, and the SD of their trainings. Three calm ones, one whose trainings
# differ a lot, and a failed one.
OTHERS = ((-1.0, 0.01), (0.0, 0.01), (1.0, 0.01), (0.0, 3.0), (-20.0, 0.0))


def _patients(world: World, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if world.shape == "skewed":
        return 1.0 - rng.exponential(1.0, shape)
    if world.shape == "heavy":
        return rng.standard_t(3, shape) / np.sqrt(3)
    return rng.standard_normal(shape)


def _draw(world: World, pairs: int, rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores of both arms of ``pairs`` pairs without a true difference, as :func:`evidence.estimate` takes them."""
    first, second = [], []
    for fold in range(world.folds):
        patients = world.patients // world.folds + (fold < world.patients % world.folds)
        of_trainings = rng.standard_normal((2, world.seeds, pairs, 1))
        if world.correlation:
            of_trainings[1] *= np.sqrt(1 - world.correlation**2)
            of_trainings[1] += world.correlation * of_trainings[0]
        truth = _patients(world, (pairs, patients), rng)
        effects = [sd * effect for sd, effect in zip(world.training_sds, of_trainings, strict=True)]
        if world.shape == "ties":
            differs = rng.random((pairs, patients)) < _DIFFERING
            scores = [
                differs * np.round(truth / np.sqrt(_DIFFERING) + effects[0] / _DIFFERING, 1),
                differs * np.round(effects[1] / _DIFFERING, 1),
            ]
        else:
            # The mean over a patient's cases, whose rests are independent.
            rest = world.rest / np.sqrt(world.cases)
            shape = (world.seeds, pairs, patients)
            scores = [effect + rest * rng.standard_normal(shape) for effect in effects]
            scores[0] += truth
            if world.cases > 1:
                scores[0] += _CASE_SD / np.sqrt(world.cases) * rng.standard_normal((pairs, patients))
        # Views with the trainings last: sums over them run along the memory of pairs and patients.
        first.append(np.moveaxis(scores[0], 0, 2))
        second.append(np.moveaxis(scores[1], 0, 2))
    return first, second


def experiments(
    world: World, pairs: int, seed: int = 0
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], Estimate]]:
    """Scores and estimates of ``pairs`` pairs, in portions that fit into memory."""
    digest = hashlib.sha256(repr((asdict(world), seed)).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    largest = max(FAMILIES)
    at_once = largest * max(1, _SCORED_AT_ONCE // (world.patients * world.seeds * largest))
    while pairs:
        portion = min(pairs, at_once)
        pairs -= portion
        first, second = _draw(world, portion, rng)
        if world.correlation is None:
            yield first, second, estimate(first, second)
        else:
            yield first, second, estimate([mine - theirs for mine, theirs in zip(first, second, strict=True)])


@dataclass(frozen=True)
class Rates:
    """Of one family size. false_winner, false_equivalence: share of experiments with any, without a true difference,
    and with one as large as the band; winner, winner_against: share of pairs for which the true winner is named, where
    the ideal test, which knows the variances, finds 80 %, and the true difference points to the shorter or the longer
    tail; equivalence: the same of two equal arms; withheld: share of pairs whose winner the ranks contradict."""

    false_winner: float
    false_equivalence: float
    winner: float
    winner_against: float
    equivalence: float
    withheld: float


def simulate(world: World, families: int, seed: int = 0) -> dict[int, Rates]:
    """Rates by family size, whatever :attr:`World.decides` says.

    Args:
        families: number of experiments with the largest family; of those with one hypothesis there are as many more.
    """
    if world.others:
        return _simulate_beside_others(world, families, seed)
    largest = max(FAMILIES)
    counts = {family: np.zeros(4) for family in FAMILIES}
    wrong = {family: {"winner": [], "equivalence": []} for family in FAMILIES}
    pairs_for_power = 0
    for first, second, result in experiments(world, families * largest, seed):
        for family in FAMILIES:
            level = ALPHA / family
            shift, band = _ideal(world, level)
            winners = _winners(result, first, second, 0.0, level)
            wrong[family]["winner"].append(winners != 0)
            at_band = [replace(result, mean=result.mean + true).p_outside(band) < level for true in (band, -band)]
            # both are at most nominal; the worse of them counts
            wrong[family]["equivalence"].append(np.array(at_band))
            if pairs_for_power < _PAIRS_FOR_POWER:
                counts[family] += (
                    (_winners(result, first, second, shift, level) > 0).sum(),
                    (_winners(result, first, second, -shift, level) < 0).sum(),
                    (result.p_outside(band) < level).sum(),
                    ((result.p_two_sided() < level) & (winners == 0)).sum(),
                )
        if pairs_for_power < _PAIRS_FOR_POWER:
            pairs_for_power += len(result.mean)
    rates = {}
    for family in FAMILIES:
        winner = np.concatenate(wrong[family]["winner"]).reshape(-1, family).any(axis=1).mean()
        equivalence = np.concatenate(wrong[family]["equivalence"], axis=1).reshape(2, -1, family).any(axis=2)
        found, against, equal, withheld = counts[family] / pairs_for_power
        rates[family] = Rates(
            false_winner=float(winner),
            false_equivalence=float(equivalence.mean(axis=1).max()),
            winner=float(found),
            winner_against=float(against),
            equivalence=float(equal),
            withheld=float(withheld),
        )
    return rates


def _winners(
    result: Estimate, first: list[np.ndarray], second: list[np.ndarray], true: float, level: float
) -> np.ndarray:
    """1 where the first arm is named, -1 where the second is, 0 elsewhere, [pairs]."""
    shifted = replace(result, mean=result.mean + true)
    named = np.where(shifted.p_two_sided() < level, np.sign(shifted.mean), 0.0)
    where = np.flatnonzero(named)
    differences = [
        mine[where].mean(axis=2) - theirs[where].mean(axis=2) for mine, theirs in zip(first, second, strict=True)
    ]
    effects = rank_biserial(np.concatenate(differences, axis=1).T + true)
    named[where[effects * named[where] < 0]] = 0.0
    return named


def _ideal(world: World, level: float) -> tuple[float, float]:
    """The difference that the ideal test finds with 80 % power, and the band in which it finds equal arms with that."""
    shift = stats.norm.isf(level / 2) + stats.norm.ppf(0.8)
    band = stats.norm.isf(level) + stats.norm.ppf(0.9)
    return float(world.se * shift), float(world.se * band)


def _simulate_beside_others(world: World, families: int, seed: int) -> dict[int, Rates]:
    """:func:`simulate`, from verdicts about tables of scores. There are as many experiments of either family."""
    rng = np.random.default_rng(seed)
    wrong: dict[int, list[np.ndarray]] = {family: [] for family in FAMILIES}
    found = {family: np.zeros(4) for family in FAMILIES}
    for_power = 0
    for first, second, _ in experiments(world, families * max(FAMILIES), seed):
        table = _table(world, first, second, rng)
        count = table["label"].nunique()
        counts_for_power = for_power * max(FAMILIES) < _PAIRS_FOR_POWER
        for_power += count * counts_for_power
        for family in FAMILIES:
            shift, band = _ideal(world, ALPHA / family)
            design = _declare(world, family, band)
            equal, *at_band = (_verdicts(design, table, true) for true in (0.0, band, -band))
            errors = [np.abs(equal) == _BETTER, *(verdicts == _EQUIVALENT for verdicts in at_band)]
            wrong[family].append(np.array(errors).any(axis=1))
            if counts_for_power:
                parts = (
                    _verdicts(design, table, shift) == _BETTER,
                    _verdicts(design, table, -shift) == -_BETTER,
                    equal == _EQUIVALENT,
                    equal == _WITHHELD,
                )
                found[family] += [part.mean() * count for part in parts]
    rates = {}
    for family in FAMILIES:
        winner, above, below = np.concatenate(wrong[family], axis=1).mean(axis=1)
        shares = [float(share) for share in found[family] / for_power]
        rates[family] = Rates(float(winner), float(max(above, below)), *shares)
    return rates


def _declare(world: World, family: int, band: float) -> Design:
    pairs = [(f"A{number}", f"B{number}") for number in range(max(FAMILIES))]
    return Design(
        arms=(*(arm for pair in pairs for arm in pair), *(f"other{number}" for number in range(len(OTHERS)))),
        folds=tuple(range(world.folds)),
        seeds=tuple(range(world.seeds)),
        hypotheses=tuple(pairs[:family]),
        paired_starts=frozenset(),
        primary="Dice",
        alpha=ALPHA,
        bands={"Dice": band},
        draws=1000,
        bootstrap_seed=0,
    )


def _table(world: World, first: list[np.ndarray], second: list[np.ndarray], rng: np.random.Generator) -> pd.DataFrame:
    """Scores as :func:`collect.collect` returns them, of pairs A0 and B0, A1 and B1, ... and of :data:`OTHERS`. Each
    class is an experiment of its own."""
    pairs, count = max(FAMILIES), len(first[0]) // max(FAMILIES)
    parts, case = [], 0
    for fold, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        _, patients, seeds = mine.shape
        scores = {}
        for arm, values in (("A", mine), ("B", theirs)):
            for number in range(pairs):
                scores[f"{arm}{number}"] = values[number * count : (number + 1) * count]
        for number, (better, sd) in enumerate(OTHERS):
            of_patients, of_trainings = (
                rng.standard_normal((count, patients, 1)),
                rng.standard_normal((count, 1, seeds)),
            )
            scores[f"other{number}"] = better + of_patients + sd * of_trainings
        places = np.indices((len(scores), count, patients, seeds)).reshape(4, -1)
        places[2] += case
        parts.append((fold, np.concatenate([values.ravel() for values in scores.values()]), places))
        case += patients
    arms, labels, patients, seeds = np.concatenate([places for *_, places in parts], axis=1)
    cases = pd.Categorical.from_codes(patients, [f"c{number:04d}" for number in range(case)])
    return pd.DataFrame(
        {
            "arm": np.array(list(scores))[arms],
            "seed": seeds,
            "fold": np.repeat([fold for fold, *_ in parts], [len(values) for _, values, _ in parts]),
            "case": cases,
            "patient": cases,
            "label": pd.Categorical.from_codes(labels, [f"experiment {number}" for number in range(count)]),
            "Dice": np.concatenate([values for _, values, _ in parts]),
        }
    )


_BETTER, _EQUIVALENT, _WITHHELD = 1, 2, 3


def _verdicts(design: Design, table: pd.DataFrame, true: float) -> np.ndarray:
    """Of every hypothesis, where its first arm is better by ``true``, [hypotheses, experiments]: +-_BETTER for either
    arm, _EQUIVALENT, _WITHHELD because of the ranks, or 0."""
    better = [first for first, _ in design.hypotheses]
    table = table.assign(Dice=table["Dice"] + true * table["arm"].isin(better))
    found = []
    for first, second in design.hypotheses:
        _, *of_experiments = pair_contrasts(design, pair_scores(table, first, second), len(design.hypotheses))
        verdicts = [judge(contrast, higher_is_better=True) for contrast in of_experiments]
        signs = {first: _BETTER, second: -_BETTER, None: 0}
        found.append(
            [
                _EQUIVALENT if v.kind is Kind.EQUIVALENT else _WITHHELD if v.reason is Reason.RANKS else signs[v.winner]
                for v in verdicts
            ]
        )
    return np.array(found)
