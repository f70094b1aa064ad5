"""The preflight of the Triton backend; preflight_interpreted.py has its failures, here is what needs no kernels."""

from pathlib import Path

import pytest
import torch
from test_triton_backend import needs_interpreter, needs_triton

from nnunet_deform.ops import choose_backend
from nnunet_deform.ops.backends import preflight, trial_due, triton_


@needs_triton
@needs_interpreter
def test_kernels_that_fail_in_every_way(interpreted):
    assert interpreted["preflight_interpreted.py"] == 23


def tensors(channels: int = 48, groups: int = 1) -> list[torch.Tensor]:
    return [torch.zeros(1, channels, 2, 2), torch.zeros(1, 18 * groups, 2, 2), torch.zeros(channels, 1, 3, 3)]


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)

    def tried(*arguments):
        raise AssertionError("tried")

    monkeypatch.setattr(preflight, "objection", tried)
    monkeypatch.setattr(preflight.Trial, "of", tried)
    assert choose_backend(*tensors())[0] in ("cpu", "torch")
    assert trial_due(*tensors()) is None


def test_what_a_trial_is_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)
    monkeypatch.setattr(triton_, "unable", lambda *tensors: None)
    assert trial_due(*tensors()) == preflight.Trial("cpu", "float32", 2, 8, False)
    assert [trial_due(*tensors(channels=c)).block for c in (384, 20, 6, 5)] == [8, 4, 2, 1]
    assert trial_due(*tensors(channels=24, groups=2)).block == 4
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert trial_due(*tensors()).deterministic
    monkeypatch.setenv("NNUNET_DEFORM_BACKEND", "torch")
    assert trial_due(*tensors()) is None


def test_where_verdicts_are_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert preflight.folder() == tmp_path / "cache" / "nnunet-deform" / "preflight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert preflight.folder() == tmp_path / ".cache" / "nnunet-deform" / "preflight"
    assert preflight.remembered() == []
