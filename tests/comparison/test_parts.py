import numpy as np
import pandas as pd
import pytest
from synthetic import make_experiment, make_scores

from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.evidence import estimate
from nnunet_deform.comparison.parts import by_fold, by_size, whole

ARMS = ("New", "Old")
PAIRS = {ARMS: False}


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(ARMS)


@pytest.fixture(scope="module")
def table(experiment) -> pd.DataFrame:
    return make_scores(experiment, {"New": 0.02}, patients=30, per_patient=2)


def test_the_whole_is_what_the_analysis_says(experiment, table):
    part = whole(table, ARMS, PAIRS, "Dice", 0.05)
    dice = analyse(design_of(experiment), table, {}).datasets[0].metrics["Dice"]
    (contrast,) = part.contrasts
    for figure in ("mean", "interval", "p", "patients", "cases", "freedom", "training_freedoms"):
        assert getattr(contrast, figure) == pytest.approx(getattr(dice.contrasts[0], figure), rel=1e-12)
    assert [mean.value for mean in part.means] == pytest.approx(dice.means)
    assert [mean.interval for mean in part.means] == [pytest.approx(tuple(ends)) for ends in dice.intervals.T]
    assert [(mean.arm, mean.cases, mean.patients) for mean in part.means] == [("New", 60, 30), ("Old", 60, 30)]


def test_a_part_has_the_cases_that_both_arms_have(table):
    lacking = table[(table["arm"] != "New") | (table["patient"] != "p0003")]
    (contrast,) = whole(lacking, ARMS, PAIRS, "Dice", 0.05).contrasts
    assert (contrast.cases, contrast.patients) == (58, 29)
    (without,) = whole(table[table["patient"] != "p0003"], ARMS, PAIRS, "Dice", 0.05).contrasts
    assert contrast.mean == pytest.approx(without.mean, rel=1e-12)
    assert contrast.interval == pytest.approx(without.interval, rel=1e-12)
    alone = whole(table[table["arm"] == "Old"], ARMS, PAIRS, "Dice", 0.05)
    assert [mean.arm for mean in alone.means] == ["Old"]
    assert alone.contrasts == ()


def test_folds_are_estimated_alone_and_average_to_the_whole(table):
    folds = by_fold(table, ARMS, PAIRS, "Dice", 0.05)
    assert [fold.name for fold in folds] == [f"fold {number}" for number in range(5)]
    assert {fold.contrasts[0].patients for fold in folds} == {6}
    (contrast,) = whole(table, ARMS, PAIRS, "Dice", 0.05).contrasts
    assert np.mean([fold.contrasts[0].mean for fold in folds]) == pytest.approx(contrast.mean)
    mine = table[table["fold"] == 2]
    of_patients = mine.groupby(["arm", "seed", "patient"])["Dice"].mean().unstack("seed")
    result = estimate([of_patients.loc["New"].to_numpy()[None]], [of_patients.loc["Old"].to_numpy()[None]])
    low, high = result.interval(0.05)
    assert folds[2].contrasts[0].interval == pytest.approx((low[0], high[0]))


def test_sizes_are_thirds_of_each_class_and_hold_the_effect_of_their_structures(table):
    # The two classes have no size in common; the effect is on small structures of either.
    number = table["patient"].str[1:].astype(int)
    voxels = 1 + number + np.where(table["label"] == "back", 1000, 0)
    small = (number < 10) & (table["arm"] == "New")
    changed = table.assign(voxels_truth=voxels, Dice=table["Dice"] + np.where(small, 0.1, 0.0))
    parts = {(part.label, part.name): part for part in by_size(changed, ARMS, PAIRS, "Dice", 0.05)}
    assert list(parts) == [(label, s) for label in (None, "front", "back") for s in ("small", "middle", "large")]
    assert {part.structures for (label, _), part in parts.items() if label is None} == {40}
    assert {part.structures for (label, _), part in parts.items() if label is not None} == {20}
    assert parts[None, "small"].voxels == (1, 1010)
    assert parts["back", "large"].voxels == (1021, 1030)
    for label in (None, "front", "back"):
        rows = changed[changed["label"].isin([label] if label else ["front", "back"])]
        for name, patients in (("small", range(10)), ("middle", range(10, 20)), ("large", range(20, 30))):
            (contrast,) = parts[label, name].contrasts
            mine = rows[rows["patient"].isin([f"p{n:04d}" for n in patients])]
            means = mine.groupby(["arm", "patient"])["Dice"].mean().unstack("patient").mean(axis=1)
            assert contrast.patients == 10
            assert contrast.mean == pytest.approx(means["New"] - means["Old"])
            assert contrast.interval[0] < contrast.mean < contrast.interval[1]
            assert [mean.value for mean in parts[label, name].means] == pytest.approx([means["New"], means["Old"]])


def test_absent_structures_have_no_size(table):
    absent = table["patient"] == "p0000"
    changed = table.assign(
        voxels_truth=np.where(absent, 0, 1 + table["patient"].str[1:].astype(int)),
        Dice=table["Dice"].where(~absent),
    )
    parts = by_size(changed, ARMS, PAIRS, "Dice", 0.05)
    assert sum(part.structures for part in parts if part.label is None) == 2 * (60 - 2)
    assert all(np.isfinite(part.contrasts[0].mean) for part in parts)


def test_structures_of_one_size_are_one_part(table):
    assert [part.name for part in by_size(table, ARMS, PAIRS, "Dice", 0.05)] == ["small"] * 3
