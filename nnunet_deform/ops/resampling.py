"""Linear resampling of feature maps, as one operation also for compilers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nnunet_deform.ops.layouts import layout_of

_MODES = {2: "bilinear", 3: "trilinear"}


def resample_linear(input: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, *spatial] -> [B, C, *size] in two or three dimensions, linear along each axis, voxels as cells.

    ``torch.nn.functional.interpolate`` without ``align_corners``. Inductor would take it apart into eight gathers, and
    eight scatters for the backward pass, some two hundred operations, where torch has a kernel for each.
    """
    size = [int(s) for s in size]
    if not torch.compiler.is_dynamo_compiling():
        return _interpolate(input, size)
    return torch.ops.nnunet_deform.resample_linear(input, size)


def _interpolate(input: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(input, size=tuple(size), mode=_MODES[len(size)], align_corners=False)


@torch.library.custom_op(
    "nnunet_deform::resample_linear", mutates_args=(), schema="(Tensor input, SymInt[] size) -> Tensor"
)
def _forward(input, size):
    return _interpolate(input, size).contiguous(memory_format=layout_of(input))


@_forward.register_fake
def _(input, size):
    shape = (*input.shape[:2], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input))


@torch.library.custom_op(
    "nnunet_deform::resample_linear_backward", mutates_args=(), schema="(Tensor grad, SymInt[] input_shape) -> Tensor"
)
def _backward(grad, input_shape):
    aten = torch.ops.aten
    kernel = aten.upsample_bilinear2d_backward if grad.ndim == 4 else aten.upsample_trilinear3d_backward
    return kernel(grad, list(grad.shape[2:]), list(input_shape), False).contiguous(memory_format=layout_of(grad))


@_backward.register_fake
def _(grad, input_shape):
    return torch.empty(input_shape, dtype=grad.dtype, device=grad.device, memory_format=layout_of(grad))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.input_shape = list(inputs[0].shape)


def _gradient(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.nnunet_deform.resample_linear_backward(grad, ctx.input_shape), None


_forward.register_autograd(_gradient, setup_context=_setup_context)
