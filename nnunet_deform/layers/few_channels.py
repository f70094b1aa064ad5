"""Modules for networks of few channels: convolution, normalisation, resampling, and products in place in prediction."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers.norm import GroupNorm
from nnunet_deform.layers.recomputation import may_keep_less
from nnunet_deform.ops import (
    compiled_on_cpu,
    few_channel_conv,
    group_norm_silu,
    opaque_group_norm,
    opaque_mixture,
    resample_linear,
)

NORM_GROUPS = 4


class FewChannelConv2d(nn.Conv2d):
    """``nn.Conv2d`` through :func:`nnunet_deform.ops.few_channel_conv`; no dilation, zeros as padding."""

    def forward(self, input: Tensor) -> Tensor:
        return few_channel_conv(input, self.weight, self.bias, self.stride, self.padding, self.groups)


class FewChannelConv3d(nn.Conv3d):
    """``nn.Conv3d`` through :func:`nnunet_deform.ops.few_channel_conv`; no dilation, zeros as padding."""

    def forward(self, input: Tensor) -> Tensor:
        return few_channel_conv(input, self.weight, self.bias, self.stride, self.padding, self.groups)


def same_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int] | None = None,
    groups: int = 1,
    bias: bool = True,
) -> nn.Module:
    """A convolution of odd kernel that keeps the spatial size, or divides it by the stride; 2D or 3D by the kernel."""
    conv = FewChannelConv2d if len(kernel_size) == 2 else FewChannelConv3d
    return conv(
        in_channels,
        out_channels,
        tuple(kernel_size),
        stride=1 if stride is None else tuple(stride),
        padding=tuple(k // 2 for k in kernel_size),
        groups=groups,
        bias=bias,
    )


def pointwise_conv(ndim: int, in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Module:
    """A convolution of kernel 1: each voxel by itself."""
    return same_conv(in_channels, out_channels, [1] * ndim, bias=bias)


class NormAct(nn.Sequential):
    """GroupNorm with four groups, then SiLU; [B, C, *spatial] -> the same. A training step keeps its input alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(GroupNorm(NORM_GROUPS, channels), _SiLU())

    def forward(self, x: Tensor) -> Tensor:
        if compiled_on_cpu(x):
            norm = self[0]
            return opaque_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu")
        if may_keep_less(self):
            norm = self[0]
            return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return super().forward(x)


class _SiLU(nn.Module):
    """SiLU, in place in prediction: it follows a norm, whose result nobody else holds."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def multiplied(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor; in prediction in the memory of x, which must be the caller's own."""
    return x * factor if torch.is_grad_enabled() else x.mul_(factor)


def mixture(logits: Tensor, maps: Iterable[Tensor]) -> Tensor:
    """sum_j softmax_j(logits) maps_j, [B, N, *spatial] and N of [B, C, *spatial] -> [B, C, *spatial].

    In prediction in the memory of the first map, which must be the caller's own; the others may be made one by one.
    """
    if compiled_on_cpu(logits):
        return opaque_mixture(logits, list(maps))
    shares, maps = logits.softmax(1).split(1, dim=1), iter(maps)
    mixed = multiplied(next(maps), shares[0])
    for one, share in zip(maps, shares[1:], strict=True):
        if not torch.is_grad_enabled():
            mixed.addcmul_(one, share)
        elif one.dtype == mixed.dtype:
            mixed = torch.addcmul(mixed, one, share)
        else:  # autocast would have addcmul keep a wide copy of the map
            mixed = mixed + one * share
    return mixed


def resampled(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, *spatial] -> [B, C, *size], linear along each axis, voxels as cells (``align_corners=False``)."""
    if x.shape[2:] == torch.Size(size):
        return x
    return resample_linear(x, size)


def spatial_mean(x: Tensor) -> Tensor:
    """[B, C, *spatial] -> [B, C], at least in float32."""
    return x.mean(tuple(range(2, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))
