"""Convolution for networks of few channels, in the forms that a CPU runs fastest."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nnunet_deform.ops.checks import convolved_size
from nnunet_deform.ops.compiling import compiled_on_cpu
from nnunet_deform.ops.layouts import CHANNELS_LAST

# Channels in a vector of oneDNN's kernels.
_LANES = 16


def few_channel_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` or ``conv3d``, by the weight's number of axes, without dilation.

    On other devices than a CPU it is that function. On a CPU, where torch's convolutions of channels-last tensors are
    slow for some small numbers of channels, it is the same sum in another form:

    - a 1x1x1 kernel is a matrix product over the channels of each voxel;
    - between 4 and 16 input channels are filled up to 16 with zeros;
    - in prediction, where all planes of a 3D kernel together have at most 16 output channels, they are computed in one
      2D convolution and then added, each shifted by its place.

    Args:
        input: [B, C, *spatial]; channels last in memory is fastest.
        weight: [C_out, C / groups, *kernel].
        bias: [C_out].
        stride, padding: one value for each spatial axis.
        groups: as in torch.
    """
    if compiled_on_cpu(input):
        # Each form is many operations. As one they take a compiler a fraction of the time.
        return torch.ops.nnunet_deform.few_channel_conv(input, weight, bias, list(stride), list(padding), groups)
    if input.device.type != "cpu":
        return _conv(weight)(input, weight, bias, stride, padding, groups=groups)
    return _conv_on_cpu(input, weight, bias, stride, padding, groups)


def _conv(weight: Tensor) -> Callable[..., Tensor]:
    return F.conv2d if weight.ndim == 4 else F.conv3d


def _conv_on_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    conv, kernel = _conv(weight), weight.shape[2:]
    if groups != 1:
        return conv(input, weight, bias, stride, padding, groups=groups)
    if _is_matrix_product(weight, stride):
        return F.linear(input.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if fill := _fill(weight):
        return conv(F.pad(input, fill), F.pad(weight, fill), bias, stride, padding)
    same_depth = len(kernel) == 3 and 1 < kernel[0] == 2 * padding[0] + 1
    if same_depth and _is_unit(stride) and kernel[0] * len(weight) <= _LANES and _writes_in_place():
        return _conv3d_by_planes(input, weight, bias, padding)
    return conv(input, weight, bias, stride, padding)


def _is_unit(stride: Sequence[int]) -> bool:
    return all(step == 1 for step in stride)


def _is_matrix_product(weight: Tensor, stride: Sequence[int]) -> bool:
    return _is_unit(stride) and all(k == 1 for k in weight.shape[2:])


def _fill(weight: Tensor) -> list[int]:
    """The padding that fills the input channels of a tensor or its weight up to the lanes; empty if none is due."""
    channels = weight.shape[1]
    return [0, 0] * (weight.ndim - 2) + [0, _LANES - channels] if 4 < channels < _LANES else []


def _writes_in_place() -> bool:
    """Whether a tensor may be filled part by part: autograd and compilers do better with one expression."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _conv3d_by_planes(input: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    width, planes, depth = len(weight), weight.shape[2], input.shape[2]
    # [C_out, C, planes, h, w] -> [planes * C_out, C, 1, h, w]
    by_plane = F.conv3d(input, weight.movedim(2, 0).flatten(0, 1).unsqueeze(2), None, 1, (0, *padding[1:]))
    by_plane = by_plane.split(width, dim=1)
    output = by_plane[planes // 2].clone(memory_format=torch.channels_last_3d)
    for plane, terms in enumerate(by_plane):
        shift = plane - planes // 2
        if shift and abs(shift) < depth:
            # The voxel at z sees this plane's term of the voxel at z + shift.
            reach = depth - abs(shift)
            output.narrow(2, max(0, -shift), reach).add_(terms.narrow(2, max(0, shift), reach))
    return output if bias is None else output.add_(bias.view(-1, 1, 1, 1))


@torch.library.custom_op(
    "nnunet_deform::few_channel_conv",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int groups) -> Tensor",
)
def _forward(input, weight, bias, stride, padding, groups):
    return _channels_last(_conv_on_cpu(input, weight, bias, stride, padding, groups))


@_forward.register_fake
def _(input, weight, bias, stride, padding, groups):
    size = convolved_size(input.shape[2:], weight.shape[2:], stride, padding, [1] * len(stride))
    return _channels_last(input.new_empty((len(input), len(weight), *size)))


@torch.library.custom_op(
    "nnunet_deform::few_channel_conv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor weight, int[] stride, int[] padding, int groups, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(grad, input, weight, stride, padding, groups, needs):
    """The gradients of input, weight and bias; an empty tensor where ``needs`` says that nobody asks."""
    if groups == 1 and _is_matrix_product(weight, stride):
        rows, matrix = grad.movedim(1, -1), weight.flatten(1)
        of_rows = rows.flatten(0, -2)
        gradients = (
            (rows @ matrix).movedim(-1, 1) if needs[0] else None,
            (of_rows.mT @ input.movedim(1, -1).flatten(0, -2)).view(weight.shape) if needs[1] else None,
            of_rows.sum(0) if needs[2] else None,
        )
    else:
        fill, channels = _fill(weight) if groups == 1 else [], input.shape[1]
        if fill:
            input, weight = F.pad(input, fill), F.pad(weight, fill)
        no_dilation, no_output_padding = [1] * len(stride), [0] * len(stride)
        gradients = torch.ops.aten.convolution_backward(
            grad, input, weight, [len(weight)], stride, padding, no_dilation, False, no_output_padding, groups, needs
        )
        if fill:
            gradients = [g if g is None or g.ndim == 1 else g[:, :channels] for g in gradients]
    of_input, of_weight, of_bias = (grad.new_empty(0) if g is None else g for g in gradients)
    return _channels_last(of_input), of_weight.contiguous(), of_bias


@_backward.register_fake
def _(grad, input, weight, stride, padding, groups, needs):
    shapes = (input.shape, weight.shape, weight.shape[:1])
    of_input, of_weight, of_bias = (grad.new_empty(s if n else 0) for s, n in zip(shapes, needs, strict=True))
    return _channels_last(of_input), of_weight, of_bias


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=CHANNELS_LAST.get(tensor.ndim - 2, torch.contiguous_format))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    input, weight, _, ctx.stride, ctx.padding, ctx.groups = inputs
    ctx.save_for_backward(input, weight)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.nnunet_deform.few_channel_conv_backward(
        grad, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.groups, needs
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def concatenate_channels(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat`` of [B, C1, *spatial] and [B, C2, *spatial]; on a CPU the faster copy of channels-last tensors."""
    if compiled_on_cpu(first):
        return torch.ops.nnunet_deform.concatenate_channels(first, second)
    if first.device.type != "cpu" or not _writes_in_place():
        return torch.cat((first, second), dim=1)
    return _concatenated(first, second)


def _concatenated(first: Tensor, second: Tensor) -> Tensor:
    split = first.shape[1]
    output = torch.empty(
        (len(first), split + second.shape[1], *first.shape[2:]),
        dtype=torch.promote_types(first.dtype, second.dtype),
        device=first.device,
        memory_format=CHANNELS_LAST[first.ndim - 2],
    )
    output[:, :split] = first
    output[:, split:] = second
    return output


@torch.library.custom_op(
    "nnunet_deform::concatenate_channels", mutates_args=(), schema="(Tensor first, Tensor second) -> Tensor"
)
def _concatenate(first, second):
    return _concatenated(first, second)


@_concatenate.register_fake
def _(first, second):
    shape = (len(first), first.shape[1] + second.shape[1], *first.shape[2:])
    return _channels_last(first.new_empty(shape, dtype=torch.promote_types(first.dtype, second.dtype)))


@torch.library.custom_op(
    "nnunet_deform::split_channels", mutates_args=(), schema="(Tensor input, int split) -> (Tensor, Tensor)"
)
def _split(input, split):
    return tuple(
        part.clone(memory_format=CHANNELS_LAST[input.ndim - 2]) for part in (input[:, :split], input[:, split:])
    )


@_split.register_fake
def _(input, split):
    parts = input[:, :split], input[:, split:]
    return tuple(_channels_last(input.new_empty(part.shape)) for part in parts)


def _setup_concatenation(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    first, second = inputs
    ctx.split, ctx.dtypes = first.shape[1], (first.dtype, second.dtype)


def _split_gradient(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
    parts = torch.ops.nnunet_deform.split_channels(grad, ctx.split)
    return tuple(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))


_concatenate.register_autograd(_split_gradient, setup_context=_setup_concatenation)
