"""Experiments whose truth is known, judged as real ones are: how often a verdict is wrong, and how often it is found.

Differences are in units of the SD of patients' true differences. Every experiment has hypotheses about pairs of arms of
their own, the hardest case for a family: errors of hypotheses that share an arm come together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

from nnunet_deform.comparison.evidence import Estimate, estimate
from nnunet_deform.comparison.statistics import rank_biserial
from nnunet_deform.comparison.verdicts import REQUIRED_PATIENTS, REQUIRED_TRAINING_FREEDOM

ALPHA = 0.05
FAMILIES = (1, 6)
_SCORED_AT_ONCE = 4_000_000  # numbers of one arm


@dataclass(frozen=True)
class World:
    """What experiments are drawn from.

    shape: of the patients' true differences, "normal", "skewed" (to the left, exponential), "heavy" (Student's t with
    3 degrees of freedom) or "ties" (six of ten patients score the same in every training, others in steps of a tenth);
    cases: of each patient; training_sds: of either arm; correlation: between trainings of both arms with the same seed,
    None where starts are not paired and arms are two samples; rest: SD of what is neither patient nor training.
    """

    patients: int
    shape: str = "normal"
    folds: int = 3
    seeds: int = 3
    training_sds: tuple[float, float] = (0.15, 0.15)
    correlation: float | None = None
    cases: int = 1
    rest: float = 0.3

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
        of_trainings = rng.standard_normal((2, pairs, 1, world.seeds))
        if world.correlation:
            of_trainings[1] *= np.sqrt(1 - world.correlation**2)
            of_trainings[1] += world.correlation * of_trainings[0]
        truth = _patients(world, (pairs, patients, 1), rng)
        effects = [sd * effect for sd, effect in zip(world.training_sds, of_trainings, strict=True)]
        if world.shape == "ties":
            differs = rng.random((pairs, patients, 1)) < _DIFFERING
            first.append(differs * np.round(truth / np.sqrt(_DIFFERING) + effects[0] / _DIFFERING, 1))
            second.append(differs * np.round(effects[1] / _DIFFERING, 1) + np.zeros_like(first[-1]))
            continue
        shape = (pairs, patients, world.cases, world.seeds)
        scores = [effect[:, :, None] + world.rest * rng.standard_normal(shape) for effect in effects]
        scores[0] += truth[..., None]
        if world.cases > 1:
            scores[0] += _CASE_SD * rng.standard_normal((pairs, patients, world.cases, 1))
        first.append(scores[0].mean(axis=2))
        second.append(scores[1].mean(axis=2))
    return first, second


def experiments(
    world: World, pairs: int, seed: int = 0
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], Estimate]]:
    """Scores and estimates of ``pairs`` pairs, in portions that fit into memory."""
    digest = hashlib.sha256(repr((asdict(world), seed)).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    at_once = max(1, _SCORED_AT_ONCE // (world.patients * world.cases * world.seeds))
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
    largest = max(FAMILIES)
    counts = {family: np.zeros(4) for family in FAMILIES}
    wrong = {family: {"winner": [], "equivalence": []} for family in FAMILIES}
    for first, second, result in experiments(world, families * largest, seed):
        for family in FAMILIES:
            level = ALPHA / family
            shift = world.se * (stats.norm.isf(level / 2) + stats.norm.ppf(0.8))
            band = world.se * (stats.norm.isf(level) + stats.norm.ppf(0.9))
            winners = [_winners(result, first, second, true, level) for true in (0.0, shift, -shift)]
            wrong[family]["winner"].append(winners[0] != 0)
            at_band = [replace(result, mean=result.mean + true).p_outside(band) < level for true in (band, -band)]
            # both are at most nominal; the worse of them counts
            wrong[family]["equivalence"].append(np.array(at_band))
            counts[family] += (
                (winners[1] > 0).sum(),
                (winners[2] < 0).sum(),
                (result.p_outside(band) < level).sum(),
                ((result.p_two_sided() < level) & (winners[0] == 0)).sum(),
            )
    total = families * largest
    rates = {}
    for family in FAMILIES:
        winner = np.concatenate(wrong[family]["winner"]).reshape(-1, family).any(axis=1).mean()
        equivalence = np.concatenate(wrong[family]["equivalence"], axis=1).reshape(2, -1, family).any(axis=2)
        found, against, equal, withheld = counts[family] / total
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
