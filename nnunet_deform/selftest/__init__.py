"""What ``nnunet-deform selftest`` does: every operator, backend and network of ours, tried on this machine.

Each check runs in a process that others share until it is ended by one, so that a crash or a hang is one line of the
report. The report is made to be sent: versions, machine, every check with its fault, times and memory.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nnunet_deform import __version__
from nnunet_deform.ops import backends_for
from nnunet_deform.ops.backends import cpu, preflight, trial_due
from nnunet_deform.processes.isolation import Outcome, Task, run_isolated
from nnunet_deform.selftest import deformable, operators, speed, steps
from nnunet_deform.selftest.measuring import describe

# For each check, the first one with the start of its process.
LIMIT_S = 300.0

DEFORMABLE = "deformable convolution"
OPERATOR = "operator"
STEP = "training step"
PREFLIGHT = "preflight"
SPEED = "time and memory"

# What may change results or times; no paths, because the report is sent to others.
_SETTINGS = (
    "NNUNET_DEFORM_BACKEND",
    "TRITON_INTERPRET",
    "TORCH_COMPILE_DISABLE",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "nnUNet_compile",
)


@dataclass(frozen=True)
class Check:
    """One line of the report: ``column`` tells checks of one name apart, such as the backend."""

    group: str
    name: str
    column: str
    task: Task


@dataclass(frozen=True)
class Finding:
    """What a check found: a fault in one sentence without a full stop, or why it was skipped, or neither."""

    group: str
    name: str
    column: str
    seconds: float
    fault: str | None = None
    skipped: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def checks_for(device: str) -> list[Check]:
    """All of them, in the order they run in, for "cuda", "mps" or "cpu"."""
    probe = [torch.zeros(shape, device=device) for shape in ((1, 16, 3, 3), (1, 18, 3, 3), (16, 1, 3, 3))]
    usable = [name for name, reason in backends_for(*probe).items() if reason is None and name != "reference"]
    found = []
    # First, so that a training begun later finds verdicts of today.
    for dtype in (torch.float16, torch.float32) if device == "cuda" else (torch.float32,):
        for axes in (3, 2):
            trial = trial_due(
                torch.zeros(1, 16, *[1] * axes, dtype=dtype, device=device),
                torch.zeros(1, axes * 3**axes, *[1] * axes, device=device),
                torch.zeros(16, 1, *[3] * axes, dtype=dtype, device=device),
            )
            if trial is not None:
                task = Task(f"{__name__}:check_preflight", [asdict(trial)])
                found.append(Check(PREFLIGHT, trial.what, "triton", task))
    for case in deformable.CASES:
        for backend in usable:
            task = Task(f"{deformable.__name__}:check_case", [device, backend, case.title])
            found.append(Check(DEFORMABLE, case.title, backend, task))
    for name in operators.OPERATORS:
        for layout in ("contiguous", "channels last"):
            task = Task(f"{operators.__name__}:check_operator", [device, name, layout == "channels last"])
            found.append(Check(OPERATOR, name, layout, task))
    for name in steps.ARCHITECTURES:
        # On a CPU nnU-Net does not compile, and MPS has neither.
        for mode in steps.MODES[: {"cuda": 3, "cpu": 2, "mps": 1}[device]]:
            task = Task(f"{steps.__name__}:check_step", [device, name, mode])
            found.append(Check(STEP, name, mode, task))
    if device != "cpu" or "triton" not in usable:
        shapes, dtypes, rounds = speed.PROBLEMS[device]
        for shape in shapes:
            for dtype in dtypes:
                batch, channels, side = shape
                task = Task(f"{speed.__name__}:measure", [device, shape, dtype, rounds])
                found.append(Check(SPEED, f"{batch} x {channels} x {side}^3, {dtype}", "", task))
    return found


def check_preflight(trial: dict[str, Any]) -> dict[str, Any]:
    """The trial that a training would make, made now and remembered."""
    fault = preflight.renewed(preflight.Trial(**trial)).fault
    return {} if fault is None else {"fault": fault}


def findings(checks: Sequence[Check]) -> Iterator[Finding]:
    """Run checks; each finding as soon as it is known."""
    started = time.monotonic()
    for check, outcome in zip(checks, run_isolated([check.task for check in checks], LIMIT_S), strict=True):
        ended = time.monotonic()
        yield _finding(check, outcome, ended - started)
        started = ended


def _finding(check: Check, outcome: Outcome, seconds: float) -> Finding:
    about = (check.group, check.name, check.column, round(seconds, 2))
    if outcome.error is not None:
        return Finding(*about, fault=outcome.error)
    figures = dict(outcome.result)
    return Finding(*about, figures.pop("fault", None), figures.pop("skipped", None), figures)


def report(device: str, found: Sequence[Finding], seconds: float) -> dict[str, Any]:
    """What is written as JSON: machine and versions, and every finding."""
    return {
        "about": _about(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        # Of this process and those of the checks, whatever else the machine does.
        "processor_seconds": round(sum(os.times()[:4]), 1),
        "passed": not any(finding.fault for finding in found),
        "findings": [
            {key: value for key, value in asdict(finding).items() if value not in (None, {})} for finding in found
        ],
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write it whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _about(device: str) -> dict[str, Any]:
    about: dict[str, Any] = {**describe(), "nnunet-deform": __version__}
    for package in ("nnunetv2", "dynamic-network-architectures", "triton", "numpy"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    about["cpu kernel"] = ", ".join(cpu.instruction_sets()) or "not built"
    about["python build"] = platform.python_compiler()
    about["settings"] = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    if device == "cuda":
        about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        about["driver"] = preflight.driver()
        about["gpus"] = [
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GB"
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return about
