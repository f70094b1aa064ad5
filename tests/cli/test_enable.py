"""Switching the plugin on and off, and what needs an nnU-Net."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from nnunet_deform import __version__, activation

OURS = activation.extension_folder()


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
