"""The Snakemake workflow, with stand-ins for nnU-Net's commands.

Snakemake is looked for on PATH and in the environment variable SNAKEMAKE: it lives in an environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest
from rich.console import Console
from trial import NAME, Trial

from nnunet_deform.comparison.collect import scores_file, scores_file_of_test
from nnunet_deform.comparison.cost import costs_file
from nnunet_deform.comparison.files import fingerprint, read_json
from nnunet_deform.comparison.run import Comparison, RunError
from nnunet_deform.comparison.workflow import PROFILES, write_workflow
from nnunet_deform.processes.commands import Interrupts

SNAKEMAKE = os.environ.get("SNAKEMAKE") or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(SNAKEMAKE is None, reason="no snakemake on PATH, nor in SNAKEMAKE")
FOLDER = f"{NAME}-3d_fullres"

pytestmark = pytest.mark.usefixtures("use_fakes")


@pytest.fixture
def small(trial) -> Trial:
    """Two arms on two folds, a test set: 4 trainings, 2 predictions, 2 costs."""
    trial.change("folds: [0, 1, 2]", "folds: [0, 1]")
    trial.change("seeds: {first: 1, repeats: [2, 3], folds: [0], arms: [stock, DeformUX]}\n", "")
    trial.change("  - {name: ResEnc, trainer: nnUNetTrainer_AdamW, plans: nnUNetResEncUNetMPlans}\n", "")
    trial.change("  - [DeformUX, ResEnc]\n", "")
    return trial


def snakemake(trial: Trial, profile: str, *arguments: str, rc: int = 0) -> str:
    """What Snakemake says.

    Args:
        rc: the exit code that it must end with.
    """
    folder = trial.output / "workflow"
    command = [SNAKEMAKE, "-s", str(folder / "Snakefile"), "--profile", str(folder / profile), *arguments]
    # its log goes into the folder in which it was started
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=trial.folder)
    assert ended.returncode == rc, ended.stdout
    return ended.stdout


def counts(trial: Trial) -> dict[str, int]:
    """Jobs by rule that Snakemake would run now."""
    shown = snakemake(trial, "local", "--dry-run", "--quiet", "rules")
    return {rule: int(number) for rule, number in re.findall(r"^(\w+) +(\d+)$", shown, re.M)}


def test_the_jobs_are_those_of_the_experiment(trial, fakes):
    trial.change("test: true}", "test: true}\n  - {id: Dataset007_Boxes, configuration: 2d}")
    comparison = trial.comparison()
    jobs = read_json(write_workflow(comparison) / "jobs.json")
    folders = comparison.folders
    assert len(comparison.trainings) == 26
    assert jobs["trainings"] == {
        t.key: str(scores_file(t, folders).relative_to(folders.output)) for t in comparison.trainings
    }
    # the Snakefile's patterns
    assert all(file == f"scores/{key}.parquet" for key, file in jobs["trainings"].items())
    assert set(jobs["arms"]) == {
        f"{NAME}-{c}/{arm}" for c in ("2d", "3d_fullres") for arm in ("stock", "DeformUX", "ResEnc")
    }
    first = comparison.trainings[0]
    assert jobs["arms"][f"{FOLDER}/stock"] == {
        "folds": [f"scores/{FOLDER}/stock_seed1_fold{fold}.parquet" for fold in (0, 1, 2)],
        "test": str(scores_file_of_test(first, folders).relative_to(folders.output)),
        "cost": str(costs_file(first, folders).relative_to(folders.output)),
    }
    assert jobs["arms"][f"{FOLDER}/stock"]["test"] == f"scores/{FOLDER}/stock_seed1_fold0_test.parquet"
    assert jobs["arms"][f"{FOLDER}/stock"]["cost"] == f"costs/{FOLDER}/stock.json"
    assert jobs["arms"][f"{NAME}-2d/stock"]["test"] is None
    assert jobs["experiment_sha256"] == fingerprint(trial.file)
    assert jobs["environment"] == {
        "nnUNet_raw": str(trial.folder / "raw"),
        "nnUNet_preprocessed": str(trial.folder / "preprocessed"),
    }
    assert jobs["nnunet_deform"] == str(fakes / "nnunet-deform")
    assert jobs["gpu"] is False
    trial.change("device: cpu", "device: cuda")
    assert read_json(write_workflow(trial.comparison()) / "jobs.json")["gpu"] is True


def test_profiles_are_the_users(trial):
    folder = write_workflow(trial.comparison())
    assert PROFILES == ("local", "slurm")
    (folder / "slurm" / "config.yaml").write_text("executor: slurm\n")
    (folder / "Snakefile").write_text("old")
    write_workflow(trial.comparison())
    assert (folder / "slurm" / "config.yaml").read_text() == "executor: slurm\n"
    assert "rule train:" in (folder / "Snakefile").read_text()


def test_jobs_are_found_by_number_and_name(trial):
    comparison = trial.comparison()
    second = comparison.trainings[1]
    assert second.key == f"{FOLDER}/DeformUX_seed1_fold0"
    assert comparison.find_training("1") == comparison.find_training(second.key) == second
    with pytest.raises(RunError, match=rf"no job 13; the 13 trainings go from 0 \({FOLDER}/stock_seed1_fold0\) to 12"):
        comparison.find_training("13")
    assert [t.fold for t in comparison.find_arm(f"{FOLDER}/stock")] == [0, 1, 2]
    assert {t.seed for t in comparison.find_arm(f"{FOLDER}/stock")} == {1}
    with pytest.raises(RunError, match=f"no arm stock; there are {FOLDER}/stock, "):
        comparison.find_arm("stock")


def test_an_arm_is_predicted_and_measured_when_it_is_trained(small):
    comparison = small.comparison()
    comparison.prepare()
    arm = comparison.find_arm(f"{FOLDER}/stock")
    for step in (comparison.predict_test, comparison.measure_cost):
        with pytest.raises(
            RunError, match=f"stock, seed 1, fold 0 .* not finished; .*--job {FOLDER}/stock_seed1_fold0"
        ):
            step(arm)
    comparison.train(arm[0])
    comparison.measure_cost(arm)
    with pytest.raises(RunError, match=r"stock, seed 1, fold 1 .* is not finished"):
        comparison.predict_test(arm)
    comparison.train(arm[1])
    comparison.predict_test(arm)
    assert scores_file_of_test(arm[0], comparison.folders).exists()
    small.change(", test: true", "")
    with pytest.raises(RunError, match="does not ask for a test set"):
        small.comparison().predict_test(arm)


def test_a_run_leaves_a_training_to_the_job_that_has_it(small):
    small.change("folds: [0, 1]", "folds: [0]")
    small.change(", test: true", "")
    comparison = small.comparison()
    comparison.prepare()
    busy = comparison.trainings[0]
    with Comparison(small.file, Console(), Interrupts()).locked(busy.key):
        (failure,) = comparison.run()
    assert failure.startswith(f"{busy}: ")
    assert f"{busy.key}.lock is held by a run or job" in failure
    assert [name.split("_")[0] for name in small.trained()] == ["nnUNetTrainerDeformUX"]
    assert small.run() == []
    assert len(small.trained()) == 2


@needs_snakemake
def test_the_dag(small):
    write_workflow(small.comparison())
    everything = {"prepare": 1, "train": 4, "predict": 2, "cost": 2, "report": 1, "total": 10}
    assert counts(small) == everything
    assert small.run() == []
    assert counts(small) == {"report": 1, "total": 1}
    small.report()
    assert counts(small) == {}

    # preparing again is no reason to train again
    os.utime(small.file)
    assert counts(small) == {"prepare": 1, "report": 1, "total": 2}

    # an arm more is one more of everything
    small.change("arms:\n", "arms:\n  - {name: more, trainer: nnUNetTrainerMAGIC}\n")
    shown = snakemake(small, "local", "--dry-run", rc=1)
    assert f"{small.file} has changed since this workflow was written; run: env nnUNet_raw=" in shown
    write_workflow(small.comparison())
    assert counts(small) == {"prepare": 1, "train": 2, "predict": 1, "cost": 1, "report": 1, "total": 6}


@needs_snakemake
def test_gpus_are_asked_for(small):
    small.change("device: cpu", "device: cuda")
    write_workflow(small.comparison())
    shown = snakemake(small, "local", "--dry-run")
    asking = [block.split(":")[0] for block in re.split(r"^rule ", shown, flags=re.M)[1:] if "gpu=1" in block]
    assert sorted(asking) == ["cost"] * 2 + ["predict"] * 2 + ["train"] * 4


def _table(trial: Trial) -> pd.DataFrame:
    return pd.read_parquet(trial.output / "report" / "cases.parquet")


# The test's SLURM keeps no accounts, and the plugin's wait of 40 s is for real jobs.
WITHOUT_ACCOUNTING = (
    *("--slurm-status-command", "squeue", "--slurm-no-account"),
    *("--slurm-init-seconds-before-status-checks", "2"),
)


def _profile_for_one_node(trial: Trial) -> None:
    """The shipped slurm profile, changed as a user of this machine would."""
    file = trial.output / "workflow" / "slurm" / "config.yaml"
    text = re.sub(r"(prepare|train|predict): \d+", r"\1: 1", file.read_text())
    text = re.sub(r"mem_mb: \d+", "mem_mb: 2000", text).replace("retries: 2", "retries: 0")
    file.write_text(text)


@pytest.mark.slurm
def test_what_slurm_is_asked_for(small, tmp_path, monkeypatch):
    small.change("device: cpu", "device: cuda")
    comparison = small.comparison()
    write_workflow(comparison)
    comparison.prepare()
    asked = tmp_path / "asked"
    asked.mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$*" >{asked}/$$\nexit 1\n')  # a file each: they come at the same time
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    snakemake(small, "slurm", "--retries", "0", *WITHOUT_ACCOUNTING, rc=1)
    calls = [file.read_text() for file in asked.iterdir()]
    assert len(calls) == 4
    for option in ("--gpus=1", "--cpus-per-task=12", "-t 2880", "--mem 48000"):
        assert all(f" {option} " in call for call in calls), option


@pytest.mark.slurm
def test_through_slurm_it_resumes_and_ends_as_an_undisturbed_run(small, tmp_path, monkeypatch):
    """See tests/one_node_slurm.sh. Minutes: ten jobs, each of which starts Python three times."""
    assert SNAKEMAKE, "no snakemake on PATH, nor in SNAKEMAKE"
    subprocess.run(["sinfo", "-h"], check=True)
    other = Trial(tmp_path / "undisturbed")
    shutil.copytree(small.folder, other.folder)
    assert other.run() == []
    other.report()
    before = len(small.trained())

    # an arm crashes: the other one is trained, and there is no report
    write_workflow(small.comparison())
    _profile_for_one_node(small)
    monkeypatch.setenv("FAKE_BAD", "DeformUX")
    shown = snakemake(small, "slurm", *WITHOUT_ACCOUNTING, rc=1)
    assert "Some jobs failed. The same command continues from here" in shown
    assert len(re.findall("has been submitted with SLURM jobid", shown)) >= 5
    assert not (small.output / "report").exists()
    done = [t for t in small.comparison().trainings if small.comparison().is_done(t)]
    assert [t.arm for t in done] == ["stock", "stock"]
    finished = small.folds()
    finished = {file: digest for file, digest in finished.items() if "AdamW" in file}
    assert finished

    # it does not crash, but is killed in the middle, as at its time limit
    monkeypatch.delenv("FAKE_BAD")
    monkeypatch.setenv("FAKE_SLOW", "5")
    folder = small.output / "workflow"
    command = [SNAKEMAKE, "-s", folder / "Snakefile", "--profile", folder / "slurm", *WITHOUT_ACCOUNTING]
    with (tmp_path / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=small.folder
        )
        while not list(small.output.glob("nnUNet_results/*/*DeformUX*/fold_*/checkpoint_latest.pth")):
            assert process.poll() is None, (tmp_path / "killed.log").read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # Snakemake cancels its jobs
        process.wait(timeout=120)
    while subprocess.run(["squeue", "-h"], check=True, capture_output=True).stdout:
        time.sleep(0.5)
    monkeypatch.setenv("FAKE_SLOW", "0")
    snakemake(small, "slurm", *WITHOUT_ACCOUNTING)
    calls = [call["args"] for call in small.calls() if call["name"] == "nnUNetv2_train"][before:]
    assert sum("AdamW" in " ".join(args) for args in calls) == 2  # never again
    assert any("--c" in args for args in calls)  # and the stand-in refuses to start over a checkpoint
    assert {file: digest for file, digest in small.folds().items() if file in finished} == finished
    pd.testing.assert_frame_equal(_table(small), _table(other))
    assert counts(small) == {}
    assert json.loads((small.output / "declared.json").read_text())["content"]["hypotheses"] == ["DeformUX - stock"]
