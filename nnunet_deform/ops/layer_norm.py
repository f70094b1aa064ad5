"""LayerNorm, as one operation for compilers."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def opaque_layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axis, [..., C] -> the same, contiguous.

    A compiler sees one operation, and one for the backward pass, which keeps the input and the statistics.
    """
    return torch.ops.nnunet_deform.layer_norm(input, weight, bias, eps)[0]


@torch.library.custom_op(
    "nnunet_deform::layer_norm",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _forward(input, weight, bias, eps):
    """The result, and mean and 1 / standard deviation of each row, [..., 1]."""
    return torch.native_layer_norm(input.contiguous(), weight.shape, weight, bias, eps)


@_forward.register_fake
def _(input, weight, bias, eps):
    statistics = input.new_empty((*input.shape[:-1], 1), dtype=torch.promote_types(input.dtype, torch.float32))
    return input.new_empty(input.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op(
    "nnunet_deform::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor mean, Tensor scale, Tensor weight, Tensor bias) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(grad, input, mean, scale, weight, bias):
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), input.contiguous(), weight.shape, mean, scale, weight, bias, [True, True, True]
    )


@_backward.register_fake
def _(grad, input, mean, scale, weight, bias):
    return input.new_empty(input.shape), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, _ = inputs
    _, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.save_for_backward(input, mean, scale, weight, bias)


def _gradients(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *torch.ops.nnunet_deform.layer_norm_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
