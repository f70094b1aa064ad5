"""What InstanceNorm and GroupNorm have in common, in few operations, for compilers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def standardize(input: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    r"""(x - mean) / sqrt(variance + eps) over these axes, in at least float32; the same shape.

    With the result :math:`\hat x` and its gradient g, that of x is

    .. math:: \frac{g - mean(g) - \hat x \, mean(g \hat x)}{\sqrt{variance + eps}}

    torch's norms are faster where nothing is compiled. torch.compile takes their backward passes apart into more
    operations than these. There is no second derivative.

    Args:
        input: [B, C, *spatial], or any other shape.
        axes: those over which mean and variance are taken, such as the spatial ones.
        eps: added to the variance, in the square of the input's unit.

    Returns:
        The input's shape, in float32 or, of float64, float64.
    """
    return _Standardize.apply(input, list(axes), eps)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: list[int], eps: float) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(values, axes, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, mean, scale)
        ctx.axes = axes
        return (values - mean) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, mean, scale = ctx.saved_tensors
        standardized = (x.to(mean.dtype) - mean) * scale
        along = (grad * standardized).mean(ctx.axes, keepdim=True)
        return ((grad - grad.mean(ctx.axes, keepdim=True) - standardized * along) * scale).to(x.dtype), None, None
