"""The Triton kernels on all generations of GPUs, without one: what the compiler makes of them, what that should take.

    python benchmarks/triton_code.py [--triton FOLDER ...] [--processes 1] [--output benchmarks/results] [--document]

Compiles what ``deform_conv2d`` and ``deform_conv3d`` launch: with the Triton that is installed for all architectures,
dtypes and variants, and with each Triton that is unpacked in a FOLDER (``pip install --no-deps --target FOLDER
triton==3.4.0``; it needs no torch) for some of them. From the machine code it counts registers, spills, the width of
loads and of atomic additions, and instructions; from these, occupancy and a predicted time. It exits with 1 if anything
was spilled or refused. ``--document`` puts the tables into ``nnunet_deform/ops/README.md``.

Results are kept (``--cache``), so that only what has changed is compiled again.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_deform.ops.backends import triton_
from nnunet_deform.selftest.measuring import describe

HERE = Path(__file__).parent
COMPILER = HERE / "triton_compiler.py"
KERNELS = Path(triton_.__file__).with_name("kernels.py")
README = Path(triton_.__file__).parents[2] / "README.md"
CACHE = Path(tempfile.gettempdir()) / "nnunet_deform_triton_code"

DTYPES = ("float32", "bfloat16", "float16")
TAPS = 27
AT_ONCE = "gather_input_gradient, all taps"


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor holds: warps, and programs."""

    warps: int
    programs: int

    def occupancy(self, registers: int, warps: int) -> float:
        """The share of its warps that can be there at once, of programs that have so many each."""
        per_warp = math.ceil(registers / 8) * 8 * 32
        return min(65536 // per_warp // warps, self.programs, self.warps // warps) * warps / self.warps


ARCHITECTURES = {
    80: Architecture(64, 32),
    86: Architecture(48, 16),
    89: Architecture(48, 24),
    90: Architecture(64, 32),
    100: Architecture(64, 32),
    120: Architecture(48, 24),
}


@dataclass(frozen=True)
class Gpu:
    """What bounds the kernels, in what it does in a second at most."""

    capability: int
    multiprocessors: int
    clock: float
    memory: float  # bytes
    products: int  # multiply-adds of one warp that a multiprocessor starts in a cycle
    sectors: float  # of 32 bytes to which L2 adds: assumed, not known


# The first as in the specification of the operator. L2's atomic additions: 1.3e12 numbers, or one sector for each of 80
# slices and cycle.
GPUS = {
    "H200": Gpu(90, 132, 1.85e9, 4.3e12, 4, 1.3e12 / 8),
    "A100": Gpu(80, 108, 1.41e9, 1.8e12, 2, 80 * 1.41e9),
}

# Batch, channels, voxels along each axis: the specification's.
SHAPES = ((2, 48, 48), (2, 96, 24), (2, 192, 12), (2, 384, 6), (2, 32, 64), (2, 32, 96), (2, 32, 128))


@dataclass(frozen=True)
class Case:
    capability: int
    dtype: str
    channels: int
    axes: int = 3
    wide: bool = False

    def __str__(self) -> str:
        wide = ", 64-bit indices" if self.wide else ""
        return f"sm_{self.capability}, {self.dtype}, {self.channels} channels, {self.axes}D{wide}"


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, int | str | None]  # of a tensor the dtype's name
    warps: int
    bytes: int  # of its tensors


class Recorder:
    """In the place of ``wrap_triton``: what would be launched."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: object) -> "Recorder":
        self._kernel = kernel.fn.__name__
        return self

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(num_warps: int, **arguments: object) -> None:
            tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
            plain = {
                name: str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.launches.append(Launch(self._kernel, tuple(grid), plain, num_warps, taken))

        return launch


def unable_to_record() -> str | None:
    """Why launches cannot be recorded with this torch, in one sentence with what to do; None where they can."""
    try:
        with FakeTensorMode():
            torch.empty(2, 3, device="cuda").t().contiguous()
    except RuntimeError as error:
        return (
            f"torch {torch.__version__} cannot copy fake CUDA tensors here ({str(error).splitlines()[0]}); take a "
            "later build of torch for CUDA."
        )
    return None


@contextmanager
def _recording(case: Case) -> Iterator[Recorder]:
    recorder = Recorder()
    capability = divmod(case.capability, 10)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton_, "wrap_triton", recorder))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=capability))
        if case.wide:
            stack.enter_context(mock.patch.object(triton_, "_MOST_NARROW", 0))
        stack.enter_context(FakeTensorMode())
        yield recorder


def launches(case: Case, side: int = 48, batch: int = 2) -> list[Launch]:
    """Of a forward pass and of both backward passes: atomic, then deterministic and only for the input's gradient."""
    size, taps, dtype = (side,) * case.axes, 3**case.axes, getattr(torch, case.dtype)
    spatial = [[1] * case.axes] * 3
    with _recording(case) as recorder:
        input = torch.empty(batch, case.channels, *size, dtype=dtype, device="cuda")
        input = input.to(memory_format=triton_.CHANNELS_LAST[case.axes])
        offset = torch.empty(batch, case.axes * taps, *size, device="cuda")
        weight = torch.empty(case.channels, 1, *(3,) * case.axes, dtype=dtype, device="cuda")
        output = triton_.forward(input, offset, weight, weight.new_empty(case.channels), *spatial)
        triton_.backward(output, input, offset, weight, *spatial, [True] * 4)
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
            triton_.backward(output, input, offset, weight, *spatial, [True, False, False, False])
    return recorder.launches


def job(case: Case, launch: Launch) -> dict:
    """What the compiler needs to know."""
    # torch.compile's sizes would be no numbers; here all are.
    arguments = {
        name: value if value is None or isinstance(value, str | bool) else int(value)
        for name, value in launch.arguments.items()
    }
    return {"kernel": launch.kernel, "capability": case.capability, "arguments": arguments, "warps": launch.warps}


def whole() -> list[Case]:
    """Everything. What is compiled for 384 channels is for the most part what is compiled for 48, and takes no time."""
    cases = itertools.product(ARCHITECTURES, DTYPES, (20, 48, 384), (3, 2), (False, True))
    return [Case(*case) for case in cases]


def most() -> list[Case]:
    """Everything in 3D with 32-bit indices; 2D and 64-bit indices, which change little, for some dtypes and widths."""
    narrow = [case for case in whole() if case.axes == 3 and not case.wide]
    others = (("float32", 48, 2, False), ("float16", 20, 2, False), ("float32", 20, 3, True), ("float16", 48, 3, True))
    return narrow + [Case(capability, *other) for capability in ARCHITECTURES for other in others]


def part(version: str) -> list[Case]:
    """For another version of Triton: in each generation some of it."""
    cases = [Case(80, "float32", 48), Case(90, "float32", 48), Case(90, "float16", 20), Case(120, "float16", 20)]
    # 3.2 knows no architecture after sm_90.
    return [case for case in cases if case.capability <= 90 or not version.startswith("3.2.")]


def _same(arguments: dict) -> list:
    """Triton compiles one kernel for numbers that agree in whether they are 1 and whether 16 divides them.

    Of some it is told not to ask (``do_not_specialize`` in the kernels).
    """
    compiled_in = ("AXES", "KERNEL", "BRICK", "BLOCK", "LANE", "SAMPLES", "WIDE")
    not_asked = ("in_", "out_", "parity_", "first_tap", "bricks_per_run")
    return [
        [name, value]
        if not isinstance(value, int) or name.startswith(compiled_in)
        else [name, value < 2**31] + [value == 1, value % 16 == 0] * (not name.startswith(not_asked))
        for name, value in arguments.items()
    ]


def compile_jobs(jobs: Sequence[dict], folder: Path | None, cache: Path, processes: int = 1) -> list[dict]:
    """The compiler's results, in order."""
    program = COMPILER.read_text() + KERNELS.read_text()
    version = triton_.triton.__version__ if folder is None else version_in(folder)
    keys = []
    for each in jobs:
        said = json.dumps([version, program, {**each, "arguments": _same(each["arguments"])}])
        keys.append(hashlib.sha256(said.encode()).hexdigest())
    cache.mkdir(parents=True, exist_ok=True)
    missing = {key: each for key, each in zip(keys, jobs, strict=True) if not (cache / f"{key}.json").exists()}
    shares = [list(missing.items())[first::processes] for first in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda share: _compile(share, folder, cache), shares))
    return [json.loads((cache / f"{key}.json").read_text()) for key in keys]


def _compile(share: list[tuple[str, dict]], folder: Path | None, cache: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, of which 3.9 warns that it will change
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, COMPILER, KERNELS]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        for key, each in share:
            print(json.dumps(each), file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                sys.exit(f"The compiler's process ended at {each['kernel']} for sm_{each['capability']}.")
            unfinished = cache / f"{key}.{os.getpid()}"
            unfinished.write_text(line)
            unfinished.replace(cache / f"{key}.json")
        child.stdin.close()


def version_in(folder: Path) -> str:
    names = [path.name for path in folder.glob("triton-*.dist-info")]
    if len(names) != 1:
        sys.exit(f"{folder} has no Triton: pip install --no-deps --target {folder} triton==3.4.0")
    return names[0].removeprefix("triton-").removesuffix(".dist-info")


def table(cases: Sequence[Case], folder: Path | None, cache: Path, processes: int = 1) -> list[dict]:
    """A row for each kernel of each case."""
    found = []
    for case in cases:
        unique = {launch.kernel: launch for launch in reversed(launches(case))}
        found += [(case, launch) for launch in unique.values()]
    results = compile_jobs([job(*each) for each in found], folder, cache, processes)
    version = triton_.triton.__version__ if folder is None else version_in(folder)
    rows = []
    for (case, launch), result in zip(found, results, strict=True):
        row = {"triton": version, **asdict(case), "kernel": launch.kernel.removesuffix("_kernel")}
        if "error" in result:
            rows.append({**row, "error": result["error"]})
            continue
        architecture = ARCHITECTURES[case.capability]
        inner = result["instructions"][-1]
        row |= {name: result[name] for name in ("registers", "stack", "spills")}
        row |= {"load_bytes": _most({_bytes(name): n for name, n in inner.items() if name.startswith("LDG")})}
        row |= {"added_at_once": _most({_added(name): n for name, n in inner.items() if name.startswith("RED")})}
        row |= {"occupancy": round(architecture.occupancy(result["registers"], launch.warps), 3)}
        row |= {"instructions": [sum(by.values()) for by in result["instructions"]]}
        rows.append(row)
    return rows


def _most(counts: dict[int, int]) -> int | None:
    """What most of the instructions do."""
    return max(counts, key=counts.get, default=None)


def _bytes(instruction: str) -> int:
    """What a load or store moves for each thread."""
    words = instruction.split(".")
    return 16 if "128" in words else 8 if "64" in words else 2 if "U16" in words else 1 if "U8" in words else 4


def _added(instruction: str) -> int:
    return 4 if "F32x4" in instruction else 2 if "F32x2" in instruction else 1


def failures(rows: Iterable[dict]) -> list[str]:
    """What was spilled, and what was refused."""
    bad = []
    for row in rows:
        case = Case(*(row[name] for name in ("capability", "dtype", "channels", "axes", "wide")))
        if "error" in row:
            bad.append(f"Triton {row['triton']} refuses {row['kernel']}, {case}: {row['error']}")
        elif row["spills"]:
            bad.append(f"Triton {row['triton']} spills in {row['kernel']}, {case}: {row['spills']} accesses")
    return bad


@dataclass(frozen=True)
class Prediction:
    """Microseconds that a kernel takes if nothing but the one thing bounds it; the longest is the prediction."""

    kernel: str
    registers: int
    occupancy: float
    instructions: float  # of a warp, 1e9
    memory: float  # each tensor once
    l1: float  # 128 bytes a cycle and multiprocessor
    l2: float  # atomic additions, by sectors of 32 bytes
    arithmetic: float  # in float32
    issue: float  # four instructions a cycle and multiprocessor
    warps: float  # those that fit, each with an instruction every four cycles

    @property
    def longest(self) -> float:
        return max(self.memory, self.l1, self.l2, self.arithmetic, self.issue, self.warps)

    @property
    def bound(self) -> str:
        names = {"memory": "memory", "l1": "L1", "l2": "L2", "arithmetic": "FP32", "issue": "issue", "warps": "warps"}
        return names[max(names, key=lambda name: getattr(self, name))]


def predict(shape: tuple[int, int, int], dtype: str, gpu: Gpu, cache: Path = CACHE) -> dict[str, Prediction]:
    """Of all kernels of one shape, summed over their launches."""
    batch, channels, side = shape
    case = Case(gpu.capability, dtype, channels)
    found = launches(case, side, batch)
    results = compile_jobs([job(case, launch) for launch in found], None, cache)
    predictions = {}
    for name in dict.fromkeys(launch.kernel for launch in found):
        of_kernel = [(launch, result) for launch, result in zip(found, results, strict=True) if launch.kernel == name]
        result = of_kernel[0][1]
        predictions[name] = _predict([launch for launch, _ in of_kernel], result, side, gpu)
    # torch.sort takes so much memory that it goes by a few taps. A counting sort would not.
    with mock.patch.object(triton_, "_SORT_MEMORY", 2**62):
        gather = [launch for launch in launches(case, side, batch) if launch.kernel == "gather_input_gradient_kernel"]
    result = next(result for launch, result in zip(found, results, strict=True) if launch.kernel == gather[0].kernel)
    predictions[AT_ONCE] = replace(_predict(gather, result, side, gpu), kernel=AT_ONCE)
    return predictions


def _predict(of_kernel: list[Launch], result: dict, side: int, gpu: Gpu) -> Prediction:
    first = of_kernel[0]
    programs = sum(math.prod(launch.grid) for launch in of_kernel)
    counts = {}
    times = 1.0
    for trips, by in zip((1, *_trips(of_kernel, side)), result["instructions"], strict=True):
        times *= trips
        for name, number in by.items():
            counts[name] = counts.get(name, 0) + times * number
    l1 = sum(n * max(1, _bytes(name) // 4) for name, n in counts.items() if name.startswith(("LD", "ST")))
    l1 += sum(n * _added(name) for name, n in counts.items() if name.startswith("RED"))
    # A block of channels is a sector, or less than one.
    voxels = 32 / max(1, first.arguments.get("BLOCK_C", 1))
    l2 = sum(n * _added(name) * voxels for name, n in counts.items() if name.startswith("RED"))
    arithmetic = sum(n for name, n in counts.items() if name in ("FFMA", "FADD", "FMUL"))
    instructions = sum(counts.values())

    architecture = ARCHITECTURES[gpu.capability]
    occupancy = architecture.occupancy(result["registers"], first.warps)
    at_once = gpu.multiprocessors * round(occupancy * architecture.warps)
    cycles = 1e6 / gpu.clock
    return Prediction(
        kernel=first.kernel.removesuffix("_kernel"),
        registers=result["registers"],
        occupancy=occupancy,
        instructions=programs * instructions / 1e9,
        memory=max(launch.bytes for launch in of_kernel) / gpu.memory * 1e6,
        l1=programs * l1 / gpu.multiprocessors * cycles,
        l2=programs * l2 / gpu.sectors * 1e6,
        arithmetic=programs * arithmetic / gpu.products / gpu.multiprocessors * cycles,
        issue=programs * instructions / 4 / gpu.multiprocessors * cycles,
        warps=max(1.0, programs / at_once) * 4 * instructions * cycles,
    )


def _trips(of_kernel: list[Launch], side: int) -> tuple[float, ...]:
    """How often the kernel's loops run, the outer one first."""
    launch = of_kernel[0]
    arguments = launch.arguments
    blocks = arguments.get("group_channels", 0) / arguments.get("BLOCK_C", 1)
    if launch.kernel == "forward_kernel":
        return (TAPS,)
    if launch.kernel == "offset_weight_gradient_kernel":
        bricks = math.prod(math.ceil(side / arguments[f"BRICK_{axis}"]) for axis in "DHW")
        return bricks / launch.grid[0], blocks
    if launch.kernel == "scatter_input_gradient_kernel":
        return (blocks,)
    if launch.kernel == "gather_input_gradient_kernel":
        # One launch for each parity of the cells, and these for a few taps at a time.
        taps = TAPS * 8 / len(of_kernel)
        return _rounds(taps * side**3 / (side + 1) ** 3, arguments["SAMPLES"]), blocks
    return ()


def _rounds(mean: float, together: int) -> float:
    """Of a cell: how often so many samples, if samples fall into cells independently."""
    probability, expected = math.exp(-mean), 0.0
    for samples in range(1, 400):
        probability *= mean / samples
        expected += probability * math.ceil(samples / together)
    return expected


def counting_sort(shape: tuple[int, int, int], gpu: Gpu) -> float:
    """Microseconds: two additions in L2 for each sample (how many in a cell, which of them), its number written and
    read twice, and its place stored in a sector that no other shares."""
    batch, _, side = shape
    samples = batch * TAPS * side**3
    return (2 * samples / gpu.sectors + samples * (3 * 4 + 32) / gpu.memory) * 1e6


def roofline(shape: tuple[int, int, int], dtype: str, gpu: Gpu) -> dict[str, float]:
    """Microseconds by the specification: the eight corners through L1, 9 and 26 multiply-adds for a tap and channel."""
    batch, channels, side = shape
    samples = batch * side**3 * TAPS * channels
    l1 = samples * 8 * getattr(torch, dtype).itemsize / (128 * gpu.multiprocessors * gpu.clock)
    product = samples / (32 * gpu.products * gpu.multiprocessors * gpu.clock)
    return {"forward": 1e6 * max(l1, 9 * product), "backward": 1e6 * max(l1, 26 * product)}


NAMES = {
    "forward": "forward",
    "offset_weight_gradient": "offset and weight gradient",
    "scatter_input_gradient": "input gradient, atomic",
    "gather_input_gradient": "input gradient, sorted",
    "cell": "cells to sort by",
}
BEGIN, END = "<!-- made by benchmarks/triton_code.py -->\n", "<!-- end -->\n"


def document(rows: list[dict], predictions: list[dict]) -> str:
    """The tables of the operators' README."""
    version = rows[0]["triton"]
    return "\n".join(
        (
            f"Registers of a thread and the share of a multiprocessor's warps that find room (Triton {version},",
            "3D, 32-bit indices; *half*: the larger of bfloat16 and float16); bytes of a load; channels of an atomic",
            "addition, below sm_90 and from it on.",
            "",
            *_code_table([row for row in rows if row["triton"] == version and row["axes"] == 3 and not row["wide"]]),
            "",
            "By version of Triton, over everything compiled with it, the most registers of each kernel:",
            "",
            *_version_table(rows),
            "",
            "Predictions for an H200, 48 channels, 48^3 voxels, batch 2: microseconds if only one thing bounded it.",
            "",
            *_detail_table([p for p in predictions if p["gpu"] == "H200" and p["shape"] == [2, 48, 48]]),
            "",
            "Predictions for all shapes, in microseconds:",
            "",
            *_shape_table(predictions),
            "",
        )
    )


def _markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *lines)]


def _code_table(rows: list[dict]) -> list[str]:
    lines = []
    for kernel, channels, half in itertools.product(NAMES, (20, 48), (False, True)):
        of_line = [
            row
            for row in rows
            if (row["kernel"], row["channels"], row["dtype"] != "float32") == (kernel, channels, half)
            and (kernel != "cell" or (channels, half) == (20, False))
        ]
        if not of_line:
            continue
        cells = []
        for capability in ARCHITECTURES:
            worst = max(
                (row for row in of_line if row["capability"] == capability and "error" not in row),
                key=lambda row: row["registers"],
                default=None,
            )
            cells.append("-" if worst is None else f"{worst['registers']}, {worst['occupancy']:.0%}")
        good = [row for row in of_line if "error" not in row]
        loads = "/".join(dict.fromkeys(str(row["load_bytes"]) for row in good))
        added = "/".join(dict.fromkeys(str(row["added_at_once"]) for row in good if row["added_at_once"]))
        name = [NAMES[kernel], *(("any", "any") if kernel == "cell" else (channels, "half" if half else "float32"))]
        lines.append([*name, *cells, loads, added or "-"])
    header = ["kernel", "channels", "dtype", *(f"sm_{c}" for c in ARCHITECTURES), "load", "addition"]
    return _markdown(header, lines)


def _version_table(rows: list[dict]) -> list[str]:
    lines = []
    for version in dict.fromkeys(row["triton"] for row in rows):
        own = [row for row in rows if row["triton"] == version]
        good = [row for row in own if "error" not in row]
        most = [max(row["registers"] for row in good if row["kernel"] == kernel) for kernel in NAMES]
        known = ", ".join(f"{c}" for c in sorted({row["capability"] for row in good}))
        lines.append([version, known, len(good), *most, sum(row["spills"] for row in good), len(own) - len(good)])
    return _markdown(["Triton", "sm", "kernels", *NAMES.values(), "spills", "refused"], lines)


def _detail_table(predictions: list[dict]) -> list[str]:
    columns = ("memory", "l1", "l2", "arithmetic", "issue", "warps")
    lines = [
        [
            {**NAMES, AT_ONCE: "the same, all taps at once"}[p["kernel"]],
            p["dtype"],
            p["registers"],
            f"{p['occupancy']:.0%}",
            f"{p['instructions']:.2f}",
            *(round(p[column]) for column in columns),
            f"**{round(p['longest'])}**",
        ]
        for p in predictions
    ]
    header = [
        "kernel",
        "dtype",
        "registers",
        "warps there",
        "10^9 instructions",
        "memory",
        "L1",
        "L2 additions",
        "FP32",
    ]
    return _markdown([*header, "issue", "warps", "prediction"], lines)


def _shape_table(predictions: list[dict]) -> list[str]:
    lines = []
    for gpu, shape, dtype in dict.fromkeys((p["gpu"], tuple(p["shape"]), p["dtype"]) for p in predictions):
        own = {
            p["kernel"]: p["longest"]
            for p in predictions
            if (p["gpu"], tuple(p["shape"]), p["dtype"]) == (gpu, shape, dtype)
        }
        bounds = roofline(shape, dtype, GPUS[gpu])
        sort = counting_sort(shape, GPUS[gpu])
        others = own["offset_weight_gradient"]
        sorted_ = own["cell"] + sort + own[AT_ONCE]
        lines.append(
            [
                gpu,
                f"{shape[0]} x {shape[1]} x {shape[2]}^3",
                dtype,
                f"{own['forward']:.0f}",
                f"{bounds['forward']:.0f}",
                f"{others:.0f}",
                f"{own['scatter_input_gradient']:.0f}",
                f"{sorted_:.0f}",
                f"{others + own['scatter_input_gradient']:.0f}",
                f"{bounds['backward']:.0f}",
            ]
        )
    return _markdown(
        [
            "GPU",
            "shape",
            "dtype",
            "forward",
            "roofline",
            "offset and weight gradient",
            "input gradient, atomic",
            "the same by a counting sort",
            "backward",
            "roofline",
        ],
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", type=Path, nargs="*", default=[], help="folders with other versions of Triton")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, help="folder for triton_code.json")
    parser.add_argument("--document", action="store_true", help="put the tables into the operators' README")
    arguments = parser.parse_args()
    if (reason := unable_to_record()) is not None:
        sys.exit(reason)
    rows = table(most(), None, arguments.cache, arguments.processes)
    for folder in arguments.triton:
        rows += table(part(version_in(folder)), folder, arguments.cache, arguments.processes)
    predictions = []
    for gpu, shape, dtype in itertools.product(GPUS, SHAPES, ("float32", "bfloat16")):
        for prediction in predict(shape, dtype, GPUS[gpu], arguments.cache).values():
            about = {"gpu": gpu, "shape": list(shape), "dtype": dtype}
            predictions.append(
                {**about, **asdict(prediction), "longest": prediction.longest, "bound": prediction.bound}
            )
    text = document(rows, predictions)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "triton_code.json").write_text(_json({**describe()}, rows=rows, predictions=predictions))
    if arguments.document:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])
    bad = failures(rows)
    print("\n".join(bad) if bad else f"{len(rows)} kernels, nothing spilled.")
    sys.exit(bool(bad))


def _json(about: dict[str, str], **lists: list[dict]) -> str:
    """A line for each row."""
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    for name, rows in lists.items():
        inside = ",\n ".join(json.dumps(_rounded(row)) for row in rows)
        parts.append(f"{json.dumps(name)}: [\n {inside}\n]")
    return "{" + ",\n".join(parts) + "}\n"


def _rounded(row: dict) -> dict:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


if __name__ == "__main__":
    main()
