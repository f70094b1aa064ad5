"""The Triton kernels' own times, which the benchmark takes on a GPU; here the GPU is feigned."""

import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_timed_one_by_one_beside_the_prediction(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    benchmark = importlib.import_module("deform_conv")
    now = [0.0]  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def elapsed_time(self, end):
            return end.time - self.time

    class Kernel:
        def __init__(self, name, milliseconds):
            self.fn, self.milliseconds = SimpleNamespace(__name__=name), milliseconds

        def __getitem__(self, grid):
            def launch(**arguments):
                now[0] += self.milliseconds

            return launch

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    # Nothing is on a GPU, but nothing is computed either.
    monkeypatch.setattr(
        benchmark, "Case", lambda *shape: SimpleNamespace(leaves=[torch.empty(1)] * 4, grad_output=None)
    )
    times = {"forward_kernel": 0.5, "scatter_input_gradient_kernel": 2.0, "gather_input_gradient_kernel": 0.25}
    kernels = {name: Kernel(name, time) for name, time in times.items()}

    def forward(*arguments):
        benchmark.triton_.wrap_triton(kernels["forward_kernel"])[1, 1, 1](num_warps=1)

    def backward(*arguments):
        if not torch.are_deterministic_algorithms_enabled():
            return benchmark.triton_.wrap_triton(kernels["scatter_input_gradient_kernel"])[1, 1, 1]()
        for _ in range(8):
            benchmark.triton_.wrap_triton(kernels["gather_input_gradient_kernel"])[1, 1]()

    monkeypatch.setattr(benchmark.triton_, "forward", forward)
    monkeypatch.setattr(benchmark.triton_, "backward", backward)
    prediction = SimpleNamespace(longest=400.0, bound="L1")
    monkeypatch.setattr(benchmark.triton_code, "predict", lambda *case: {"forward_kernel": prediction})
    rows = benchmark.kernel_times((2, 48, 48), torch.bfloat16, rounds=2)
    about = {"shape": "2x48x48^3", "dtype": "bfloat16"}
    assert rows == [
        {**about, "kernel": "forward_kernel", "measured_us": pytest.approx(500), "predicted_us": 400.0, "bound": "L1"},
        {**about, "kernel": "scatter_input_gradient_kernel", "measured_us": pytest.approx(2000)},
        # Eight launches, one for each parity of the cells.
        {**about, "kernel": "gather_input_gradient_kernel", "measured_us": pytest.approx(2000)},
    ]
    assert not torch.are_deterministic_algorithms_enabled()
