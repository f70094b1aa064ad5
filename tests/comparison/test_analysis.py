"""The whole analysis on tables whose truth is known."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import CONFIGURATION, DATASET, make_experiment, make_scores

from nnunet_deform.comparison.analysis import analyse, few_trainings
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.report.words import sentence, summary
from nnunet_deform.comparison.trainings import Training
from nnunet_deform.comparison.verdicts import Kind, Reason

ARMS = ("New", "Old", "Third")


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(ARMS, hypotheses=[["New", "Old"], ["New", "Third"]], statistics={"draws": 2000})


@pytest.fixture(scope="module")
def with_effect(experiment):
    return analyse(design_of(experiment), make_scores(experiment, {"New": 0.03}), {})


def _missing(arm: str, seed: int = 1, folds: range = range(5), why: str = "not started") -> dict[Training, str]:
    return {Training(DATASET, CONFIGURATION, arm, "t", "p", seed, fold): why for fold in folds}


def test_a_known_effect_is_found(with_effect):
    for hypothesis in with_effect.hypotheses:
        assert hypothesis.verdict.kind is Kind.BETTER
        assert hypothesis.verdict.winner == "New"
        assert hypothesis.contrast.mean == pytest.approx(0.03, abs=0.002)
        low, high = hypothesis.contrast.interval
        assert low < 0.03 < high
        assert hypothesis.contrast.p_adjusted == 2 * hypothesis.contrast.p < 0.001
        assert sentence(hypothesis, 0.005).startswith(f"New is better than {hypothesis.second} (mean difference +0.03")
    assert summary(with_effect) == (
        f"New is better than Old on {DATASET} (3d_fullres). New is better than Third on {DATASET} (3d_fullres)."
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


def test_every_training_enters(experiment):
    """Only the first seed entered the test: what the others scored changed nothing but a margin."""
    table = make_scores(experiment, {})
    worse = table.assign(Dice=table["Dice"].mask((table["arm"] == "New") & (table["seed"] == 3), table["Dice"] - 0.3))
    before, after = (analyse(design_of(experiment), t, {}).hypotheses[0].contrast for t in (table, worse))
    assert after.mean == pytest.approx(before.mean - 0.1)
    assert after.trainings_share > 0.8 > before.trainings_share


def test_figures_are_what_plain_code_gives(experiment):
    table = make_scores(experiment, {"New": 0.01}, seed=3)
    (dataset,) = analyse(design_of(experiment), table, {}).datasets
    dice = dataset.metrics["Dice"]
    np.testing.assert_allclose(
        dice.by_class, table.pivot_table("Dice", "arm", "label").loc[list(ARMS), ["front", "back"]]
    )
    np.testing.assert_allclose(dice.means, table.groupby("arm")["Dice"].mean().loc[list(ARMS)])
    per_patient = table.pivot_table("Dice", "patient", "arm")
    difference = per_patient["New"] - per_patient["Old"]
    contrast = dice.contrast("New", "Old")
    assert (contrast.cases, contrast.patients, contrast.folds) == (120, 60, 5)
    assert contrast.mean == pytest.approx(difference.mean())
    assert contrast.median == pytest.approx(difference.median())
    assert contrast.training_freedoms == (10, 10)
    of_front = table[table["label"] == "front"].pivot_table("Dice", "patient", "arm")
    assert dice.by_class_contrasts["front"][0].mean == pytest.approx((of_front["New"] - of_front["Old"]).mean())
    trainings = table.groupby(["arm", "fold", "seed"])["Dice"].mean().unstack()
    assert dice.noise.intra == pytest.approx(np.sqrt(trainings.var(axis=1, ddof=1).mean()))
    found = dice.seed_means.set_index(["arm", "fold", "seed"])["Dice"].unstack()
    pd.testing.assert_frame_equal(found.sort_index(), trainings.sort_index())
    assert dataset.trainings == dict.fromkeys(ARMS, 15)


def test_arms_in_no_hypothesis_change_no_verdict_to_the_bit():
    """Three unrelated arms made two identical methods "equivalent" in 99 % of experiments instead of 34 %."""
    many = make_experiment([*ARMS, "X", "Y", "Z"], hypotheses=[["New", "Old"], ["New", "Third"]])
    few = make_experiment(ARMS, hypotheses=[["New", "Old"], ["New", "Third"]])
    table = make_scores(many, {"X": -0.5, "Y": 0.1}, seed_sd=0.004)
    alone = analyse(design_of(few), table[table["arm"].isin(ARMS)], {}).hypotheses
    assert analyse(design_of(many), table, {}).hypotheses == alone
    # nor in which order arms and rows stand
    turned = make_experiment(["Z", "Third", "Old", "New"], hypotheses=[["New", "Old"], ["New", "Third"]])
    shuffled = table[table["arm"].isin(("Z", *ARMS))].sample(frac=1, random_state=1)
    assert analyse(design_of(turned), shuffled, {}).hypotheses == alone


def test_networks_that_start_alike_are_compared_seed_by_seed():
    trainers = {"Deform": "nnUNetTrainerX_AdamW", "off": "nnUNetTrainerX_opOff", "stock": "nnUNetTrainer"}
    content = make_experiment(ARMS).model_dump()
    arms = [{"name": name, "trainer": trainer} for name, trainer in trainers.items()]
    pairs = [("Deform", "off"), ("Deform", "stock")]
    experiment = type(make_experiment(ARMS)).model_validate({**content, "arms": arms, "hypotheses": pairs})
    assert [experiment.paired_starts(*pair) for pair in pairs] == [True, False]
    table = make_scores(experiment, {}, seed_sd=0.0)
    shared = {seed: shift for seed, shift in zip((1, 2, 3), (-0.03, 0.0, 0.03), strict=True)}
    moved = table.assign(Dice=table["Dice"] + table["seed"].map(shared))
    alike, unlike = (h.contrast for h in analyse(design_of(experiment), moved, {}).hypotheses)
    assert (alike.paired_starts, unlike.paired_starts) == (True, False)
    assert (alike.training_freedoms, unlike.training_freedoms) == ((10,), (10, 10))
    assert alike.se < 0.6 * unlike.se
    # seeds that only one of them has are of no use to such a pair
    fewer = moved[(moved["arm"] != "off") | (moved["seed"] != 3) | (moved["fold"] > 1)]
    alike = analyse(design_of(experiment), fewer, {}).hypotheses[0].contrast
    assert alike.training_freedoms == (8,)


def test_folds_that_only_one_arm_has_are_left_out(experiment):
    table = make_scores(experiment, {})
    table = table[(table["arm"] != "Old") | (table["fold"] < 3)]
    analysis = analyse(design_of(experiment), table, _missing("Old", folds=range(3, 5)))
    hypothesis = analysis.hypotheses[0]
    assert (hypothesis.contrast.folds, hypothesis.contrast.patients, hypothesis.contrast.cases) == (3, 36, 72)
    assert hypothesis.verdict.kind is Kind.UNDECIDED
    assert hypothesis.verdict.reason is Reason.MISSING
    assert "Old, seed 1, fold 3: not started" in sentence(hypothesis, 0.005)
    (dataset,) = analysis.datasets
    assert dataset.arms == ("New", "Third")
    assert dataset.incomplete == {"Old": "fold 3 not started; fold 4 not started"}


def test_missing_seeds_leave_a_pair_undecided(experiment):
    table = make_scores(experiment, {"New": 0.03})
    analysis = analyse(design_of(experiment), table[(table["seed"] == 1) | (table["arm"] == "New")], {})
    for hypothesis in analysis.hypotheses:
        assert hypothesis.verdict.kind is Kind.UNDECIDED
        assert hypothesis.verdict.further_trainings == {hypothesis.second: 6}
        assert f"undecided, 6 more seeds of {hypothesis.second} needed on any of the folds" in sentence(
            hypothesis, 0.005
        )
    assert few_trainings(analysis.datasets[0]) == ["Old", "Third"]
    assert summary(analysis) == "Undecided, because trainings or patients are missing: 2 of 2 comparisons."


def test_an_arm_that_hardly_learned_is_not_compared(experiment):
    """ "stock is better than LightMedSeg" it was, "which says nothing about networks" in the same sentence."""
    table = make_scores(experiment, {"New": 0.005}, seed_sd=0.01)
    hardly = (table["arm"] == "Third") & (table["label"] == "back")
    (before,) = analyse(design_of(experiment), table[table["arm"] != "Third"], _missing("Third")).datasets
    analysis = analyse(design_of(experiment), table.assign(Dice=table["Dice"].mask(hardly, table["Dice"] / 10.5)), {})
    (after,) = analysis.datasets
    assert after.failed == {"Third": {"back": pytest.approx(0.8 / 10.5, abs=0.003)}}
    assert before.failed == {}
    assert after.metrics["Dice"].noise == before.metrics["Dice"].noise
    verdicts = [hypothesis.verdict for hypothesis in analysis.hypotheses]
    assert verdicts[0].kind is not Kind.NOT_COMPARABLE
    assert (verdicts[1].kind, verdicts[1].winner, set(verdicts[1].arms)) == (Kind.NOT_COMPARABLE, None, {"Third"})
    assert "are not comparable: Third reaches a mean Dice of 0.07" in sentence(analysis.hypotheses[1], 0.005)
    assert summary(analysis).endswith("hardly learned: 1 of 2 comparisons.")
    just_enough = analyse(design_of(experiment), table.assign(Dice=table["Dice"].mask(hardly, table["Dice"] / 9.5)), {})
    assert just_enough.datasets[0].failed == {}
    assert just_enough.hypotheses[1].verdict.winner == "New"


def test_an_arm_that_crashed_is_not_compared(experiment):
    table = make_scores(experiment, {"New": 0.03})
    missing = _missing("Third", why="failed: out of memory")
    analysis = analyse(design_of(experiment), table[table["arm"] != "Third"], missing)
    decided, failed = analysis.hypotheses
    assert decided.verdict.winner == "New"
    # the family is as large as declared
    assert decided.contrast.p_adjusted == pytest.approx(2 * decided.contrast.p)
    assert failed.contrast is None
    assert (failed.verdict.kind, failed.verdict.reason) == (Kind.NOT_COMPARABLE, Reason.FAILED)
    assert "no training of Third succeeded. Third, seed 1, fold 0: failed: out of memory" in sentence(failed, 0.005)


def test_nothing_at_all(experiment):
    table = make_scores(experiment, {}).iloc[:0]
    analysis = analyse(design_of(experiment), table, {t: w for arm in ARMS for t, w in _missing(arm).items()})
    assert [hypothesis.verdict.kind for hypothesis in analysis.hypotheses] == [Kind.UNDECIDED] * 2
    assert analysis.datasets[0].arms == ()


def test_nothing_names_a_winner_where_there_is_no_difference(experiment):
    rejected = 0
    for seed in range(12):
        analysis = analyse(
            design_of(experiment), make_scores(experiment, {}, patients=30, seed_sd=0.004, seed=seed), {}
        )
        rejected += any(h.verdict.kind is Kind.BETTER for h in analysis.hypotheses)
        assert all(h.verdict.winner is None for h in analysis.hypotheses if h.verdict.kind is not Kind.BETTER)
    assert rejected <= 1


def test_means_and_differences_follow_one_rule_where_a_structure_is_absent(experiment):
    """50 absent structures, 10 of them drawn by one arm: its mean was lower by 0.10, the paired difference 0.215."""
    table = make_scores(experiment, {}, labels=["tumour"])
    cases = sorted(set(table["case"]))
    absent, drawn = table["case"].isin(cases[:50]), table["case"].isin(cases[:10]) & (table["arm"] == "Old")
    columns = ["Dice", "NSD", "HD95"]
    table.loc[absent, "voxels_truth"] = 0
    table.loc[absent & ~drawn, [*columns, "voxels_prediction"]] = [np.nan, np.nan, np.nan, 0]
    table.loc[drawn, columns] = [0.0, 0.0, 90.0]
    analysis = analyse(design_of(experiment), table, {})
    (dataset,) = analysis.datasets
    assert dataset.absent == 50
    assert dataset.drawn == {"New": 0, "Old": 10, "Third": 0}
    for metric in dataset.metrics.values():
        for first in ARMS:
            for second in ARMS:
                if first != second:
                    means = metric.means[ARMS.index(first)] - metric.means[ARMS.index(second)]
                    assert metric.contrast(first, second).mean == pytest.approx(means, abs=1e-12)
    dice = dataset.metrics["Dice"]
    # 10 of 120 cases differ by a whole Dice
    assert dice.contrast("New", "Old").mean == pytest.approx(10 / 120, abs=0.01)
    assert (dice.case_differences("New", "Old") == 1.0).sum() == 10
    assert dataset.metrics["HD95"].contrast("New", "Old").mean == pytest.approx(-10 * 90 / 120, abs=0.5)
    np.testing.assert_allclose(dice.case_differences("New", "Old").mean(), dice.contrast("New", "Old").mean, atol=1e-12)
    # and no other arm changes what it is
    without = analyse(design_of(experiment), table[table["arm"] != "Third"], _missing("Third")).datasets[0]
    assert repr(without.metrics["Dice"].contrast("New", "Old")) == repr(dice.contrast("New", "Old"))


def test_patients_with_many_cases_count_once(experiment):
    table = make_scores(experiment, {})
    one_case = table[table["case"].str.endswith("_0")]
    copies = pd.concat([one_case.assign(case=one_case["case"] + f"x{n}") for n in range(3)])
    first, second = (analyse(design_of(experiment), t, {}).hypotheses[0].contrast for t in (one_case, copies))
    assert (second.cases, second.patients) == (180, 60)
    assert second.p == pytest.approx(first.p, rel=1e-9)


LARGE = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from synthetic import make_experiment, make_scores
from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.design import design_of
from nnunet_deform.processes.memory import most_resident
arms = [f"A{{i}}" for i in range(8)]
experiment = make_experiment(arms, hypotheses=[[arms[0], other] for other in arms[1:7]])
table = make_scores(experiment, {{"A0": 0.01}}, patients={patients}, per_patient=1, labels=list("abcde"))
import time
started = time.perf_counter()
analysis = analyse(design_of(experiment), table, {{}})
assert len(analysis.datasets[0].cases) == {patients}
print(time.perf_counter() - started, most_resident() / 2**30)
"""


@pytest.mark.parametrize(
    ("patients", "most_seconds", "most_gigabytes"),
    [(200, 6, 1), pytest.param(2500, 60, 2, marks=pytest.mark.slow)],
)
def test_time_and_memory_of_eight_arms_on_five_folds(patients, most_seconds, most_gigabytes):
    code = LARGE.format(folder=str(Path(__file__).parent), patients=patients)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, result.stdout.split())
    assert seconds < most_seconds
    assert gigabytes < most_gigabytes
