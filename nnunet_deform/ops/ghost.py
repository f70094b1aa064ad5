"""Ghost features, as one operation for compilers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nnunet_deform.ops.checks import convolved_size
from nnunet_deform.ops.few_channels import concatenate_channels, few_channel_conv
from nnunet_deform.ops.layouts import CHANNELS_LAST


def opaque_ghost_features(
    input: Tensor, primary: Tensor, ghost: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """A convolution, and behind its channels those of a depthwise convolution of them; [B, C, *spatial] -> [B, 2 P,
    *spatial / stride], channels last.

    Args:
        primary, ghost: weights, [P, C, *kernel] and [P, 1, *kernel], without bias.
        stride: of the first convolution; the second has none.
        padding: of both.
    """
    return torch.ops.nnunet_deform.ghost_features(input, primary, ghost, list(stride), list(padding))


@torch.library.custom_op(
    "nnunet_deform::ghost_features",
    mutates_args=(),
    schema="(Tensor input, Tensor primary, Tensor ghost, int[] stride, int[] padding) -> Tensor",
)
def _forward(input, primary, ghost, stride, padding):
    first = few_channel_conv(input, primary, None, stride, padding)
    second = few_channel_conv(first, ghost, None, [1] * len(stride), padding, groups=len(ghost))
    return concatenate_channels(first, second).contiguous(memory_format=CHANNELS_LAST[len(stride)])


@_forward.register_fake
def _(input, primary, ghost, stride, padding):
    size = convolved_size(input.shape[2:], primary.shape[2:], stride, padding, [1] * len(stride))
    output = input.new_empty((len(input), 2 * len(primary), *size))
    return output.contiguous(memory_format=CHANNELS_LAST[len(stride)])


@torch.library.custom_op(
    "nnunet_deform::ghost_features_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor output, Tensor primary, Tensor ghost, int[] stride, int[] padding, "
    "bool of_image) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad, input, output, primary, ghost, stride, padding, of_image):
    """The gradients of input, an empty tensor unless asked ``of_image``, and of both weights."""
    backward, split = torch.ops.nnunet_deform.few_channel_conv_backward, len(primary)
    no_stride = [1] * len(stride)
    of_first, of_ghost, _ = backward(
        grad[:, split:], output[:, :split], ghost, no_stride, padding, split, [True, True, False]
    )
    of_first.add_(grad[:, :split])
    of_input, of_primary, _ = backward(of_first, input, primary, stride, padding, 1, [of_image, True, False])
    return of_input, of_primary, of_ghost


@_backward.register_fake
def _(grad, input, output, primary, ghost, stride, padding, of_image):
    of_input = input.new_empty(input.shape if of_image else 0)
    if of_image:
        of_input = of_input.contiguous(memory_format=CHANNELS_LAST[len(stride)])
    return of_input, torch.empty_like(primary), torch.empty_like(ghost)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    input, primary, ghost, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(input, output, primary, ghost)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_image = ctx.needs_input_grad[0]
    of_input, *of_weights = torch.ops.nnunet_deform.ghost_features_backward(
        grad, *ctx.saved_tensors, ctx.stride, ctx.padding, of_image
    )
    return of_input if of_image else None, *of_weights, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
