"""The preflight with Triton kernels that fail in every way, in Triton's interpreter.

Run for test_preflight.py in a process of its own, because Triton is interpreted only if TRITON_INTERPRET is 1 before it
is imported. The trial's process is forked here instead of started anew, so that it has the broken kernels as well and
takes no time to import torch; test_isolation.py and ``test_a_process_of_its_own`` start real ones.
"""

import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Forked

from nnunet_deform.ops import backends_for, choose_backend, deform_conv2d
from nnunet_deform.ops.backends import preflight, reference, triton_
from nnunet_deform.processes import isolation

FORWARD = ("forward_kernel",)
BACKWARD = ("offset_weight_gradient_kernel", "scatter_input_gradient_kernel")
RESULTS = ("output", "grad_offset", "grad_input")


def raises(launch, arguments):
    raise RuntimeError("device-side assert triggered\nmore of it")


def is_wrong(launch, arguments):
    launch(**arguments)
    for result in (arguments[name] for name in RESULTS if arguments.get(name) is not None):
        result *= 1.001


def returns_nan(launch, arguments):
    launch(**arguments)
    for result in (arguments[name] for name in RESULTS if arguments.get(name) is not None):
        result[(-1,) * result.ndim] = float("nan")


def kills_its_process(launch, arguments):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(launch, arguments):
    time.sleep(600)


FAULTS = {
    raises: "raised RuntimeError: device-side assert triggered more of it",
    is_wrong: "was wrong (the {result} is off by 1.0e-03 of its norm, where 4.0e-06 is allowed)",
    returns_nan: "was wrong (the {result} is not finite)",
    kills_its_process: "ended its process by SIGSEGV",
    hangs: "did not end within 1 s",
}


@pytest.fixture(autouse=True)
def _nothing_tried_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "_verdicts", {})


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> type[Forked]:
    monkeypatch.setattr(isolation, "Popen", Forked)
    monkeypatch.setattr(Forked, "started", 0)
    return Forked


def break_kernels(monkeypatch: pytest.MonkeyPatch, fault, names) -> None:
    def wrap(kernel):
        return Broken(kernel) if kernel.fn.__name__ in names else kernel

    class Broken:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: fault(self.kernel[grid], arguments)

    monkeypatch.setattr(triton_, "wrap_triton", wrap)


def problem(channels=8):
    generator = torch.Generator().manual_seed(1)
    shapes = (1, channels, 2, 2), (1, 4, 2, 1), (channels, 1, 1, 2)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def output_and_gradients(tensors):
    output = deform_conv2d(*tensors)
    return [output, *torch.autograd.grad(output, tensors, torch.ones_like(output))]


def assert_right(tensors) -> None:
    doubles = [tensor.detach().double() for tensor in tensors]
    spatial = [1] * 2, [0] * 2, [1] * 2
    expected = [reference.forward(*doubles, None, *spatial)]
    expected += reference.backward(torch.ones_like(expected[0]), *doubles, *spatial, (True, True, True, False))[:3]
    for result, truth in zip(output_and_gradients(tensors), expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", [FORWARD, BACKWARD], ids=["forward", "backward only"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_kernels_that_fail_are_not_used(fault, kernels, forked, monkeypatch, caplog) -> None:
    """The operator gives the right results, a line says why, and other processes know."""
    break_kernels(monkeypatch, fault, kernels)
    if fault is hangs:
        monkeypatch.setattr(preflight, "LIMIT_S", 1)
    tensors = problem()
    with caplog.at_level(logging.WARNING, "nnunet_deform.ops"):
        assert_right(tensors)
        assert_right(tensors)
    assert choose_backend(*tensors)[0] != "triton"
    said = FAULTS[fault].format(result="output" if kernels == FORWARD else "gradient of the input")
    (line,) = caplog.messages
    assert line.startswith(
        f"WARNING: the triton backend of the deformable convolution {said} in its preflight (float32, 2D, "
    )
    assert "nnunet-deform selftest --device cpu -o report.json" in line
    assert "\n" not in line

    # Another process would know it from the disk.
    monkeypatch.setattr(preflight, "_verdicts", {})
    started = forked.started
    assert_right(tensors)
    assert forked.started == started
    assert [record["fault"] for record in preflight.remembered()] == [said]


def test_a_process_of_its_own(monkeypatch, caplog) -> None:
    """Kernels that work pass in a real one, and are used; the kernels of other channels are tried by themselves."""
    tensors = problem()
    with caplog.at_level(logging.WARNING, "nnunet_deform.ops"):
        assert choose_backend(*tensors)[0] == "triton"
    assert not caplog.messages
    (record,) = preflight.remembered()
    assert record["fault"] is None
    assert (record["dtype"], record["axes"], record["block"], record["deterministic"]) == ("float32", 2, 8, False)

    def no_process(*arguments, **options):
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(preflight, "_verdicts", {})
    monkeypatch.setattr(isolation, "Popen", no_process)
    assert choose_backend(*tensors)[0] == "triton"
    # Where no process can be started it is another backend, this time.
    assert choose_backend(*problem(channels=5))[0] != "triton"
    assert len(preflight.remembered()) == 1


@pytest.mark.parametrize(
    ("dtype", "axes", "block", "deterministic"),
    [("float16", 3, 8, False), ("bfloat16", 2, 4, False), ("float32", 2, 1, True)],
)
def test_every_kind_of_trial_passes(dtype, axes, block, deterministic) -> None:
    trial = preflight.Trial("cpu", dtype, axes, block, deterministic)
    assert preflight._compare(preflight.asdict(trial)) == {"fault": None, "lasting": True}
    torch.use_deterministic_algorithms(False)


def test_the_kernels_in_use_are_tried(forked, monkeypatch) -> None:
    """Deterministic ones where these are asked for: the others work."""
    break_kernels(monkeypatch, is_wrong, ("gather_input_gradient_kernel",))
    tensors = problem()
    assert choose_backend(*tensors)[0] == "triton"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(*tensors)[0] != "triton"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("circumstance", ["no device", "the process dies", "no memory"])
def test_what_says_nothing_about_the_kernels_is_not_remembered(circumstance, forked, monkeypatch) -> None:
    def expected(*arguments):
        if circumstance == "the process dies":
            os._exit(9)
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if circumstance == "no memory":
        monkeypatch.setattr(triton_, "forward", no_memory)
    else:
        monkeypatch.setattr(preflight, "_expected", expected)
    trial = preflight.Trial("cpu", "float32", 2, 8, False)
    decided = preflight.verdict(trial)
    assert decided.fault.startswith("could not be tried (")
    assert not decided.lasting
    assert preflight.warning(trial, decided).endswith("an issue. NNUNET_DEFORM_BACKEND=triton uses it untried.")
    assert not preflight.remembered()
    assert choose_backend(*problem())[0] != "triton"


def test_a_forced_backend_is_not_tried(forked, monkeypatch) -> None:
    monkeypatch.setenv("NNUNET_DEFORM_BACKEND", "triton")
    assert choose_backend(*problem())[0] == "triton"
    assert backends_for(*problem())["triton"] is None
    assert forked.started == 0


def test_a_renewed_verdict_replaces_the_remembered_one(forked, monkeypatch) -> None:
    trial = preflight.Trial("cpu", "float32", 2, 8, False)
    with monkeypatch.context() as broken:
        break_kernels(broken, raises, FORWARD)
        assert preflight.verdict(trial).fault.startswith("raised")
    assert preflight.verdict(trial).fault.startswith("raised")
    assert preflight.renewed(trial) == preflight.Verdict(None)
    assert preflight.verdict(trial) == preflight.Verdict(None)


def test_the_first_to_write_decides(monkeypatch, tmp_path) -> None:
    """Two processes that try at once, and a file that is damaged."""
    trial = preflight.Trial("cpu", "float32", 2, 8, False)
    file = preflight._file(trial)
    assert preflight._remember(file, trial, "raised this") == "raised this"
    assert preflight._remember(file, trial, None) == "raised this"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.write_text(file.read_text()[:40])
    assert preflight.remembered() == []
    assert preflight._remember(file, trial, None) is None
    assert json.loads(file.read_text())["fault"] is None

    def no_links(*arguments):
        raise OSError("Operation not supported")

    file.unlink()
    monkeypatch.setattr(os, "link", no_links)
    assert preflight._remember(file, trial, "raised that") == "raised that"
    assert preflight.verdict(trial) == preflight.Verdict("raised that")


def test_where_nothing_can_be_written_each_process_tries(forked, monkeypatch, tmp_path) -> None:
    (tmp_path / "nnunet-deform").write_text("in the way")
    trial = preflight.Trial("cpu", "float32", 2, 8, False)
    for _ in range(2):
        started = forked.started
        assert preflight.verdict(trial) == preflight.Verdict(None)
        assert forked.started == started + 1


def test_a_verdict_holds_for_its_machine(monkeypatch) -> None:
    trial = preflight.Trial("cpu", "float32", 2, 8, False)
    files = {preflight._file(trial)}
    before = preflight.machine("cpu")
    for what in before:
        monkeypatch.setattr(preflight, "machine", lambda device, what=what: {**before, what: "another"})
        files.add(preflight._file(trial))
    assert len(files) == 6
