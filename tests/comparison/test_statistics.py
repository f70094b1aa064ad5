"""Each statistic against scipy or statsmodels, and the whole against simulations whose truth is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from nnunet_deform.comparison import statistics
from nnunet_deform.comparison.statistics import (
    Contrast,
    SeedNoise,
    bca_interval,
    bootstrap_means,
    detectable_effect,
    holm,
    judge,
    paired_differences,
    patient_sums,
    seed_noise,
    signed_rank,
    smallest_adjusted,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _names(count: int) -> list[str]:
    return [f"p{i:04d}" for i in range(count)]


def test_a_structure_only_one_arm_left_out_counts_as_perfect():
    nan = np.nan
    first = np.array([0.9, nan, nan, 0.0])
    second = np.array([0.7, nan, 0.0, nan])
    np.testing.assert_allclose(paired_differences(first, second, perfect=1.0), [0.2, nan, 1.0, -1.0], atol=1e-15)
    # HD95: the penalty of the arm that drew it, against 0 mm
    assert paired_differences(np.array([nan]), np.array([87.0]), perfect=0.0) == -87.0


def test_patient_sums():
    sums, counts = patient_sums(np.array([[1.0, np.nan], [2.0, 5.0], [4.0, 6.0]]), ["b", "a", "b"])
    np.testing.assert_array_equal(sums, [[2, 5], [5, 6]])
    np.testing.assert_array_equal(counts, [[1, 1], [2, 1]])


@pytest.mark.parametrize("size", [8, 20, 45, 120])
@pytest.mark.parametrize("decimals", [16, 1], ids=["untied", "ties and zeros"])
def test_signed_rank_is_scipys(rng, size, decimals):
    values = np.round(rng.normal(0.2, 1, (size, 3)), decimals)
    values[2, 1] = np.nan
    p_values, effects = signed_rank(values)
    for column in range(3):
        used = values[~np.isnan(values[:, column]), column]
        expected = stats.wilcoxon(used, zero_method="pratt")
        assert p_values[column] == expected.pvalue
        # scipy's one-sided statistic is W+, and the ranks of non-zeros sum up to W+ + W-
        positive = stats.wilcoxon(used, zero_method="pratt", alternative="greater").statistic
        total = stats.rankdata(np.abs(used))[used != 0].sum()
        assert effects[column] == pytest.approx(2 * positive / total - 1, abs=1e-12)


def test_signed_rank_uses_pratts_zeros_and_not_wilcoxons(rng):
    values = np.concatenate([np.zeros(40), rng.normal(0.5, 1, 60)])
    (p,), _ = signed_rank(values[:, None])
    assert p == stats.wilcoxon(values, zero_method="pratt").pvalue
    assert abs(p - stats.wilcoxon(values, zero_method="wilcox").pvalue) > 1e-4


def test_signed_rank_at_the_extremes():
    columns = np.array([[0.0, 1, -1, np.nan]] * 12) * np.arange(1, 13)[:, None]
    p_values, effects = signed_rank(columns)
    np.testing.assert_allclose(p_values, [1, 2 / 2**12, 2 / 2**12, np.nan], rtol=1e-12)
    np.testing.assert_array_equal(effects, [0, 1, -1, np.nan])


def test_holm_is_statsmodels(rng):
    for size in (1, 2, 7, 30):
        p_values = rng.uniform(0, 0.2, size)
        np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], rtol=1e-12)


def test_holm_counts_a_missing_test_as_a_member():
    np.testing.assert_allclose(holm([0.01, np.nan, 0.02]), [0.03, np.nan, 0.04])


@pytest.mark.parametrize("skewed", [False, True])
def test_bca_is_scipys_on_the_same_draws(rng, skewed):
    values = rng.exponential(1, (60, 1)) ** 2 if skewed else rng.normal(0.3, 1, (60, 1))
    sums, counts = patient_sums(values, _names(60))
    draws = bootstrap_means(sums, counts, 5000, rng)
    low, high = bca_interval(sums, counts, draws)
    ours = SimpleNamespace(bootstrap_distribution=draws[:, 0])
    expected = stats.bootstrap((values[:, 0],), np.mean, n_resamples=0, bootstrap_result=ours, method="BCa")
    assert (low[0], high[0]) == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
    percentile = np.quantile(draws[:, 0], [0.025, 0.975])
    assert abs(high[0] - percentile[1]) > (0.02 if skewed else 0)  # the correction did something


def test_bca_is_scipys_with_draws_of_their_own(rng):
    values = rng.gamma(1.5, 1, (80, 1))
    sums, counts = patient_sums(values, _names(80))
    (low,), (high,) = bca_interval(sums, counts, bootstrap_means(sums, counts, 20000, rng))
    theirs = stats.bootstrap((values[:, 0],), np.mean, n_resamples=20000, method="BCa", rng=1).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * values.std())


def test_bootstrap_draws_whole_patients(rng):
    # Every patient's cases are copies, so cases say nothing more than patients do.
    patients = rng.normal(0, 1, (40, 1))
    cases, names = np.repeat(patients, 5, axis=0), np.repeat(_names(40), 5)
    by_patient = bootstrap_means(*patient_sums(cases, names), 20000, rng).std()
    assert by_patient == pytest.approx(patients.std() / np.sqrt(40), rel=0.03)
    by_case = bootstrap_means(*patient_sums(cases, _names(200)), 20000, rng).std()
    assert by_case == pytest.approx(by_patient / np.sqrt(5), rel=0.03)


def test_bootstrap_weighs_cases_and_leaves_missing_ones_out(rng):
    values = np.array([[1.0, np.nan], [2.0, 4.0], [3.0, 8.0], [10.0, 0.0]])
    sums, counts = patient_sums(values, ["a", "a", "a", "b"])
    draws = bootstrap_means(sums, counts, 4000, rng)
    # Two draws of two patients: both a (1/4), both b (1/4) or one each (1/2); the mean is over cases.
    for column, expected in ((0, [2.0, 4.0, 10.0]), (1, [0.0, 4.0, 6.0])):
        found, count = np.unique(np.round(draws[:, column], 12), return_counts=True)
        np.testing.assert_allclose(found, expected)
        assert count[expected.index(4.0)] == pytest.approx(2000, abs=200)


def test_columns_share_their_draws(rng):
    values = rng.normal(0, 1, (30, 1)) * [1, -2]
    draws = bootstrap_means(*patient_sums(values, _names(30)), 100, rng)
    np.testing.assert_allclose(draws[:, 1], -2 * draws[:, 0])


def test_intervals_of_too_little_are_nan_and_of_no_variation_a_point(rng):
    values = np.array([[0.5, np.nan, 0.25], [np.nan, np.nan, 0.25], [np.nan, np.nan, 0.25]])
    sums, counts = patient_sums(values, ["a", "b", "c"])
    low, high = bca_interval(sums, counts, bootstrap_means(sums, counts, 50, rng))
    np.testing.assert_array_equal(low, [np.nan, np.nan, 0.25])
    np.testing.assert_array_equal(high, [np.nan, np.nan, 0.25])


@pytest.mark.parametrize(("units", "alpha"), [(5, 0.05), (20, 0.05), (100, 0.05), (200, 0.01), (1500, 0.05 / 8)])
def test_detectable_effect_is_statsmodels(units, alpha):
    expected = TTestPower().solve_power(nobs=units, alpha=alpha, power=0.8)
    assert detectable_effect(units, alpha) == pytest.approx(expected, rel=1e-5)


def test_detectable_effect_of_one_unit_is_unknown():
    assert np.isnan(detectable_effect(1, 0.05))


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
    assert noise.margin(2, 0.05) == pytest.approx(stats.t.ppf(0.975, 4) * noise.intra)


def test_seed_noise_without_repeats_is_unknown():
    noise = seed_noise(np.array([[[0.8, np.nan], [0.9, np.nan]]]))
    assert np.isnan([noise.intra, noise.inter, noise.ratio, noise.margin(5, 0.05)]).all()


def test_null_data_are_rejected_at_the_nominal_rate(rng):
    # 30 patients with 1 to 3 cases that share a patient effect; no difference between the arms
    simulations, patients = 2000, np.repeat(_names(30), rng.integers(1, 4, 30))
    _, index = np.unique(patients, return_inverse=True)
    shared = rng.standard_t(5, (30, simulations))[index]
    values = shared + 0.3 * rng.standard_t(5, (len(patients), simulations))
    sums, counts = patient_sums(values, patients)
    rejected = (signed_rank(sums / counts)[0] < 0.05).mean()
    assert rejected == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / simulations))
    # the test that takes cases for independent rejects far too often
    assert (signed_rank(values)[0] < 0.05).mean() > 0.12


def test_intervals_exclude_the_true_difference_at_the_nominal_rate(rng):
    simulations, patients = 1000, np.repeat(_names(150), rng.integers(1, 4, 150))
    _, index = np.unique(patients, return_inverse=True)
    values = rng.normal(0, 1, (150, simulations))[index] + 0.3 * rng.normal(0, 1, (len(patients), simulations))

    def excluded(names: list[str]) -> float:
        sums, counts = patient_sums(values, names)
        low, high = bca_interval(sums, counts, bootstrap_means(sums, counts, 1000, rng))
        return ((low > 0) | (high < 0)).mean()

    assert excluded(patients) == pytest.approx(0.05, abs=0.025)
    # cases taken for independent give intervals that are far too short
    assert excluded(_names(len(patients))) > 0.12


def test_a_family_of_nulls_has_at_most_the_nominal_chance_of_any_rejection(rng):
    any_rejected = np.mean([holm(signed_rank(rng.normal(0, 1, (25, 6)))[0]).min() < 0.05 for _ in range(400)])
    assert any_rejected < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert any_rejected > 0.02


@pytest.mark.parametrize("units", [30, 120])
def test_the_detectable_difference_is_found_in_four_of_five(rng, units):
    shift = detectable_effect(units, 0.05)
    found = (signed_rank(rng.normal(shift, 1, (units, 1000)))[0] < 0.05).mean()
    # the Wilcoxon test has 95 % of the t-test's efficiency for normal differences
    assert 0.73 < found < 0.84


def _contrast(mean=0.02, interval=(0.015, 0.025), p=0.001, equivalence=None, patients=50) -> Contrast:
    return Contrast(
        first="new",
        second="old",
        metric="Dice",
        cases=100,
        patients=patients,
        mean=mean,
        median=mean,
        interval=interval,
        equivalence=equivalence or interval,
        p=p,
        p_holm=p,
        rank_biserial=0.5,
        detectable=0.004,
        one_sided_absent=0,
    )


QUIET = SeedNoise(intra=0.002, freedom=8, inter=0.02)


def _judge(contrast, noise=QUIET, seeds=(3, 3), folds=5, higher_is_better=True, family=2):
    return judge(
        contrast,
        noise=noise,
        seeds=seeds,
        folds=folds,
        family=family,
        smallest_p=smallest_adjusted([contrast.p] * family, [contrast.patients] * family)[0],
        band=0.005,
        alpha=0.05,
        higher_is_better=higher_is_better,
    )


def test_a_winner_is_named_when_everything_agrees():
    verdict = _judge(_contrast())
    assert (verdict.kind, verdict.winner) == ("better", "new")
    assert "new is better than old" in verdict.sentence
    assert _judge(_contrast(-0.02, (-0.025, -0.015))).winner == "old"
    assert _judge(_contrast(), higher_is_better=False).winner == "old"
    assert _judge(_contrast(-0.02, (-0.025, -0.015)), higher_is_better=False).winner == "new"


@pytest.mark.parametrize(
    ("contrast", "options", "reason"),
    [
        (_contrast(p=0.2), {}, "the test does not reject"),
        (_contrast(p=0.05), {}, "the test does not reject"),
        (_contrast(interval=(-0.001, 0.03)), {}, "the test does not reject"),
        (_contrast(-0.02, (-0.03, 0.001)), {}, "the test does not reject"),
        (_contrast(interval=(-0.03, -0.01)), {}, "the test does not reject"),
        (_contrast(), {"seeds": (3, 2)}, "old has 2 of 3 seeds"),
        (_contrast(), {"seeds": (1, 3)}, "new has 1 of 3 seeds"),
        (_contrast(), {"noise": SeedNoise(0.02, 8, 0.019)}, "differ less than seeds of one method"),
        (_contrast(), {"noise": SeedNoise(np.nan, 0, np.nan)}, "differ less than seeds of one method"),
        (_contrast(), {"noise": SeedNoise(0.02, 8, 0.5)}, "a change of seeds alone"),
        (_contrast(p=np.nan), {}, "too few for a test"),
        (_contrast(p=0.04, patients=6), {}, "with 6 patients no difference, however large, could be significant"),
        (_contrast(0.0, (0.0, 0.0), p=np.nan), {"seeds": (1, 1)}, "too few for a test"),
        (_contrast(0.001, (-0.002, 0.004)), {"seeds": (2, 3)}, "new has 2 of 3 seeds"),
        (_contrast(0.003, (0.001, 0.0049), equivalence=(0.0, 0.0051), p=0.2), {}, "the test does not reject"),
    ],
)
def test_without_evidence_nothing_is_distinguishable_and_nobody_wins(contrast, options, reason):
    verdict = _judge(contrast, **options)
    assert (verdict.kind, verdict.winner) == ("not distinguishable", None)
    assert reason in verdict.sentence
    assert verdict.sentence.startswith("new and old are not distinguishable: ")
    assert "better" not in verdict.sentence


def test_seven_patients_can_decide_a_family_of_two():
    (p,), _ = signed_rank(np.arange(1.0, 8.0)[:, None])
    assert holm([p, p])[0] < 0.05
    assert _judge(_contrast(p=2 * p, patients=7)).kind == "better"


def test_equivalence_is_a_result_even_when_the_test_rejects():
    verdict = _judge(_contrast(0.001, (0.0005, 0.0015)))
    assert (verdict.kind, verdict.winner) == ("equivalent", None)
    assert "equivalent within +-0.005" in verdict.sentence


def test_the_seeds_margin_counts_folds():
    noise = SeedNoise(intra=0.01, freedom=8, inter=0.02)
    # a family of two: t(0.9875, 8) = 2.752, and the margin is 0.0389 / sqrt(folds)
    assert _judge(_contrast(), noise, folds=3).kind == "not distinguishable"
    assert _judge(_contrast(), noise, folds=4).kind == "better"
    assert _judge(_contrast(), noise, folds=4, family=4).kind == "not distinguishable"


def test_equivalence_must_survive_a_change_of_seeds():
    contrast = _contrast(0.001, (0.0005, 0.0015))
    # a family of two: t(0.975, 8) = 2.306, one-sided at alpha / family; sqrt(2 / 5) of it is 1.458
    assert _judge(contrast, SeedNoise(0.0027, 8, 0.02)).kind == "equivalent"
    verdict = _judge(contrast, SeedNoise(0.0028, 8, 0.02))
    assert (verdict.kind, verdict.winner) == ("not distinguishable", None)
    assert "agree within +-0.005, but a change of seeds alone gives differences up to 0.0041" in verdict.sentence


def _seeds_decide(rng, true_difference: float, seed_sd: float, folds: int, arms: int) -> list[str]:
    """Verdicts on the first arm against each other one, whose methods differ by ``true_difference`` from it, where
    patients are so many that only the noise of seeds is left."""
    means = rng.normal(0, seed_sd, (folds, arms, 3))
    means[:, 0] += true_difference
    means[1:, :, 1:] = np.nan
    noise = seed_noise(means)
    kinds = []
    for arm in range(1, arms):
        mean = (means[:, 0, 0] - means[:, arm, 0]).mean()
        contrast = _contrast(mean, (mean - 1e-6, mean + 1e-6), p=1e-9, patients=2500)
        # whatever the ratio would have kept back
        loud = SeedNoise(noise.intra, noise.freedom, 1.0)
        kinds.append(_judge(contrast, loud, folds=folds, family=arms - 1).kind)
    return kinds


def test_seeds_alone_give_a_family_a_winner_at_most_at_the_nominal_rate(rng):
    simulations = 1500
    any_winner = np.mean(["better" in _seeds_decide(rng, 0.0, 0.02, 3, 7) for _ in range(simulations)])
    assert any_winner < 0.05 + 3 * np.sqrt(0.05 * 0.95 / simulations)
    assert any_winner > 0.01


def test_methods_that_differ_by_the_band_are_called_equivalent_at_most_at_the_nominal_rate(rng):
    simulations = 1500
    equivalent = np.mean(
        ["equivalent" in _seeds_decide(rng, 0.005, sd, 5, 3) for sd in (0.001, 0.003) for _ in range(simulations)]
    )
    assert equivalent < 0.05 + 3 * np.sqrt(0.05 * 0.95 / simulations)


def test_the_smallest_adjusted_p_depends_on_the_other_tests():
    # Two tests on 100 patients reject, so the two on 7 need no more than holm's factors 2 and 1.
    np.testing.assert_allclose(
        smallest_adjusted([1e-9, 1e-8, 0.04, 0.5], [100, 100, 7, 7])[2:], [2 / 64, 2 / 64], rtol=1e-12
    )
    # Among their like, the smallest of four has the factor 4.
    np.testing.assert_allclose(smallest_adjusted([0.04, 0.5, np.nan, 0.3], [7, 7, 0, 7])[:2], [4 / 64, 4 / 64])


def test_the_required_number_of_seeds_is_the_protocols():
    assert statistics.REQUIRED_SEEDS == 3
