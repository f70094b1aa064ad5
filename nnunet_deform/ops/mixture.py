"""A sum of feature maps with a softmax for each voxel as weights, as one operation for compilers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nnunet_deform.ops.layouts import layout_of


def opaque_mixture(logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """sum_j softmax_j(logits) maps_j, [B, N, *spatial] and N of [B, C, *spatial] -> [B, C, *spatial].

    A compiler sees one operation, and one for the backward pass.
    """
    return torch.ops.nnunet_deform.mixture(logits, list(maps))


def _shares(logits: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return logits.softmax(1).to(maps[0].dtype).split(1, dim=1)


@torch.library.custom_op("nnunet_deform::mixture", mutates_args=(), schema="(Tensor logits, Tensor[] maps) -> Tensor")
def _forward(logits, maps):
    shares = _shares(logits, maps)
    mixed = maps[0] * shares[0]
    for one, share in zip(maps[1:], shares[1:], strict=True):
        mixed.addcmul_(one, share)
    return mixed.contiguous(memory_format=layout_of(maps[0]))


@_forward.register_fake
def _(logits, maps):
    return _like(maps[0])


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout_of(tensor))


@torch.library.custom_op(
    "nnunet_deform::mixture_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor[] maps) -> (Tensor, Tensor[])",
)
def _backward(grad, logits, maps):
    shares = logits.softmax(1)
    of_shares = torch.cat([(grad * one).sum(1, keepdim=True, dtype=logits.dtype) for one in maps], dim=1)
    of_logits = torch.ops.aten._softmax_backward_data(of_shares, shares, 1, logits.dtype)
    of_maps = [
        (grad * share.to(grad.dtype)).contiguous(memory_format=layout_of(one))
        for one, share in zip(maps, shares.split(1, dim=1), strict=True)
    ]
    return of_logits.contiguous(memory_format=layout_of(logits)), of_maps


@_backward.register_fake
def _(grad, logits, maps):
    return _like(logits), [_like(one) for one in maps]


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    logits, maps = inputs
    ctx.save_for_backward(logits, *maps)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits, *maps = ctx.saved_tensors
    return torch.ops.nnunet_deform.mixture_backward(grad, logits, maps)


_forward.register_autograd(_gradients, setup_context=_setup_context)
