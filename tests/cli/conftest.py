"""The command line in this process, with the plugin's traces in scratch folders."""

import os
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnunet_deform import activation, cli
from nnunet_deform.diagnosis import lookup

OURS = activation.extension_folder()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for name in (activation.VARIABLE, "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    # As in an activated environment, whichever way the tests were started.
    monkeypatch.setenv("PATH", sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"])
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def pth(monkeypatch, tmp_path) -> Path:
    """The file ``enable`` writes, in a scratch folder instead of site-packages."""
    path = tmp_path / activation.PTH_NAME
    monkeypatch.setattr(activation, "pth_path", lambda: str(path))
    return path


@pytest.fixture
def active(run, pth, monkeypatch):
    """``run`` with the plugin active, and a fast look-up, which other tests have run."""
    from nnunet_deform.trainers.variants import find_trainer

    def found(name: str) -> type | None:
        try:
            return find_trainer(name)
        except AttributeError:
            return None

    monkeypatch.setattr(lookup, "lookup", found)
    monkeypatch.setenv(activation.VARIABLE, OURS)
    return run
