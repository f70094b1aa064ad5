"""What may be said of two arms: codes with numbers. Sentences are made in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from nnunet_deform.comparison.evidence import estimate, noncentrality
from nnunet_deform.comparison.statistics import rank_biserial, signed_rank

# With fewer the tails of skewed differences cannot be estimated, and errors exceed the nominal level.
REQUIRED_PATIENTS = 30
# Degrees of freedom between trainings, of each sample: trainings beyond the first of each fold, as 3 folds x 3 seeds
# have. Fewer estimate a variance so badly that a test finds little, and errors at small levels exceed nominal ones.
REQUIRED_TRAINING_FREEDOM = 6


class Kind(str, Enum):
    BETTER = "better"
    EQUIVALENT = "equivalent"
    NO_DIFFERENCE = "no difference shown"
    UNDECIDED = "undecided"
    NOT_COMPARABLE = "not comparable"


class Reason(str, Enum):
    """Why a verdict says no more. RANKS: most patients differ in the other direction than their mean."""

    RANKS = "ranks contradict"
    MISSING = "trainings missing"
    TOO_FEW = "too few"
    FAILED = "failed"
    HARDLY_LEARNED = "hardly learned"


@dataclass(frozen=True)
class Contrast:
    """One arm against another on one question and metric; differences are first minus second, in the metric's unit.

    alpha, family: the level of ``family`` contrasts together, each of which has alpha / family;
    paired_starts: whether differences of the same fold and seed were analysed; folds: that both have;
    interval: at 1 - alpha / family, it leaves zero out exactly where p_adjusted < alpha; p: two-sided; equivalence: at
    1 - 2 alpha / family, it lies within the band exactly where p_equivalence < alpha, which is NaN without a band;
    p_adjusted, p_equivalence: times family; trainings_share: of the variance; training_sds, training_freedoms: see
    :class:`evidence.Estimate`; rank_biserial, p_ranks: of the signed-rank test, unadjusted.
    """

    first: str
    second: str
    metric: str
    alpha: float
    family: int
    paired_starts: bool
    cases: int
    patients: int
    folds: int
    mean: float
    median: float
    se: float
    freedom: float
    interval: tuple[float, float]
    equivalence: tuple[float, float]
    p: float
    p_adjusted: float
    p_equivalence: float
    patient_sd: float
    trainings_share: float
    training_sds: tuple[float, ...]
    training_freedoms: tuple[int, ...]
    rank_biserial: float
    p_ranks: float

    @property
    def trainings_known(self) -> bool:
        """Whether the noise of trainings is in the interval."""
        return min(self.training_freedoms) > 0

    @property
    def detectable(self) -> float:
        """What is found with 80 % power at this standard error; NaN where the noise of trainings is not known."""
        if not self.trainings_known or not np.isfinite(self.se):
            return float("nan")
        return self.se * noncentrality(self.freedom, self.alpha / self.family)

    @property
    def ranks_contradict(self) -> bool:
        return self.rank_biserial * self.mean < 0


@dataclass(frozen=True)
class Verdict:
    """winner: with BETTER; further_patients, further_trainings: what an undecided pair lacks, the latter by arm, on any
    of its folds; missing: what was declared and has no scores; arms: those that failed or hardly learned, with what the
    latter reach in which class."""

    kind: Kind
    winner: str | None = None
    reason: Reason | None = None
    further_patients: int = 0
    further_trainings: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    arms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def contrasts(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    names: tuple[str, str],
    metric: str,
    cases: int,
    paired_starts: bool,
    alpha: float,
    family: int = 1,
    band: float | None = None,
) -> list[Contrast]:
    """One for each question.

    Args:
        first, second: scores, an array a fold, [questions, patients, trainings]; with paired starts the trainings
            correspond.
        band: differences within +-band count as equal.
    """
    if paired_starts:
        result = estimate([mine - theirs for mine, theirs in zip(first, second, strict=True)])
    else:
        result = estimate(first, second)
    differences = np.concatenate(
        [mine.mean(axis=2) - theirs.mean(axis=2) for mine, theirs in zip(first, second, strict=True)], axis=1
    )
    p_ranks, effects = signed_rank(differences.T), rank_biserial(differences.T)
    level = alpha / family
    low, high = result.interval(level)
    equal_low, equal_high = result.equivalence_interval(level)
    p = result.p_two_sided()
    p_equivalence = np.full(len(p), np.nan) if band is None else result.p_outside(band)
    return [
        Contrast(
            first=names[0],
            second=names[1],
            metric=metric,
            alpha=alpha,
            family=family,
            paired_starts=paired_starts,
            cases=cases,
            patients=differences.shape[1],
            folds=len(first),
            mean=float(result.mean[k]),
            median=float(np.median(differences[k])),
            se=float(result.se[k]),
            freedom=float(result.freedom[k]),
            interval=(float(low[k]), float(high[k])),
            equivalence=(float(equal_low[k]), float(equal_high[k])),
            p=float(p[k]),
            p_adjusted=float(min(1.0, p[k] * family)),
            p_equivalence=float(np.minimum(1.0, p_equivalence[k] * family)),
            patient_sd=float(result.patient_sd[k]),
            trainings_share=float(result.trainings[k] / result.se[k] ** 2) if result.se[k] > 0 else 0.0,
            training_sds=tuple(float(sd[k]) for sd in result.training_sds),
            training_freedoms=result.training_freedoms,
            rank_biserial=float(effects[k]),
            p_ranks=float(p_ranks[k]),
        )
        for k in range(len(p))
    ]


def turned(contrast: Contrast) -> Contrast:
    """Second minus first."""

    def flip(ends: tuple[float, float]) -> tuple[float, float]:
        return -ends[1], -ends[0]

    return replace(
        contrast,
        first=contrast.second,
        second=contrast.first,
        mean=-contrast.mean,
        median=-contrast.median,
        interval=flip(contrast.interval),
        equivalence=flip(contrast.equivalence),
        training_sds=contrast.training_sds[::-1],
        training_freedoms=contrast.training_freedoms[::-1],
        rank_biserial=-contrast.rank_biserial,
    )


def judge(contrast: Contrast, *, higher_is_better: bool) -> Verdict:
    """What the evidence says, everything declared being there."""
    lacking = _lacking(contrast)
    if lacking is not None:
        return lacking
    if contrast.p_equivalence < contrast.alpha:
        return Verdict(Kind.EQUIVALENT)
    if not contrast.p_adjusted < contrast.alpha:
        return Verdict(Kind.NO_DIFFERENCE)
    if contrast.ranks_contradict:
        return Verdict(Kind.NO_DIFFERENCE, reason=Reason.RANKS)
    winner = contrast.first if (contrast.mean > 0) == higher_is_better else contrast.second
    return Verdict(Kind.BETTER, winner=winner)


def _lacking(contrast: Contrast) -> Verdict | None:
    patients = max(0, REQUIRED_PATIENTS - contrast.patients)
    arms = (contrast.first, contrast.second)
    freedoms = contrast.training_freedoms * (2 if contrast.paired_starts else 1)
    trainings = {
        arm: REQUIRED_TRAINING_FREEDOM - freedom
        for arm, freedom in zip(arms, freedoms, strict=True)
        if freedom < REQUIRED_TRAINING_FREEDOM
    }
    if not patients and not trainings:
        return None
    return Verdict(Kind.UNDECIDED, reason=Reason.TOO_FEW, further_patients=patients, further_trainings=trainings)


# Below this mean Dice a network has not begun to segment: a structure drawn at random has about as much.
_HARDLY = 0.05


def hardly_learned(dice: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Which of two arms hardly learned, and what it reaches in which class.

    An arm did if its mean over classes is below 0.05, or if it reaches in a class, where the other has at least that,
    at most a tenth of the other's.

    Args:
        dice: mean Dice of each class by arm, over the cases that have the structure.
    """
    found: dict[str, dict[str, float]] = {}
    for arm, classes in dice.items():
        if not classes:
            continue
        if sum(classes.values()) / len(classes) < _HARDLY:
            found[arm] = dict(classes)
            continue
        best = {label: max(other[label] for other in dice.values()) for label in classes}
        low = {x: value for x, value in classes.items() if best[x] >= _HARDLY and value <= best[x] / 10}
        if low:
            found[arm] = low
    return found
