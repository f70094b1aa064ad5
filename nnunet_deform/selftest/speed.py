"""Time and memory of the deformable convolution's backends beside what else computes or resembles it."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_deform.ops import BACKEND_VARIABLE, backends_for, deform_conv3d
from nnunet_deform.selftest.measuring import PeakMemory, can_measure_memory, clock_of, fastest

TAPS = 27
# Batch, channels, side; dtypes; rounds.
PROBLEMS = {
    "cpu": ([(1, 48, 24)], ["float32"], 2),
    "mps": ([(2, 48, 24)], ["float32"], 3),
    "cuda": ([(2, 48, 48), (2, 384, 6)], ["float32", "float16"], 5),
}

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def composition(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same operator from torch's own parts, with a kernel of 3 and padding 1."""
    size = input.shape[2:]
    voxels = torch.meshgrid(*(torch.arange(s, device=input.device, dtype=offset.dtype) for s in size), indexing="ij")
    output = bias.view(1, -1, 1, 1, 1)
    for tap in range(TAPS):
        place = (tap // 9 - 1, tap // 3 % 3 - 1, tap % 3 - 1)
        positions = [v + p + offset[:, 3 * tap + axis] for axis, (v, p) in enumerate(zip(voxels, place, strict=True))]
        grid = torch.stack([(2 * q + 1) / s - 1 for q, s in zip(positions, size, strict=True)][::-1], -1)
        sample = F.grid_sample(input, grid.to(input.dtype), padding_mode="zeros", align_corners=False)
        output = output + sample * weight.flatten(1)[:, tap].view(1, -1, 1, 1, 1)
    return output


def depthwise(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """No deformation: what the operator costs on top of this is the price of being deformable."""
    return F.conv3d(input, weight, bias, padding=1, groups=len(weight))


def ours(backend: str, *tensors: Tensor) -> Tensor:
    os.environ[BACKEND_VARIABLE] = backend
    try:
        return deform_conv3d(*tensors, padding=1)
    finally:
        del os.environ[BACKEND_VARIABLE]


def measure(device: str, shape: Sequence[int], dtype: str, rounds: int) -> dict[str, Any]:
    """Milliseconds forward and with backward, the fastest of some rounds, and the peak memory of a pass with backward
    beyond its results, in units of the input (None where this system does not tell), in "rows" by name.

    With one thread on a CPU the times are the process's own.
    """
    batch, channels, side = shape
    size = (side, side, side)
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    values = getattr(torch, dtype)
    input, grad_output = (
        random(batch, channels, *size, dtype=values).contiguous(memory_format=torch.channels_last_3d) for _ in range(2)
    )
    offset = 0.5 * random(batch, 3 * TAPS, *size, dtype=torch.float32)
    leaves = [input, offset, random(channels, 1, 3, 3, 3, dtype=values), random(channels, dtype=values)]
    for leaf in leaves:
        leaf.requires_grad_()

    def forward(function: Function) -> None:
        with torch.no_grad():
            function(*leaves)

    def both(function: Function) -> list[Tensor | None]:
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad_output, allow_unused=True)]

    before = os.environ.pop(BACKEND_VARIABLE, None)
    named: dict[str, Function] = {"composition of grid_sample": composition}
    reasons = backends_for(*leaves[:3])
    named |= {name: partial(ours, name) for name in reasons if reasons[name] is None and name != "reference"}
    named["depthwise convolution, not deformable"] = depthwise
    clock = clock_of(device, torch.get_num_threads())
    forwards = fastest(rounds, {name: partial(forward, function) for name, function in named.items()}, clock)
    boths = fastest(rounds, {name: partial(both, function) for name, function in named.items()}, clock)
    rows = {
        name: {
            "forward_ms": forwards[name],
            "forward_backward_ms": boths[name],
            "extra_memory": _extra_memory(device, partial(both, function), input.numel() * 4),
        }
        for name, function in named.items()
    }
    if before is not None:
        os.environ[BACKEND_VARIABLE] = before
    return {"rows": rows}


def _extra_memory(device: str, run: Callable[[], list[Tensor | None]], unit: int) -> float | None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        results = run()
        peak = torch.cuda.max_memory_allocated() - held
    elif device == "cpu" and can_measure_memory():
        memory = PeakMemory()
        memory.start()
        results = run()
        peak = memory.bytes()
    else:
        return None
    return (peak - sum(result.nbytes for result in results if result is not None)) / unit
