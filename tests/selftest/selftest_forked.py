"""The self-test passes here, and finds what is wrong: wrong numbers, errors, crashes. test_selftest.py runs this.

In a process of its own, because one that has computed gradients before cannot be forked.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Forked
from typer.testing import CliRunner, Result

from nnunet_deform import selftest
from nnunet_deform.cli import app
from nnunet_deform.cli.devices import best_device
from nnunet_deform.ops import backends, dynamic_conv
from nnunet_deform.ops.backends import torch_
from nnunet_deform.processes import isolation
from nnunet_deform.selftest import deformable, operators, steps


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Returns run(names, *options): the command with the checks of these names only, in forks of this process."""
    every = selftest.checks_for("cpu")

    def invoke(names: tuple[str, ...], *options: str) -> Result:
        chosen = [check for check in every if check.name in names]
        assert {check.name for check in chosen} == set(names)
        monkeypatch.setattr(selftest, "checks_for", lambda device: chosen)
        return CliRunner().invoke(app, ["selftest", "--device", "cpu", *options])

    monkeypatch.setattr(isolation, "Popen", Forked)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)
    return invoke


# Of each group, what takes a moment.
QUICK = ("float32, 2D", "float16, 2D", "offsets that are no positions", "standardisation", "dynamic convolution, 2D")


def test_a_machine_that_is_well(run, tmp_path: Path):
    result = run(QUICK, "-o", str(tmp_path / "report.json"))
    assert result.exit_code == 0, result.output
    assert "✓" in result.output
    assert "✗" not in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True
    assert report["device"] == "cpu"
    assert report["processor_seconds"] > 0
    assert {finding["name"] for finding in report["findings"]} == set(QUICK)
    assert not any("fault" in finding for finding in report["findings"])
    assert {"torch", "triton", "nnunetv2", "processor", "nnunet-deform", "python"} <= report["about"].keys()
    assert f"All {len(report['findings'])} checks pass" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("place", "name"), [(0, "input"), (1, "offset"), (2, "weight"), (3, "bias")], ids=lambda value: str(value)
)
def test_a_backend_with_a_wrong_gradient(run, monkeypatch, tmp_path, place, name):
    """In each of the four gradients; the other backends stay well."""
    backward = torch_.backward

    def wrong(*arguments):
        gradients = list(backward(*arguments))
        gradients[place] = gradients[place] * 1.001
        return tuple(gradients)

    monkeypatch.setattr(torch_, "backward", wrong)
    result = run(("float32, 2D",), "-o", str(tmp_path / "report.json"))
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "Fails:" in line]
    said = f"the gradient of the {name} is off by 1.0e-03 of its norm, where 2.0e-06 is allowed"
    assert line == f"Fails: deformable convolution, float32, 2D, torch: {said}."
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False
    assert [f["column"] for f in report["findings"] if "fault" in f] == ["torch"]
    assert "please attach the report to an issue" in result.output


def test_errors_and_crashes_are_lines_and_the_rest_goes_on(run, monkeypatch):
    def forward(input, *arguments):
        if input.dtype == torch.float16:
            os.abort()
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch_, "forward", forward)
    result = run(("float32, 2D", "float16, 2D", "standardisation"))
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if "Fails:" in line]
    assert len(lines) == 2
    assert "float32, 2D, torch: RuntimeError: no kernel image is available" in lines[0]
    assert "float16, 2D, torch: ended its process by SIGABRT" in lines[1]
    assert "2 of " in result.output
    assert "run it again with -o report.json" in result.output


def test_another_operator_that_is_wrong(run, monkeypatch):
    assert operators.check_operator("cpu", "dynamic convolution, 2D", False) == {}
    fold = dynamic_conv._dynamic_conv
    monkeypatch.setattr(dynamic_conv, "_dynamic_conv", lambda *arguments: fold(*arguments) * 1.0001)
    assert operators.check_operator("cpu", "dynamic convolution, 2D", False) == {
        "fault": "the output is off by 1.0e-04 of its norm, where 2e-05 is allowed"
    }


def test_a_training_step_with_a_wrong_backend(monkeypatch):
    """The default backend's gradients of the weights are lost; the torch backend, which it is held against, is well."""
    monkeypatch.setattr(steps, "PATCH", (4, 8, 8))
    assert "fault" not in steps.check_step("cpu", "DeformUX-Net", "float32")

    def without_weights(*tensors):
        gradients = torch_.backward(*tensors)
        return gradients[0] * 0, *gradients[1:]

    wrong = type("Wrong", (), {"unable": torch_.unable, "forward": torch_.forward})
    wrong.backward = staticmethod(without_weights)
    monkeypatch.setattr(backends, "_PREFERENCE", ("wrong",))
    monkeypatch.setitem(backends._BACKENDS, "wrong", wrong)
    assert steps.check_step("cpu", "DeformUX-Net", "float32")["fault"].startswith("the error of the gradients is ")


def test_what_is_checked_where():
    checks = selftest.checks_for("cpu")
    assert {check.column for check in checks if check.group == selftest.DEFORMABLE} >= {"torch"}
    assert {check.name for check in checks if check.group == selftest.STEP} == set(steps.ARCHITECTURES)
    assert {check.column for check in checks if check.group == selftest.STEP} == {"float32", "autocast"}
    assert len({(check.group, check.name, check.column) for check in checks}) == len(checks)
    assert deformable.check_case("cpu", "torch", "another stream") == {"skipped": "of CUDA"}
    assert "it convolves depthwise" in deformable.check_case("cpu", "cpu", "dense")["skipped"] or "cpu" not in {
        check.column for check in checks
    }


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["selftest", "--device", "cuda"])
    assert result.exit_code == 1
    assert "--device cuda: torch finds no CUDA device here" in result.output
    assert best_device() in ("cpu", "mps")


def test_a_report_that_cannot_be_written(tmp_path: Path):
    result = CliRunner().invoke(app, ["selftest", "--device", "cpu", "-o", str(tmp_path / "missing" / "report.json")])
    assert result.exit_code == 1
    assert "there is no folder" in result.output
