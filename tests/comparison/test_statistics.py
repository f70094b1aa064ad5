"""Ranks, adjusted p-values, bootstrap means and the noise of seeds, against scipy and statsmodels."""

import time

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from nnunet_deform.comparison.statistics import (
    bootstrap_means,
    holm,
    rank_biserial,
    seed_noise,
    signed_rank,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("size", [5, 8, 10])
def test_signed_rank_is_the_distribution_over_all_signs(rng, size):
    values = np.round(rng.normal(0.2, 1, (size, 3)), 1)
    values[0, 1] = 0.0
    for column, p in enumerate(signed_rank(values)):
        signed = stats.rankdata(np.abs(values[:, column])) * np.sign(values[:, column])
        signs = np.stack(np.meshgrid(*[[-1, 1]] * size)).reshape(size, -1)
        sums = np.abs(signed) @ signs
        tail = min((sums >= signed.sum() - 1e-9).mean(), (sums <= signed.sum() + 1e-9).mean())
        assert p == pytest.approx(min(1.0, 2 * tail), abs=1e-12)


@pytest.mark.parametrize("size", [20, 45])
def test_signed_rank_without_ties_is_scipys_exact_one(rng, size):
    values = rng.normal(0.2, 1, (size, 2))
    expected = [stats.wilcoxon(column, method="exact").pvalue for column in values.T]
    np.testing.assert_allclose(signed_rank(values), expected, rtol=1e-12)


@pytest.mark.parametrize("decimals", [16, 1], ids=["untied", "ties and zeros"])
def test_signed_rank_of_many_is_scipys_asymptotic_one(rng, decimals):
    values = np.round(rng.normal(0.1, 1, (120, 3)), decimals)
    expected = [stats.wilcoxon(c, zero_method="pratt", method="asymptotic").pvalue for c in values.T]
    np.testing.assert_allclose(signed_rank(values), expected, rtol=1e-9)


def test_rank_biserial_is_from_scipys_statistics(rng):
    values = np.round(rng.normal(0.2, 1, (60, 3)), 1)
    for column, effect in zip(values.T, rank_biserial(values), strict=True):
        positive = stats.wilcoxon(column, zero_method="pratt", alternative="greater", method="asymptotic").statistic
        total = stats.rankdata(np.abs(column))[column != 0].sum()
        assert effect == pytest.approx(2 * positive / total - 1, abs=1e-12)


def test_ranks_at_the_extremes():
    columns = np.array([[0.0, 1, -1]] * 12) * np.arange(1, 13)[:, None]
    np.testing.assert_allclose(signed_rank(columns), [1, 2 / 2**12, 2 / 2**12], rtol=1e-12)
    np.testing.assert_array_equal(rank_biserial(columns), [0, 1, -1])


def test_no_number_of_patients_is_a_cliff(rng):
    """scipy's permutations took 264 s for 4 arms and 15 classes at 13 patients with ties, and 0.6 s at 14."""
    columns = 6 * 3 * 16  # 6 pairs, 3 metrics, 15 classes and their mean
    seconds = {}
    for size in (5, 13, 14, 50, 51, 1000):
        values = np.round(rng.normal(0, 1, (size, columns)), 1)
        started = time.process_time()
        signed_rank(values)
        seconds[size] = time.process_time() - started
    assert max(seconds.values()) < 2
    assert seconds[13] < 3 * seconds[14] + 0.05


def test_holm_is_statsmodels(rng):
    for size in (1, 2, 7, 30):
        p_values = rng.uniform(0, 0.2, size)
        np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], rtol=1e-12)


def test_holm_counts_a_missing_test_as_a_member():
    np.testing.assert_allclose(holm([0.01, np.nan, 0.02]), [0.03, np.nan, 0.04])


def test_bootstrap_means_spread_as_means_do_and_columns_share_their_draws(rng):
    values = rng.normal(0, 1, (40, 1)) * [1, -2]
    draws = bootstrap_means(values, 20000, rng)
    assert draws[:, 0].std() == pytest.approx(values[:, 0].std() / np.sqrt(40), rel=0.03)
    np.testing.assert_allclose(draws[:, 1], -2 * draws[:, 0])


def test_seed_noise_pools_and_compares():
    nan = np.nan
    # fold 0: arms at 0.80, 0.90, 0.70 with the first seed; fold 1 has no repeats and must not count
    means = np.array(
        [
            [[0.80, 0.82, 0.84], [0.90, 0.90, 0.96], [0.70, nan, nan]],
            [[0.10, nan, nan], [0.20, nan, nan], [0.99, nan, nan]],
        ]
    )
    noise = seed_noise(means)
    assert noise.freedom == 4
    assert noise.intra == pytest.approx(np.sqrt((2 * 0.02**2 + 2 * np.var([0.9, 0.9, 0.96], ddof=1)) / 4))
    assert noise.inter == pytest.approx(0.1)
    assert noise.ratio == pytest.approx(0.1 / noise.intra)


def test_seed_noise_without_repeats_is_unknown():
    noise = seed_noise(np.array([[[0.8, np.nan], [0.9, np.nan]]]))
    assert np.isnan([noise.intra, noise.inter, noise.ratio]).all()
