"""GroupNorm with what stands around it, as one operation for compilers, and as one that keeps its input alone."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nnunet_deform.ops.autocast import autocast_dtype
from nnunet_deform.ops.layouts import layout_of

Activation = Literal["identity", "silu", "leaky_relu"]


def opaque_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: Activation = "identity",
    negative_slope: float = 0.0,
) -> Tensor:
    """activation(group_norm(x) + residual), [B, C, *spatial] -> the same, in the input's dtype and layout.

    A compiler sees one operation, and one for the backward pass, which keeps the input and the groups' statistics.

    Args:
        residual: as the input; None for none.
        negative_slope: of "leaky_relu".
    """
    arguments = (input, num_groups, weight, bias, eps, residual, activation, negative_slope)
    return torch.ops.nnunet_deform.group_norm(*arguments)[0]


def group_norm_silu(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)), [B, C, *spatial] -> the same, in the input's layout and the dtype that torch's norm gives.

    Autograd keeps the input and the groups' statistics, where torch's operations keep the norm's result as well, under
    autocast both in float32. There is no second derivative.
    """
    return _GroupNormSilu.apply(input, weight, bias, num_groups, eps)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        output, mean, scale = normalized_silu(input, num_groups, weight, bias, eps)
        ctx.save_for_backward(input, mean, scale, weight, bias)
        return output.to(norm_dtype(input))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, scale, weight, bias = ctx.saved_tensors
        before = normalized_again(input, mean, scale, weight, bias)
        return *normalized_silu_backward(grad, before, input, mean, scale, weight, ctx.needs_input_grad[:3]), None, None


def norm_dtype(input: Tensor) -> torch.dtype:
    """Of what torch's norms make of a tensor: float32 under autocast, everywhere but on a CPU."""
    device = input.device.type
    wide = device != "cpu" and autocast_dtype(device) is not None
    return torch.promote_types(input.dtype, torch.float32) if wide else input.dtype


def normalized_silu(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(group_norm(x)) in at least float32, and mean and 1 / standard deviation of each group, [B, groups]."""
    output, mean, scale = _normalize(_wide(input), num_groups, _wide(weight), _wide(bias), eps)
    return F.silu(output, inplace=True), mean, scale


def normalized_again(input: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """group_norm(x) by the statistics of its groups, in at least float32."""
    factor = scale.repeat_interleave(len(weight) // scale.shape[1], dim=1) * weight
    shift = bias - mean.repeat_interleave(len(weight) // mean.shape[1], dim=1) * factor
    per_channel = (*factor.shape, *[1] * (input.ndim - 2))
    return torch.addcmul(shift.view(per_channel), input, factor.view(per_channel))


def normalized_silu_backward(
    grad: Tensor,
    before: Tensor,
    input: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias of silu(before), with before = group_norm(x); None where not needed."""
    wide = _wide(input)
    grad = torch.ops.aten.silu_backward(grad.to(wide.dtype).contiguous(memory_format=layout_of(input)), before)
    shape, num_groups = input.shape, mean.shape[1]
    gradients = torch.ops.aten.native_group_norm_backward(
        grad, wide, mean, scale, _wide(weight), shape[0], shape[1], math.prod(shape[2:]), num_groups, list(needs)
    )
    return tuple(
        None if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, (input, weight, weight), strict=True)
    )


def _normalize(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = input.shape
    return torch.native_group_norm(input, weight, bias, shape[0], shape[1], math.prod(shape[2:]), num_groups, eps)


def _wide(tensor: Tensor | None) -> Tensor | None:
    """At least float32, contiguous in its own layout."""
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous(memory_format=layout_of(tensor))


@torch.library.custom_op(
    "nnunet_deform::group_norm",
    mutates_args=(),
    schema="(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
    "str activation, float negative_slope) -> (Tensor, Tensor, Tensor)",
)
def _forward(input, num_groups, weight, bias, eps, residual, activation, negative_slope):
    """The result, and mean and 1 / standard deviation of each group, [B, groups]."""
    output, mean, scale = _normalize(_wide(input), num_groups, _wide(weight), _wide(bias), eps)
    if residual is not None:
        output += residual
    if activation == "silu":
        F.silu(output, inplace=True)
    elif activation == "leaky_relu":
        F.leaky_relu_(output, negative_slope)
    return output.to(input.dtype).contiguous(memory_format=layout_of(input)), mean, scale


@_forward.register_fake
def _(input, num_groups, weight, bias, eps, residual, activation, negative_slope):
    statistics = input.new_empty((len(input), num_groups), dtype=torch.promote_types(input.dtype, torch.float32))
    return _like(input), statistics, torch.empty_like(statistics)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout_of(tensor))


@torch.library.custom_op(
    "nnunet_deform::group_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor mean, Tensor scale, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? residual, str activation, float negative_slope) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, input, mean, scale, weight, bias, eps, residual, activation, negative_slope):
    """The gradients of input, weight, bias and residual; of a missing one an empty tensor."""
    dtype, layout, shape, num_groups = input.dtype, layout_of(input), input.shape, mean.shape[1]
    input, weight, bias = _wide(input), _wide(weight), _wide(bias)
    grad = grad.to(input.dtype).contiguous(memory_format=layout)
    if activation != "identity":
        before = _normalize(input, num_groups, weight, bias, eps)[0]
        if residual is not None:
            before += residual
        if activation == "silu":
            grad = torch.ops.aten.silu_backward(grad, before)
        else:
            grad = torch.ops.aten.leaky_relu_backward(grad, before, negative_slope, False)
    of_input, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        *(grad, input, mean, scale, weight, shape[0], shape[1], math.prod(shape[2:]), num_groups),
        [True, weight is not None, bias is not None],
    )
    return (
        of_input.to(dtype).contiguous(memory_format=layout),
        grad.new_empty(0) if weight is None else of_weight,
        grad.new_empty(0) if bias is None else of_bias,
        # Not the incoming gradient itself, which an operation must not return.
        grad.new_empty(0) if residual is None else grad.to(residual.dtype).clone(memory_format=layout_of(residual)),
    )


@_backward.register_fake
def _(grad, input, mean, scale, weight, bias, eps, residual, activation, negative_slope):
    vectors = (mean.new_empty(0 if vector is None else len(vector)) for vector in (weight, bias))
    return _like(input), *vectors, mean.new_empty(0) if residual is None else _like(residual)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, _, weight, bias, ctx.eps, residual, ctx.activation, ctx.negative_slope = inputs
    _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(input, mean, scale, weight, bias, residual)


def _gradients(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    input, mean, scale, weight, bias, residual = ctx.saved_tensors
    of_input, of_weight, of_bias, of_residual = torch.ops.nnunet_deform.group_norm_backward(
        grad, input, mean, scale, weight, bias, ctx.eps, residual, ctx.activation, ctx.negative_slope
    )
    return (
        of_input,
        None,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
        None,
        None if residual is None else of_residual,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
