"""A quick look at what benchmarks/verdicts.py shows at length: errors stay nominal, and the simulation is not blind."""

from dataclasses import replace

import numpy as np
import pytest

from nnunet_deform.comparison import simulation
from nnunet_deform.comparison.simulation import World, experiments, simulate
from nnunet_deform.comparison.verdicts import Kind, contrasts, judge

EXPERIMENTS = 400


def _limit(nominal: float, count: int) -> float:
    return nominal + 3 * np.sqrt(nominal * (1 - nominal) / count)


@pytest.mark.parametrize(
    "world",
    [
        World(30, "normal"),
        World(30, "skewed"),
        # with 130 patients and six hypotheses a winner was named in 15 % without a difference
        World(130, "skewed", training_sds=(0.01, 0.01)),
        World(130, "skewed", cases=2),
        World(130, "heavy", training_sds=(0.05, 0.3)),
        World(130, "ties"),
        World(130, "normal", correlation=0.8),
        World(130, "normal", training_sds=(0.25, 1.5)),
    ],
    ids=str,
)
def test_errors_are_nominal(world):
    assert world.decides
    rates = simulate(world, EXPERIMENTS)
    for family, of_family in rates.items():
        count = EXPERIMENTS * 6 // family
        assert of_family.false_winner < _limit(0.06, count)
        assert of_family.false_equivalence < _limit(0.06, count)
        assert of_family.false_winner > 0.01
    assert (rates[1].winner + rates[1].winner_against) / 2 > 0.64


def test_the_standard_error_is_the_true_one():
    for world in (World(60, "skewed", cases=2), World(60, "ties", correlation=None), World(60, correlation=0.8)):
        means = np.concatenate([result.mean for _, _, result in experiments(world, 4000)])
        assert means.std() == pytest.approx(world.se, rel=0.05)
        assert means.mean() == pytest.approx(0, abs=4 * world.se / np.sqrt(4000))


def test_verdicts_are_counted_as_they_are_given():
    world = World(30, "skewed", training_sds=(0.05, 0.3))
    shift = 0.55
    ((first, second, result),) = experiments(world, 300)
    winners = simulation._winners(result, first, second, shift, 0.05 / 6)
    for pair in range(300):
        (contrast,) = contrasts(
            [fold[pair : pair + 1] + shift for fold in first],
            [fold[pair : pair + 1] for fold in second],
            names=("A", "B"),
            metric="Dice",
            cases=30,
            paired_starts=False,
            alpha=0.05,
            family=6,
        )
        verdict = judge(contrast, higher_is_better=True)
        assert {1: "A", -1: "B", 0: None}[winners[pair]] == verdict.winner
        assert (verdict.kind is Kind.BETTER) == (winners[pair] != 0)


def test_beside_other_arms_the_analysis_gives_the_verdicts_that_are_counted_without_them():
    world = World(31, "skewed", training_sds=(0.05, 0.3), others=True)
    ((first, second, result),) = experiments(world, 40 * 6)
    table = simulation._table(world, first, second, np.random.default_rng(0))
    assert len(set(table["arm"])) == 12 + len(simulation.OTHERS)
    shift, band = simulation._ideal(world, 0.05 / 6)
    for true in (0.0, shift, -shift):
        found = simulation._verdicts(simulation._declare(world, 6, band), table, true)
        winners = simulation._winners(result, first, second, true, 0.05 / 6).reshape(6, 40)
        equivalent = (replace(result, mean=result.mean + true).p_outside(band) < 0.05 / 6).reshape(6, 40)
        assert equivalent.any() or true
        np.testing.assert_array_equal(found == simulation._EQUIVALENT, equivalent)
        np.testing.assert_array_equal(np.where(np.abs(found) == 1, found, 0), np.where(equivalent, 0, winners))


def test_errors_are_nominal_beside_other_arms():
    rates = simulate(World(30, "normal", others=True), 60)
    for of_family in rates.values():
        assert max(of_family.false_winner, of_family.false_equivalence) < _limit(0.06, 60)
        assert of_family.winner > 0.5


def test_a_test_that_knows_nothing_of_trainings_is_caught(monkeypatch):
    def blind(first, second=None):
        if second is not None:
            first = [
                mine.mean(2, keepdims=True) - theirs.mean(2, keepdims=True)
                for mine, theirs in zip(first, second, strict=True)
            ]
        return original([fold.mean(axis=2, keepdims=True) for fold in first])

    original = simulation.estimate
    monkeypatch.setattr(simulation, "estimate", blind)
    assert simulate(World(130, training_sds=(0.25, 1.5)), 100)[1].false_winner > 0.3
