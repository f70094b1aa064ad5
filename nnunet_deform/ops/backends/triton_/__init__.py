"""The Triton backend: depthwise deformable convolution on NVIDIA GPUs, channels last.

Values are float32, bfloat16 or float16; coordinates and sums are float32. Triton is optional: without it
:func:`unable` says so. ``kernels.py`` has the arithmetic.

The backward pass is two kernels. One takes a tap at a time: the offset gradient of a tap is complete in one program,
and the weight gradient is a sum of sums, always added in the same order. The other makes the input gradient, either
with atomic additions, whose order changes from run to run, or, under ``torch.use_deterministic_algorithms(True)``, from
the samples sorted by cell: each cell adds its samples in order, and cells that share corners take turns.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nnunet_deform.ops.layouts import CHANNELS_LAST

_missing = "Triton is not installed"
try:
    import triton

    from nnunet_deform.ops.backends.triton_.kernels import (
        cell_kernel,
        forward_kernel,
        gather_input_gradient_kernel,
        offset_weight_gradient_kernel,
        scatter_input_gradient_kernel,
        trial_kernel,
    )
except ImportError as error:
    triton = None
    if not isinstance(error, ModuleNotFoundError):
        _missing = f"Triton cannot be imported ({error})"


# The kernels count voxels in 32 bits, with a bit to spare for the offsets.
_MOST_VOXELS = 2**29 - 1
# Elements of a batch item that 32 bits index.
_MOST_NARROW = 2**31 - 1
# CUDA's limit on the second axis of a grid.
_MOST_ITEMS = 65535

# Neighbouring voxels of one program, by the number of axes, and its threads: as many (see kernels.py).
_BRICK = {2: (1, 4, 8), 3: (2, 2, 8)}
_WARPS = 1
# Half as many, where several voxels for each thread would take so many registers that few warps find room.
_HALF_BRICK = (1, 2, 8)

# Channels at a time: 16 bytes of a voxel for one thread in half precision, for each of two in float32.
_BLOCK = 8
# In the sorted input gradient the threads of one channel add up their samples, so fewer should have it.
_GATHER_BLOCK = 16
# Such blocks in one program of the forward pass, for which it computes positions once: a sum in registers for each.
_BLOCKS = 6
# Wide maps are small ones, with few programs: more of them matter more than positions.
_WIDE_MAP, _BLOCKS_OF_WIDE = 96, 2
# Neighbouring channels that one atomic addition in float32 takes, from compute capability 9.0 on.
_ADDED_AT_ONCE = 4

# Programs of the kernel that takes a tap at a time: enough to fill the largest GPU a few times.
_PROGRAMS = 8192

# What torch.sort needs for a sample of the sorted input gradient: keys, places, and the sort's own copies of both.
_SORT_BYTES = 36
# Sorting takes a few taps at a time, so that it needs no more than the input in float32, or than this.
_SORT_MEMORY = 2**26


def unable(input: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    if triton is None:
        return _missing
    if not hasattr(torch.library, "triton_op"):
        return f"it needs torch 2.6 or later, and this is {torch.__version__}"
    if input.device.type != "cuda" and not (_interpreted() and input.device.type == "cpu"):
        return f"it runs on CUDA devices, and the tensors are on {input.device.type}"
    if input.dtype == torch.float64:
        return "it computes in torch.float32, and the input is torch.float64"
    if weight.shape[:2] != (input.shape[1], 1):
        return (
            f"it convolves depthwise, one filter for each channel, and the weight {tuple(weight.shape)} for "
            f"{input.shape[1]} channels is not"
        )
    # Not torch.Size.numel, here and below: it would make torch.compile build for this one size.
    if max(math.prod(input.shape[2:]), math.prod(offset.shape[2:])) > _MOST_VOXELS:
        return f"it handles at most {_MOST_VOXELS} voxels a batch item"
    if input.shape[0] * _offset_groups(offset, weight) > _MOST_ITEMS:
        return f"it handles at most {_MOST_ITEMS} batch items times deformable groups"
    return _unable_device(input) if input.device.type == "cuda" else None


def _unable_device(input: Tensor) -> str | None:
    if torch.version.hip:
        return "it was written for NVIDIA GPUs, and this is an AMD one"
    capability = torch.cuda.get_device_capability(input.device)
    needed = (8, 0) if input.dtype == torch.bfloat16 else (7, 0)
    if capability < needed:
        return (
            f"{input.dtype} needs compute capability {needed[0]}.{needed[1]}, and this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    with _current_device(input):
        return _unable_to_compile(capability)


@functools.cache
def _unable_to_compile(capability: tuple[int, int]) -> str | None:
    """Tried once for each kind of GPU: there may be no C compiler, or none that knows the GPU."""
    try:
        # Compiled and not launched, because torch.compile asks as well, and it has no tensors to launch with.
        trial_kernel.warmup(torch.float32, grid=(1,))
    except Exception as error:  # Triton's own, those of subprocess, of the operating system ...
        lines = str(error).strip().splitlines() or [""]
        return f"Triton {triton.__version__} cannot compile here ({type(error).__name__}: {lines[0]})"
    return None


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    problem = _Problem(input, offset, weight, stride, padding, dilation)
    output = problem.empty_output()
    with _current_device(input):
        wrap_triton(forward_kernel)[problem.bricks(problem.brick), problem.items, problem.runs](
            **problem.input,
            **problem.offset,
            weight=problem.by_tap,
            bias=bias if bias is None else problem.aligned(bias.contiguous()),
            output=output,
            **problem.geometry,
            **_by_axis("BRICK_{}", problem.brick, 1),
            group_channels=problem.group_channels,
            BLOCK_C=problem.block,
            LANE_C=problem.lane,
            BLOCKS=problem.blocks,
            WIDE=problem.wide,
            num_warps=_WARPS,
        )
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_offset, needs_weight, needs_bias = needs
    problem = _Problem(input, offset, weight, stride, padding, dilation)
    grad_output = problem.aligned(grad_output.contiguous(memory_format=CHANNELS_LAST[input.ndim - 2]))

    grad_input = grad_offset = grad_weight = grad_bias = None
    if needs_input:
        # Sums of many samples: float32 whatever the dtype of the values.
        grad_input = torch.zeros_like(input, dtype=torch.float32, memory_format=CHANNELS_LAST[input.ndim - 2])
        with _current_device(input):
            if torch.are_deterministic_algorithms_enabled():
                _gather_input_gradient(problem, grad_output, grad_input)
            else:
                _scatter_input_gradient(problem, grad_output, grad_input)
        grad_input = grad_input.to(input.dtype)
    if needs_offset or needs_weight:
        with _current_device(input):
            grad_offset, grad_weight = _offset_weight_gradient(problem, grad_output, needs_offset, needs_weight)
    if needs_bias:
        grad_bias = grad_output.movedim(1, -1).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
    return grad_input, grad_offset, grad_weight, grad_bias


def _offset_weight_gradient(
    problem: "_Problem", grad_output: Tensor, needs_offset: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    offset, weight = problem.offset["offset"], problem.weight
    # One voxel for each thread, or for those that share its channels.
    brick = problem.brick if problem.lane == problem.block else _HALF_BRICK
    bricks = problem.bricks(brick)
    per_run = max(1, bricks * problem.items * problem.taps // _PROGRAMS)
    runs = triton.cdiv(bricks, per_run)
    summands = (runs, problem.batch, problem.groups, problem.taps, problem.group_channels)
    grad_offset = offset.new_empty(offset.shape, dtype=torch.float32) if needs_offset else None
    grad_weight = offset.new_empty(summands, dtype=torch.float32) if needs_weight else None
    wrap_triton(offset_weight_gradient_kernel)[runs, problem.items, problem.taps](
        grad_output=grad_output,
        **problem.input,
        **problem.offset,
        weight=problem.by_tap,
        grad_offset=grad_offset,
        grad_weight=grad_weight,
        bricks_per_run=per_run,
        **problem.geometry,
        **_by_axis("BRICK_{}", brick, 1),
        group_channels=problem.group_channels,
        BLOCK_C=problem.block,
        LANE_C=problem.lane,
        WIDE=problem.wide,
        num_warps=_WARPS,
    )
    if needs_offset:
        grad_offset = grad_offset.to(offset.dtype)
    if needs_weight:
        grad_weight = grad_weight.sum((0, 1)).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
    return grad_offset, grad_weight


def _scatter_input_gradient(problem: "_Problem", grad_output: Tensor, grad_input: Tensor) -> None:
    at_once = min(problem.block, _added_at_once(grad_input))
    brick = problem.brick if at_once > 1 else _HALF_BRICK
    wrap_triton(scatter_input_gradient_kernel)[problem.bricks(brick), problem.items, problem.taps](
        grad_output=grad_output,
        **problem.offset,
        weight=problem.by_tap,
        grad_input=grad_input,
        **problem.geometry,
        **_by_axis("BRICK_{}", brick, 1),
        group_channels=problem.group_channels,
        BLOCK_C=problem.block,
        LANE_C=at_once,
        WIDE=problem.wide,
        num_warps=_WARPS,
    )


def _added_at_once(grad_input: Tensor) -> int:
    newest = not grad_input.is_cuda or torch.cuda.get_device_capability(grad_input.device) >= (9, 0)
    return _ADDED_AT_ONCE if newest else 1


def _gather_input_gradient(problem: "_Problem", grad_output: Tensor, grad_input: Tensor) -> None:
    voxels = math.prod(problem.out_size)
    cells = [1] * (3 - problem.axes) + [size + 1 for size in problem.size]
    beyond = problem.items * math.prod(cells)
    key = torch.int32 if beyond < 2**31 else torch.int64
    memory = max(_SORT_MEMORY, 4 * math.prod(grad_input.shape))
    block = _common_power(problem.group_channels, _GATHER_BLOCK)
    together = min(problem.taps, max(1, memory // (_SORT_BYTES * voxels * problem.items)))
    for first_tap in range(0, problem.taps, together):
        taps = min(together, problem.taps - first_tap)
        numbers = torch.empty((taps, problem.items, voxels), dtype=key, device=grad_input.device)
        wrap_triton(cell_kernel)[problem.bricks(problem.brick), problem.items, taps](
            **problem.offset,
            cells=numbers,
            first_tap=first_tap,
            **problem.geometry,
            **_by_axis("BRICK_{}", problem.brick, 1),
            num_warps=_WARPS,
        )
        numbers, order = torch.sort(numbers.flatten(), stable=True)
        starts = torch.searchsorted(numbers, torch.arange(beyond + 1, dtype=key, device=numbers.device))
        del numbers
        for parity in itertools.product(*(range(min(2, number)) for number in cells)):
            in_turn = math.prod((number - odd + 1) // 2 for number, odd in zip(cells, parity, strict=True))
            wrap_triton(gather_input_gradient_kernel)[in_turn, problem.items](
                grad_output=grad_output,
                **problem.offset,
                weight=problem.by_tap,
                order=order,
                starts=starts,
                grad_input=grad_input,
                first_tap=first_tap,
                parity_d=parity[0],
                parity_h=parity[1],
                parity_w=parity[2],
                **problem.geometry,
                group_channels=problem.group_channels,
                SAMPLES=32 * _WARPS,
                BLOCK_C=block,
                LANE_C=min(block, _ADDED_AT_ONCE),
                num_warps=_WARPS,
            )


class _Problem:
    """The kernels' arguments, under the names they have there, and the axes of their grids."""

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self.axes = len(stride)
        self.batch, channels = input.shape[0], int(input.shape[1])
        self.size, self.out_size = input.shape[2:], offset.shape[2:]
        self.weight = weight
        by_tap = weight.flatten(1).t().contiguous()  # [taps, channels]
        self.taps = int(by_tap.shape[0])
        self.groups = _offset_groups(offset, weight)
        self.items = self.batch * self.groups

        self.group_channels = channels // self.groups
        self.block = _common_power(self.group_channels, _BLOCK)
        self.by_tap = self.aligned(by_tap)
        # What one access of 16 bytes takes.
        self.lane = min(self.block, 16 // weight.element_size())
        # So many runs of blocks that none has more than it may, and all the same number (kernels.py tells how).
        blocks = self.group_channels // self.block
        self.runs = triton.cdiv(blocks, _BLOCKS if channels <= _WIDE_MAP else _BLOCKS_OF_WIDE)
        self.blocks = triton.cdiv(blocks, self.runs)

        starts = (input.storage_offset(), *(input.stride(axis) for axis in (0, *range(2, input.ndim))))
        if input.stride(1) != 1 or any(start % self.block for start in starts):
            input = input.clone(memory_format=CHANNELS_LAST[self.axes])
        # Planar, channels last, or anything else in which the voxels are evenly spaced.
        if not offset.is_contiguous(memory_format=CHANNELS_LAST[self.axes]):
            offset = offset.contiguous()
        self.input = {"input": input, "input_batch_stride": input.stride(0)}
        self.input |= _by_axis("input_{}_stride", input.stride()[2:], 0)
        self.offset = {"offset": offset}
        for name, step in zip(("batch", "channel", "voxel"), offset.flatten(2).stride(), strict=True):
            self.offset[f"offset_{name}_stride"] = step
        self.geometry = {
            **_by_axis("in_{}", self.size, 1),
            **_by_axis("out_{}", self.out_size, 1),
            # Numbers, also where torch.compile traces them: it builds anew for others.
            **_by_axis("stride_{}", [int(s) for s in stride], 1),
            **_by_axis("padding_{}", [int(p) for p in padding], 0),
            **_by_axis("dilation_{}", [int(d) for d in dilation], 1),
            "groups": self.groups,
            "AXES": self.axes,
            **{name: int(k) for name, k in _by_axis("KERNEL_{}", weight.shape[2:], 1).items()},
        }
        self.brick = _BRICK[self.axes]
        reach = sum((size - 1) * step for size, step in zip(input.shape[1:], input.stride()[1:], strict=True))
        self.wide = max(reach, math.prod(input.shape[1:])) > _MOST_NARROW

    def aligned(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy if it begins where no block of channels may: the kernels read blocks as vectors."""
        return tensor.clone() if tensor.storage_offset() % self.block else tensor

    def bricks(self, brick: Sequence[int]) -> int:
        lengths = zip(_three(self.out_size, 1), _three(brick, 1), strict=True)
        return math.prod(triton.cdiv(size, length) for size, length in lengths)

    def empty_output(self) -> Tensor:
        input = self.input["input"]
        return torch.empty(
            (*input.shape[:2], *self.out_size),
            dtype=input.dtype,
            device=input.device,
            memory_format=CHANNELS_LAST[self.axes],
        )


def _by_axis(name: str, values: Sequence[int], missing: int) -> dict[str, int]:
    """The values as arguments for depth, height and width."""
    letters = "DHW" if name.isupper() else "dhw"
    return {name.format(axis): value for axis, value in zip(letters, _three(values, missing), strict=True)}


def _three(values: Sequence[int], missing: int) -> tuple[int, ...]:
    """One value for each of three axes; a 2D problem lacks the first."""
    return (missing,) * (3 - len(values)) + tuple(values)


def _common_power(channels: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides the channels."""
    return min(most, channels & -channels)


def _offset_groups(offset: Tensor, weight: Tensor) -> int:
    return int(offset.shape[1] // ((offset.ndim - 2) * math.prod(weight.shape[2:])))


def _current_device(input: Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU, whichever one the tensors are on."""
    return torch.cuda.device(input.device) if input.is_cuda and torch.cuda.is_available() else nullcontext()


def wrap_triton(kernel: Any) -> Any:
    """torch's function of this name, which older versions refuse to kernels that are interpreted."""
    return kernel if _interpreted() else torch.library.wrap_triton(kernel)


def _interpreted() -> bool:
    """TRITON_INTERPRET=1 runs the kernels in NumPy, which is how they are tested without a GPU."""
    return not isinstance(forward_kernel, triton.JITFunction)
