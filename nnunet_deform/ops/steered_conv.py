"""Deformable convolution that keeps what its features and offsets are computed from, in their place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_deform.ops.autocast import autocast_as_now, autocast_dtype, autocast_to
from nnunet_deform.ops.deform_conv import deform_conv2d, deform_conv3d


def steered_deform_conv(
    prepared: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding: Sequence[int],
    parameters: Sequence[Tensor],
) -> Tensor:
    """``deform_conv(*prepared(x), weight, bias, padding=padding)`` in two or three dimensions, by the weight's axes.

    Autograd keeps x; ``prepared`` is called again in the backward pass, the operator is not. The offsets alone are as
    many numbers for each voxel as the kernel has taps times axes, in float32. There is no second derivative.

    Args:
        prepared: of x makes the features [B, C, *spatial] and the offsets [B, G * taps * axes, *out] in voxels.
        x: [B, C, *spatial].
        weight, bias, padding: as in :func:`nnunet_deform.ops.deform_conv3d`, without stride and dilation.
        parameters: what ``prepared`` uses beside x and may need gradients.
    """
    dtype = autocast_dtype(x.device.type)

    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        features, offset = prepared(x)
        return autocast_to(features, dtype), offset

    return _SteeredConv.apply(cast, list(padding), x, autocast_to(weight, dtype), autocast_to(bias, dtype), *parameters)


class _SteeredConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepared: Callable[[Tensor], tuple[Tensor, Tensor]],
        padding: list[int],
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.prepared, ctx.padding = prepared, padding
        ctx.autocast = autocast_as_now(x.device.type)
        # Beside what is saved, which guards against changes: hooks may have handed out copies of it.
        ctx.parameters = parameters
        ctx.save_for_backward(x, weight, *parameters)
        op = deform_conv2d if weight.ndim == 4 else deform_conv3d
        return op(*prepared(x), weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors[:2]
        needs_x, needs_weight, needs_bias, *needs_parameters = ctx.needs_input_grad[2:]
        with torch.enable_grad(), ctx.autocast():
            leaf = x.detach().requires_grad_(needs_x)
            made = ctx.prepared(leaf)
        needs = [*(one.requires_grad for one in made), needs_weight, needs_bias]
        ones = [1] * len(ctx.padding)
        gradients = torch.ops.nnunet_deform.deform_conv_backward(
            grad, *(one.detach() for one in made), weight, ones, ctx.padding, ones, needs
        )
        *of_made, of_weight, of_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
        wanted = [one for one, need in zip((leaf, *ctx.parameters), (needs_x, *needs_parameters), strict=True) if need]
        through = [(one, of_one) for one, of_one in zip(made, of_made, strict=True) if of_one is not None]
        found = iter(torch.autograd.grad([m for m, _ in through], wanted, [g for _, g in through]) if through else ())
        return (
            *(None, None, next(found) if needs_x else None, of_weight, of_bias),
            *(next(found) if need else None for need in needs_parameters),
        )
