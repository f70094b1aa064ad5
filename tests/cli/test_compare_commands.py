"""The commands of compare, before there is anything to compare."""

import sys

import pytest


def test_compare_init_writes_a_file_that_loads_and_never_replaces_one(run, tmp_path):
    from nnunet_deform.comparison.experiment_file import load_experiment

    file = tmp_path / "e.yaml"
    written = run("compare", "init", "-d", "501", "-o", str(file), "--device", "cpu")
    assert written.exit_code == 0
    assert f"nnunet-deform compare check {file}" in written.output
    experiment = load_experiment(file).experiment
    assert (experiment.datasets[0].id, experiment.device) == (501, "cpu")
    again = run("compare", "init", "-d", "502", "-o", str(file))
    assert again.exit_code == 1
    assert "exists; give another name with -o" in again.output
    assert load_experiment(file).experiment == experiment
    other = tmp_path / "other.yaml"
    wrong = run("compare", "init", "-d", "501", "-o", str(other), "--device", "tpu")
    assert wrong.exit_code == 1
    assert "device: 'tpu' is none of cuda, cpu, mps." in wrong.output
    assert not other.exists()


@pytest.mark.parametrize("command", ["run", "report", "prepare", "jobs"])
def test_compare_tells_faults_of_the_file_in_one_line_each(run, tmp_path, command):
    file = tmp_path / "e.yaml"
    file.write_text("name: a\nfolds: all\n")
    result = run("compare", command, str(file))
    assert result.exit_code == 1
    assert f"{file}:2: folds: fold 'all' trains on every case" in result.output
    assert f"{file}:1: arms: is missing" in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == [file]


def test_compare_without_its_extra_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    result = run("compare", "report", str(tmp_path / "e.yaml"))
    assert result.exit_code == 1
    assert "pip install 'nnunet-deform[compare]'" in result.output
