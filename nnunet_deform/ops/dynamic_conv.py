"""Convolution with kernels of each sample's own, in two and three dimensions: given, or mixed of common ones."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_deform.ops.autocast import autocast_disabled, autocast_dtype, autocast_to
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
    """Convolution of images with kernels of each sample's own.

    As :func:`dynamic_conv3d` with two axes: input [B, C, H, W], weight [B, C_out, C / groups, kH, kW], bias [B, C_out]
    -> [B, C_out, H_out, W_out].
    """
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
    return _convolved(input, weight, bias, stride, padding, dilation, groups, _form(conv_impl, input, ndim))


def mixed_conv(
    input: Tensor,
    mixing: Tensor,
    kernels: Tensor,
    biases: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    conv_impl: ConvImpl = "auto",
) -> Tensor:
    r"""Dynamic convolution with kernels mixed of K common ones: :math:`y_b = (\sum_k m_{bk} W_k) * x_b + \sum_k m_{bk}
    c_k`.

    Autograd keeps the input and the mixing weights, and mixes the kernels again in the backward pass: each sample has
    as many numbers in its kernels as the convolution has weights. There is no second derivative.

    Args:
        input: [B, C, *spatial] with at least one sample.
        mixing: [B, K]; the kernels are mixed in the precision of ``kernels``, also under autocast.
        kernels: [K, C_out, C/groups, *kernel], in two or three dimensions.
        biases: [K, C_out].
        stride, padding, dilation, groups, conv_impl: as in :func:`dynamic_conv3d`, one value for each axis.

    Returns:
        [B, C_out, *spatial'], under autocast in its precision.
    """
    ndim = kernels.ndim - 3
    one_each = (
        None if common is None else common[:1].expand(len(input), *common.shape[1:]) for common in (kernels, biases)
    )
    check_dynamic_conv(input, *one_each, groups, ndim)
    form = _form(conv_impl, input, ndim)
    input = autocast_to(input, autocast_dtype(input.device.type))
    return _MixedConv.apply(input, mixing, kernels, biases, list(stride), list(padding), list(dilation), groups, form)


def _mixed_kernels(mixing: Tensor, kernels: Tensor) -> Tensor:
    """[B, K] and [K, ...] -> [B, ...], never rounded by autocast."""
    with autocast_disabled(kernels.device.type):
        return (mixing.to(kernels.dtype) @ kernels.flatten(1)).view(len(mixing), *kernels.shape[1:])


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    form: Literal["grouped", "loop"],
) -> Tensor:
    conv = F.conv2d if input.ndim == 4 else F.conv3d
    batch, out_channels = weight.shape[:2]
    if form == "loop":
        biases = [None] * batch if bias is None else bias.unbind()
        samples = zip(input.split(1), weight.unbind(), biases, strict=True)
        return torch.cat([conv(x, w, b, stride, padding, dilation, groups) for x, w, b in samples])
    folded = input.reshape(1, batch * input.shape[1], *input.shape[2:])
    folded_bias = None if bias is None else bias.flatten()
    output = conv(folded, weight.flatten(0, 1), folded_bias, stride, padding, dilation, batch * groups)
    return output.reshape(batch, out_channels, *output.shape[2:])


class _MixedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mixing: Tensor,
        kernels: Tensor,
        biases: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        form: Literal["grouped", "loop"],
    ) -> Tensor:
        ctx.geometry, ctx.groups, ctx.form = (stride, padding, dilation), groups, form
        ctx.save_for_backward(input, mixing, kernels, biases)
        weight = _mixed_kernels(mixing, kernels).to(input.dtype)
        bias = None if biases is None else _mixed_kernels(mixing, biases).to(input.dtype)
        return _convolved(input, weight, bias, stride, padding, dilation, groups, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mixing, kernels, biases = ctx.saved_tensors
        needs_input, needs_mixing, needs_kernels, needs_biases = ctx.needs_input_grad[:4]
        needs = [needs_input, needs_mixing or needs_kernels, biases is not None and (needs_mixing or needs_biases)]
        batch = len(mixing)
        weight = _mixed_kernels(mixing, kernels).to(input.dtype)
        if ctx.form == "loop":
            samples = zip(grad.split(1), input.split(1), weight, strict=True)
            by_sample = [_conv_backward(*sample, ctx.geometry, ctx.groups, needs) for sample in samples]
            of_input, of_weight, of_bias = (
                join(list(gradients)) if need else None
                for join, gradients, need in zip(
                    (torch.cat, torch.stack, torch.stack), zip(*by_sample, strict=True), needs, strict=True
                )
            )
        else:
            of_input, of_weight, of_bias = _conv_backward(
                *(tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (grad, input)),
                *(weight.flatten(0, 1), ctx.geometry, batch * ctx.groups, needs),
            )
            of_input = None if of_input is None else of_input.view(input.shape)
        of_mixing = torch.zeros_like(mixing) if needs_mixing else None
        of_common: list[Tensor | None] = []
        for of_mixed, common, need in ((of_weight, kernels, needs_kernels), (of_bias, biases, needs_biases)):
            of_mixed = None if of_mixed is None else of_mixed.view(batch, -1).to(kernels.dtype)
            if needs_mixing and of_mixed is not None:
                of_mixing += (of_mixed @ common.flatten(1).mT).to(mixing.dtype)
            of_common.append((mixing.to(kernels.dtype).mT @ of_mixed).view(common.shape) if need else None)
        return of_input, of_mixing, *of_common, None, None, None, None, None


def _conv_backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[list[int]], groups: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    output_padding = [0] * (input.ndim - 2)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [len(weight)], *geometry, False, output_padding, groups, needs
    )


def _form(conv_impl: ConvImpl, input: Tensor, ndim: int) -> Literal["grouped", "loop"]:
    if conv_impl == "auto":
        return "loop" if input.is_cuda and ndim == 3 and input.shape[0] <= LARGEST_LOOP else "grouped"
    if conv_impl not in ("grouped", "loop"):
        raise ValueError(f"conv_impl={conv_impl!r} must be 'auto', 'grouped' or 'loop'.")
    return conv_impl
