"""Statistics over all voxels of a feature map, in one backward pass and without copies in another precision."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_deform.ops.autocast import autocast_disabled

# Half-precision maps are converted to float32 a few channels at a time, in at most this number of steps.
_SLABS = 8


def voxel_statistics(
    input: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    *,
    with_peak: bool = True,
    keep_maps: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""The mean of each channel, the mean of the largest channel, and an attention-weighted mean of each channel.

    .. math::
        mean_c = \frac1N \sum_v x_c(v), \quad peak = \frac1N \sum_v \max_c x_c(v), \quad
        context_c = \sum_v softmax_v(w \cdot x(v) + b) \, x_c(v)

    Everything is accumulated in float32 (float64 for float64), also under autocast: over a volume the softmax is of the
    order of 1e-6, which half precision does not hold. Autograd keeps the input and two numbers for each voxel, and the
    gradient of a maximum goes to the first channel that attains it. There is no second derivative.

    Args:
        input: [B, C, *spatial].
        mask_weight: w, [C], or None to leave the context out.
        mask_bias: b, [1]; the softmax cancels it.
        with_peak: False leaves the peak out.
        keep_maps: False makes the two numbers for each voxel, softmax and place of the largest channel, again in the
            backward pass.

    Returns:
        mean [B, C], peak [B] or None, context [B, C] or None.
    """
    with_context = mask_weight is not None
    statistics = iter(_VoxelStatistics.apply(input.flatten(2), mask_weight, mask_bias, with_peak, keep_maps))
    return next(statistics), next(statistics) if with_peak else None, next(statistics) if with_context else None


class _VoxelStatistics(torch.autograd.Function):
    """Mean, peak and context as far as they are asked for: torch 2.6 does not compile functions that return None."""

    @staticmethod
    def forward(ctx, x, mask_weight, mask_bias, with_peak, keep_maps):
        with autocast_disabled(x.device.type):
            dtype = _accumulation_dtype(x)
            statistics = [x.mean(2, dtype=dtype)]
            winner = attention = None
            if with_peak:
                largest, winner = x.max(1, keepdim=True)
                statistics.append(largest.mean((1, 2), dtype=dtype))
                # 2 bytes for each voxel are kept instead of 8.
                winner = winner.to(torch.int16) if keep_maps else None
            if mask_weight is not None:
                attention = _attention(x, mask_weight, mask_bias)
                statistics.append(_over_voxels(x, attention))
        ctx.with_peak = with_peak
        ctx.save_for_backward(x, mask_weight, mask_bias, winner, attention if keep_maps else None)
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, *grads):
        x, mask_weight, mask_bias, winner, attention = ctx.saved_tensors
        grad_weight = grad_bias = None
        voxels = x.shape[2]
        with autocast_disabled(x.device.type):
            # The gradient of x is a sum of outer products of a C-vector and a map: one matrix product.
            vectors, maps = [grad_mean / voxels], [torch.ones_like(x[:, 0], dtype=grad_mean.dtype)]
            if mask_weight is not None:
                grad_context = grads[-1]
                if attention is None:
                    attention = _attention(x, mask_weight, mask_bias)
                grad_attention = _over_channels(x, grad_context)
                inner = (attention * grad_attention).sum(1, keepdim=True)
                grad_logits = attention * (grad_attention - inner)
                vectors += [grad_context, mask_weight.to(grad_context.dtype).expand_as(grad_context)]
                maps += [attention, grad_logits]
                grad_weight = _over_voxels(x, grad_logits).sum(0)
                grad_bias = grad_logits.sum().reshape(1)
            if _converted_as_it_is_read(x):
                grad_x = sum(v.unsqueeze(2) * m.unsqueeze(1) for v, m in zip(vectors, maps, strict=True)).to(x.dtype)
            else:
                stacked = torch.stack(maps, 1)
                slabs = [torch.bmm(v, stacked).to(x.dtype) for v in torch.stack(vectors, 2).split(_slab(x), 1)]
                grad_x = slabs[0] if len(slabs) == 1 else torch.cat(slabs, 1)
            if ctx.with_peak:
                if winner is None:
                    winner = x.max(1, keepdim=True).indices
                share = (grads[0] / voxels).to(x.dtype).view(-1, 1, 1)
                grad_x.scatter_add_(1, winner.long(), share.expand(winner.shape))
        return grad_x, grad_weight, grad_bias, None, None


def _attention(x: Tensor, mask_weight: Tensor, mask_bias: Tensor) -> Tensor:
    """softmax_v(w . x(v) + b), [B, N]."""
    weight = mask_weight.to(_accumulation_dtype(x)).expand(x.shape[0], -1)
    return (_over_channels(x, weight) + mask_bias).softmax(1)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _slab(x: Tensor) -> int:
    """Channels to work on at once: all, unless they must be converted."""
    channels = x.shape[1]
    return channels if x.dtype == _accumulation_dtype(x) else -(-channels // _SLABS)


def _converted_as_it_is_read(x: Tensor) -> bool:
    """Whether sums are better written as sums: a compiler then converts no map in memory. Around its matrix products
    it would, and even keep the converted map for the backward pass."""
    return torch.compiler.is_compiling() and x.dtype != _accumulation_dtype(x)


def _over_channels(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C, N] and [B, C] -> [B, N]."""
    if _converted_as_it_is_read(x):
        return (x.to(weight.dtype) * weight.unsqueeze(2)).sum(1)
    slabs = zip(x.split(_slab(x), 1), weight.split(_slab(x), 1), strict=True)
    return sum(torch.bmm(w.unsqueeze(1), s.to(w.dtype)) for s, w in slabs).squeeze(1)


def _over_voxels(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C, N] and [B, N] -> [B, C]."""
    if _converted_as_it_is_read(x):
        return (x.to(weight.dtype) * weight.unsqueeze(1)).sum(2)
    rows = weight.unsqueeze(1)
    return torch.cat([torch.bmm(rows, s.to(rows.dtype).mT) for s in x.split(_slab(x), 1)], 2).squeeze(1)
