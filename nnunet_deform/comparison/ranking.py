"""How stable a ranking of arms is when other patients had been drawn (as challengeR does)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from nnunet_deform.comparison.statistics import holm


@dataclass(frozen=True)
class Ranking:
    """Rank 1 is the best; ties share the mean of their ranks.

    means: [arms]; ranks: [arms] of the whole sample; by_tests: [arms], the rank by the number of arms significantly
    beaten; rank_interval: [2, arms], the middle 95 % over the draws; first: [arms], share of draws in which the arm is
    first (ties share); frequencies: [arms, arms], share of draws in which arm i has rank j + 1 (ties rounded down);
    tau: [draws], Kendall's tau-b between each draw's ranking and the whole sample's.
    """

    means: np.ndarray
    ranks: np.ndarray
    by_tests: np.ndarray
    rank_interval: np.ndarray
    first: np.ndarray
    frequencies: np.ndarray
    tau: np.ndarray

    @property
    def mean_tau(self) -> float:
        """Over the draws that have one; NaN where none has, because all arms score the same."""
        known = self.tau[~np.isnan(self.tau)]
        return float(known.mean()) if known.size else float("nan")


def rank_rows(scores: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, 1 for the highest score, ties with the mean of their ranks.

    Args:
        scores: [..., arms], higher is better.
    """
    above = (scores[..., None, :] > scores[..., :, None]).sum(axis=-1)
    equal = (scores[..., None, :] == scores[..., :, None]).sum(axis=-1)
    return above + (equal + 1) / 2


def kendall_tau(reference: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row with a reference ranking.

    Args:
        reference: [arms]; ranks: [rows, arms].

    Returns:
        [rows]; NaN where either has only ties.
    """
    first, second = np.triu_indices(len(reference), 1)
    of_reference = np.sign(reference[first] - reference[second])
    of_rows = np.sign(ranks[:, first] - ranks[:, second])
    untied = np.sqrt((of_reference**2).sum() * (of_rows**2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.where(untied > 0, (of_rows @ of_reference) / untied, np.nan)


def beaten_ranks(differences: np.ndarray, p_values: np.ndarray, alpha: float) -> np.ndarray:
    """Rank by the number of arms that each beats significantly, Holm over all pairs.

    Args:
        differences, p_values: [pairs] in the order of ``numpy.triu_indices(arms, 1)``; a positive difference means that
            the first arm of the pair is better.
        alpha: level.

    Returns:
        [arms]
    """
    arms = int((1 + np.sqrt(1 + 8 * len(p_values))) / 2)
    first, second = np.triu_indices(arms, 1)
    significant = holm(p_values) < alpha
    beaten = np.bincount(first[significant & (differences > 0)], minlength=arms)
    beaten += np.bincount(second[significant & (differences < 0)], minlength=arms)
    return rank_rows(beaten)


def bootstrap_ranking(means: np.ndarray, draws: np.ndarray, by_tests: np.ndarray) -> Ranking:
    """Ranking by mean score, and what it becomes in bootstrap samples.

    Args:
        means: [arms], higher is better.
        draws: [draws, arms], the same means in samples of patients.
        by_tests: [arms] from :func:`beaten_ranks`.
    """
    ranks, drawn = rank_rows(means), rank_rows(draws)
    best = drawn == drawn.min(axis=1, keepdims=True)
    places = np.floor(drawn).astype(int) - 1
    return Ranking(
        means=means,
        ranks=ranks,
        by_tests=by_tests,
        rank_interval=np.quantile(drawn, [0.025, 0.975], axis=0),
        first=(best / best.sum(axis=1, keepdims=True)).mean(axis=0),
        frequencies=(places[:, :, None] == np.arange(len(means))).mean(axis=0),
        tau=kendall_tau(ranks, drawn),
    )


@dataclass(frozen=True)
class RanksAcross:
    """ranks: [datasets, arms], 1 is the best; means: [arms], over datasets; p: of Friedman's test that all arms are
    alike, NaN with fewer than five datasets or three arms, of which it says nothing."""

    ranks: np.ndarray
    means: np.ndarray
    p: float


_FRIEDMAN_DATASETS, _FRIEDMAN_ARMS = 5, 3


def rank_across(means: np.ndarray) -> RanksAcross:
    """Rank on each dataset, then average, because scores of different datasets have no common scale.

    Args:
        means: [datasets, arms], higher is better.
    """
    ranks = rank_rows(means)
    datasets, arms = ranks.shape
    p = float("nan")
    if datasets >= _FRIEDMAN_DATASETS and arms >= _FRIEDMAN_ARMS and np.ptp(ranks) > 0:
        p = float(stats.friedmanchisquare(*ranks.T).pvalue)
    return RanksAcross(ranks, ranks.mean(axis=0), p)
