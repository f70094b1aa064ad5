"""Deformable convolution in two and three dimensions: argument checks, registration with torch, gradients.

The equations, the convention at borders and integers, and the tolerances are in the README beside this file. The
arithmetic is in :mod:`nnunet_deform.ops.backends`.
"""

from collections.abc import Sequence
from typing import List, Tuple  # noqa: UP035

import torch
from torch import Tensor

from nnunet_deform.ops.autocast import autocast_dtype, autocast_to
from nnunet_deform.ops.backends import choose_backend
from nnunet_deform.ops.backends.triton_ import backward as triton_backward
from nnunet_deform.ops.backends.triton_ import forward as triton_forward
from nnunet_deform.ops.checks import check_deform_conv, convolved_size, spatial_argument
from nnunet_deform.ops.layouts import layout_of


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Deformable convolution of images, with the arguments and conventions of ``torchvision.ops.deform_conv2d``.

    As :func:`deform_conv3d` with two axes, (height, width): input [B, C, H, W], offset [B, G * taps * 2, H_out, W_out]
    in pixels, weight [C_out, C / groups, kH, kW], bias [C_out] -> [B, C_out, H_out, W_out].
    """
    return _deform_conv(2, input, offset, weight, bias, stride, padding, dilation)


def deform_conv3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    r"""Deformable convolution of volumes (Dai et al. 2017 with a third axis; DeformUX-Net, eq. 1-2).

    .. math:: y(v) = b + \sum_t W_t \, X\big(v \cdot stride - padding + t \cdot dilation + o_t(v)\big)

    X interpolates trilinearly. Voxels outside the volume are zero, so values fade linearly to zero within one voxel of
    the border; a position at or beyond -1 or the size on any axis samples exactly zero and passes no gradient, and so
    does one that is not a number. At integer positions the derivative is the one from the right.

    Args:
        input: values, [B, C, D, H, W].
        offset: displacement in voxels of each tap at each output voxel, [B, G*K*3, D', H', W'] for G deformable groups
            (each serves C/G neighbouring channels) and K taps in row-major order. Channel ``(g*K + tap)*3 + axis``
            moves along axis 0 (depth), 1 (height) or 2 (width). Its dtype is the input's, or float32 beside
            half-precision values.
        weight: [C_out, C/groups, kD, kH, kW]. The shape says the number of groups: C_out = C and one channel per group
            is a depthwise convolution, C channels per group a dense one.
        bias: [C_out].
        stride, padding, dilation: one integer, or one for each axis.

    Returns:
        [B, C_out, D', H', W'] in the input's dtype; channels last in memory if the input is.

    Under autocast the values are cast like a convolution's, the offset to float32. Coordinates are always float32 or
    float64. There is no second derivative.

    Raises:
        ValueError, TypeError, RuntimeError: shapes, dtypes or devices that do not go together.
    """
    return _deform_conv(3, input, offset, weight, bias, stride, padding, dilation)


def _deform_conv(
    ndim: int,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    stride = spatial_argument("stride", stride, ndim, 1)
    padding = spatial_argument("padding", padding, ndim, 0)
    dilation = spatial_argument("dilation", dilation, ndim, 1)
    dtype = autocast_dtype(input.device.type)
    if dtype is not None:
        input, weight = autocast_to(input, dtype), autocast_to(weight, dtype)
        bias = bias if bias is None else autocast_to(bias, dtype)
        offset = autocast_to(offset, torch.float32)
    check_deform_conv(input, offset, weight, bias, stride, padding, dilation)
    return torch.ops.nnunet_deform.deform_conv(input, offset, weight, bias, stride, padding, dilation)


# torch infers the operators' schemas from these. Up to 2.13 a triton_op has no other way to get one, and in 2.6 the
# inference knows no builtin generics.
_Ints = List[int]  # noqa: UP006
_Bools = List[bool]  # noqa: UP006
_Gradients = Tuple[Tensor, Tensor, Tensor, Tensor]  # noqa: UP006


# Below torch 2.6, which is not supported, there is none; the package can be imported and says so.
_triton_op = getattr(torch.library, "triton_op", torch.library.custom_op)


# torch.compile looks into a triton_op and so sees the Triton kernels. The other backends' work it cannot see, or, for
# plain tensor operations, had better not: they are operators of their own below.
@_triton_op("nnunet_deform::deform_conv", mutates_args=())
def _forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, stride: _Ints, padding: _Ints, dilation: _Ints
) -> Tensor:
    if input.shape[0] == 0:
        return _empty_output(input, weight, stride, padding, dilation)
    name, _ = choose_backend(input, offset, weight)
    if name != "triton":
        return _opaque_forward(input, offset, weight, bias, stride, padding, dilation)
    output = triton_forward(input, offset, weight, bias, stride, padding, dilation)
    return output.contiguous(memory_format=layout_of(input))


@torch.library.custom_op("nnunet_deform::deform_conv_opaque", mutates_args=())
def _opaque_forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, stride: _Ints, padding: _Ints, dilation: _Ints
) -> Tensor:
    _, backend = choose_backend(input, offset, weight)
    output = backend.forward(input, offset, weight, bias, stride, padding, dilation)
    return output.contiguous(memory_format=layout_of(input))


@_opaque_forward.register_fake
@_forward.register_fake
def _(input, offset, weight, bias, stride, padding, dilation):
    return _empty_output(input, weight, stride, padding, dilation)


def _empty_output(input, weight, stride, padding, dilation):
    out_size = convolved_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return torch.empty(
        (input.shape[0], weight.shape[0], *out_size),
        dtype=input.dtype,
        device=input.device,
        memory_format=layout_of(input),
    )


@_triton_op("nnunet_deform::deform_conv_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    needs: _Bools,
) -> _Gradients:
    """The gradients of input, offset, weight and bias; an empty tensor where ``needs`` says that nobody asks."""
    if input.shape[0] == 0:
        return tuple(gradient.zero_() for gradient in _empty_gradients(input, offset, weight, needs))
    name, _ = choose_backend(input, offset, weight)
    if name != "triton":
        return _opaque_backward(grad_output, input, offset, weight, stride, padding, dilation, needs)
    gradients = triton_backward(grad_output, input, offset, weight, stride, padding, dilation, needs)
    return _as_results(gradients, input, offset, weight)


@torch.library.custom_op("nnunet_deform::deform_conv_opaque_backward", mutates_args=())
def _opaque_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    needs: _Bools,
) -> _Gradients:
    _, backend = choose_backend(input, offset, weight)
    gradients = backend.backward(grad_output, input, offset, weight, stride, padding, dilation, needs)
    return _as_results(gradients, input, offset, weight)


def _as_results(gradients, input, offset, weight):
    formats = (layout_of(input), *[torch.contiguous_format] * 3)
    return tuple(
        like.new_empty(0) if gradient is None else gradient.contiguous(memory_format=memory_format)
        for gradient, like, memory_format in zip(gradients, (input, offset, weight, weight), formats, strict=True)
    )


@_opaque_backward.register_fake
@_backward.register_fake
def _(grad_output, input, offset, weight, stride, padding, dilation, needs):
    return _empty_gradients(input, offset, weight, needs)


def _empty_gradients(input, offset, weight, needs):
    likes = (input, offset, weight, weight)
    shapes = (input.shape, offset.shape, weight.shape, weight.shape[:1])
    formats = (layout_of(input), *[torch.contiguous_format] * 3)
    return tuple(
        torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
        if need
        else like.new_empty(0)
        for like, shape, memory_format, need in zip(likes, shapes, formats, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    input, offset, weight, _, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(input, offset, weight)


def _gradients(ctx, grad_output):
    needs = list(ctx.needs_input_grad[:4])
    gradients = torch.ops.nnunet_deform.deform_conv_backward(
        grad_output, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.dilation, needs
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


def _no_second_derivative(ctx, *grad_outputs):
    raise NotImplementedError(
        "deform_conv has no second derivative; call backward without create_graph, or detach its gradients."
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_no_second_derivative)
