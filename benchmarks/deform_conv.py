"""Depthwise deformable convolution in 3D on the CPU: our backends beside what else computes or resembles it.

    python benchmarks/deform_conv.py [--rounds 7] [--threads 1] [--compile] [--output benchmarks/results]

All run in turn in every round, and the fastest round counts. With one thread the time is the process's own CPU time, so
that other programs on the machine matter little; with more it is wall time. Ratios are to the first contender, the sum
of one grid_sample for each of the 27 taps with autograd's backward. The extra memory is the peak over a forward and a
backward pass less its results (output and gradients), in units of the input.
"""

import argparse
import ctypes
import datetime
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_deform.ops import deform_conv3d
from nnunet_deform.ops.backends import BACKEND_VARIABLE, cpu

SHAPES = ((48, 24), (96, 12), (16, 32))  # channels, voxels along each axis
TAPS = 27


def composition(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same operator from torch's own parts, with a kernel of 3 and padding 1."""
    size = input.shape[2:]
    voxels = torch.meshgrid(*(torch.arange(s, dtype=input.dtype) for s in size), indexing="ij")
    output = bias.view(1, -1, 1, 1, 1)
    for tap in range(TAPS):
        place = (tap // 9 - 1, tap // 3 % 3 - 1, tap % 3 - 1)
        positions = [v + p + offset[:, 3 * tap + axis] for axis, (v, p) in enumerate(zip(voxels, place, strict=True))]
        grid = torch.stack([(2 * q + 1) / s - 1 for q, s in zip(positions, size, strict=True)][::-1], -1)
        sample = F.grid_sample(input, grid, padding_mode="zeros", align_corners=False)
        output = output + sample * weight.flatten(1)[:, tap].view(1, -1, 1, 1, 1)
    return output


def depthwise(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """No deformation: what the operator costs on top of this is the price of being deformable."""
    return F.conv3d(input, weight, bias, padding=1, groups=len(weight))


class Ours:
    """One backend, in one instruction set where it has several."""

    def __init__(self, backend: str, instruction_set: str | None = None) -> None:
        self.backend = backend
        self.instruction_set = instruction_set

    def __call__(self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        os.environ[BACKEND_VARIABLE] = self.backend
        if self.instruction_set:
            cpu._library().instruction_set = self.instruction_set
        return deform_conv3d(input, offset, weight, bias, padding=1)


def contenders(compiled: bool) -> dict[str, tuple[Callable[..., Tensor], torch.memory_format]]:
    """By name: the function, and the layout in which it gets its input and its output's gradient."""
    contiguous, last = torch.contiguous_format, torch.channels_last_3d
    named = {"composition": (composition, contiguous)}
    if compiled:
        named["composition, compiled"] = (torch.compile(composition), contiguous)
    named["torch"] = (Ours("torch"), last)
    for name in cpu.instruction_sets():
        named[f"cpu {name}"] = (Ours("cpu", name), last)
    for name in cpu.instruction_sets()[:1]:
        named[f"cpu {name} with layout copies"] = (Ours("cpu", name), contiguous)
    named["depthwise convolution"] = (depthwise, last)
    return named


class Case:
    """Tensors of one shape in one layout."""

    def __init__(self, channels: int, side: int, layout: torch.memory_format) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (side, side, side)
        self.input = torch.randn(1, channels, *size, generator=generator).contiguous(memory_format=layout)
        self.leaves = [
            self.input,
            torch.randn(1, 3 * TAPS, *size, generator=generator) * 0.5,
            torch.randn(channels, 1, 3, 3, 3, generator=generator),
            torch.randn(channels, generator=generator),
        ]
        self.grad_output = torch.randn(1, channels, *size, generator=generator).contiguous(memory_format=layout)
        for leaf in self.leaves:
            leaf.requires_grad_()

    def forward(self, function: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            function(*self.leaves)

    def forward_backward(self, function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*self.leaves), self.leaves, self.grad_output, allow_unused=True)


def fastest(rounds: int, runs: dict[str, Callable[[], None]], clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each, the rounds interleaved after one to warm up."""
    best = dict.fromkeys(runs, float("inf"))
    for round_number in range(rounds + 1):
        for name, call in runs.items():
            start = clock()
            call()
            if round_number:
                best[name] = min(best[name], (clock() - start) * 1e3)
    return best


def peak_beyond_resident(call: Callable[[], None]) -> int | None:
    """Bytes by which a second call raises the resident memory at its peak; on Linux with glibc only."""
    status = Path("/proc/self/status")
    if platform.libc_ver()[0] != "glibc" or not status.exists():
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: freed tensors leave the process at once

    def kibibytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    call()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kibibytes("VmRSS")
    call()
    return (kibibytes("VmHWM") - before) * 1024


def extra_memory(case: Case, function: Callable[..., Tensor]) -> float | None:
    """Peak resident memory of a pass beyond its results, in units of the input."""
    peak = peak_beyond_resident(partial(case.forward_backward, function))
    results = sum(t.numel() for t in (*case.leaves, case.grad_output)) * 4
    return None if peak is None else (peak - results) / (case.input.numel() * 4)


def measure(rounds: int, threads: int, compiled: bool) -> list[dict]:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    named = contenders(compiled)
    rows = []
    for channels, side in SHAPES:
        cases = {name: Case(channels, side, layout) for name, (_, layout) in named.items()}
        best = {}
        for what in ("forward", "forward_backward"):
            runs = {name: partial(getattr(cases[name], what), function) for name, (function, _) in named.items()}
            best[what] = fastest(rounds, runs, clock)
        for name in named:
            row = {"shape": f"{channels}x{side}^3", "name": name}
            for what, times in best.items():
                row |= {f"{what}_ms": times[name], f"{what}_ratio": times["composition"] / times[name]}
            rows.append(row)

    # After all times, because it changes how memory is allocated.
    for row, ((channels, side), (function, layout)) in zip(
        rows, itertools.product(SHAPES, named.values()), strict=True
    ):
        row["extra_memory"] = extra_memory(Case(channels, side, layout), function)
    return rows


def machine() -> dict[str, str]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def show(rows: list[dict]) -> None:
    print(f"{'shape':10} {'':34} {'forward':>18} {'forward+backward':>20} {'extra memory':>13}")
    for row in rows:
        memory = "" if row["extra_memory"] is None else f"{row['extra_memory']:.1f}x"
        print(
            f"{row['shape']:10} {row['name']:34} {row['forward_ratio']:7.1f}x {row['forward_ms']:6.1f} ms"
            f" {row['forward_backward_ratio']:9.1f}x {row['forward_backward_ms']:6.1f} ms {memory:>12}"
        )


def plot(rows: list[dict], about: dict[str, str], threads: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    height = 0.8 / len(shapes)
    for ax, what in zip(axes, ("forward", "forward_backward"), strict=True):
        for number, shape in enumerate(shapes):
            ratios = [row[f"{what}_ratio"] for row in rows if row["shape"] == shape]
            bars = ax.barh([i + number * height for i in range(len(names))], ratios, height, label=shape)
            ax.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        ax.set_xscale("log")
        ax.set_xlabel(f"{what.replace('_', ' + ')}: times as fast as the composition")
        ax.set_yticks([i + 0.3 for i in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[0].legend()
    threads_text = "one thread" if threads == 1 else f"{threads} threads"
    figure.suptitle(f"{about['processor']}, {threads_text}, torch {about['torch']}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also the composition under torch.compile")
    parser.add_argument("--output", type=Path, help="folder for deform_conv_cpu.json and .png")
    arguments = parser.parse_args()
    about = machine()
    rows = measure(arguments.rounds, arguments.threads, arguments.compile)
    show(rows)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        record = {**about, "threads": arguments.threads, "rounds": arguments.rounds, "results": rows}
        (arguments.output / "deform_conv_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
        plot(rows, about, arguments.threads, arguments.output / "deform_conv_cpu.png")


if __name__ == "__main__":
    main()
