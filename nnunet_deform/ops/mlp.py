"""Two matrix products around a GELU, as one operation for compilers."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def mlp(input: Tensor, expand: Tensor, expand_bias: Tensor, reduce: Tensor, reduce_bias: Tensor) -> Tensor:
    """reduce(gelu(expand(x))): [..., C] -> [..., C], with weights [H, C] and [C, H].

    Compiled, it is one operation that keeps the hidden layer once, before the GELU.
    """
    if torch.compiler.is_dynamo_compiling():
        device = input.device.type
        arguments = (input, expand, expand_bias, reduce, reduce_bias)
        if torch.is_autocast_enabled(device):
            arguments = tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in arguments)
        return torch.ops.nnunet_deform.mlp(*arguments)[0]
    return F.linear(F.gelu(F.linear(input, expand, expand_bias)), reduce, reduce_bias)


@torch.library.custom_op(
    "nnunet_deform::mlp",
    mutates_args=(),
    schema="(Tensor input, Tensor expand, Tensor expand_bias, Tensor reduce, Tensor reduce_bias) -> (Tensor, Tensor)",
)
def _forward(input, expand, expand_bias, reduce, reduce_bias):
    """The output and the hidden layer before the GELU."""
    hidden = F.linear(input, expand, expand_bias)
    return F.linear(F.gelu(hidden), reduce, reduce_bias), hidden


@_forward.register_fake
def _(input, expand, expand_bias, reduce, reduce_bias):
    return input.new_empty((*input.shape[:-1], len(reduce))), input.new_empty((*input.shape[:-1], len(expand)))


@torch.library.custom_op(
    "nnunet_deform::mlp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor hidden, Tensor expand, Tensor reduce) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, input, hidden, expand, reduce):
    rows, inputs = grad.flatten(0, -2), input.flatten(0, -2)
    hidden = hidden.flatten(0, -2)
    of_reduce = rows.mT @ F.gelu(hidden)
    of_hidden = torch.ops.aten.gelu_backward(rows @ reduce, hidden)
    of_input = (of_hidden @ expand).view(input.shape)
    return of_input, of_hidden.mT @ inputs, of_hidden.sum(0), of_reduce, rows.sum(0)


@_backward.register_fake
def _(grad, input, hidden, expand, reduce):
    likes = (expand.shape, expand.shape[:1], reduce.shape, reduce.shape[:1])
    return input.new_empty(input.shape), *(expand.new_empty(shape) for shape in likes)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input, expand, _, reduce, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(input, hidden, expand, reduce)


def _gradients(ctx: FunctionCtx, grad: Tensor, grad_hidden: Tensor | None) -> tuple[Tensor, ...]:
    return torch.ops.nnunet_deform.mlp_backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup_context)
