"""A residual block of convolutions and instance norms that keeps two feature maps for the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_deform.ops.autocast import autocast_dtype, autocast_to


def residual_block(
    parts: Sequence[Tensor],
    first: Tensor,
    second: Tensor,
    shortcut: Tensor | None,
    *,
    padding: Sequence[int],
    eps: Sequence[float],
    negative_slope: float,
) -> Tensor:
    r"""leaky(n(second * leaky(n(first * x))) + n(shortcut * x)), with n the instance norm without affine.

    Autograd keeps the parts, the activation between the convolutions and the output, which what follows keeps anyway.
    That is enough: leaky ReLU can be inverted, so the output of the first norm is got from its activation, that of the
    second from the block's output less the shortcut, and a norm's backward pass needs its own output and

    .. math:: 1 / \sqrt{variance + eps}

    for each channel. The parts are put together again, and the shortcut is computed again. Without recomputation the
    outputs of all three convolutions would be kept as well, and the parts twice. There is no second derivative.

    Args:
        parts: of the input along the channels, [B, C_i, *spatial] each.
        first, second: weights of the convolutions, which keep the spatial size; no bias, the norm takes it out.
        shortcut: weight of a convolution of kernel 1, or None for the input itself.
        padding: of both convolutions, one value for each spatial axis.
        eps: of the norms behind first, second and shortcut.
        negative_slope: of leaky ReLU, more than 0.

    Returns:
        [B, C_out, *spatial]. Under autocast everything is cast as a convolution's arguments are.
    """
    dtype = autocast_dtype(parts[0].device.type)
    weights = [None if weight is None else autocast_to(weight, dtype) for weight in (first, second, shortcut)]
    parts = [autocast_to(part, dtype) for part in parts]
    return _ResidualBlock.apply(list(padding), list(eps), negative_slope, *weights, *parts)


def _conv(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    return (F.conv2d if weight.ndim == 4 else F.conv3d)(x, weight, None, 1, list(padding))


def _standardized(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The instance norm, and mean and 1 / standard deviation of each channel, [B * C]."""
    planes = x.contiguous().view(1, -1, *x.shape[2:])
    output, mean, scale = torch.native_batch_norm(planes, None, None, None, None, True, 0.0, eps)
    return output.view(x.shape), mean, scale


def _standardized_backward(grad: Tensor, output: Tensor, scale: Tensor) -> Tensor:
    """The gradient of what an instance norm was given, from its own output and 1 / standard deviation."""
    planes = (1, -1, *grad.shape[2:])
    # The output is its own norm: mean 0 and deviation 1. The factor stands where a learned one would.
    statistics = torch.zeros_like(scale), torch.ones_like(scale)
    of_input, _, _ = torch.ops.aten.native_batch_norm_backward(
        *(grad.contiguous().view(planes), output.view(planes), scale, None, None, *statistics, True, 0.0),
        [True, False, False],
    )
    return of_input.view(grad.shape)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    ones, zeros = [1] * len(padding), [0] * len(padding)
    mask = [needs_input, needs_weight, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, ones, padding, ones, False, zeros, 1, mask)[:2]


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        padding: list[int],
        eps: list[float],
        negative_slope: float,
        first: Tensor,
        second: Tensor,
        shortcut: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        x = _together(parts)
        between, _, first_scale = _standardized(_conv(x, first, padding), eps[0])
        between = F.leaky_relu_(between, negative_slope)
        output, _, second_scale = _standardized(_conv(between, second, padding), eps[1])
        mean = scale = None
        if shortcut is None:
            output += x
        else:
            other, mean, scale = _standardized(_conv(x, shortcut, [0] * len(padding)), eps[2])
            output += other
        output = F.leaky_relu_(output, negative_slope)
        ctx.save_for_backward(first, second, shortcut, between, output, first_scale, second_scale, mean, scale, *parts)
        ctx.padding, ctx.negative_slope = padding, negative_slope
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second, shortcut, between, output, first_scale, second_scale, mean, scale, *parts = ctx.saved_tensors
        padding, slope = ctx.padding, ctx.negative_slope
        _, _, _, needs_first, needs_second, needs_shortcut, *needs_parts = ctx.needs_input_grad
        needs_input = any(needs_parts)
        channels = [part.shape[1] for part in parts]
        x = _together(parts)
        # Of a block that is computed again, these hold the only references, and what follows is its largest moment.
        del parts

        grad = torch.ops.aten.leaky_relu_backward(grad, output, slope, True)
        of_input = of_shortcut = None
        normed = F.leaky_relu(output, 1 / slope)
        del output
        if shortcut is None:
            normed -= x
            of_input = grad
        else:
            other = _conv(x, shortcut, [0] * len(padding)).contiguous()
            per_channel = (*other.shape[:2], *[1] * len(padding))
            other = other.sub_(mean.view(per_channel)).mul_(scale.view(per_channel))
            normed -= other
            of_other = _standardized_backward(grad, other, scale)
            del other
            of_input, of_shortcut = _conv_backward(
                of_other, x, shortcut, [0] * len(padding), needs_input, needs_shortcut
            )
            del of_other
        grad = _standardized_backward(grad, normed, second_scale)
        del normed
        grad, of_second = _conv_backward(grad, between, second, padding, True, needs_second)
        grad = torch.ops.aten.leaky_relu_backward(grad, between, slope, True)
        normed = F.leaky_relu(between, 1 / slope)
        del between
        grad = _standardized_backward(grad, normed, first_scale)
        del normed
        through, of_first = _conv_backward(grad, x, first, padding, needs_input, needs_first)
        of_parts: Sequence[Tensor | None] = [None] * len(channels)
        if needs_input:
            of_parts = through.add_(of_input).split(channels, dim=1)
        return None, None, None, of_first, of_second, of_shortcut, *of_parts
