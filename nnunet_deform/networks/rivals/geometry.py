"""Token grids, and the convolutions that the rivals share, in two or three dimensions."""

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_dim_to_conv_op,
    get_matching_batchnorm,
    get_matching_convtransp,
    get_matching_instancenorm,
)
from torch import Tensor, nn

from nnunet_deform.layers.residual import ConvStyle

LEAKY_RELU_SLOPE = 0.01

Sizes = Sequence[Sequence[int]]


def token_grids(patch_size: Sequence[int], strides: Sizes) -> list[list[int]]:
    """The size of the map after each of the strides, rounded up."""
    grids: list[list[int]] = []
    size = list(patch_size)
    for stride in strides:
        size = [-(-s // step) for s, step in zip(size, stride, strict=True)]
        grids.append(size)
    return grids


def total_stride(strides: Sizes) -> list[int]:
    """The product of the strides on each axis."""
    total = [1] * len(strides[0])
    for stride in strides:
        total = [one * other for one, other in zip(total, stride, strict=True)]
    return total


def halving_conv(in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]) -> nn.Module:
    """A convolution of odd kernel, with bias, whose output has ceil(size / stride) voxels on each axis."""
    conv_op = convert_dim_to_conv_op(len(kernel_size))
    padding = tuple(k // 2 for k in kernel_size)
    return conv_op(in_channels, out_channels, tuple(kernel_size), tuple(stride), padding)


def patch_conv(in_channels: int, out_channels: int, stride: Sequence[int], *, bias: bool) -> nn.Module:
    """A convolution with kernel = stride."""
    return convert_dim_to_conv_op(len(stride))(in_channels, out_channels, tuple(stride), tuple(stride), bias=bias)


def expanding_conv(in_channels: int, out_channels: int, stride: Sequence[int], *, bias: bool) -> nn.Module:
    """A transposed convolution with kernel = stride."""
    conv_op = get_matching_convtransp(dimension=len(stride))
    return conv_op(in_channels, out_channels, tuple(stride), tuple(stride), bias=bias)


def residual_style(ndim: int, *, batch_norm: bool) -> ConvStyle:
    """Of UNETR's residual block: convolutions without bias, BatchNorm or InstanceNorm without affine, LeakyReLU."""
    return ConvStyle(
        conv_op=convert_dim_to_conv_op(ndim),
        conv_bias=False,
        norm_op=get_matching_batchnorm(dimension=ndim) if batch_norm else get_matching_instancenorm(dimension=ndim),
        # In place, or autograd would keep its input as well.
        nonlin_kwargs={"negative_slope": LEAKY_RELU_SLOPE, "inplace": True},
    )


def cropped_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, *spatial] without what exceeds ``size`` at the end of each axis."""
    return x[(..., *map(slice, size))]


def truncated_normal_linears(module: nn.Module) -> None:
    """For ``apply``: weights of linear layers from a truncated normal distribution of 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(largest: float, blocks: int) -> list[float]:
    """Growing linearly from 0 to ``largest``."""
    return torch.linspace(0, largest, blocks, device="cpu").tolist()
