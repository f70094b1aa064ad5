"""The model of evidence: against textbook formulas where it becomes one, and against its own consistency."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from nnunet_deform.comparison.evidence import Estimate, Plan, estimate, noncentrality


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _folds(rng, questions=4, patients=(20, 15, 17), seeds=(3, 3, 3), sd=0.5):
    return [
        rng.normal(0, 1, (questions, n, 1))
        + sd * rng.normal(0, 1, (questions, 1, s))
        + 0.3 * rng.normal(0, 1, (questions, n, s))
        for n, s in zip(patients, seeds, strict=True)
    ]


def test_the_mean_is_over_patients_and_then_trainings(rng):
    first, second = _folds(rng), _folds(rng, seeds=(2, 3, 5))
    result = estimate(first, second)
    of_patients = np.concatenate([a.mean(2) - b.mean(2) for a, b in zip(first, second, strict=True)], axis=1)
    np.testing.assert_allclose(result.mean, of_patients.mean(axis=1), atol=1e-12)
    assert result.number == 52
    np.testing.assert_allclose(result.patients + result.trainings, result.se**2)


def test_with_one_fold_and_training_and_symmetric_data_it_is_students_t(rng):
    half = rng.normal(0, 1, (3, 20))
    values = np.concatenate([half, -half], axis=1) + 0.2  # no skewness
    result = estimate([values[:, :, None]])
    np.testing.assert_allclose(result.p_two_sided(), stats.ttest_1samp(values, 0, axis=1).pvalue, rtol=1e-9)
    low, high = result.interval(0.05)
    for k in range(3):
        expected = DescrStatsW(values[k])
        assert (low[k], high[k]) == pytest.approx(expected.tconfint_mean(0.05), abs=1e-9)
        # two one-sided tests are statsmodels'
        outside = max(expected.ttest_mean(-0.3, "larger")[1], expected.ttest_mean(0.3, "smaller")[1])
        assert result.p_outside(0.3)[k] == pytest.approx(outside, rel=1e-9)
    assert result.training_freedoms == (0,)
    assert np.isnan(result.training_sds[0]).all()


def test_trainings_that_patients_hardly_differ_on_are_welchs_test(rng):
    """Two samples of trainings on one fold, equal for all patients but for what vanishes."""
    one, two = rng.normal(0, 1, (3, 9)), rng.normal(0, 4, (3, 7))
    first, second = (values[:, None, :] + np.zeros((3, 30, 1)) for values in (one, two))
    result = estimate([first], [second])
    expected = stats.ttest_ind(one, two, axis=1, equal_var=False)
    np.testing.assert_allclose(np.abs(result.mean / result.se), np.abs(expected.statistic), rtol=1e-9)
    # Satterthwaite's degrees of freedom with the heavier parts are never more than Welch's by much, nor fewer than 6
    assert (result.freedom > 6).all()
    assert result.training_freedoms == (8, 6)
    np.testing.assert_allclose(result.training_sds[1], two.std(axis=1, ddof=1), rtol=1e-9)


def test_variance_parts_are_what_plain_code_gives(rng):
    first, second = _folds(rng, 1), _folds(rng, 1)
    result = estimate(first, second)
    counts, number = [20, 15, 17], 52
    patients = sum(
        ((a.mean(2) - b.mean(2) - (a.mean(2) - b.mean(2)).mean()) ** 2).sum()
        for a, b in zip(first, second, strict=True)
    ) / (number - 3)
    trainings = rests = 0.0
    for arm in (first, second):
        variance = np.mean([fold.mean(1).var(ddof=1) for fold in arm])
        trainings += variance * sum((n / number) ** 2 / 3 for n in counts)
        squares = sum(
            ((fold - fold.mean(2, keepdims=True) - fold.mean(1, keepdims=True) + fold.mean()) ** 2).sum()
            for fold in arm
        )
        rests += squares / sum(2 * (n - 1) for n in counts) * sum(n / number**2 / 3 for n in counts)
    assert result.trainings[0] == pytest.approx(trainings)
    assert result.se[0] ** 2 == pytest.approx(patients / number + trainings - rests)
    assert result.patient_sd[0] == pytest.approx(np.sqrt(patients))


def test_paired_starts_remove_what_trainings_share(rng):
    shared = rng.normal(0, 2, (1, 1, 3))
    first = [rng.normal(0, 1, (1, 40, 1)) + shared + 0.1 * rng.normal(0, 1, (1, 1, 3)) for _ in range(3)]
    second = [shared + np.zeros((1, 40, 1)) for _ in range(3)]
    paired = estimate([a - b for a, b in zip(first, second, strict=True)])
    assert paired.training_freedoms == (6,)
    assert paired.se[0] < estimate(first, second).se[0] / 3


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6])
def test_test_interval_and_equivalence_never_contradict_each_other(rng, alpha):
    skewed = [1 - rng.exponential(1, (500, 12, 1)) + 0.2 * rng.normal(0, 1, (500, 1, 3)) for _ in range(3)]
    result = estimate([fold + 0.3 for fold in skewed])
    low, high = result.interval(alpha)
    np.testing.assert_array_equal(result.p_two_sided() < alpha, (low > 0) | (high < 0))
    assert ((low < result.mean) & (result.mean < high)).all()
    band = 0.6
    equal_low, equal_high = result.equivalence_interval(alpha)
    np.testing.assert_array_equal(result.p_outside(band) < alpha, (-band < equal_low) & (equal_high < band))
    assert 0.02 < (result.p_outside(band) < alpha).mean() < 0.98
    # turning the arms round turns everything round
    turned = estimate([-fold - 0.3 for fold in skewed])
    np.testing.assert_allclose(turned.p_two_sided(), result.p_two_sided(), rtol=1e-9)
    np.testing.assert_allclose(turned.interval(alpha), [-high, -low], rtol=1e-9)


def test_the_interval_is_longer_towards_the_longer_tail(rng):
    skewed = -rng.exponential(1, (1, 60, 1))
    result = estimate([skewed])
    low, high = result.interval(0.05)
    student = stats.t.ppf(0.975, 59) * result.se
    assert result.mean - low > 1.05 * student
    assert high - result.mean == pytest.approx(student)


def test_no_variation_at_all_is_a_point():
    nothing = estimate([np.zeros((1, 30, 3))] * 3)
    assert (nothing.p_two_sided(), nothing.p_outside(0.01)) == (1, 0)
    assert [end[0] for end in nothing.interval(0.05)] == [0, 0]
    always = estimate([np.full((1, 30, 3), 0.25)])
    assert (always.p_two_sided(), always.p_outside(0.1)) == (0, 1)


def test_a_single_patient_has_no_interval():
    with np.errstate(all="ignore"):
        result = estimate([np.ones((1, 1, 1))])
    assert np.isnan(result.se)


@pytest.mark.parametrize(("units", "alpha"), [(6, 0.05), (20, 0.05), (200, 0.01), (1500, 0.05 / 8)])
def test_the_shift_that_is_found_is_statsmodels(units, alpha):
    expected = TTestPower().solve_power(nobs=units, alpha=alpha, power=0.8) * np.sqrt(units)
    assert noncentrality(units - 1, alpha) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("training_sds", [(0.2, 0.2), (0.3,)])
def test_a_plan_says_what_is_found_in_four_of_five_experiments(rng, training_sds):
    seeds = ((3, 3, 3),) * len(training_sds)
    plan = Plan(patients=60, patient_sd=1.0, seeds=seeds, training_sds=training_sds, family=2)
    experiments = 4000

    def arm(sd: float, patient_sd: float) -> list[np.ndarray]:
        return [
            patient_sd * rng.normal(0, 1, (experiments, 20, 1)) + sd * rng.normal(0, 1, (experiments, 1, 3))
            for _ in range(3)
        ]

    first = [fold + plan.detectable for fold in arm(training_sds[0], 1.0)]
    result = estimate(first, arm(training_sds[1], 0.0)) if len(training_sds) == 2 else estimate(first)
    assert result.mean.std() == pytest.approx(plan.se, rel=0.03)
    assert (result.p_two_sided() < 0.025).mean() == pytest.approx(0.8, abs=0.03)


def test_a_plan_counts_the_trainings_of_each_fold(rng):
    first, second = (3, 3, 2), (4, 1, 2)
    plan = Plan(patients=60, patient_sd=1.0, seeds=(first, second), training_sds=(0.6, 0.3))
    assert plan.training_freedoms == (5, 4)

    def arm(sd: float, patient_sd: float, seeds: tuple[int, ...]) -> list[np.ndarray]:
        return [
            patient_sd * rng.normal(0, 1, (4000, 20, 1)) + sd * rng.normal(0, 1, (4000, 1, number)) for number in seeds
        ]

    result = estimate([fold + plan.detectable for fold in arm(0.6, 1.0, first)], arm(0.3, 0.0, second))
    assert result.mean.std() == pytest.approx(plan.se, rel=0.03)
    assert (result.p_two_sided() < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_a_plan_without_repeated_trainings_finds_nothing():
    assert np.isnan(Plan(100, 1.0, ((1,) * 5,) * 2, (0.1, 0.1)).detectable)


def test_no_array_is_shared_with_the_scores(rng):
    fold = rng.normal(0, 1, (1, 30, 3))
    before = fold.copy()
    assert isinstance(estimate([fold]), Estimate)
    np.testing.assert_array_equal(fold, before)
