"""The whole analysis on tables whose truth is known."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import CONFIGURATION, DATASET, make_experiment, make_scores

from nnunet_deform.comparison.analysis import analyse, few_seeds
from nnunet_deform.comparison.statistics import REQUIRED_SEEDS

ARMS = ("New", "Old", "Third")


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(ARMS, hypotheses=[["New", "Old"], ["New", "Third"]], statistics={"draws": 2000})


@pytest.fixture(scope="module")
def with_effect(experiment):
    return analyse(experiment, make_scores(experiment, {"New": 0.03}), {})


def test_a_known_effect_is_found(with_effect):
    for hypothesis in with_effect.hypotheses:
        assert hypothesis.verdict.kind == "better"
        assert hypothesis.verdict.winner == "New"
        assert hypothesis.contrast.mean == pytest.approx(0.03, abs=0.002)
        low, high = hypothesis.contrast.interval
        assert low < 0.03 < high
        assert hypothesis.contrast.p_holm < 0.001
    assert with_effect.summary == (
        f"New is better than Old on {DATASET} (3d_fullres); New is better than Third on {DATASET} (3d_fullres)."
    )


def test_every_direction_is_right(with_effect):
    (dataset,) = with_effect.datasets
    assert dataset.metrics["HD95"].contrast("New", "Old").mean == pytest.approx(-40 * 0.03, abs=0.1)
    for metric in dataset.metrics.values():
        assert metric.ranking.ranks[0] == 1
        assert metric.ranking.first[0] > 0.99
        assert metric.ranking.by_tests[0] == 1
    turned = dataset.metrics["Dice"].contrast("Old", "New")
    contrast = dataset.metrics["Dice"].contrast("New", "Old")
    assert (turned.mean, turned.interval) == (-contrast.mean, (-contrast.interval[1], -contrast.interval[0]))
    assert turned.rank_biserial == -contrast.rank_biserial
    assert turned.p == contrast.p


def test_an_arm_that_hardly_learned_is_no_spread_of_methods(experiment):
    table = make_scores(experiment, {"New": 0.005}, seed_sd=0.01)
    hardly = (table["arm"] == "Third") & (table["label"] == "back")
    without = {(DATASET, CONFIGURATION, "Third"): "not trained"}
    (before,) = analyse(experiment, table[table["arm"] != "Third"], without).datasets
    analysis = analyse(experiment, table.assign(Dice=table["Dice"].mask(hardly, table["Dice"] / 10.5)), {})
    (after,) = analysis.datasets
    assert after.failed == {"Third": {"back": pytest.approx(0.8 / 10.5, abs=0.003)}}
    assert before.failed == {}
    assert after.metrics["Dice"].noise == before.metrics["Dice"].noise
    assert analysis.summary.endswith(". Third hardly learned to segment, which says nothing about networks.")
    just_enough = analyse(experiment, table.assign(Dice=table["Dice"].mask(hardly, table["Dice"] / 9.5)), {})
    assert just_enough.datasets[0].failed == {}
    assert just_enough.datasets[0].metrics["Dice"].noise.inter > 10 * before.metrics["Dice"].noise.inter


def test_figures_are_what_plain_code_gives(experiment):
    table = make_scores(experiment, {"New": 0.01}, seed=3)
    (dataset,) = analyse(experiment, table, {}).datasets
    first = table[table["seed"] == 1]
    dice = dataset.metrics["Dice"]
    np.testing.assert_allclose(
        dice.by_class, first.pivot_table("Dice", "arm", "label").loc[list(ARMS), ["front", "back"]]
    )
    np.testing.assert_allclose(dice.means, first.groupby("arm")["Dice"].mean().loc[list(ARMS)])
    per_patient = first.pivot_table("Dice", "patient", "arm")
    difference = per_patient["New"] - per_patient["Old"]
    contrast = dice.contrast("New", "Old")
    assert (contrast.cases, contrast.patients) == (120, 60)
    assert contrast.p == pytest.approx(stats.wilcoxon(difference, zero_method="pratt").pvalue, rel=1e-9)
    assert contrast.mean == pytest.approx(difference.mean())
    of_front = first[first["label"] == "front"].pivot_table("Dice", "patient", "arm")
    assert dice.by_class_contrasts["front"][0].mean == pytest.approx((of_front["New"] - of_front["Old"]).mean())
    fold_means = table[table["fold"] == 0].groupby(["arm", "seed"])["Dice"].mean().unstack()
    assert dice.noise.intra == pytest.approx(np.sqrt(fold_means.var(axis=1, ddof=1).mean()))
    assert dice.noise.inter == pytest.approx(fold_means[1].std(ddof=1))


def test_nothing_names_a_winner_where_there_is_no_difference(experiment):
    rejected = 0
    for seed in range(12):
        analysis = analyse(experiment, make_scores(experiment, {}, patients=30, seed_sd=0.004, seed=seed), {})
        rejected += any(h.verdict.kind == "better" for h in analysis.hypotheses)
        assert all(h.verdict.winner is None for h in analysis.hypotheses if h.verdict.kind != "better")
    assert rejected <= 1


def test_holm_runs_over_the_declared_family(with_effect):
    contrasts = [hypothesis.contrast for hypothesis in with_effect.hypotheses]
    small, large = sorted(contrasts, key=lambda c: c.p)
    assert small.p_holm == pytest.approx(2 * small.p)
    assert large.p_holm == pytest.approx(max(large.p, 2 * small.p))
    # exploratory: over the three pairs of arms
    (dataset,) = with_effect.datasets
    smallest = min(dataset.metrics["Dice"].contrasts, key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(3 * smallest.p)


def test_missing_seeds_leave_everything_undecided(experiment):
    table = make_scores(experiment, {"New": 0.03})
    analysis = analyse(experiment, table[(table["seed"] == 1) | (table["arm"] == "New")], {})
    for hypothesis in analysis.hypotheses:
        assert hypothesis.verdict.kind == "not distinguishable"
        assert f"{hypothesis.second} has 1 of {REQUIRED_SEEDS} seeds" in hypothesis.verdict.sentence
    assert few_seeds(analysis.datasets[0]) == ["Old", "Third"]
    assert analysis.summary == (
        "In none of the 2 declared comparisons are the arms distinguishable with this evidence."
    )


def test_an_incomplete_arm_is_named_and_left_out(experiment):
    table = make_scores(experiment, {"New": 0.03})
    table = table[(table["arm"] != "Third") | (table["fold"] < 3)]
    missing = {(DATASET, CONFIGURATION, "Third"): "seed 1, fold 3: failed: out of memory"}
    analysis = analyse(experiment, table, missing)
    (dataset,) = analysis.datasets
    assert dataset.arms == ("New", "Old")
    assert dataset.incomplete == {"Third": "seed 1, fold 3: failed: out of memory"}
    decided, undecided = analysis.hypotheses
    assert decided.verdict.winner == "New"
    # the family is as large as declared
    assert decided.contrast.p_holm == pytest.approx(2 * decided.contrast.p)
    assert undecided.contrast is None
    assert "evidence is missing (Third: seed 1, fold 3: failed: out of memory)" in undecided.verdict.sentence


def test_nothing_at_all(experiment):
    table = make_scores(experiment, {}).iloc[:0]
    missing = {(DATASET, CONFIGURATION, arm): "not started" for arm in ARMS}
    analysis = analyse(experiment, table, missing)
    assert [hypothesis.verdict.kind for hypothesis in analysis.hypotheses] == ["not distinguishable"] * 2
    assert analysis.datasets[0].arms == ()


def test_false_positives_on_absent_structures_count(experiment):
    table = make_scores(experiment, {})
    # in 30 cases "back" is absent; New leaves it out, Old draws it
    absent = table["case"].isin(sorted(set(table["case"]))[:30]) & (table["label"] == "back")
    columns = ["Dice", "NSD", "HD95"]
    table.loc[absent, "voxels_truth"] = 0
    table.loc[absent & (table["arm"] != "Old"), [*columns, "voxels_prediction"]] = [np.nan, np.nan, np.nan, 0]
    table.loc[absent & (table["arm"] == "Old"), columns] = [0.0, 0.0, 90.0]
    (dataset,) = analyse(experiment, table, {}).datasets
    dice = dataset.metrics["Dice"]
    np.testing.assert_array_equal(dice.no_score, [30, 0, 30])
    contrast = dice.contrast("New", "Old")
    assert contrast.one_sided_absent == 30
    # 30 of 240 cells differ by a whole Dice
    assert contrast.mean == pytest.approx(30 / 240, abs=0.01)
    assert dice.contrast("New", "Third").one_sided_absent == 0
    # of 120 cases of that class, 30 are absent for both
    third = dice.contrast("New", "Third")
    assert third.cases == 120
    back = {(c.first, c.second): c for c in dice.by_class_contrasts["back"]}
    assert back["New", "Third"].cases == 90
    assert back["New", "Old"].cases == 120
    assert back["New", "Old"].mean == pytest.approx(30 / 120, abs=0.02)
    assert dataset.metrics["HD95"].by_class_contrasts["back"][0].mean < -20
    # figures show what is tested, case by case
    np.testing.assert_allclose(np.nanmean(dice.case_differences("New", "Old")), contrast.mean)
    np.testing.assert_array_equal(dice.case_differences("Old", "New"), -dice.case_differences("New", "Old"))
    # seeds are compared on the same scale as arms: a whole Dice for a structure that only other trainings drew
    row = table[(table["arm"] == "New") & (table["seed"] == 2)]
    expected = row.fillna({"Dice": 1.0}).groupby("case")["Dice"].mean().mean()
    means = dice.seed_means.set_index(["arm", "fold", "seed"])["Dice"]
    assert means["New", 0, 2] == pytest.approx(expected)


def test_the_figure_shows_false_positives_of_a_dataset_with_one_class(experiment):
    table = make_scores(experiment, {}, labels=["tumour"])
    absent = table["case"].isin(sorted(set(table["case"]))[:30])
    table.loc[absent & (table["arm"] == "New"), ["Dice", "NSD", "HD95"]] = np.nan
    table.loc[absent & (table["arm"] == "New"), ["voxels_truth", "voxels_prediction"]] = 0
    table.loc[absent & (table["arm"] == "Old"), ["Dice", "NSD", "HD95"]] = [0.0, 0.0, 90.0]
    (dataset,) = analyse(experiment, table, {}).datasets
    differences = dataset.metrics["Dice"].case_differences("New", "Old")
    assert (differences == 1.0).sum() == 30
    assert not np.isnan(differences).any()


def test_the_same_table_gives_the_same_figures(experiment):
    table = make_scores(experiment, {})
    shuffled = table.sample(frac=1, random_state=1)
    first, second = (analyse(experiment, t, {}).hypotheses[0].contrast for t in (table, shuffled))
    assert first.interval == pytest.approx(second.interval, abs=1e-12)
    assert first.p == pytest.approx(second.p)


LARGE = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from synthetic import make_experiment, make_scores
from nnunet_deform.comparison.analysis import analyse
arms = [f"A{{i}}" for i in range(8)]
experiment = make_experiment(arms, hypotheses=[[arms[0], other] for other in arms[1:]])
table = make_scores(experiment, {{"A0": 0.01}}, patients=2500, per_patient=1, labels=list("abcde"))
import time, resource
started = time.perf_counter()
analysis = analyse(experiment, table, {{}})
assert len(analysis.datasets[0].cases) == 2500
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_eight_arms_on_five_folds_of_500_cases_fit_in_a_minute_and_two_gigabytes():
    code = LARGE.format(folder=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, result.stdout.split())
    assert seconds < 60
    assert gigabytes < 2
