"""Statistics that describe: ranks, adjusted p-values, bootstrap means and the noise of seeds.

Verdicts rest on :mod:`nnunet_deform.comparison.evidence`. Here, too, the unit is the patient, because two scans of one
patient are no two witnesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

_EXACT_UNITS = 50  # below, the exact distribution of the signed ranks costs less than a millisecond
_DRAWS_AT_ONCE = 500  # bounds the memory of the bootstrap weights: 10 MB at 2,500 patients


def rank_biserial(differences: np.ndarray) -> np.ndarray:
    """Matched-pairs rank-biserial correlation, (W+ - W-) / (W+ + W-) of Wilcoxon's signed ranks with Pratt's zeros.

    1 if every difference is positive, -1 if every one is negative, 0 if none differs from zero.

    Args:
        differences: [units, K], complete.

    Returns:
        [K].
    """
    signed = stats.rankdata(np.abs(differences), axis=0) * np.sign(differences)
    total = np.abs(signed).sum(axis=0)
    return np.divide(signed.sum(axis=0), total, out=np.zeros(len(total)), where=total > 0)


def signed_rank(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values of Wilcoxon's signed-rank test with Pratt's treatment of zeros.

    Exact up to 50 units, with ties and zeros, too; above from the normal distribution with the variance of the ranks
    that there are.

    Args:
        differences: [units, K], complete.

    Returns:
        [K]; 1 without any difference other than zero.
    """
    p_values = np.ones(differences.shape[1])
    for column, values in enumerate(differences.T):
        # Zeros are ranked too, and then left out: Pratt's rule. Doubled ranks are integers.
        doubled = np.round(2 * stats.rankdata(np.abs(values))).astype(int)
        positive, ranks = doubled[values > 0].sum(), doubled[values != 0]
        if len(values) <= _EXACT_UNITS:
            ways = np.ones(1)  # probability of each doubled W+
            for rank in ranks:
                ways = np.concatenate([ways, np.zeros(rank)]) / 2
                ways[rank:] += ways[: len(ways) - rank].copy()
            tail = min(ways[: positive + 1].sum(), ways[positive:].sum())
        else:
            spread = max(1.0, np.sqrt((ranks.astype(float) ** 2).sum()))
            tail = special.ndtr(-abs(2 * positive - ranks.sum()) / spread)
        p_values[column] = min(1.0, 2 * tail)
    return p_values


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of the p-values of one family; NaN stays NaN and still counts as a member."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)  # NaN last
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return np.where(np.isnan(p_values), np.nan, adjusted)


def bootstrap_means(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means when patients are drawn with replacement; every column sees the same patients.

    Args:
        values: of each patient, [patients, K], complete.
        draws: number of samples.

    Returns:
        [draws, K].
    """
    patients = len(values)
    means = np.empty((draws, values.shape[1]))
    for start in range(0, draws, _DRAWS_AT_ONCE):
        rows = min(_DRAWS_AT_ONCE, draws - start)
        chosen = rng.integers(patients, size=(rows, patients)) + patients * np.arange(rows)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=rows * patients).reshape(rows, patients)
        means[start : start + rows] = weights @ values / patients
    return means


@dataclass(frozen=True)
class SeedNoise:
    """How much trainings of the same method differ, and methods from each other.

    intra: SD of a fold's mean score between seeds of one method, pooled; freedom: its degrees of freedom; inter: SD of
    the methods' mean scores in the same folds; ratio: inter / intra. NaN where there are no repeated seeds.
    """

    intra: float
    freedom: int
    inter: float

    @property
    def ratio(self) -> float:
        if np.isnan(self.intra):
            return float("nan")
        return self.inter / self.intra if self.intra > 0 else float("inf")


def seed_noise(means: np.ndarray) -> SeedNoise:
    """From the mean score of each training.

    Args:
        means: [folds, arms, seeds], the first seed being the one every arm has; NaN where there was no training.
    """
    seeds = (~np.isnan(means)).sum(axis=2)
    repeated = seeds >= 2
    freedom = int((seeds[repeated] - 1).sum())
    if freedom == 0:
        return SeedNoise(float("nan"), 0, float("nan"))
    intra = np.sqrt((np.nanvar(means[repeated], axis=1, ddof=0) * seeds[repeated]).sum() / freedom)
    folds = [fold[~np.isnan(fold)] for fold in means[repeated.any(axis=1), :, 0]]
    variances = [np.var(fold, ddof=1) for fold in folds if fold.size >= 2]
    inter = np.sqrt(np.mean(variances)) if variances else float("nan")
    return SeedNoise(float(intra), freedom, float(inter))
