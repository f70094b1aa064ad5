"""The other operators against the same in torch's own operations, in float64 on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_deform import ops
from nnunet_deform.ops.backends.agreement import relative_error

# Norm of the error over the norm of the result, in float32; each is a few sums of thousands of terms.
TOLERANCE = 2e-5

_SIZE = (5, 6, 7)
_UNIT = [1, 1, 1]


def _shape(*channels: int) -> tuple[int, ...]:
    return (*channels, *_SIZE)


def _samples(conv: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([conv(x[None], w, b, padding=1) for x, w, b in zip(input, weight, bias, strict=True)])


def _plain_mlp(x: Tensor, expand: Tensor, expand_bias: Tensor, reduce: Tensor, reduce_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, expand, expand_bias)), reduce, reduce_bias)


def _gated(x: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor, excite_bias: Tensor) -> Tensor:
    hidden = F.silu(F.linear(x.flatten(2).mean(2), squeeze, squeeze_bias))
    return x * F.linear(hidden, excite, excite_bias).sigmoid()[:, :, None, None, None]


def _ghosts(x: Tensor, primary: Tensor, ghost: Tensor) -> Tensor:
    first = F.conv3d(x, primary, padding=1)
    return torch.cat([first, F.conv3d(first, ghost, padding=1, groups=len(ghost))], 1)


def _mixed(logits: Tensor, *maps: Tensor) -> Tensor:
    return sum(share * one for share, one in zip(logits.softmax(1).split(1, 1), maps, strict=True))


def _plain_statistics(x: Tensor, weight: Tensor) -> Tensor:
    x = x.flatten(2)
    attention = torch.einsum("bcv,c->bv", x, weight).softmax(1)
    peak = x.amax(1).mean(1, keepdim=True)
    return torch.cat([x.mean(2), peak, torch.einsum("bcv,bv->bc", x, attention)], 1)


def _statistics(x: Tensor, weight: Tensor) -> Tensor:
    mean, peak, context = ops.voxel_statistics(x, weight, weight.new_zeros(1))
    return torch.cat([mean, peak[:, None], context], 1)


_MAP, _WIDE, _BATCH_KERNELS = _shape(2, 6), _shape(2, 16), (2, 8, 6, 3, 3, 3)

# Name: shapes of the arguments, ours, and the same by torch.
OPERATORS: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor], Callable[..., Tensor]]] = {
    **{
        f"dynamic convolution, {form}": (
            [_MAP, _BATCH_KERNELS, (2, 8)],
            lambda *t, form=form: ops.dynamic_conv3d(*t, padding=1, conv_impl=form),
            lambda *t: _samples(F.conv3d, *t),
        )
        for form in ("grouped", "loop")
    },
    "dynamic convolution, 2D": (
        [(2, 6, 9, 8), (2, 8, 6, 3, 3), (2, 8)],
        lambda *t: ops.dynamic_conv2d(*t, padding=1),
        lambda *t: _samples(F.conv2d, *t),
    ),
    "convolution of few channels, 1x1x1": (
        [_MAP, (8, 6, 1, 1, 1), (8,)],
        lambda *t: torch.ops.nnunet_deform.few_channel_conv(*t, _UNIT, [0, 0, 0], 1),
        F.conv3d,
    ),
    "convolution of few channels, 3x3x3": (
        [_MAP, (8, 6, 3, 3, 3), (8,)],
        lambda *t: torch.ops.nnunet_deform.few_channel_conv(*t, [2, 2, 2], _UNIT, 1),
        lambda *t: F.conv3d(*t, stride=2, padding=1),
    ),
    "concatenation of channels": (
        [_MAP, _WIDE],
        torch.ops.nnunet_deform.concatenate_channels,
        lambda *t: torch.cat(t, 1),
    ),
    "ghost features": (
        [_MAP, (4, 6, 3, 3, 3), (4, 1, 3, 3, 3)],
        lambda *t: ops.opaque_ghost_features(*t, _UNIT, _UNIT),
        _ghosts,
    ),
    "group norm, residual and activation": (
        [_MAP, (6,), (6,), _MAP],
        lambda x, w, b, r: ops.opaque_group_norm(x, 2, w, b, 1e-5, residual=r, activation="silu"),
        lambda x, w, b, r: F.silu(F.group_norm(x, 2, w, b, 1e-5) + r),
    ),
    "layer norm": (
        [(2, *_SIZE, 6), (6,), (6,)],
        lambda *t: ops.opaque_layer_norm(*t, 1e-5),
        lambda x, w, b: F.layer_norm(x, (6,), w, b, 1e-5),
    ),
    "standardisation": (
        [_MAP],
        lambda x: ops.standardize(x, [2, 3, 4], 1e-5),
        lambda x: F.instance_norm(x, eps=1e-5),
    ),
    "mixture of maps": ([_shape(2, 2), _MAP, _MAP], lambda x, *m: ops.opaque_mixture(x, m), _mixed),
    "squeeze and excite": ([_MAP, (3, 6), (3,), (6, 3), (6,)], ops.opaque_squeeze_excite, _gated),
    "MLP": (
        [(2, *_SIZE, 6), (24, 6), (24,), (6, 24), (6,)],
        lambda *t: torch.ops.nnunet_deform.mlp(*t)[0],
        _plain_mlp,
    ),
    "statistics over voxels": ([_WIDE, (16,)], _statistics, _plain_statistics),
    "linear resampling": (
        [_MAP],
        lambda x: torch.ops.nnunet_deform.resample_linear(x, [10, 9, 14]),
        lambda x: F.interpolate(x, (10, 9, 14), mode="trilinear"),
    ),
}


def check_operator(device: str, name: str, channels_last: bool) -> dict[str, Any]:
    """``{}`` where output and all gradients agree in float32, else a "fault"."""
    shapes, ours, plain = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    placed = []
    for leaf in leaves:
        tensor = leaf.float().to(device)
        if channels_last and tensor.ndim in (4, 5):
            tensor = tensor.contiguous(memory_format=ops.CHANNELS_LAST[tensor.ndim - 2])
        placed.append(tensor.requires_grad_())
    leaves = [leaf.float().double().requires_grad_() for leaf in leaves]
    expected = plain(*leaves)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64).float()
    expected = [expected, *torch.autograd.grad(expected, leaves, upstream.double())]
    with exact_float32():
        output = ours(*placed)
        results = [output, *torch.autograd.grad(output, placed, upstream.to(device))]
    for place, (result, truth) in enumerate(zip(results, expected, strict=True)):
        what = "the output" if place == 0 else f"the gradient of argument {place}"
        if result.shape != truth.shape:
            return {"fault": f"{what} has shape {tuple(result.shape)} in the place of {tuple(truth.shape)}"}
        error = relative_error(result.detach(), truth.detach())
        if not error <= TOLERANCE:
            return {"fault": f"{what} is off by {error:.1e} of its norm, where {TOLERANCE:.0e} is allowed"}
    return {}


class exact_float32:
    """A context in which convolutions and matrix products on a GPU do not round to TF32."""

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self._before
