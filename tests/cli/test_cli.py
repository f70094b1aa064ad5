import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnunet_deform import __version__, activation, cli, trainers

OURS = activation.extension_folder()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv(activation.VARIABLE, raising=False)
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def pth(monkeypatch, tmp_path) -> Path:
    """The file ``enable`` writes, in a scratch folder instead of site-packages."""
    path = tmp_path / activation.PTH_NAME
    monkeypatch.setattr(activation, "pth_path", lambda: str(path))
    return path


def test_version(run):
    assert run("--version").output.strip() == f"nnunet-deform {__version__}"
    assert importlib.metadata.version("nnunet-deform") == __version__


@pytest.mark.parametrize(("before", "after"), [(None, OURS), ("/mine", f"/mine:{OURS}"), ("", OURS)])
@pytest.mark.skipif(os.name == "nt", reason="the line is for a POSIX shell")
def test_env_appends_to_the_users_paths(run, before, after):
    line = run("env").output
    environment = {} if before is None else {activation.VARIABLE: before}
    script = f"set -u; {line}printf %s ${activation.VARIABLE}"
    shell = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert shell.stdout == after


def test_enable_then_disable(run, pth):
    assert str(pth) in run("enable").output
    assert [p.name for p in pth.parent.iterdir()] == [pth.name]
    enabled = pth.read_text()
    assert run("enable").exit_code == 0
    assert pth.read_text() == enabled
    assert str(pth) in run("disable").output
    assert not pth.exists()
    again = run("disable")
    assert again.exit_code == 0
    assert "Nothing to do" in again.output


def interpreter(line: str, environment: dict[str, str], code: str) -> str:
    """Run ``code`` in an interpreter whose start-up executed a .pth line."""
    code = f"{line}\n{code}"
    environment = {"PATH": os.environ["PATH"], **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout.strip()


def test_the_enabled_line_sets_the_variable_cheaply(run, pth):
    run("enable")
    code = f"import os, sys; print(os.environ['{activation.VARIABLE}'], *({{'torch', 'argparse'}} & set(sys.modules)))"
    assert interpreter(pth.read_text(), {}, code) == OURS
    mine = {activation.VARIABLE: "/mine"}
    assert interpreter(pth.read_text(), mine, code) == f"/mine{os.pathsep}{OURS}"
    twice = {activation.VARIABLE: OURS}
    assert interpreter(pth.read_text(), twice, code) == OURS


def test_the_enabled_line_survives_our_uninstallation(run, pth):
    run("enable")
    orphan = pth.read_text().replace("nnunet_deform.activation", "nnunet_deform_gone.activation")
    assert interpreter(orphan, {}, "print('started')") == "started"


def test_enable_without_permission(run, monkeypatch, tmp_path):
    monkeypatch.setattr(activation, "pth_path", lambda: str(tmp_path / "missing" / activation.PTH_NAME))
    result = run("enable")
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert "nnunet-deform env" in result.stderr


@pytest.mark.parametrize("command", ["enable", "status", "demo"])
def test_an_old_nnunetv2(run, pth, monkeypatch, command):
    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.5.1" if name == "nnunetv2" else versions(name))
    result = run(command)
    assert result.exit_code == 1
    assert "nnunetv2 2.5.1 is too old" in result.stderr
    assert "pip install 'nnunetv2>=2.8.1,<3'" in result.stderr
    assert not pth.exists()


def test_a_missing_nnunetv2(run, pth, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = run("enable")
    assert result.exit_code == 1
    assert "nnunetv2 is not installed" in result.stderr


def test_status_when_all_is_well(run, pth, monkeypatch):
    monkeypatch.setenv(activation.VARIABLE, OURS)
    result = run("status")
    assert result.exit_code == 0, result.output
    assert "All is well" in result.output
    for name in trainers.__all__:
        assert any(name in line and "found" in line for line in result.output.splitlines())
    assert any("cpu" in line and "used" in line for line in result.output.splitlines())


def test_status_when_not_active(run, pth):
    result = run("status")
    assert result.exit_code == 1
    assert f"does not name our folder {OURS}" in result.output
    assert "nnunet-deform enable" in result.output
    assert "not found" in result.output


def test_status_when_a_path_points_nowhere(run, pth, monkeypatch):
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join(["/nowhere/at [all]", OURS]))
    result = run("status")
    assert result.exit_code == 1
    assert "'/nowhere/at [all]', which is not a folder" in result.output


def test_status_when_another_copy_shadows_ours(run, pth, monkeypatch, tmp_path):
    copy = tmp_path / "copied_trainers.py"
    copy.write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerDeformUX(nnUNetTrainer): pass\n"
    )
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join([str(tmp_path), OURS]))
    result = run("status")
    assert result.exit_code == 1
    assert "another class named nnUNetTrainerDeformUX, in copied_trainers" in result.output
    assert result.output.count("Problem:") == 1


def test_status_when_the_requested_backend_does_not_exist(run, pth, monkeypatch):
    monkeypatch.setenv(activation.VARIABLE, OURS)
    monkeypatch.setenv("NNUNET_DEFORM_BACKEND", "abacus")
    result = run("status")
    assert "'abacus' names no backend" in result.output


def test_compare_init_writes_a_file_that_loads_and_never_replaces_one(run, tmp_path):
    from nnunet_deform.comparison.experiment import load_experiment

    file = tmp_path / "e.yaml"
    written = run("compare", "init", "-d", "501", "-o", str(file), "--device", "cpu")
    assert written.exit_code == 0
    assert f"nnunet-deform compare run {file}" in written.output
    experiment = load_experiment(file)
    assert (experiment.datasets[0].id, experiment.device) == (501, "cpu")
    again = run("compare", "init", "-d", "502", "-o", str(file))
    assert again.exit_code == 1
    assert "exists; give another name with -o" in again.output
    assert load_experiment(file) == experiment


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
