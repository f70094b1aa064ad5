"""The portable backend: plain tensor operations on any device, in the memory of a few feature maps.

The input is laid out channels last, so that one sample is one contiguous row, and the taps are taken a few at a time.
Nothing of the forward pass is kept; the backward pass samples again. Coordinates and sums are float32 (float64 for
float64 tensors) whatever the dtype of the values. The convention is the reference's.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one temporary: enough to fill a GPU, small enough that the temporaries of small stages stay in cache.
_CHUNK_ELEMENTS = 2**21


def unable(input: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    return None


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    sampler = _Sampler(input, offset, weight, stride, padding, dilation)
    mix = _ChannelMix(weight, sampler.dtype, input.shape[1])
    output = sampler.rows.new_zeros(sampler.points, weight.shape[0])
    for taps in sampler.chunks():
        samples = sampler.rows.new_zeros(len(taps), sampler.points, input.shape[1])
        for row, interpolation, _ in sampler.corners(taps):
            sampler.by_group(samples).addcmul_(sampler.gather(row, taps), interpolation[..., None])
        for tap, sample in zip(taps, samples, strict=True):
            mix.add(output, sample, tap)
    if bias is not None:
        output += bias.to(sampler.dtype)
    return sampler.as_feature_map(output, offset.shape[2:]).to(input.dtype)


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
    needs_input, needs_offset, needs_weight, needs_bias = needs
    sampler = _Sampler(input, offset, weight, stride, padding, dilation)
    mix = _ChannelMix(weight, sampler.dtype, input.shape[1])
    grad_out = grad_output.movedim(1, -1).reshape(sampler.points, -1).to(sampler.dtype)  # [B*V, C_out]

    grad_rows = torch.zeros_like(sampler.rows) if needs_input else None
    grad_offset = torch.zeros_like(sampler.offset) if needs_offset else None
    grad_weight = torch.zeros_like(mix.weight) if needs_weight else None
    for taps in sampler.chunks():
        if needs_input or needs_offset:
            grad_samples = sampler.by_group(torch.stack([mix.transposed(grad_out, tap) for tap in taps]))
        if needs_weight:
            samples = sampler.rows.new_zeros(len(taps), sampler.points, input.shape[1])
        for row, interpolation, slopes in sampler.corners(taps):
            if needs_input:
                grad_rows.index_add_(0, row.flatten(), (grad_samples * interpolation[..., None]).flatten(0, -2))
            if needs_offset or needs_weight:
                corner = sampler.gather(row, taps)
            if needs_offset:
                projected = (corner * grad_samples).sum(-1)
                for axis, slope in enumerate(slopes):
                    grad_offset[:, :, taps.start : taps.stop, axis] += sampler.as_offset(slope * projected)
            if needs_weight:
                sampler.by_group(samples).addcmul_(corner, interpolation[..., None])
        if needs_weight:
            for tap, sample in zip(taps, samples, strict=True):
                grad_weight[tap] = mix.weight_gradient(grad_out, sample)

    if needs_input:
        grad_input = sampler.as_feature_map(grad_rows[:-1].view(-1, input.shape[1]), input.shape[2:])
    return (
        grad_input.to(input.dtype) if needs_input else None,
        grad_offset.view_as(offset).to(offset.dtype) if needs_offset else None,
        mix.as_weight(grad_weight).to(weight.dtype) if needs_weight else None,
        grad_out.sum(0).to(weight.dtype) if needs_bias else None,
    )


class _Sampler:
    """Where each tap samples: rows of the channels-last input, and their interpolation weights.

    B batch, G deformable groups, C channels, K taps, n axes, V output voxels, T taps of one chunk.
    """

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self.kernel = tuple(weight.shape[2:])
        self.size = tuple(input.shape[2:])
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.batch = input.shape[0]
        self.out_size = tuple(offset.shape[2:])
        self.points = self.batch * offset.shape[2:].numel()  # B*V
        self.taps = torch.Size(self.kernel).numel()
        self.groups = offset.shape[1] // (len(self.size) * self.taps)
        self.channels = input.shape[1]
        group_channels = self.channels // self.groups
        # [B*voxels*G + 1, C/G]. The last row is zero: what lies outside the volume. Weighing an arbitrary row with zero
        # instead would make NaN of an infinite voxel.
        rows = input.movedim(1, -1).reshape(-1, group_channels).to(self.dtype)
        self.rows = F.pad(rows, (0, 0, 0, 1))
        self.offset = offset.to(self.dtype).reshape(self.batch, self.groups, self.taps, len(self.size), *self.out_size)

    def chunks(self) -> Iterator[range]:
        """Runs of taps whose samples fit the budget."""
        length = max(1, _CHUNK_ELEMENTS // max(1, self.points * self.channels))
        for start in range(0, self.taps, length):
            yield range(start, min(start + length, self.taps))

    def corners(self, taps: range) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """For each corner of the cells: the input's row, the interpolation weight and its derivative along each axis,
        all [T, B*V, G]."""
        positions = [self._positions(taps, axis) for axis in range(len(self.size))]
        inside = (positions[0] > -1) & (positions[0] < self.size[0])
        for q, size in zip(positions[1:], self.size[1:], strict=True):
            inside &= (q > -1) & (q < size)
        # Set before the conversion to integers: NaN and huge numbers have no defined integer.
        positions = [torch.where(inside, q, 0) for q in positions]
        floors = [q.floor() for q in positions]
        upper_factors = [q - floor for q, floor in zip(positions, floors, strict=True)]
        lower = [(floor >= 0) & inside for floor in floors]
        upper = [(floor < size - 1) & inside for floor, size in zip(floors, self.size, strict=True)]
        lower_index = [floor.long() for floor in floors]

        group = torch.arange(self.groups, device=self.rows.device)
        sample = torch.arange(self.batch, device=self.rows.device).repeat_interleave(
            torch.Size(self.out_size).numel(), output_size=self.points
        )
        for ends in itertools.product((0, 1), repeat=len(self.size)):
            row = sample[None, :, None]
            all_present = inside
            present = [upper[axis] if end else lower[axis] for axis, end in enumerate(ends)]
            factors = [
                torch.where(there, factor if end else 1 - factor, 0)
                for there, factor, end in zip(present, upper_factors, ends, strict=True)
            ]
            for axis, end in enumerate(ends):
                row = row * self.size[axis] + lower_index[axis] + end
                all_present = all_present & present[axis]
            row = torch.where(all_present, row * self.groups + group, len(self.rows) - 1)
            interpolation = factors[0]
            for factor in factors[1:]:
                interpolation = interpolation * factor
            slopes = []
            for axis, end in enumerate(ends):
                slope = torch.where(present[axis], 1.0 if end else -1.0, 0).to(self.dtype)
                for other, factor in enumerate(factors):
                    if other != axis:
                        slope = slope * factor
                slopes.append(slope)
            yield row, interpolation, slopes

    def _positions(self, taps: range, axis: int) -> Tensor:
        """Coordinates along one axis, [T, B*V, G]."""
        along = [1] * len(self.size)
        along[axis] = -1
        voxel = torch.arange(self.out_size[axis], device=self.rows.device, dtype=self.dtype)
        regular = (voxel * self.stride[axis] - self.padding[axis]).view(along)
        after = torch.Size(self.kernel[axis + 1 :]).numel()
        place = torch.tensor([tap // after % self.kernel[axis] for tap in taps], device=self.rows.device)
        place = (place * self.dilation[axis]).to(self.dtype).view(-1, *[1] * len(self.size))
        position = self.offset[:, :, taps.start : taps.stop, axis] + (regular + place)  # [B, G, T, *out_size]
        return position.permute(2, 0, *range(3, position.ndim), 1).reshape(len(taps), self.points, self.groups)

    def gather(self, row: Tensor, taps: range) -> Tensor:
        """The input at the given rows, [T, B*V, G, C/G]."""
        return self.rows.index_select(0, row.flatten()).view(len(taps), self.points, self.groups, -1)

    def by_group(self, samples: Tensor) -> Tensor:
        """[T, B*V, C] as [T, B*V, G, C/G]."""
        return samples.view(*samples.shape[:2], self.groups, -1)

    def as_offset(self, values: Tensor) -> Tensor:
        """[T, B*V, G] in the offset's order, [B, G, T, *out_size]."""
        values = values.view(-1, self.batch, *self.out_size, self.groups)
        return values.permute(1, values.ndim - 1, 0, *range(2, values.ndim - 1))

    def as_feature_map(self, rows: Tensor, size: Sequence[int]) -> Tensor:
        """[B*V, C] as [B, C, *size], still channels last in memory."""
        return rows.view(self.batch, *size, rows.shape[-1]).movedim(-1, 1)


class _ChannelMix:
    """The weight of each tap as a (grouped) matrix between channels; depthwise is the elementwise product."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, channels: int) -> None:
        self.shape = weight.shape
        self.groups = channels // weight.shape[1]
        self.depthwise = weight.shape[1] == 1 and weight.shape[0] == channels
        by_tap = weight.to(dtype).flatten(2).movedim(2, 0)  # [K, C_out, C/groups]
        if self.depthwise:
            self.weight = by_tap.squeeze(2).contiguous()  # [K, C]
        else:
            self.weight = by_tap.reshape(len(by_tap), self.groups, -1, weight.shape[1])  # [K, groups, C_out/g, C/g]

    def add(self, output: Tensor, sample: Tensor, tap: int) -> None:
        """output [N, C_out] += W_tap sample [N, C]."""
        if self.depthwise:
            output.addcmul_(sample, self.weight[tap])
        else:
            mixed = torch.einsum("ngc,goc->ngo", sample.view(len(sample), self.groups, -1), self.weight[tap])
            output += mixed.reshape_as(output)

    def transposed(self, grad: Tensor, tap: int) -> Tensor:
        """W_tap^T grad: [N, C_out] -> [N, C]."""
        if self.depthwise:
            return grad * self.weight[tap]
        return torch.einsum("ngo,goc->ngc", grad.view(len(grad), self.groups, -1), self.weight[tap]).flatten(1)

    def weight_gradient(self, grad: Tensor, sample: Tensor) -> Tensor:
        """sum over the points of grad [N, C_out] times sample [N, C], in the shape of weight[tap]."""
        if self.depthwise:
            return (grad * sample).sum(0)
        by_group = (grad.view(len(grad), self.groups, -1), sample.view(len(sample), self.groups, -1))
        return torch.einsum("ngo,ngc->goc", *by_group)

    def as_weight(self, by_tap: Tensor) -> Tensor:
        """The gradient by tap in the shape of the weight, [C_out, C/groups, *kernel]."""
        return by_tap.reshape(len(by_tap), *self.shape[:2]).movedim(0, -1).reshape(self.shape)
