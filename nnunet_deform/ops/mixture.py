"""A sum of feature maps with a softmax for each voxel as weights: as one operation for compilers, and of maps behind a
norm as one that keeps what the norms are given."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nnunet_deform.ops.autocast import autocast_disabled
from nnunet_deform.ops.group_norm import norm_dtype, normalized_again, normalized_silu, normalized_silu_backward
from nnunet_deform.ops.layouts import layout_of


def mixture_behind_norms(
    logits: Tensor,
    maps: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_groups: int,
    eps: Sequence[float],
) -> Tensor:
    """sum_j softmax_j(logits) silu(group_norm_j(maps_j)), [B, N, *spatial] and N of [B, C, *spatial] -> [B, C,
    *spatial], in the dtype that torch's norm gives.

    Autograd keeps logits and maps, and makes one branch after the other again in the backward pass; torch's operations
    keep three further maps of each branch. There is no second derivative.

    Args:
        weights, biases, eps: of the norm of each map.
        num_groups: of all norms.
    """
    return _MixtureBehindNorms.apply(num_groups, list(eps), logits, *maps, *weights, *biases)


class _MixtureBehindNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_groups: int, eps: list[float], logits: Tensor, *arguments: Tensor) -> Tensor:
        n = len(eps)
        maps, weights, biases = arguments[:n], arguments[n : 2 * n], arguments[2 * n :]
        with autocast_disabled(logits.device.type):
            shares = _wide_softmax(logits).split(1, dim=1)
            mixed, statistics = None, []
            for share, one, weight, bias, e in zip(shares, maps, weights, biases, eps, strict=True):
                branch, *of_groups = normalized_silu(one, num_groups, weight, bias, e)
                statistics += of_groups
                mixed = branch.mul_(share) if mixed is None else mixed.addcmul_(branch, share)
        ctx.save_for_backward(logits, *arguments, *statistics)
        return mixed.to(norm_dtype(maps[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *arguments = ctx.saved_tensors
        n = len(arguments) // 5
        maps, weights, biases, statistics = (
            arguments[:n],
            arguments[n : 2 * n],
            arguments[2 * n : 3 * n],
            arguments[3 * n :],
        )
        _, _, needs_logits, *needs = ctx.needs_input_grad
        shares = _wide_softmax(logits)
        grad = grad.to(shares.dtype).contiguous(memory_format=layout_of(maps[0]))
        of_shares, gradients = torch.empty_like(shares), [None] * (3 * n)
        for j in range(n):
            mean, scale = statistics[2 * j : 2 * j + 2]
            before = normalized_again(maps[j], mean, scale, weights[j], biases[j])
            torch.sum(F.silu(before).mul_(grad), 1, keepdim=True, out=of_shares.narrow(1, j, 1))
            gradients[j::n] = normalized_silu_backward(
                *(grad * shares.narrow(1, j, 1), before, maps[j], mean, scale, weights[j]), tuple(needs[j::n])
            )
            del before
        of_logits = None
        if needs_logits:
            of_logits = torch.ops.aten._softmax_backward_data(of_shares, shares, 1, shares.dtype).to(logits.dtype)
        return None, None, of_logits, *gradients


def _wide_softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))


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
