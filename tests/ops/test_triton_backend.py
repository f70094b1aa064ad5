"""The Triton backend where there is no GPU: interpreted, and seen by torch.compile.

tests/benchmarks/test_triton_code.py compiles the kernels for GPUs. What they compute is in triton_interpreted.py, which
runs here in a process of its own. On a GPU the tests that are parametrised over backends and devices run it as well
(``-m gpu``).
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_deform.ops import BACKEND_VARIABLE, backends_for, choose_backend, deform_conv3d
from nnunet_deform.ops.backends import triton_

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def release(package: str) -> tuple[int, int]:
    """Major and minor; (0, 0) if it is not installed."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


needs_interpreter = pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="Triton's interpreter takes arrays of one element for numbers up to 3.6, which NumPy refuses from 2.4 on",
)


def tensors(size, channels=48, dtype=torch.float32, device="meta", batch=2):
    """Input, offset and weight for a kernel of 3 with padding 1."""
    taps = 3 ** len(size)
    return (
        torch.empty(batch, channels, *size, dtype=dtype, device=device),
        torch.empty(batch, len(size) * taps, *size, device=device),
        torch.empty(channels, 1, *[3] * len(size), dtype=dtype, device=device),
    )


@needs_triton
@needs_interpreter
def test_interpreted_kernels_agree_with_the_reference(interpreted):
    assert interpreted["triton_interpreted.py"] >= 48


@needs_triton
@needs_interpreter
def test_interpreted_kernels_follow_the_convention(interpreted):
    """The tests of every backend, as far as the interpreter is quick enough for them."""
    assert interpreted["test_deform_conv_convention.py"] == 4


@needs_triton
@pytest.mark.gpu
def test_kernels_agree_with_the_reference_on_a_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_interpreted.py"]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds a GPU to compile for, and none to run on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_benchmarker=lambda: None,
    )
    # Not set_active, which newer versions of Triton undo only where there is a GPU.
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", gpu)


@pytest.fixture
def traced(hopper, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list, Callable]]:
    """The graphs that torch.compile makes, and the backend that makes and does not run them.

    Traced as for the interpreter, but with torch's own wrapper of the kernels. Fake tensors on a GPU would do as well,
    but old versions of torch.compile take none from outside.
    """
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph.nodes)

        def run(*arguments):
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
                results = graph.forward(*fakes)
            return [torch.empty(tuple(result.shape)) for result in results]

        return run

    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(triton_, "_interpreted", lambda: True)
    monkeypatch.setattr(triton_, "wrap_triton", torch.library.wrap_triton)
    torch.compiler.reset()
    yield graphs, aot_autograd(fw_compiler=keep)
    torch.compiler.reset()


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_compile_sees_the_kernels(deterministic: bool, traced):
    """One graph serves every size."""
    graphs, compiler = traced
    backward = torch.ops.nnunet_deform.deform_conv_backward
    forward = torch.compile(
        lambda *t: deform_conv3d(*t, padding=1).sin(), fullgraph=True, dynamic=True, backend=compiler
    )
    gradients = torch.compile(
        lambda *t: backward(*t, [1] * 3, [1] * 3, [1] * 3, [True] * 4), fullgraph=True, dynamic=True, backend=compiler
    )
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.no_grad():
            # No two sizes of the first call agree, or they would be taken for one.
            for size, batch, stance in (((5, 6, 7), 4, "default"), ((8, 4, 5), 3, "fail_on_recompile")):
                made = tensors(size, channels=2, device="cpu", batch=batch)
                with torch.compiler.set_stance(stance):
                    output = forward(*made)
                    results = gradients(output, *made)
    finally:
        torch.use_deterministic_algorithms(False)
    assert output.shape == made[0].shape
    assert [tuple(r.shape) for r in results] == [*(tuple(t.shape) for t in made), (2,)]
    names = [[node.name for node in nodes] for nodes in graphs]
    kernels = [sum("triton_kernel_wrapper" in name for name in graph) for graph in names]
    # One forward; for the gradients two, or one, one to number the cells and one for each of eight parities.
    assert kernels == [1, 10 if deterministic else 2]
    assert not any("deform_conv" in name for graph in names for name in graph)


@needs_triton
def test_a_traced_stride_reaches_the_kernels_as_a_number(traced):
    graphs, compiler = traced
    compiled = torch.compile(
        lambda *t, stride: deform_conv3d(*t, stride=stride, padding=1), fullgraph=True, dynamic=True, backend=compiler
    )
    with torch.no_grad():
        for stride in (2, 3):
            input, offset, weight = tensors((8, 9, 10), channels=2, device="cpu")
            steps = slice(None, None, stride)
            output = compiled(input, offset[:, :, steps, steps, steps], weight, stride=stride)
            assert tuple(output.shape[2:]) == tuple((size - 1) // stride + 1 for size in (8, 9, 10))
    launches = [node.kwargs["kwargs"] for nodes in graphs for node in nodes if "kernel_wrapper" in node.name]
    assert [[launch[f"stride_{axis}"] for axis in "dhw"] for launch in launches] == [[2] * 3, [3] * 3]


@needs_triton
@pytest.mark.parametrize(
    ("device", "change", "reason"),
    [
        ("cpu", lambda i, o, w: (i, o, w), "it runs on CUDA devices, and the tensors are on cpu"),
        ("cuda", lambda i, o, w: (i, o, w), None),
        ("cuda", lambda i, o, w: (i.double(), o.double(), w.double()), "the input is torch.float64"),
        ("cuda", lambda i, o, w: (i, o, w.expand(-1, 4, -1, -1, -1)), "it convolves depthwise"),
        ("cuda", lambda i, o, w: (i.expand(-1, -1, 2**28, -1, -1), o, w), "at most 536870911 voxels"),
        ("cuda", lambda i, o, w: (i.expand(80000, -1, -1, -1, -1), o, w), "at most 65535 batch items"),
    ],
)
def test_what_it_cannot_do_has_a_reason(device, change, reason, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_, "_unable_device", lambda input: None)
    with FakeTensorMode():
        found = triton_.unable(*change(*tensors((1, 2, 2), channels=4, device=device, batch=1)))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((6, 1), torch.float32, "torch.float32 needs compute capability 7.0, and this GPU has 6.1"),
        ((7, 0), torch.float16, None),
        ((7, 5), torch.bfloat16, "torch.bfloat16 needs compute capability 8.0, and this GPU has 7.5"),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_old_gpus_have_a_reason(capability, dtype, reason, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_, "_unable_to_compile", lambda capability: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_._unable_device(torch.empty(1, dtype=dtype)) == reason
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in triton_._unable_device(torch.empty(1, dtype=dtype))


def test_without_triton_there_is_a_reason_and_another_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(triton_, "triton", None)
    made = tensors((3, 4, 5), channels=4, device="cpu")
    assert backends_for(*made)["triton"] == "Triton is not installed"
    assert choose_backend(*made)[0] != "triton"


@needs_triton
def test_a_triton_that_cannot_compile_has_a_reason(hopper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_._unable_to_compile.cache_clear()
    assert triton_._unable_device(torch.empty(1)) is None

    def no_compiler(*arguments, **options):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(triton_.trial_kernel, "warmup", no_compiler)
    assert triton_._unable_device(torch.empty(1)) is None, "tried once"
    triton_._unable_to_compile.cache_clear()
    reason = triton_._unable_device(torch.empty(1))
    triton_._unable_to_compile.cache_clear()
    assert reason.endswith("cannot compile here (RuntimeError: Failed to find C compiler.)")


# What is there in the place of Triton or torch, and what is said then.
ENVIRONMENTS = {
    "no Triton": ("sys.modules['triton'] = None", "Triton is not installed"),
    "a broken Triton": ("sys.path.insert(0, sys.argv[1])", "Triton cannot be imported (libstdc++ is too old)"),
    "a torch below the oldest": (
        "del torch.library.triton_op, torch.library.wrap_triton; torch.__version__ = '2.5.1'",
        "it needs torch 2.6 or later, and this is 2.5.1",
    ),
}
# Forks of a process that has imported torch, which takes seconds, and neither Triton nor us.
PROGRAM = """
import os, sys
import torch
assert not {"triton", "nnunet_deform"} & sys.modules.keys()
for before in sys.argv[2:]:
    if os.fork() == 0:
        exec(before)
        from nnunet_deform.ops import backends_for, choose_backend, deform_conv3d
        arguments = torch.ones(1, 2, 3, 3, 3), torch.zeros(1, 81, 3, 3, 3), torch.ones(2, 1, 3, 3, 3)
        assert deform_conv3d(*arguments, padding=1)[0, 0, 1, 1, 1] == 27
        print(choose_backend(*arguments)[0], backends_for(*arguments)["triton"], sep=": ", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, before
"""


@needs_triton
def test_the_package_is_imported_and_another_backend_used(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libstdc++ is too old')")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *(before for before, _ in ENVIRONMENTS.values())]
    environment = {**os.environ, BACKEND_VARIABLE: ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for (_, expected), line in zip(ENVIRONMENTS.values(), result.stdout.splitlines(), strict=True):
        backend, _, said = line.partition(": ")
        assert backend != "triton"
        assert said == expected
