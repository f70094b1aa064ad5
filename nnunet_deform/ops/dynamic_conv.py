"""Convolution with kernels of each sample's own, in two and three dimensions."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_deform.ops.checks import check_dynamic_conv, spatial_argument

ConvImpl = Literal["auto", "grouped", "loop"]

# Up to this batch a CUDA device gets a loop of ordinary 3D convolutions: cuDNN is known to be slow at 3D convolutions
# with few groups in half precision. A guess on the safe side until both forms are measured on a GPU.
LARGEST_LOOP = 4


def dynamic_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    conv_impl: ConvImpl = "auto",
) -> Tensor:
    """Convolution of images with kernels of each sample's own. See :func:`dynamic_conv3d`; here there are two axes."""
    return _dynamic_conv(2, input, weight, bias, stride, padding, dilation, groups, conv_impl)


def dynamic_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    conv_impl: ConvImpl = "auto",
) -> Tensor:
    r"""Convolution of volumes with kernels of each sample's own: :math:`y_b = W_b * x_b + c_b`.

    Args:
        input: [B, C, D, H, W] with at least one sample.
        weight: [B, C_out, C/groups, kD, kH, kW].
        bias: [B, C_out].
        stride, padding, dilation: one integer, or one for each axis.
        groups: of the convolution of each sample.
        conv_impl: "grouped" folds the batch into the groups of one convolution, "loop" runs one ordinary convolution
            for each sample; they differ in speed only. "auto" takes the grouped form, which was never slower on the
            CPU; on CUDA it loops over a 3D batch of up to 4, which is the careful choice and not a measured one.

    Returns:
        [B, C_out, D', H', W'].

    Raises:
        ValueError: shapes that do not go together, or an unknown ``conv_impl``.
    """
    return _dynamic_conv(3, input, weight, bias, stride, padding, dilation, groups, conv_impl)


def _dynamic_conv(
    ndim: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    conv_impl: ConvImpl,
) -> Tensor:
    stride = spatial_argument("stride", stride, ndim, 1)
    padding = spatial_argument("padding", padding, ndim, 0)
    dilation = spatial_argument("dilation", dilation, ndim, 1)
    check_dynamic_conv(input, weight, bias, groups, ndim)
    conv = F.conv2d if ndim == 2 else F.conv3d
    batch, out_channels = weight.shape[:2]
    if _form(conv_impl, input, ndim) == "loop":
        biases = [None] * batch if bias is None else bias.unbind()
        samples = zip(input.split(1), weight.unbind(), biases, strict=True)
        return torch.cat([conv(x, w, b, stride, padding, dilation, groups) for x, w, b in samples])
    folded = input.reshape(1, batch * input.shape[1], *input.shape[2:])
    folded_bias = None if bias is None else bias.flatten()
    output = conv(folded, weight.flatten(0, 1), folded_bias, stride, padding, dilation, batch * groups)
    return output.reshape(batch, out_channels, *output.shape[2:])


def _form(conv_impl: ConvImpl, input: Tensor, ndim: int) -> Literal["grouped", "loop"]:
    if conv_impl == "auto":
        return "loop" if input.is_cuda and ndim == 3 and input.shape[0] <= LARGEST_LOOP else "grouped"
    if conv_impl not in ("grouped", "loop"):
        raise ValueError(f"conv_impl={conv_impl!r} must be 'auto', 'grouped' or 'loop'.")
    return conv_impl
