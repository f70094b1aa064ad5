"""A backend proves itself before its first use: a small problem in a process of its own, against the torch backend.

The Triton kernels are compiled on the user's machine, for a GPU that nobody may have run them on. An illegal access or
an endless loop cannot be survived in the process itself, so the trial runs in another one, with a limit of time. Its
verdict is remembered on disk for the GPU, the driver, and the versions of torch, Triton and the kernels. Nothing here
runs where the Triton backend cannot.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_deform import __version__
from nnunet_deform.ops.backends import torch_, triton_
from nnunet_deform.ops.backends.agreement import RESULTS, disagreement
from nnunet_deform.processes.isolation import Task, described, run_isolated

logger = logging.getLogger("nnunet_deform.ops")

LIMIT_S = 60.0
SELFTEST = "nnunet-deform selftest"

# Channels to try, by how many the kernels take at a time.
_CHANNELS = {8: 48, 4: 20, 2: 6, 1: 5}

# Both sides of the comparison round.
_TIMES_TOLERANCE = 2

# Batch, size and kernel, by the number of axes. On a GPU several programs on each axis, some of them partly empty.
_PROBLEMS = {2: (2, (7, 19), (3, 3)), 3: (2, (5, 6, 19), (3, 3, 3))}
# Triton's interpreter takes a tenth of a second for a tap.
_INTERPRETED = {2: (1, (2, 3), (1, 2)), 3: (1, (1, 2, 3), (1, 1, 1))}


@dataclass(frozen=True)
class Trial:
    """What is tried: the kernels that are compiled for such tensors, on their device.

    ``dtype`` is the name of the values' dtype; ``block`` how many channels the kernels take at a time: 8, 4, 2 or 1,
    the largest that divides those of a deformable group.
    """

    device: str
    dtype: str
    axes: int
    block: int
    deterministic: bool

    @classmethod
    def of(cls, input: Tensor, offset: Tensor, weight: Tensor) -> "Trial":
        axes = input.ndim - 2
        groups = int(offset.shape[1]) // (axes * math.prod(weight.shape[2:]))
        return cls(
            device=str(input.device),
            dtype=str(input.dtype).removeprefix("torch."),
            axes=axes,
            block=next(block for block in _CHANNELS if int(input.shape[1]) // groups % block == 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    @property
    def what(self) -> str:
        deterministic = ", deterministic" if self.deterministic else ""
        return f"{self.dtype}, {self.axes}D, {self.block} channels at a time{deterministic}"


@dataclass(frozen=True)
class Verdict:
    """``fault`` says in one sentence without a full stop why the backend is not to be used, None that it passed.

    Only what the kernels did is ``lasting``: that the trial could not be made is not remembered on disk.
    """

    fault: str | None
    lasting: bool = True


# Of a record on disk.
_KEYS = {"fault", "date", "gpu", "driver", "torch", "triton", "nnunet-deform", *Trial.__annotations__}

_verdicts: dict[Trial, Verdict] = {}
_one_at_a_time = threading.Lock()


def objection(trial: Trial) -> str | None:
    """Why the Triton backend is not to be used, None where it passed the trial; tried now if it was not before.

    A fault is said once by a process, as a warning of the logger ``nnunet_deform.ops``.
    """
    known = _verdicts.get(trial)
    if known is None:
        with _one_at_a_time:
            known = _verdicts.get(trial)
            if known is None:
                known = _verdicts[trial] = verdict(trial)
                if known.fault is not None:
                    logger.warning(warning(trial, known))
    return known.fault


def settle(trial: Trial, decided: Verdict) -> None:
    """Let this process follow a verdict that was reached, and said, elsewhere."""
    _verdicts[trial] = decided


def warning(trial: Trial, decided: Verdict) -> str:
    """The one line for a log."""
    device = "cuda" if trial.device.startswith("cuda") else trial.device
    return (
        f"WARNING: the triton backend of the deformable convolution {decided.fault} in its preflight "
        f"({trial.what}, on {machine(trial.device)['gpu']}); the torch backend computes it, slower. Please run "
        f"{SELFTEST} --device {device} -o report.json and attach report.json to an issue."
        + ("" if decided.lasting else " NNUNET_DEFORM_BACKEND=triton uses it untried.")
    )


def verdict(trial: Trial) -> Verdict:
    """The remembered verdict, or that of a trial made now, which takes up to ``LIMIT_S`` seconds."""
    known = recalled(trial)
    if known is not None:
        return known
    made = _try(trial)
    return Verdict(_remember(_file(trial), trial, made.fault)) if made.lasting else made


def recalled(trial: Trial) -> Verdict | None:
    """The verdict that the disk remembers, None for none."""
    record = _read(_file(trial))
    return None if record is None else Verdict(record["fault"])


def renewed(trial: Trial) -> Verdict:
    """The verdict of a trial made now, whatever is remembered, and remembered in its place."""
    with contextlib.suppress(OSError):
        _file(trial).unlink(missing_ok=True)
    return verdict(trial)


def remembered() -> list[dict[str, Any]]:
    """All that is remembered on this machine's disk, of any GPU and version: what was tried where, fault and date."""
    return [record for file in sorted(folder().glob("*.json")) if (record := _read(file)) is not None]


def _try(trial: Trial) -> Verdict:
    arguments = [asdict(trial)]
    # The first shows whether the process works and reaches the device, which says nothing about the kernels.
    tasks = [Task(f"{__name__}:_solve", arguments), Task(f"{__name__}:_compare", arguments)]
    with contextlib.closing(run_isolated(tasks, LIMIT_S)) as outcomes:
        try:
            reached = next(outcomes)
        except OSError as error:
            return Verdict(f"could not be tried ({described(error)})", lasting=False)
        if reached.error is not None:
            return Verdict(f"could not be tried ({reached.error})", lasting=False)
        compared = next(outcomes)
    return Verdict(compared.error) if compared.error is not None else Verdict(**compared.result)


def _solve(fields: dict[str, Any]) -> None:
    _expected(*_problem(Trial(**fields)))


def _compare(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the verdict on the kernels, in the process that tries them."""
    trial = Trial(**fields)
    tensors, grad_output, spatial = _problem(trial)
    expected = _expected(tensors, grad_output, spatial)
    torch.use_deterministic_algorithms(trial.deterministic)
    try:
        output = triton_.forward(*tensors, *spatial)
        gradients = triton_.backward(grad_output, *tensors[:3], *spatial, (True,) * 4)
        found = disagreement((output, *gradients), expected, _TIMES_TOLERANCE)
    except torch.OutOfMemoryError as error:
        return asdict(Verdict(f"could not be tried ({described(error)})", lasting=False))
    except Exception as error:  # Triton's own, CUDA's, the compiler's ...
        return asdict(Verdict(f"raised {described(error)}"))
    return asdict(Verdict(None if found is None else f"was wrong ({found})"))


def _problem(trial: Trial) -> tuple[list[Tensor], Tensor, list[list[int]]]:
    """Input, offset, weight and bias, the gradient of the output, and stride, padding and dilation."""
    axes, on_gpu = trial.axes, trial.device.startswith("cuda")
    batch, size, kernel = (_PROBLEMS if on_gpu else _INTERPRETED)[axes]
    channels = _CHANNELS[trial.block] if on_gpu else trial.block
    spatial = [[1] * axes, [1] * axes, [1] * axes]
    out_size = [s + 3 - k for s, k in zip(size, kernel, strict=True)]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    offset = 1.5 * random(batch, axes * torch.Size(kernel).numel(), *out_size)
    # A network starts with positions at integers and at the border.
    offset[:, :axes] = offset[:, :axes].round()
    values = [random(batch, channels, *size), random(channels, 1, *kernel), random(channels)]
    values.append(random(batch, channels, *out_size))
    input, weight, bias, grad_output = (v.to(trial.device, getattr(torch, trial.dtype)) for v in values)
    return [input, offset.to(trial.device), weight, bias], grad_output, spatial


def _expected(tensors: list[Tensor], grad_output: Tensor, spatial: list[list[int]]) -> tuple[Tensor, ...]:
    """The torch backend's results in float32, on the same device."""
    wide = [tensor.float() for tensor in tensors]
    gradients = torch_.backward(grad_output.float(), *wide[:3], *spatial, (True,) * 4)
    results = (torch_.forward(*wide, *spatial), *gradients)
    for name, result in zip(RESULTS, results, strict=True):
        if not result.isfinite().all():
            raise ArithmeticError(f"the torch backend's {name} is not finite")
    return results


def folder() -> Path:
    """Where verdicts are remembered."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "nnunet-deform" / "preflight"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "nnunet-deform" / "preflight"


@functools.cache
def machine(device: str) -> dict[str, str]:
    """What a verdict holds for."""
    on_gpu = device.startswith("cuda")
    kernels = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(_sources()))).hexdigest()[:8]
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter",
        "driver": driver() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": triton_.triton.__version__,
        "nnunet-deform": f"{__version__} (kernels {kernels})",
    }


def _sources() -> Iterator[Path]:
    """A checkout's version stays while its kernels change."""
    return Path(triton_.__file__).parent.glob("*.py")


def driver() -> str:
    with contextlib.suppress(OSError, IndexError):
        # On Linux: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ...".
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    return "unknown"


def _record(trial: Trial) -> dict[str, Any]:
    fields = asdict(trial)
    # Two GPUs of one kind are one to it.
    fields["device"] = fields["device"].split(":")[0]
    return {**machine(trial.device), **fields}


def _file(trial: Trial) -> Path:
    key = json.dumps(_record(trial), sort_keys=True)
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """None where there is no such file, or none that is whole."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if record.keys() >= _KEYS else None
    except (OSError, ValueError, AttributeError):
        return None


def _remember(file: Path, trial: Trial, fault: str | None) -> str | None:
    """Write a fault down and return it; that of another process that was faster, so that all do the same.

    Where nothing can be written every process tries for itself.
    """
    record = {**_record(trial), "fault": fault, "date": datetime.now(timezone.utc).date().isoformat()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and _read(file) is None:
            file.unlink()
        descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with open(descriptor, "w", encoding="utf-8") as part:
            json.dump(record, part)
        try:
            os.link(name, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        logger.info("the verdict on the triton backend is not remembered: %s", error)
        return fault
    first = _read(file)
    return fault if first is None else first["fault"]
