"""Depthwise deformable convolution in 3D: our backends beside what else computes or resembles it.

    python benchmarks/deform_conv.py [--device cpu] [--threads 1] [--rounds 7] [--compile] [--output benchmarks/results]

All run in turn in every round, and the fastest round counts. On the CPU with one thread the time is the process's own
CPU time, so that other programs on the machine matter little; else it is wall time. Ratios are to the first contender,
the sum of one grid_sample for each of the 27 taps with autograd's backward. The extra memory is the peak over a forward
and a backward pass less its results (output and gradients), in units of the input as float32; on the CPU each is
measured in a process of its own.

On a GPU the Triton kernels are timed one by one as well, beside what ``triton_code.py`` predicts if it knows the GPU.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton_code
from torch import Tensor

from nnunet_deform.ops import BACKEND_VARIABLE, backends_for, deform_conv3d
from nnunet_deform.ops.backends import cpu, triton_
from nnunet_deform.selftest.measuring import PeakMemory, can_measure_memory, clock_of, describe, fastest, in_own_process
from nnunet_deform.selftest.speed import TAPS, composition, depthwise

# Batch, channels, voxels along each axis.
SHAPES = {
    "cpu": ((1, 48, 24), (1, 96, 12), (1, 16, 32)),
    "cuda": ((2, 48, 48), (2, 96, 24), (2, 192, 12), (2, 384, 6), (2, 32, 64), (2, 32, 96)),
}
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tvdcn(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The maintained implementation of others. Without a modulation mask its backward pass fails, so it gets ones."""
    from tvdcn.ops import deform_conv3d as theirs

    mask = torch.ones(len(offset), TAPS, *offset.shape[2:], device=offset.device)
    return theirs(input, weight, offset, mask, bias, [1] * 3, [1] * 3, [1] * 3, len(weight))


def ours(backend: str, instruction_set: str, deterministic: bool, *tensors: Tensor) -> Tensor:
    os.environ[BACKEND_VARIABLE] = backend
    if instruction_set:
        cpu._library().instruction_set = instruction_set
    torch.use_deterministic_algorithms(deterministic)
    try:
        return deform_conv3d(*tensors, padding=1)
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Contender:
    function: Function
    layout: torch.memory_format  # of the input and the output's gradient
    compiled: bool = False
    deterministic: bool = False  # also while the backward pass runs


def contenders(device: str, dtype: torch.dtype, compiled: bool) -> dict[str, Contender]:
    contiguous, last = torch.contiguous_format, torch.channels_last_3d
    named = {"composition": Contender(composition, contiguous)}
    if compiled:
        named["composition, compiled"] = Contender(composition, contiguous, compiled=True)
    if _runs(tvdcn, device, dtype):
        named["tvdcn"] = Contender(tvdcn, contiguous)
    probe = [tensor.detach() for tensor in Case(1, 8, 4, device, dtype, last).leaves]
    for name, reason in backends_for(*probe[:3]).items():
        if reason is not None or name == "reference":
            continue
        sets = cpu.instruction_sets() if name == "cpu" else [""]
        for instruction_set in sets:
            label = f"{name} {instruction_set}".strip()
            named[label] = Contender(partial(ours, name, instruction_set, False), last)
        label = f"{name} {sets[0]}".strip()
        named[f"{label}, layout copies"] = Contender(partial(ours, name, sets[0], False), contiguous)
        if name == "triton":
            deterministic = partial(ours, name, sets[0], True)
            named[f"{label}, deterministic"] = Contender(deterministic, last, deterministic=True)
    named["depthwise convolution"] = Contender(depthwise, last)
    return named


def _runs(function: Function, device: str, dtype: torch.dtype) -> bool:
    try:
        function(*Case(1, 8, 4, device, dtype, torch.contiguous_format).leaves)
    except Exception as error:
        print(f"{function.__name__} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


class Case:
    """Tensors of one shape in one layout."""

    def __init__(
        self, batch: int, channels: int, side: int, device: str, dtype: torch.dtype, layout: torch.memory_format
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (side, side, side)

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.input = random(batch, channels, *size).contiguous(memory_format=layout)
        self.leaves = [
            self.input,
            random(batch, 3 * TAPS, *size, dtype=torch.float32) * 0.5,
            random(channels, 1, 3, 3, 3),
            random(channels),
        ]
        self.grad_output = random(batch, channels, *size).contiguous(memory_format=layout)
        for leaf in self.leaves:
            leaf.requires_grad_()

    @property
    def input_bytes(self) -> int:
        return self.input.numel() * 4

    def forward(self, contender: Contender) -> Tensor:
        with torch.no_grad():
            return self._function(contender)(*self.leaves)

    def forward_backward(self, contender: Contender) -> tuple[Tensor, ...]:
        output = self._function(contender)(*self.leaves)
        with _deterministic(contender.deterministic):
            return output, *torch.autograd.grad(output, self.leaves, self.grad_output, allow_unused=True)

    def _function(self, contender: Contender) -> Function:
        return torch.compile(contender.function) if contender.compiled else contender.function


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def extra_memory(contender: Contender, shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> float:
    """Peak memory of a pass beyond its results, in units of the input."""
    if device == "cuda":
        case = Case(*shape, device, dtype, contender.layout)
        case.forward_backward(contender)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = case.forward_backward(contender)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak_memory = PeakMemory()
        small = Case(1, shape[1], 4, device, dtype, contender.layout)
        small.forward_backward(contender)  # loads code
        case = Case(*shape, device, dtype, contender.layout)
        peak_memory.start()
        results = case.forward_backward(contender)
        peak = peak_memory.bytes()
    return (peak - sum(tensor.nbytes for tensor in results if tensor is not None)) / case.input_bytes


def measure(device: str, dtype: torch.dtype, rounds: int, threads: int, compiled: bool) -> list[dict]:
    torch.set_num_threads(threads)
    clock = clock_of(device, threads)
    named = contenders(device, dtype, compiled)
    rows = []
    for shape in SHAPES[device]:
        cases = {name: Case(*shape, device, dtype, contender.layout) for name, contender in named.items()}
        best = {}
        for what in ("forward", "forward_backward"):
            runs = {name: partial(getattr(cases[name], what), contender) for name, contender in named.items()}
            best[what] = fastest(rounds, runs, clock)
        del cases, runs
        for name, contender in named.items():
            batch, channels, side = shape
            row = {"shape": f"{batch}x{channels}x{side}^3", "dtype": str(dtype).removeprefix("torch."), "name": name}
            for what, times in best.items():
                row |= {f"{what}_ms": times[name], f"{what}_ratio": times["composition"] / times[name]}
            row["extra_memory"] = None
            if device == "cuda":
                row["extra_memory"] = extra_memory(contender, shape, device, dtype)
            elif can_measure_memory() and not contender.compiled:
                row["extra_memory"] = in_own_process(threads, extra_memory, contender, shape, "cpu", dtype)
            rows.append(row)
            print(as_text(row), flush=True)
    return rows


class Stopwatch:
    """In the place of ``wrap_triton``: launches each kernel some times over, between two events on the GPU."""

    REPEATS = 10  # so that launching, of microseconds, is hidden behind what runs

    def __init__(self) -> None:
        self._events = []

    def __call__(self, kernel: object) -> "Stopwatch":
        self._kernel = kernel
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: object) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(self.REPEATS):
                self._kernel[grid](**arguments)
            end.record()
            self._events.append((self._kernel.fn.__name__, start, end))

        return launch

    def microseconds(self) -> dict[str, float]:
        """Of each kernel, summed over its launches."""
        torch.cuda.synchronize()
        total = dict.fromkeys((name for name, *_ in self._events), 0.0)
        for name, start, end in self._events:
            total[name] += start.elapsed_time(end) * 1e3 / self.REPEATS
        return total


def kernel_times(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row for each Triton kernel: the fastest of the rounds, and the prediction with what it says is the bound."""
    case = Case(*shape, "cuda", dtype, torch.channels_last_3d)
    input, offset, weight, bias = (leaf.detach() for leaf in case.leaves)
    spatial = [[1] * 3] * 3
    best = {}
    for round_number in range(rounds + 1):
        stopwatch = Stopwatch()
        with mock.patch.object(triton_, "wrap_triton", stopwatch):
            triton_.forward(input, offset, weight, bias, *spatial)
            triton_.backward(case.grad_output, input, offset, weight, *spatial, [True] * 4)
            with _deterministic(True):
                triton_.backward(case.grad_output, input, offset, weight, *spatial, [True, False, False, False])
        if round_number:  # the first one compiles
            for name, time in stopwatch.microseconds().items():
                best[name] = min(time, best.get(name, time))
    name = str(dtype).removeprefix("torch.")
    gpu = next((gpu for model, gpu in triton_code.GPUS.items() if model in torch.cuda.get_device_name()), None)
    predicted = {} if gpu is None else triton_code.predict(shape, name, gpu)
    rows = []
    for kernel, time in best.items():
        row = {"shape": "{}x{}x{}^3".format(*shape), "dtype": name, "kernel": kernel, "measured_us": time}
        if kernel in predicted:
            row |= {"predicted_us": predicted[kernel].longest, "bound": predicted[kernel].bound}
        rows.append(row)
        print(" ".join(f"{value:.0f}" if isinstance(value, float) else value for value in row.values()), flush=True)
    return rows


def as_text(row: dict) -> str:
    memory = "" if row["extra_memory"] is None else f"{row['extra_memory']:.1f}x"
    return (
        f"{row['shape']:10} {row['dtype']:9} {row['name']:28} {row['forward_ratio']:7.1f}x {row['forward_ms']:8.2f} ms"
        f" {row['forward_backward_ratio']:9.1f}x {row['forward_backward_ms']:8.2f} ms {memory:>12}"
    )


def plot(rows: list[dict], about: dict[str, str], threads: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    height = 0.8 / len(shapes)
    for ax, what in zip(axes, ("forward", "forward_backward"), strict=True):
        for number, shape in enumerate(shapes):
            ratios = [row[f"{what}_ratio"] for row in rows if (row["shape"], row["dtype"]) == shape]
            bars = ax.barh([i + number * height for i in range(len(names))], ratios, height, label=" ".join(shape))
            ax.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        ax.set_xscale("log")
        ax.set_xlabel(f"{what.replace('_', ' + ')}: times as fast as the composition")
        ax.set_yticks([i + 0.3 for i in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    device = about.get("gpu", f"{about['processor']}, {threads} thread{'s' * (threads > 1)}")
    figure.suptitle(f"{device}, torch {about['torch']}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also the composition under torch.compile")
    parser.add_argument("--output", type=Path, help="folder for deform_conv_DEVICE_THREADS.json and .png")
    arguments = parser.parse_args()
    about = describe()
    dtypes = [torch.float32, torch.bfloat16] if arguments.device == "cuda" else [torch.float32]
    print(f"{'shape':10} {'dtype':9} {'':28} {'forward':>20} {'forward+backward':>21} {'extra memory':>13}")
    rows = list(
        itertools.chain.from_iterable(
            measure(arguments.device, dtype, arguments.rounds, arguments.threads, arguments.compile) for dtype in dtypes
        )
    )
    kernels = []
    if any(row["name"] == "triton" for row in rows):
        print("Triton kernels: microseconds measured, predicted")
        for shape, dtype in itertools.product(SHAPES["cuda"], dtypes):
            kernels += kernel_times(shape, dtype, arguments.rounds)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = "deform_conv_cuda" if arguments.device == "cuda" else f"deform_conv_cpu_{arguments.threads}"
        record = {**about, "threads": arguments.threads, "rounds": arguments.rounds, "results": rows}
        if kernels:
            record["kernels"] = kernels
        (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        plot(rows, about, arguments.threads, arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
