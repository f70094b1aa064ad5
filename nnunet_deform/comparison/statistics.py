"""Paired statistics of two arms on the same cases.

The unit is the patient, because two scans of one patient are no two witnesses: tests work on one mean difference a
patient, the bootstrap draws whole patients. Arrays have one row a case (or patient) and one column a question (a class,
a contrast), and NaN where a structure was scored in neither arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

# Three trainings are the fewest that say anything about how much one differs from the next.
REQUIRED_SEEDS = 3

_DRAWS_AT_ONCE = 500  # bounds the memory of the bootstrap weights: 10 MB at 2,500 patients


def paired_differences(first: np.ndarray, second: np.ndarray, *, perfect: float) -> np.ndarray:
    """``first - second``, cell by cell.

    A structure that is absent from the truth and from a prediction has no score (NaN). Where only one arm left it out,
    that arm was right and the other wrong, so its score counts as ``perfect``: without this rule false positives on
    absent structures would vanish from the comparison. NaN in both remains NaN.

    Args:
        first, second: scores of the same cases and classes, any equal shape.
        perfect: the metric's best value.
    """
    first_alone, second_alone = np.isnan(second) & ~np.isnan(first), np.isnan(first) & ~np.isnan(second)
    return np.where(second_alone, perfect, first) - np.where(first_alone, perfect, second)


def patient_sums(values: np.ndarray, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each patient.

    Args:
        values: [cases, K]; NaN counts as missing.
        patients: the patient of each case.

    Returns:
        sums and counts, [patients, K] each, patients in sorted order.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    present = ~np.isnan(values)
    sums, counts = np.zeros((2, index.max() + 1, values.shape[1]))
    np.add.at(sums, index, np.where(present, values, 0.0))
    np.add.at(counts, index, present)
    return sums, counts


def signed_rank(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided Wilcoxon signed-rank test with Pratt's treatment of zeros, and the matched-pairs rank-biserial.

    The rank-biserial is (W+ - W-) / (W+ + W-): 1 if every difference is positive, -1 if every one is negative.

    Args:
        differences: [units, K]; NaN counts as missing.

    Returns:
        p-values and rank-biserial correlations, [K] each. Without any difference other than zero they are 1 and 0,
        without any difference at all NaN.
    """
    p_values, effects = np.full((2, differences.shape[1]), np.nan)
    for column, values in enumerate(differences.T):
        values = values[~np.isnan(values)]
        if not values.size:
            continue
        if not values.any():
            p_values[column], effects[column] = 1.0, 0.0
            continue
        p_values[column] = stats.wilcoxon(values, zero_method="pratt").pvalue
        ranks = stats.rankdata(np.abs(values))  # zeros are ranked too, and then left out: Pratt's rule
        positive, negative = ranks[values > 0].sum(), ranks[values < 0].sum()
        effects[column] = (positive - negative) / (positive + negative)
    return p_values, effects


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of the p-values of one family; NaN stays NaN and still counts as a member."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)  # NaN last
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return np.where(np.isnan(p_values), np.nan, adjusted)


def smallest_adjusted(p_values: Sequence[float], patients: Sequence[int]) -> np.ndarray:
    """Holm-adjusted p-value of each test, had all its patients differed in the same direction; the others as they are.

    The signed-rank test has no smaller p-value than 2^(1 - patients).
    """
    adjusted = np.empty(len(p_values))
    for position, count in enumerate(patients):
        attained = np.array(p_values, dtype=float)
        attained[position] = 2.0 ** (1 - count)
        adjusted[position] = holm(attained)[position]
    return adjusted


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means over cases when patients are drawn with replacement; every column sees the same patients.

    Args:
        sums, counts: of each patient, [patients, K], see :func:`patient_sums`.
        draws: number of samples.

    Returns:
        [draws, K]; NaN where a draw has no scored case.
    """
    patients = len(sums)
    means = np.empty((draws, sums.shape[1]))
    complete = bool((counts == counts[:, :1]).all())
    for start in range(0, draws, _DRAWS_AT_ONCE):
        rows = min(_DRAWS_AT_ONCE, draws - start)
        chosen = rng.integers(patients, size=(rows, patients)) + patients * np.arange(rows)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=rows * patients).reshape(rows, patients).astype(float)
        totals = weights @ (counts[:, :1] if complete else counts)
        with np.errstate(invalid="ignore"):
            means[start : start + rows] = (weights @ sums) / totals
    return means


def bca_interval(
    sums: np.ndarray, counts: np.ndarray, draws: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of the mean over cases, by patient.

    Args:
        sums, counts: of each patient, [patients, K].
        draws: [draws, K] from :func:`bootstrap_means`.
        level: coverage.

    Returns:
        Lower and upper ends, [K] each; both equal the mean where all draws do, NaN with fewer than two patients.
    """
    low, high = np.full((2, sums.shape[1]), np.nan)
    alpha = (1 - level) / 2
    for column in range(sums.shape[1]):
        used = counts[:, column] > 0
        if used.sum() < 2:
            continue
        total, number = sums[used, column], counts[used, column]
        mean = total.sum() / number.sum()
        values = draws[:, column]
        values = np.sort(values[~np.isnan(values)])
        if np.ptp(values) <= 1e-12 * max(1.0, abs(mean)):
            low[column] = high[column] = mean
            continue
        below, up_to = np.searchsorted(values, mean, side="left"), np.searchsorted(values, mean, side="right")
        bias = stats.norm.ppf((below + up_to) / (2 * len(values)))
        left_out = (total.sum() - total) / (number.sum() - number)
        skew = left_out.mean() - left_out
        spread = (skew**2).sum() ** 1.5
        acceleration = (skew**3).sum() / (6 * spread) if spread > 0 else 0.0
        shifted = bias + stats.norm.ppf([alpha, 1 - alpha])
        percentiles = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
        low[column], high[column] = np.quantile(values, percentiles)
    return low, high


@lru_cache
def detectable_effect(units: int, alpha: float, power: float = 0.8) -> float:
    """The standardised difference that a two-sided paired t-test of this size finds with that power.

    A Wilcoxon test needs at most 16 % more units, for normal differences 5 %. NaN with fewer than two units.
    """
    if units < 2:
        return float("nan")
    freedom = units - 1
    critical = stats.t.ppf(1 - alpha / 2, freedom)

    def missing_power(shift: float) -> float:
        # A rejection on the wrong side is rarer than 1e-5 where the right side has this power.
        return float(stats.nct.sf(critical, freedom, shift) - power)

    return float(optimize.brentq(missing_power, 0.0, 2 * critical + 2) / np.sqrt(units))


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

    def margin(self, folds: int, alpha: float) -> float:
        """What the difference of two methods must exceed to be more than a change of seeds gives.

        Each method's mean is one over ``folds`` independent trainings, so the difference has the variance
        2 intra^2 / folds.
        """
        if self.freedom < 1:
            return float("nan")
        return float(stats.t.ppf(1 - alpha / 2, self.freedom) * self.intra * np.sqrt(2 / folds))


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


@dataclass(frozen=True)
class Contrast:
    """One arm against another on one metric; differences are first minus second, in the metric's own unit.

    interval: at 95 %; equivalence: at level 1 - 2 alpha / family, which lies inside the band exactly where two
    one-sided tests at alpha over the whole family reject.
    """

    first: str
    second: str
    metric: str
    cases: int
    patients: int
    mean: float
    median: float
    interval: tuple[float, float]
    equivalence: tuple[float, float]
    p: float
    p_holm: float
    rank_biserial: float
    detectable: float
    one_sided_absent: int


@dataclass(frozen=True)
class Verdict:
    """``kind`` is "better", "equivalent" or "not distinguishable"; ``winner`` is None except with "better"."""

    kind: str
    winner: str | None
    sentence: str


def judge(
    contrast: Contrast,
    *,
    noise: SeedNoise,
    seeds: tuple[int, int],
    folds: int,
    family: int,
    smallest_p: float,
    band: float,
    alpha: float,
    higher_is_better: bool,
    number: str = "{:+.4f}",
) -> Verdict:
    """What may be said of a declared hypothesis.

    A winner is named only if the adjusted test rejects, the interval excludes zero on the same side, both arms were
    trained with at least ``REQUIRED_SEEDS`` seeds somewhere, the dataset can tell methods apart (inter / intra >= 1),
    and the difference is larger than a change of seeds gives. Equivalence needs the interval within +-``band``, the
    seeds, and that a change of them leaves the difference in the band, too. All else is "not distinguishable", with the
    reason. Seeds are judged at alpha / family: with many patients any two trainings differ significantly, so that
    the chance of a false winner is that of the seeds.

    Args:
        smallest_p: the adjusted p-value if every patient differed in the same direction, see :func:`smallest_adjusted`.
    """
    low, high = contrast.interval
    pair = f"{contrast.first} and {contrast.second}"
    numbers = (
        f"mean difference {number.format(contrast.mean)}, 95 % interval {number.format(low)} to {number.format(high)}, "
        f"p = {contrast.p_holm:.3g} after Holm"
    )

    def undecided(reason: str) -> Verdict:
        return Verdict("not distinguishable", None, f"{pair} are not distinguishable: {reason} ({numbers}).")

    if np.isnan(contrast.p_holm) or np.isnan(low):
        return undecided(f"{contrast.patients} patients are too few for a test")
    if smallest_p >= alpha:
        return undecided(f"with {contrast.patients} patients no difference, however large, could be significant")
    few = [
        f"{arm} has {count} of {REQUIRED_SEEDS} seeds"
        for arm, count in zip((contrast.first, contrast.second), seeds, strict=True)
        if count < REQUIRED_SEEDS
    ]
    if few:
        return undecided(f"evidence is missing, {' and '.join(few)}, so a difference may be chance of the training")
    if not noise.ratio >= 1:
        return undecided(
            f"methods differ less than seeds of one method here (inter/intra SD {noise.ratio:.2f}), so this dataset "
            "cannot tell them apart"
        )
    equal_low, equal_high = contrast.equivalence
    if -band <= equal_low and equal_high <= band:
        change = noise.margin(folds, 2 * alpha / family)  # one-sided, as equivalence is
        if abs(contrast.mean) + change <= band:
            return Verdict("equivalent", None, f"{pair} are equivalent within +-{band:g} ({numbers}).")
        return undecided(
            f"these trainings agree within +-{band:g}, but a change of seeds alone gives differences up to "
            f"{number.format(change).lstrip('+')}"
        )
    if not (contrast.p_holm < alpha and low * high > 0 and low * contrast.mean > 0):
        return undecided(
            f"the test does not reject, and a difference of {number.format(contrast.detectable).lstrip('+')} is the "
            "smallest that these cases would have shown with 80 % power"
        )
    margin = noise.margin(folds, alpha / family)
    if not abs(contrast.mean) > margin:
        return undecided(f"a change of seeds alone gives differences up to {number.format(margin).lstrip('+')}")
    winner, loser = contrast.first, contrast.second
    if (contrast.mean > 0) != higher_is_better:
        winner, loser = loser, winner
    return Verdict("better", winner, f"{winner} is better than {loser} ({numbers}).")
