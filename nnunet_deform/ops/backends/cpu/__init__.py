"""The C++ backend: depthwise deformable convolution in float32 on the CPU, channels last, vectorised over channels.

Half-precision values are converted, which takes a copy in float32.

The kernel is a plain C library that Python loads with ctypes; it knows neither torch nor Python, so one build serves
every version of both. It is optional: without it :func:`unable` says why. ``deform_conv.h`` states the functions'
contracts, ``kernel.cpp`` has the arithmetic.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nnunet_deform.ops.layouts import CHANNELS_LAST

LIBRARY = Path(__file__).with_name("_kernel.dll" if sys.platform == "win32" else "_kernel.so")


# The kernel counts voxels and positions in 32 bits, with a bit to spare for the offsets.
_MOST_VOXELS = 2**29


def unable(input: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    if input.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {input.device.type}"
    if isinstance(_library(), str):
        return _library()
    if input.dtype == torch.float64:
        return "it computes in torch.float32, and the input is torch.float64"
    if weight.shape[:2] != (input.shape[1], 1):
        return (
            f"it convolves depthwise, one filter for each channel, and the weight {tuple(weight.shape)} for "
            f"{input.shape[1]} channels is not"
        )
    # Not torch.Size.numel, which would make torch.compile build for this one size.
    if max(math.prod(input.shape[2:]), math.prod(offset.shape[2:])) > _MOST_VOXELS:
        return f"it handles at most {_MOST_VOXELS} voxels a batch item"
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
    dtype = input.dtype
    input, offset, by_tap = _channels_last(input), _dense(offset), _by_tap(weight)
    bias = None if bias is None else bias.float().contiguous()
    output = _empty_channels_last(input, offset.shape[2:])
    _library().forward(
        torch.get_num_threads(),
        _Shape.of(input, offset, weight, stride, padding, dilation),
        *map(_pointer, (input, offset, by_tap, bias, output)),
    )
    return output.to(dtype)


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
    dtype, offset_dtype = input.dtype, offset.dtype
    input, offset, grad_output = _channels_last(input), _dense(offset), _channels_last(grad_output)
    by_tap = _by_tap(weight)
    grad_input = _empty_channels_last(input, input.shape[2:]) if needs_input else None
    grad_offset = torch.empty(offset.shape, dtype=offset.dtype) if needs_offset else None
    grad_by_tap = torch.empty_like(by_tap) if needs_weight else None
    if needs_input or needs_offset or needs_weight:
        no_memory = _library().backward(
            torch.get_num_threads(),
            _Shape.of(input, offset, weight, stride, padding, dilation),
            *map(_pointer, (grad_output, input, offset, by_tap, grad_input, grad_offset, grad_by_tap)),
        )
        if no_memory:
            raise MemoryError("the deformable convolution's backward pass found no memory for its threads' sums")
    return (
        grad_input.to(dtype) if needs_input else None,
        grad_offset.to(offset_dtype) if needs_offset else None,
        grad_by_tap.t().reshape(weight.shape).to(dtype) if needs_weight else None,
        grad_output.movedim(1, -1).flatten(0, -2).sum(0).to(dtype) if needs_bias else None,
    )


def instruction_sets() -> list[str]:
    """The instruction sets that the kernel was built for and this processor has, the fastest first."""
    library = _library()
    return [] if isinstance(library, str) else list(library.instruction_sets)


class _Shape(ctypes.Structure):
    """``DeformConvShape`` of deform_conv.h."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("axes", "batch", "channels", "groups")],
        *[(name, ctypes.c_int64 * 3) for name in ("size", "out_size", "kernel", "stride", "padding", "dilation")],
        *[(f"offset_{axis}_stride", ctypes.c_int64) for axis in ("batch", "channel", "voxel")],
    )

    @classmethod
    def of(
        cls,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> "_Shape":
        axes = input.ndim - 2
        kernel = weight.shape[2:]
        return cls(
            axes,
            *input.shape[:2],
            offset.shape[1] // (axes * kernel.numel()),
            *((ctypes.c_int64 * 3)(*p) for p in (input.shape[2:], offset.shape[2:], kernel, stride, padding, dilation)),
            *offset.flatten(2).stride(),
        )


class _Library:
    """The loaded kernel, in one instruction set."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(LIBRARY))
        pointer, shape = ctypes.c_void_p, ctypes.POINTER(_Shape)
        library.nnunet_deform_conv_forward.argtypes = [ctypes.c_int, ctypes.c_int, shape, *[pointer] * 5]
        library.nnunet_deform_conv_forward.restype = None
        library.nnunet_deform_conv_backward.argtypes = [ctypes.c_int, ctypes.c_int, shape, *[pointer] * 7]
        library.nnunet_deform_instruction_set.restype = ctypes.c_char_p
        self._library = library
        self.instruction_sets: dict[str, int] = {}
        index = 0
        while (name := library.nnunet_deform_instruction_set(index)) is not None:
            if name:
                self.instruction_sets[name.decode()] = index
            index += 1
        self.instruction_set = next(iter(self.instruction_sets))

    def forward(self, *arguments) -> None:
        self._library.nnunet_deform_conv_forward(self.instruction_sets[self.instruction_set], *arguments)

    def backward(self, *arguments) -> int:
        return self._library.nnunet_deform_conv_backward(self.instruction_sets[self.instruction_set], *arguments)


@functools.cache
def _library() -> _Library | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "the C++ kernel was not built (no compiler at installation); reinstall with one"
    try:
        return _Library()
    except (OSError, AttributeError) as error:
        return f"the C++ kernel does not load ({error}); reinstall"


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous(memory_format=CHANNELS_LAST[tensor.ndim - 2])


def _empty_channels_last(like: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty((*like.shape[:2], *size), dtype=like.dtype, memory_format=CHANNELS_LAST[len(size)])


def _dense(offset: Tensor) -> Tensor:
    """Planar or channels last as it is, so that its voxels are evenly spaced; anything else becomes planar."""
    offset = offset.float()
    return offset if offset.is_contiguous(memory_format=CHANNELS_LAST[offset.ndim - 2]) else offset.contiguous()


def _by_tap(weight: Tensor) -> Tensor:
    """[C, 1, *kernel] as [K, C]."""
    return weight.float().flatten(1).t().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
