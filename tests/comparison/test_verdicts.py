"""Verdicts on data that are made to fool them; the comments say what earlier rules made of them."""

import numpy as np
import pytest

from nnunet_deform.comparison.verdicts import (
    REQUIRED_PATIENTS,
    REQUIRED_TRAINING_FREEDOM,
    Contrast,
    Kind,
    Reason,
    contrasts,
    hardly_learned,
    judge,
    turned,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _contrast(
    differences, seeds=3, folds=3, sd=(0.001, 0.001), family=1, band=0.005, paired=False, rng=None
) -> Contrast:
    """Of patients' ``differences``, dealt to folds, with trainings that differ by ``sd``."""
    rng = rng or np.random.default_rng(1)
    noise = [rng.normal(0, 1, (2, seeds)) * np.array(sd)[:, None] for _ in range(folds)]
    first = [differences[None, f::folds, None] + 0.7 + noise[f][0] for f in range(folds)]
    second = [np.full((1, len(differences[f::folds]), 1), 0.7) + noise[f][1] for f in range(folds)]
    (contrast,) = contrasts(
        first,
        second,
        names=("A", "B"),
        metric="Dice",
        cases=len(differences),
        paired_starts=paired,
        alpha=0.05,
        family=family,
        band=band,
    )
    return contrast


def _judge(contrast):
    return judge(contrast, higher_is_better=True)


def test_a_winner_is_named_when_everything_agrees(rng):
    differences = rng.normal(0.02, 0.02, 60)
    contrast = _contrast(differences)
    assert (_judge(contrast).kind, _judge(contrast).winner) == (Kind.BETTER, "A")
    assert _judge(_contrast(-differences)).winner == "B"
    assert judge(contrast, higher_is_better=False).winner == "B"
    assert judge(turned(contrast), higher_is_better=True).winner == "A"
    assert turned(turned(contrast)) == contrast


def test_a_winner_whom_most_patients_contradict_is_not_named(rng):
    """A better by 0.006 on 85 patients and worse by 0.15 on 15: "B is better" it was, with a rank-biserial of +0.45."""
    differences = rng.permutation(np.concatenate([np.full(85, 0.006), np.full(15, -0.15)]))
    contrast = _contrast(differences, sd=(1e-5, 1e-5))
    assert contrast.p_adjusted < 0.05
    assert contrast.mean == pytest.approx(-0.0174, abs=1e-4)
    assert contrast.rank_biserial == pytest.approx(0.4477, abs=0.02)
    verdict = _judge(contrast)
    assert (verdict.kind, verdict.winner, verdict.reason) == (Kind.NO_DIFFERENCE, None, Reason.RANKS)


@pytest.mark.parametrize(("patients", "further"), [(6, 24), (10, 20), (20, 10), (29, 1)])
def test_few_patients_are_undecided_even_where_they_agree(patients, further):
    """Equivalence was named in 5.2 % at the band's edge with 6 patients, 2.8 % with 10, 1.3 % with 20, for 0.83 %."""
    verdict = _judge(_contrast(np.linspace(-1e-4, 1e-4, patients), folds=2, seeds=4))
    assert (verdict.kind, verdict.reason) == (Kind.UNDECIDED, Reason.TOO_FEW)
    assert (verdict.further_patients, verdict.further_trainings) == (further, {})


def test_trainings_that_say_too_little_are_undecided(rng):
    differences = rng.normal(0.02, 0.02, 60)
    for folds, seeds, further in ((1, 3, 4), (3, 2, 3), (5, 2, 1), (5, 1, 6)):
        verdict = _judge(_contrast(differences, seeds, folds))
        assert verdict.kind is Kind.UNDECIDED
        assert verdict.further_trainings == {"A": further, "B": further}
    for folds, seeds in ((6, 2), (3, 3), (1, 7)):
        assert _judge(_contrast(differences, seeds, folds)).kind is Kind.BETTER
    assert _judge(_contrast(differences, 3, 2, paired=True)).further_trainings == {"A": 2, "B": 2}


def test_one_training_each_shows_the_difference_of_these_trainings(rng):
    contrast = _contrast(rng.normal(0.02, 0.02, 60), seeds=1)
    assert not contrast.trainings_known
    assert contrast.interval[0] < contrast.mean < contrast.interval[1]
    assert np.isnan(contrast.detectable)


def test_equivalence_is_a_result_and_needs_no_ratio_of_methods_and_seeds(rng):
    """Two identical methods were "equivalent" in 34 % of experiments, because their ratio was below 1."""
    kinds = [_judge(_contrast(rng.normal(0, 0.01, 130), sd=(0.001, 0.001), rng=rng)).kind for _ in range(200)]
    assert kinds.count(Kind.EQUIVALENT) > 190


def test_equivalence_beats_a_difference_that_does_not_matter(rng):
    contrast = _contrast(rng.normal(0.001, 0.002, 130), sd=(1e-4, 1e-4))
    assert contrast.p_adjusted < 0.05
    assert _judge(contrast).kind is Kind.EQUIVALENT


def test_seeds_of_one_arm_that_vary_name_no_winner(rng):
    """Seed SDs of 0.03 and 0.005 beside five calm arms gave a false winner in 28 % of experiments."""
    false = [
        _judge(_contrast(rng.normal(0, 0.03, 130), sd=(0.03, 0.005), rng=rng)).kind is Kind.BETTER for _ in range(500)
    ]
    assert np.mean(false) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)
    assert np.mean(false) > 0.01


def test_the_family_shares_alpha(rng):
    values = rng.normal(0, 1, 60)
    differences = 0.0095 + 0.03 * (values - values.mean()) / values.std()  # t = 2.45
    alone, six = (_contrast(differences, family=family, sd=(1e-4, 1e-4)) for family in (1, 6))
    assert six.p == alone.p < 0.05
    assert six.p_adjusted == pytest.approx(6 * alone.p)
    assert six.interval[0] < 0 < alone.interval[0]
    assert (_judge(alone).kind, _judge(six).kind) == (Kind.BETTER, Kind.NO_DIFFERENCE)
    assert six.detectable > alone.detectable


def test_who_hardly_learned():
    stock = {"front": 0.8, "back": 0.7}
    # "stock is better than LightMedSeg" it was, with a Dice of 0.011 for the latter
    assert hardly_learned({"stock": stock, "new": {"front": 0.02, "back": 0.002}}) == {
        "new": {"front": 0.02, "back": 0.002}
    }
    # two that both failed are not compared, either
    both = hardly_learned({"new": {"front": 0.011, "back": 0.011}, "off": {"front": 0.009, "back": 0.012}})
    assert set(both) == {"new", "off"}
    # a tenth of the other's in one class
    assert hardly_learned({"stock": stock, "new": {"front": 0.8, "back": 0.069}}) == {"new": {"back": 0.069}}
    assert hardly_learned({"stock": stock, "new": {"front": 0.8, "back": 0.071}}) == {}
    # a class that nobody learns is no arm's failure
    assert hardly_learned({"stock": {"front": 0.8, "speck": 0.04}, "new": {"front": 0.8, "speck": 0.001}}) == {}


def test_the_limits_are_those_the_simulation_shows():
    assert (REQUIRED_PATIENTS, REQUIRED_TRAINING_FREEDOM) == (30, 6)
