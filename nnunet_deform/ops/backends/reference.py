"""The deformable convolution as its equation, in float64: the truth that the other backends are tested against.

    q_t(v) = v * stride - padding + t * dilation + o_t(v)                one position per tap t and output voxel v
    y(v)   = b + sum_t W_t X(q_t(v))

X is the multilinear interpolation of the input between the 2^n corners of the cell floor(q). A corner outside the
volume counts as zero. A position outside (-1, size) on any axis, or one that is not a number, samples zero and has no
gradient. At an integer the cell is floor(q), so the derivative is the one from the right.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unable(input: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    return "it computes in float64, which MPS does not have" if input.device.type == "mps" else None


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    groups = channels // group_channels
    out_size = offset.shape[2:]

    output = input.new_zeros((batch, groups, out_channels // groups, out_size.numel()), dtype=torch.float64)
    volume = _by_deformable_group(input, offset, kernel)
    tap_weights = weight.double().reshape(groups, out_channels // groups, group_channels, -1)
    for tap, position in _positions(offset, kernel, stride, padding, dilation):
        sample = volume.new_zeros(*volume.shape[:3], out_size.numel())  # [B, G, C/G, V]
        for index, interpolation, _ in _corners(position, size):
            sample += interpolation[:, :, None] * _gather(volume, index)
        sample = sample.view(batch, groups, group_channels, -1)
        output += torch.einsum("bgcv,goc->bgov", sample, tap_weights[..., tap])

    output = output.view(batch, out_channels, *out_size)
    if bias is not None:
        output += bias.double().view(-1, *[1] * len(size))
    return output.to(input.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    groups = channels // group_channels
    out_size = offset.shape[2:]

    volume = _by_deformable_group(input, offset, kernel)
    tap_weights = weight.double().reshape(groups, out_channels // groups, group_channels, -1)
    grad_out = grad_output.double().reshape(batch, groups, out_channels // groups, -1)
    grad_volume = torch.zeros_like(volume)
    grad_weight = torch.zeros_like(tap_weights)
    grad_offset = volume.new_zeros(batch, volume.shape[1], tap_weights.shape[-1], len(size), out_size.numel())
    for tap, position in _positions(offset, kernel, stride, padding, dilation):
        grad_sample = torch.einsum("bgov,goc->bgcv", grad_out, tap_weights[..., tap])
        grad_sample = grad_sample.reshape(*volume.shape[:3], -1)
        sample = torch.zeros_like(grad_sample)
        for index, interpolation, slopes in _corners(position, size):
            corner = _gather(volume, index)
            sample += interpolation[:, :, None] * corner
            grad_volume.scatter_add_(3, index[:, :, None].expand_as(corner), interpolation[:, :, None] * grad_sample)
            for axis, slope in enumerate(slopes):
                grad_offset[:, :, tap, axis] += slope * (corner * grad_sample).sum(2)
        sample = sample.view(batch, groups, group_channels, -1)
        grad_weight[..., tap] = torch.einsum("bgov,bgcv->goc", grad_out, sample)

    return (
        grad_volume[..., :-1].reshape(input.shape).to(input.dtype) if needs[0] else None,
        grad_offset.view_as(offset).to(offset.dtype) if needs[1] else None,
        grad_weight.view_as(weight).to(weight.dtype) if needs[2] else None,
        grad_out.sum((0, 3)).flatten().to(weight.dtype) if needs[3] else None,
    )


def _by_deformable_group(input: Tensor, offset: Tensor, kernel: Sequence[int]) -> Tensor:
    """The input as [B, deformable groups G, C/G, voxels + 1]; the last voxel is zero, what lies outside the volume."""
    offset_groups = offset.shape[1] // (len(kernel) * torch.Size(kernel).numel())
    volume = input.double().reshape(input.shape[0], offset_groups, -1, input.shape[2:].numel())
    return F.pad(volume, (0, 1))


def _positions(
    offset: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[int, list[Tensor]]]:
    """For each tap its number and q_t, one tensor [B, G, V] for each axis."""
    batch, _, *out_size = offset.shape
    by_tap = offset.double().reshape(batch, -1, torch.Size(kernel).numel(), len(kernel), *out_size)
    for tap, place in enumerate(itertools.product(*map(range, kernel))):
        position = []
        for axis, size in enumerate(out_size):
            voxel = torch.arange(size, device=offset.device, dtype=torch.float64)
            regular = voxel * stride[axis] - padding[axis] + place[axis] * dilation[axis]
            regular = regular.view([-1 if a == axis else 1 for a in range(len(out_size))])
            position.append((regular + by_tap[:, :, tap, axis]).flatten(2))
        yield tap, position


def _corners(position: Sequence[Tensor], size: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """For each corner of the cell: its voxel's index in the flat volume, its interpolation weight, and that weight's
    derivative along each axis, all [B, G, V]."""
    inside = torch.ones_like(position[0], dtype=torch.bool)
    for q, s in zip(position, size, strict=True):
        inside = inside & (q > -1) & (q < s)
    floor = [torch.where(inside, q, 0.0).floor() for q in position]
    fraction = [torch.where(inside, q, 0.0) - f for q, f in zip(position, floor, strict=True)]

    for upper in itertools.product((0, 1), repeat=len(size)):
        index = torch.zeros_like(position[0], dtype=torch.int64)
        present = inside
        factors, signs = [], []
        for axis, s in enumerate(size):
            coordinate = floor[axis].long() + upper[axis]
            present = present & (coordinate >= 0) & (coordinate < s)
            index = index * s + coordinate
            factors.append(fraction[axis] if upper[axis] else 1 - fraction[axis])
            signs.append(1.0 if upper[axis] else -1.0)
        index = torch.where(present, index, torch.Size(size).numel())
        interpolation = present.double()
        for factor in factors:
            interpolation = interpolation * factor
        slopes = []
        for axis, sign in enumerate(signs):
            slope = sign * present.double()
            for other, factor in enumerate(factors):
                if other != axis:
                    slope = slope * factor
            slopes.append(slope)
        yield index, interpolation, slopes


def _gather(volume: Tensor, index: Tensor) -> Tensor:
    return volume.gather(3, index[:, :, None].expand(-1, -1, volume.shape[2], -1))
