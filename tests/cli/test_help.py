"""The help of every command, and the examples in it, which the command itself must understand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nnunet_deform import cli

LINES = 40  # of 100 columns: one screen


def every_command(group: Any, *above: str) -> dict[tuple[str, ...], Any]:
    commands = {}
    for name, command in group.commands.items():
        commands[(*above, name)] = command
        if hasattr(command, "commands"):
            commands |= every_command(command, *above, name)
    return commands


COMMANDS = every_command(typer.main.get_command(cli.app))


def test_every_command_is_here():
    assert len(COMMANDS) >= 23
    assert ("compare", "results") in COMMANDS


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_is_one_screen_with_an_example(name, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(cli.app, [*name, "-h"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= LINES
    (example,) = re.findall(r"^ *Example: (.*)$", COMMANDS[name].help, re.M)
    # What the example writes and reads exists in a folder of its own.
    monkeypatch.chdir(tmp_path)
    Path("imagesTr").mkdir()
    words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", example))
    assert words[: len(name) + 1] == ["nnunet-deform", *name]
    command, arguments = COMMANDS[name], words[len(name) + 1 :]
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    assert command.make_context("", arguments).params.keys() >= {p.name for p in command.params if p.required}


def test_help_needs_no_torch():
    """Completion asks for it at every stroke."""
    code = "import sys, nnunet_deform.cli; print(*{'torch', 'nnunetv2', 'numpy'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    words = "nnunet-deform compare re"
    environment = {
        "_NNUNET_DEFORM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": "2",
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = CliRunner().invoke(cli.app, [], prog_name="nnunet-deform", env=environment)
    assert "report" in result.output
    assert "results" in result.output
    assert "archive" not in result.output
