"""What ``compare check`` says of experiments without faults."""

from __future__ import annotations

import re

import pytest
from trial import NAME, Trial

from nnunet_deform import activation
from nnunet_deform.comparison.check import check_experiment
from nnunet_deform.comparison.evidence import Plan
from nnunet_deform.comparison.experiment import ExperimentError
from nnunet_deform.comparison.outlook import describe, look_ahead

OWN = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerOfMine(nnUNetTrainer): pass
"""


def _check(trial: Trial):
    comparison = trial.comparison()
    return check_experiment(comparison.source, comparison.folders)


@pytest.fixture
def large(trial) -> Trial:
    """60 patients, three folds of three seeds."""
    trial.change(", patients: patients.csv, test: true", "")
    trial.change("folds: [0], arms: [stock, DeformUX]", "folds: null")
    for number in range(12, 60):
        (trial.folder / "raw" / NAME / "labelsTr" / f"tr_{number:02d}.nii.gz").touch()
    return trial


def test_what_can_be_found_is_the_plans_figure_for_the_stated_sds(large):
    outlook = look_ahead(_check(large), patient_sd=0.04, training_sd=0.006)
    (power,) = outlook.powers  # both hypotheses have the same design
    plan = Plan(60, 0.04, ((3, 3, 3),) * 2, (0.006, 0.006), family=2, alpha=0.05)
    assert power.plans == (plan,)
    assert plan.detectable == pytest.approx(0.018, abs=0.001)
    lines = describe(outlook)
    at = lines.index(
        f"{NAME} (3d_fullres), DeformUX - stock, DeformUX - ResEnc: 60 cases, each counted as a patient; "
        "3 folds x 3 seeds an arm."
    )
    assert lines[at + 1] == "  Found in four of five such experiments (Dice; SDs as stated):"
    assert lines[at + 2].startswith(
        f"    a difference of {plan.detectable:.2g}, if patients' differences have an SD of 0.04 and"
    )


def test_several_sds_are_assumed_where_none_is_stated(large):
    lines = describe(look_ahead(_check(large)))
    assert (
        "  Found in four of five such experiments (Dice; SDs assumed; --patient-sd and --training-sd state others):"
        in lines
    )
    found = [float(x) for x in re.findall(r"a difference of ([\d.]+),", "\n".join(lines))]
    assert len(found) == 6
    assert found == sorted(found[:3]) + sorted(found[3:])
    large.change("statistics: {draws", "primary: HD95\nstatistics: {draws")
    lines = describe(look_ahead(_check(large)))
    assert any("depends on SDs of HD95, of which none are assumed" in line for line in lines)
    assert any(
        "a difference of 2 mm" in line for line in describe(look_ahead(_check(large), patient_sd=4.5, training_sd=0.5))
    )


def test_paired_starts_are_planned_as_differences(large):
    large.change("{name: stock, trainer: nnUNetTrainer_AdamW}", "{name: twin, trainer: nnUNetTrainerDeformUX_opOff}")
    large.change("[DeformUX, stock]", "[DeformUX, twin]")
    first, second = look_ahead(_check(large), patient_sd=0.04, training_sd=0.01).powers
    assert (first.hypotheses, first.paired_starts, first.seeds) == ((("DeformUX", "twin"),), True, ((3, 3, 3),))
    assert first.plans[0].training_sds == pytest.approx((0.01 * 2**0.5,))
    assert (second.paired_starts, second.plans[0].training_sds) == (False, (0.01, 0.01))
    # as much noise, estimated from half as many trainings
    assert first.plans[0].se == pytest.approx(second.plans[0].se)
    assert first.plans[0].detectable > second.plans[0].detectable


def test_below_the_limits_of_a_verdict_what_is_missing_is_told(trial):
    lines = describe(look_ahead(_check(trial)))
    assert "  UNDECIDED whatever is found: 24 more patients needed, 30 in all." in lines
    assert any("more repeated trainings needed, 4 more of DeformUX, 6 more of ResEnc;" in line for line in lines)
    assert "Trainings: 13, 0 of them done." in lines
    assert f"To make: 3 folds of {NAME}, which keep patients together." in lines
    assert f"To make: nnUNetPlans of {NAME} by ExperimentPlanner, and its preprocessed cases." in lines
    assert "Time: not known before each arm has finished a training." in lines
    assert not any("Found in four" in line for line in lines)
    assert trial.calls() == []
    assert not trial.output.exists()


def test_the_time_on_a_gpu_is_nnunets(trial, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    trial.change("device: cpu", "device: cuda")
    trial.change("budget: {epochs: 3, iterations: 5}", "budget: {epochs: 500}")
    outlook = look_ahead(_check(trial))
    # 10 trainings on nnUNetPlans, 3 on ResEnc M's
    assert outlook.seconds == pytest.approx(3600 * (10 * 9 + 3 * 12) / 2)
    assert outlook.needed_bytes == 13 * 500_000_000


def test_trainers_of_the_users_own_are_found_with_their_suffixes(trial, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(OWN)
    trial.change("nnUNetTrainerDeformUX}", "nnUNetTrainerOfMine_AdamW}")
    with pytest.raises(ExperimentError, match=f"name its folder in {activation.VARIABLE}"):
        _check(trial)
    monkeypatch.setenv(activation.VARIABLE, str(folder))
    assert len(_check(trial).trainings) == 13
    trial.change("nnUNetTrainerOfMine_AdamW}", "nnUNetTrainerOfMin_AdamW}")
    with pytest.raises(ExperimentError, match=r"did you mean nnUNetTrainerOfMine\?"):
        _check(trial)
    (folder / "a_broken.py").write_text("import not_there")
    with pytest.raises(ExperimentError, match=r"fails in .*a_broken\.py \(ModuleNotFoundError: No module named 'not_t"):
        _check(trial)
