import numpy as np
import pytest
from scipy import stats

from nnunet_deform.comparison.ranking import beaten_ranks, bootstrap_ranking, kendall_tau, rank_across, rank_rows


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("decimals", [16, 0], ids=["untied", "ties"])
def test_ranks_and_tau_are_scipys(rng, decimals):
    scores = np.round(rng.normal(0, 1, (50, 6)), decimals)
    ranks = rank_rows(scores)
    np.testing.assert_array_equal(ranks, stats.rankdata(-scores, axis=1))
    taus = kendall_tau(ranks[0], ranks)
    expected = [stats.kendalltau(ranks[0], row).statistic for row in ranks]
    np.testing.assert_allclose(taus, expected, atol=1e-12)


def test_tau_of_a_ranking_of_ties_only_is_unknown():
    assert np.isnan(kendall_tau(np.array([1.0, 2.0]), np.array([[1.5, 1.5]]))).all()


def test_beaten_ranks_need_significance_over_all_pairs():
    # pairs (0, 1), (0, 2), (1, 2): 0 beats 1 and 2; 2 seems to beat 1, but not after Holm
    ranks = beaten_ranks(np.array([0.1, 0.2, -0.3]), np.array([0.001, 0.002, 0.06]), alpha=0.05)
    np.testing.assert_array_equal(ranks, [1, 2.5, 2.5])
    ranks = beaten_ranks(np.array([0.1, 0.2, -0.3]), np.array([0.001, 0.002, 0.04]), alpha=0.05)
    np.testing.assert_array_equal(ranks, [1, 3, 2])


def test_holm_over_pairs_matters():
    # 0.02 alone is significant, 0.06 after Holm over three is not
    ranks = beaten_ranks(np.array([0.1, 0.2, -0.3]), np.array([0.02, 0.5, 0.6]), alpha=0.05)
    np.testing.assert_array_equal(ranks, [2, 2, 2])


def test_bootstrap_ranking():
    draws = np.array([[3.0, 2, 1], [3, 2, 1], [2, 3, 1], [3, 3, 1]])
    ranking = bootstrap_ranking(np.array([0.9, 0.8, 0.1]), draws, np.array([1.0, 2, 3]))
    np.testing.assert_array_equal(ranking.ranks, [1, 2, 3])
    np.testing.assert_allclose(ranking.first, [2.5 / 4, 1.5 / 4, 0])
    np.testing.assert_allclose(ranking.frequencies, [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 1]])
    np.testing.assert_allclose(ranking.tau, [1, 1, 1 / 3, 2 / np.sqrt(6)])
    np.testing.assert_allclose(ranking.rank_interval[:, 2], [3, 3])


def test_a_clear_ranking_is_stable_and_a_null_one_is_not(rng):
    noise = rng.normal(0, 1, (2000, 4)) * 0.01
    clear = bootstrap_ranking(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.9, 0.8, 0.7, 0.6]) + noise, np.ones(4))
    assert clear.tau.min() == 1
    null = bootstrap_ranking(np.array([0.81, 0.80, 0.79, 0.78]) * 1e-4, noise, np.ones(4))
    assert abs(np.mean(null.tau)) < 0.05
    np.testing.assert_allclose(null.first, 0.25, atol=0.04)


def test_ranks_across_datasets_are_averaged_whatever_their_scales():
    across = rank_across(np.array([[0.9, 0.8, 0.7], [0.2, 0.3, 0.1]]))
    assert across.ranks.tolist() == [[1, 2, 3], [2, 1, 3]]
    assert across.means.tolist() == [1.5, 1.5, 3]
    assert np.isnan(across.p)


def test_friedmans_test_needs_five_datasets():
    means = np.tile([0.9, 0.8, 0.7], (5, 1))
    # All five agree: chi-squared 10 with 2 degrees of freedom.
    assert rank_across(means).p == pytest.approx(np.exp(-5))
    assert np.isnan(rank_across(means[:4]).p)
    assert np.isnan(rank_across(means[:, :2]).p)
    assert np.isnan(rank_across(np.ones((5, 3))).p)
