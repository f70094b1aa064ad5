"""Convolution for networks of few channels, in the forms that a CPU runs fastest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    conv = F.conv2d if weight.ndim == 4 else F.conv3d
    if input.device.type != "cpu" or groups != 1:
        return conv(input, weight, bias, stride, padding, groups=groups)
    channels, kernel = weight.shape[1], weight.shape[2:]
    unit_stride = all(step == 1 for step in stride)
    if unit_stride and all(k == 1 for k in kernel):
        return F.linear(input.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if 4 < channels < _LANES:
        fill = [0, 0] * len(kernel) + [0, _LANES - channels]
        return conv(F.pad(input, fill), F.pad(weight, fill), bias, stride, padding)
    same_depth = len(kernel) == 3 and 1 < kernel[0] == 2 * padding[0] + 1
    if unit_stride and same_depth and kernel[0] * len(weight) <= _LANES and _writes_in_place():
        return _conv3d_by_planes(input, weight, bias, padding)
    return conv(input, weight, bias, stride, padding)


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


def concatenate_channels(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat`` of [B, C1, *spatial] and [B, C2, *spatial]; on a CPU the faster copy of channels-last tensors."""
    if first.device.type != "cpu" or not _writes_in_place():
        return torch.cat((first, second), dim=1)
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
