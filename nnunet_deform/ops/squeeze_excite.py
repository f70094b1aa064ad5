"""Squeeze and excite, as one operation for compilers."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nnunet_deform.ops.layouts import layout_of


def opaque_squeeze_excite(
    input: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor, excite_bias: Tensor
) -> Tensor:
    """x * sigmoid(excite(silu(squeeze(mean(x))))), the mean over space; [B, C, *spatial] -> the same.

    Weights are [H, C] and [C, H]; the gate is computed in their dtype. A compiler sees one operation, and one for the
    backward pass.
    """
    return torch.ops.nnunet_deform.squeeze_excite(input, squeeze, squeeze_bias, excite, excite_bias)[0]


def _spatial(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(2, tensor.ndim))


def _over_space(vector: Tensor, like: Tensor) -> Tensor:
    """[B, C] -> [B, C, 1, ...], in another tensor's dtype."""
    return vector.to(like.dtype).view(*vector.shape, *[1] * (like.ndim - 2))


@torch.library.custom_op(
    "nnunet_deform::squeeze_excite",
    mutates_args=(),
    schema="(Tensor input, Tensor squeeze, Tensor squeeze_bias, Tensor excite, Tensor excite_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(input, squeeze, squeeze_bias, excite, excite_bias):
    """The result, the means, the hidden layer before its SiLU, and the gate."""
    mean = input.mean(_spatial(input), dtype=squeeze.dtype)
    hidden = F.linear(mean, squeeze, squeeze_bias)
    gate = F.linear(F.silu(hidden), excite, excite_bias).sigmoid()
    return (input * _over_space(gate, input)).contiguous(memory_format=layout_of(input)), mean, hidden, gate


@_forward.register_fake
def _(input, squeeze, squeeze_bias, excite, excite_bias):
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input))
    batch, (hidden, channels) = len(input), squeeze.shape
    return output, *(squeeze.new_empty((batch, size)) for size in (channels, hidden, channels))


@torch.library.custom_op(
    "nnunet_deform::squeeze_excite_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor mean, Tensor hidden, Tensor gate, Tensor squeeze, Tensor excite) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, input, mean, hidden, gate, squeeze, excite):
    of_gate = (grad * input).sum(_spatial(input), dtype=gate.dtype)
    of_logits = of_gate * gate * (1 - gate)
    of_hidden = torch.ops.aten.silu_backward(of_logits @ excite, hidden)
    of_mean = of_hidden @ squeeze / input[0, 0].numel()
    of_input = torch.addcmul(_over_space(of_mean, input), grad, _over_space(gate, input))
    of_weights = of_hidden.mT @ mean, of_hidden.sum(0), of_logits.mT @ F.silu(hidden), of_logits.sum(0)
    return of_input.contiguous(memory_format=layout_of(input)), *of_weights


@_backward.register_fake
def _(grad, input, mean, hidden, gate, squeeze, excite):
    of_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input))
    shapes = (squeeze.shape, squeeze.shape[:1], excite.shape, excite.shape[:1])
    return of_input, *(squeeze.new_empty(shape) for shape in shapes)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    input, squeeze, _, excite, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, *output[1:], squeeze, excite)


def _gradients(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    return torch.ops.nnunet_deform.squeeze_excite_backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup_context)
