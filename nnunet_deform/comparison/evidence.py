"""The one model behind every test, interval, equivalence and detectable difference.

An arm's score of patient i by training s of fold f is

    y(i, s) = mean of the fold + patient(i) + training(f, s) + rest(i, s)

Folds are fixed, each patient belongs to one; patients and trainings are drawn, trainings of different folds or seeds
independently. The estimate is the mean over patients of their difference, itself a mean over the trainings of each arm.
With n patients in F folds, w(f) = n(f) / n and S(f) trainings of an arm in fold f its variance has the parts

    patients    variance of the patients' differences about their fold's mean / n                        n - F
    trainings   for each arm: variance of the trainings' means about their fold's x sum of w(f)^2 / S(f) sum of S(f) - 1
    rest        for each arm: variance of the rest x sum of n(f) / (n^2 S(f)), which the other two both contain

and on the right their degrees of freedom, which Satterthwaite's rule combines; a trainings' part with f of them has
weight f / (f - 2) in it, the mean of true over estimated variance, without which errors at small levels exceed nominal
ones by up to a half. Arms whose networks start from the same
weights at a seed are one sample of differences of the same fold and seed, all others are two samples.

Means of few patients with a long tail are skewed, and Student's t then errs on one side. Hall's transformation of t
(J. R. Stat. Soc. B 54, 1992) corrects that side and loses on the other, so that each side takes whichever of the two
says less: intervals are Student's, lengthened towards the longer tail. The skewness of a few patients is too small on
average; for two-sided tests the side of the shorter tail makes up for that, for equivalence it is multiplied by
1 + (30 / n)^2. benchmarks/verdicts.py shows what that holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special, stats


@dataclass(frozen=True)
class Estimate:
    """Means of K questions, or differences of two arms in them, with what they are uncertain by; arrays are [K].

    number: of patients; mean, se: in the metric's unit; freedom: of se; skew: third cumulant of the mean / se^3;
    patients, trainings: the variances that add up to se^2; patient_sd: of the patients' differences about their fold's
    mean; training_sds, training_freedoms: of each sample's trainings about their fold's mean, one entry a sample (the
    differences, or either arm), NaN and 0 where no fold has two trainings. If one of them is 0, ``trainings`` is, too,
    and the estimate is about these very trainings.
    """

    number: int
    mean: np.ndarray
    se: np.ndarray
    freedom: np.ndarray
    skew: np.ndarray
    patients: np.ndarray
    trainings: np.ndarray
    patient_sd: np.ndarray
    training_sds: tuple[np.ndarray, ...]
    training_freedoms: tuple[int, ...]

    def p_above(self, value: float) -> np.ndarray:
        """One-sided p-value against "the true mean is at most ``value``", [K]."""
        student, hall = self._pivots(value)
        return special.stdtr(self.freedom, -np.minimum(student, hall))

    def p_below(self, value: float) -> np.ndarray:
        """One-sided p-value against "the true mean is at least ``value``", [K]."""
        student, hall = self._pivots(value)
        return special.stdtr(self.freedom, np.maximum(student, hall))

    def p_two_sided(self) -> np.ndarray:
        """Against a true mean of zero, [K]."""
        return np.minimum(1.0, 2 * np.minimum(self.p_above(0.0), self.p_below(0.0)))

    def p_outside(self, band: float) -> np.ndarray:
        """Two one-sided tests against "the true mean lies outside +-``band``": the larger of their p-values, [K]."""
        cautious = self._cautious()
        return np.maximum(cautious.p_above(-band), cautious.p_below(band))

    def interval(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """All values that a one-sided test at alpha / 2 does not reject on either side, [K] each."""
        quantile = -special.stdtrit(self.freedom, alpha / 2)
        low = np.maximum(quantile, _inverse_hall(quantile, self.skew))
        high = np.minimum(-quantile, _inverse_hall(-quantile, self.skew))
        return self.mean - self.se * low, self.mean - self.se * high

    def equivalence_interval(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """It lies within +-band exactly where ``p_outside(band) < alpha``, [K] each."""
        return self._cautious().interval(2 * alpha)

    def _cautious(self) -> Estimate:
        return replace(self, skew=self.skew * (1 + (30 / self.number) ** 2))

    def _pivots(self, value: float) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            student = np.nan_to_num((self.mean - value) / self.se, nan=0.0, posinf=np.inf, neginf=-np.inf)
        return student, _hall(student, self.skew)


def _hall(student: np.ndarray, skew: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        # ((1 + skew t / 3)^3 - 1) / skew + skew / 6, written so that skew may be 0
        turned = student * (1 + skew * student / 3 * (1 + skew * student / 9)) + skew / 6
    return np.where(np.isfinite(student), turned, student)


def _inverse_hall(quantile: np.ndarray, skew: np.ndarray) -> np.ndarray:
    safe = np.where(skew == 0, 1.0, skew)
    return np.where(skew == 0, quantile, 3 / safe * (np.cbrt(1 + safe * (quantile - safe / 6)) - 1))


def estimate(first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None = None) -> Estimate:
    """
    Args:
        first: an array a fold, [K, patients, trainings], the patients' scores; or, with paired starts, the differences
            of the same seed; complete.
        second: the same folds and patients of the other arm, with trainings of its own. None: the mean of ``first``.

    Returns:
        Of the mean of first, or first - second, over patients.
    """
    samples = [first] if second is None else [first, second]
    counts = np.array([fold.shape[1] for fold in first])
    number, folds = int(counts.sum()), len(counts)
    weights = counts / number
    of_patients = [fold.mean(axis=2) for fold in first]
    if second is not None:
        of_patients = [mine - fold.mean(axis=2) for mine, fold in zip(of_patients, second, strict=True)]
    fold_means = [values.mean(axis=1) for values in of_patients]
    mean = sum(weight * value for weight, value in zip(weights, fold_means, strict=True))
    residuals = np.concatenate(
        [values - value[:, None] for values, value in zip(of_patients, fold_means, strict=True)], axis=1
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        patient_variance = (residuals**2).sum(axis=1) / (number - folds) if number > folds else np.nan * mean
    # Unbiased where folds are equally large; of fewer than three patients a fold there is nothing to estimate.
    unbiased = (number - folds) * (number - 2 * folds)
    third = (residuals**3).sum(axis=1) * number / unbiased if number > 2 * folds else np.zeros(len(mean))

    of_patient_part = patient_variance / number
    training_part, rest_part, weighted, spread = (np.zeros(len(mean)) for _ in range(4))
    training_sds, training_freedoms = [], []
    within = [_within_folds(sample) for sample in samples]
    known = all(freedom for _, _, freedom, _ in within)
    for sample, (variance, rest, freedom, rest_freedom) in zip(samples, within, strict=True):
        seeds = np.array([fold.shape[2] for fold in sample])
        training_sds.append(np.sqrt(variance))
        training_freedoms.append(freedom)
        if known:
            part = variance * (weights**2 / seeds).sum()
            training_part += part
            heavier = part * freedom / max(1, freedom - 2)
            weighted += heavier
            spread += heavier**2 / freedom
        if known and rest_freedom:
            rest_part += rest * (counts / (number**2 * seeds)).sum()
    total = np.maximum(of_patient_part + training_part - rest_part, np.maximum(of_patient_part, training_part))
    of_patients_alone = total - training_part
    spread += of_patients_alone**2 / max(1, number - folds)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.where(spread > 0, (of_patients_alone + weighted) ** 2 / spread, max(1, number - folds))
        skew = np.where(total > 0, third / number**2 / total**1.5, 0.0)
    return Estimate(
        number=number,
        mean=mean,
        se=np.sqrt(total),
        freedom=np.maximum(1.0, freedom),
        skew=skew,
        patients=of_patients_alone,
        trainings=training_part,
        patient_sd=np.sqrt(patient_variance),
        training_sds=tuple(training_sds),
        training_freedoms=tuple(training_freedoms),
    )


def _within_folds(sample: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Variances of the trainings' means and of the rest, [K] each, and their degrees of freedom; NaN without any."""
    squares, rests = (np.zeros(len(sample[0])) for _ in range(2))
    freedom = rest_freedom = 0
    for fold in sample:
        _, patients, seeds = fold.shape
        if seeds < 2:
            continue
        of_trainings = fold.mean(axis=1, keepdims=True)
        effects = of_trainings - of_trainings.mean(axis=2, keepdims=True)
        rest = fold - fold.mean(axis=2, keepdims=True) - effects
        squares += (effects**2).sum(axis=(1, 2))
        rests += (rest**2).sum(axis=(1, 2))
        freedom += seeds - 1
        rest_freedom += (seeds - 1) * (patients - 1)
    unknown = np.full(len(squares), np.nan)
    variance = squares / freedom if freedom else unknown
    return variance, rests / rest_freedom if rest_freedom else unknown, freedom, rest_freedom


def noncentrality(freedom: float, alpha: float, power: float = 0.8) -> float:
    """By how many standard errors a two-sided t-test of this level must be off to reject with this power."""
    critical = stats.t.ppf(1 - alpha / 2, freedom)

    def missing_power(shift: float) -> float:
        # A rejection on the wrong side is rarer than 1e-5 where the right side has this power.
        return float(stats.nct.sf(critical, freedom, shift) - power)

    return float(optimize.brentq(missing_power, 0.0, 2 * critical + 5))


@dataclass(frozen=True)
class Plan:
    """What a comparison of two arms is going to have, in the metric's unit.

    patients, patient_sd: their number, and the SD of their differences; seeds: of each sample of trainings, how many
    there are on each fold, and folds are equally large; training_sds: of each sample, between trainings on one fold.
    Samples are the two arms, or with paired starts the differences of the same fold and seed alone; family: number of
    hypotheses; alpha: level of them together.
    """

    patients: int
    patient_sd: float
    seeds: tuple[tuple[int, ...], ...]
    training_sds: tuple[float, ...]
    family: int = 1
    alpha: float = 0.05

    @property
    def training_freedoms(self) -> tuple[int, ...]:
        """Of each sample of trainings."""
        return tuple(sum(sample) - len(sample) for sample in self.seeds)

    @property
    def se(self) -> float:
        """Standard error of the estimate, were the variances known."""
        return float(np.sqrt(self._parts().sum()))

    @property
    def detectable(self) -> float:
        """The difference that is found in four of five experiments; NaN where trainings are not repeated."""
        folds = len(self.seeds[0])
        if min(self.training_freedoms) < 1 or self.patients <= folds:
            return float("nan")
        parts = self._parts()
        of_trainings = np.array(self.training_freedoms)
        heavier = np.array([parts[0], *(parts[1:] * of_trainings / np.maximum(1, of_trainings - 2))])
        freedoms = np.array([self.patients - folds, *of_trainings])
        combined = heavier.sum() ** 2 / (heavier**2 / freedoms).sum()
        return self.se * noncentrality(float(combined), self.alpha / self.family)

    def _parts(self) -> np.ndarray:
        weights = [np.sum(1 / np.array(sample)) / len(sample) ** 2 for sample in self.seeds]
        return np.array([self.patient_sd**2 / self.patients, *np.square(self.training_sds) * weights])
