"""Which backend runs, and what is said about it."""

import logging

import pytest
import torch
from deform_conv_cases import BACKENDS, draw, leaves, one_case, plain_conv
from torch import Tensor

from nnunet_deform.ops import BACKEND_VARIABLE, Backend, backends, backends_for, choose_backend

CASE = one_case("2d-depthwise")
LOGGER = "nnunet_deform.ops"


@pytest.fixture
def tensors() -> list[Tensor]:
    return draw(CASE, dtype=torch.float32)


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    backends._log_choice.cache_clear()


def module_of(name: str, tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Backend:
    with monkeypatch.context() as forced:
        forced.setenv(BACKEND_VARIABLE, name)
        return choose_backend(*tensors[:3])[1]


def count_calls(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> list[str]:
    """The names of the backend's functions that run from now on."""
    calls = []
    for function in ("forward", "backward"):
        original = getattr(backend, function)

        def counted(*args, function=function, original=original):
            calls.append(function)
            return original(*args)

        monkeypatch.setattr(backend, function, counted)
    return calls


def test_the_forced_backend_runs(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]):
    able = [name for name in BACKENDS if backends_for(*tensors[:3])[name] is None]
    assert {"reference", "torch"} <= set(able)
    calls = {name: count_calls(monkeypatch, module_of(name, tensors, monkeypatch)) for name in able}
    for forced in able:
        monkeypatch.setenv(BACKEND_VARIABLE, forced)
        assert choose_backend(*tensors[:3])[0] == forced
        plain_conv(*tensors, **CASE.spatial).sum().backward()
        for name in able:
            assert calls[name] == (["forward", "backward"] if name == forced else []), (forced, name)
            calls[name].clear()


def test_backward_follows_the_variable_of_its_own_time(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]):
    calls = {name: count_calls(monkeypatch, module_of(name, tensors, monkeypatch)) for name in ("reference", "torch")}
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    output = plain_conv(*tensors, **CASE.spatial)
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    output.sum().backward()
    assert calls == {"reference": ["backward"], "torch": ["forward"]}


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]):
    monkeypatch.setenv(BACKEND_VARIABLE, "trition")
    with pytest.raises(ValueError, match="NNUNET_DEFORM_BACKEND='trition' names no backend; choose one of ") as refusal:
        plain_conv(*tensors, **CASE.spatial)
    for name in BACKENDS:
        assert name in str(refusal.value)


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]):
    backend = module_of("torch", tensors, monkeypatch)
    monkeypatch.setattr(backend, "unable", lambda *tensors: "it is Sunday")
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    with pytest.raises(RuntimeError, match="NNUNET_DEFORM_BACKEND='torch' cannot run here: it is Sunday; unset it"):
        plain_conv(*tensors, **CASE.spatial)
    assert backends_for(*tensors[:3])["torch"] == "it is Sunday"
    assert backends_for(*tensors[:3])["reference"] is None


def test_an_empty_variable_is_no_choice(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]):
    unset = choose_backend(*tensors[:3])[0]
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    assert choose_backend(*tensors[:3])[0] == unset


def test_the_reference_never_runs_unasked(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]):
    assert choose_backend(*tensors[:3])[0] != "reference"
    for name in BACKENDS:
        if name != "reference" and backends_for(*tensors[:3])[name] is None:
            monkeypatch.setattr(module_of(name, tensors, monkeypatch), "unable", lambda *tensors: "it is Sunday")
    with pytest.raises(RuntimeError, match=r"no backend can run this deformable conv.* \(.*not torch: it is Sunday"):
        plain_conv(*tensors, **CASE.spatial)


def test_the_next_backend_runs_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tensors: list[Tensor]
):
    reference = module_of("reference", tensors, monkeypatch)
    backend = module_of("torch", tensors, monkeypatch)
    monkeypatch.setattr(backends, "_PREFERENCE", ("torch", "reference"))
    monkeypatch.setattr(backend, "unable", lambda *tensors: "it is Sunday")
    with caplog.at_level(logging.INFO, LOGGER):
        assert choose_backend(*tensors[:3]) == ("reference", reference)
    assert "reference backend" in caplog.text
    assert "not torch: it is Sunday" in caplog.text


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture, tensors: list[Tensor]):
    name = choose_backend(*tensors[:3])[0]
    backends._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, LOGGER):
        for _ in range(3):
            plain_conv(*tensors, **CASE.spatial).sum().backward()
        assert [record.levelname for record in caplog.records if record.name == LOGGER] == ["INFO"]
        assert f"on cpu in torch.float32: {name} backend" in caplog.text
        plain_conv(*leaves(tensors, "cpu", torch.float64), **CASE.spatial)
    assert len([record for record in caplog.records if record.name == LOGGER]) == 2
    assert "on cpu in torch.float64" in caplog.text
