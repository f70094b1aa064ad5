"""GroupNorm with what stands around it, as one operation for compilers."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

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
