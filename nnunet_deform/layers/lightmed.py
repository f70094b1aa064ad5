"""The parts of LightMedSeg; equations by their numbers in :mod:`nnunet_deform.networks.lightmedseg`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from nnunet_deform.layers.few_channels import (
    NORM_GROUPS,
    NormAct,
    mixture,
    multiplied,
    pointwise_conv,
    same_conv,
    spatial_mean,
)
from nnunet_deform.layers.norm import GroupNorm
from nnunet_deform.layers.recomputation import may_keep_less, recomputed
from nnunet_deform.ops import (
    autocast_disabled,
    compiled_on_cpu,
    concatenate_channels,
    opaque_ghost_features,
    opaque_squeeze_excite,
)

DETECTOR_WIDTH = 8
DETECTOR_HIDDEN = 128
# The sigmoid of it is 0.95. Gates that start half closed, one behind the other, leave little signal to learn from.
GATE_BIAS = 3.0


class GhostFeatures(nn.Module):
    """Half of the channels from a convolution, the other half, the ghosts, from a depthwise convolution of the first.

    [B, in, *spatial] -> [B, out, *spatial / stride].
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.primary = same_conv(in_channels, half, kernel_size, stride=stride, bias=False)
        self.ghost = same_conv(half, half, kernel_size, groups=half, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if compiled_on_cpu(x):
            convs = self.primary, self.ghost
            return opaque_ghost_features(x, *(conv.weight for conv in convs), self.primary.stride, self.ghost.padding)
        primary = self.primary(x)
        return concatenate_channels(primary, self.ghost(primary))


def ghost_or_standard(
    ghost: bool, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int] | None = None
) -> nn.Module:
    """Ghost features, or one convolution with as many channels. No bias: a norm follows."""
    if ghost:
        return GhostFeatures(in_channels, out_channels, kernel_size, stride)
    return same_conv(in_channels, out_channels, kernel_size, stride=stride, bias=False)


class SqueezeExcite(nn.Module):
    """Eq. 10: x * sigmoid(V2 silu(V1 mean(x) + c1) + c2), with max(4, C / 4) hidden units.

    [B, C, *spatial] -> the same. It starts open. In prediction it works in the memory of its input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, channels // 4)
        self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, channels), nn.Sigmoid())
        nn.init.constant_(self.gate[2].bias, GATE_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        if compiled_on_cpu(x):
            squeeze, _, excite, _ = self.gate
            return opaque_squeeze_excite(x, squeeze.weight, squeeze.bias, excite.weight, excite.bias)
        gate = self.gate(spatial_mean(x)).to(x.dtype)
        return multiplied(x, gate.view(*gate.shape, *[1] * (x.ndim - 2)))


# In torch's eyes one function on the tensor, as those of torch.nn.init are, so that a mode sees the draws as its own.
@wrap_torch_function(lambda tensor, ndim: (tensor,))
@torch.no_grad()
def spread_(tensor: Tensor, ndim: int) -> Tensor:
    """Fills [K * ndim] with logits of K positions: on each axis one in each of K equal parts of (0.1, 0.9), in random
    order."""
    k = len(tensor) // ndim
    parts = torch.stack([torch.randperm(k, device=tensor.device) for _ in range(ndim)], 1)
    position = (parts + torch.rand_like(parts, dtype=tensor.dtype)) / k
    return tensor.copy_(torch.logit(0.1 + 0.8 * position).flatten())


class AnchorDetector(nn.Module):
    """Eq. 1: K anchors from the image, [B, C, *spatial] -> [B, K, ndim], coordinates in (0, 1) relative to the patch.

    Args:
        input_channels: C.
        num_anchors: K.
        kernel_sizes, strides: of its three convolutions.
        width: factor of its hidden widths: 8 channels of the convolutions, 128 units before the coordinates.
    """

    def __init__(
        self,
        input_channels: int,
        num_anchors: int,
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        width: int = 1,
    ) -> None:
        super().__init__()
        self.num_anchors = num_anchors
        self.ndim = len(strides[0])
        widths = [input_channels, *[DETECTOR_WIDTH * width] * len(strides)]
        self.features = nn.Sequential(
            *(
                nn.Sequential(same_conv(i, o, kernel, stride=stride, bias=False), NormAct(o))
                for i, o, kernel, stride in zip(widths[:-1], widths[1:], kernel_sizes, strides, strict=True)
            )
        )
        self.coordinates = nn.Sequential(
            nn.Linear(DETECTOR_WIDTH * width, DETECTOR_HIDDEN * width),
            nn.SiLU(),
            nn.Linear(DETECTOR_HIDDEN * width, self.ndim * num_anchors),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Anchors spread out: on each axis one in each of K equal parts of (0.1, 0.9), in random order."""
        last = self.coordinates[-1]
        spread_(last.bias, self.ndim)
        nn.init.normal_(last.weight, std=0.5)

    def forward(self, image: Tensor) -> Tensor:
        features = spatial_mean(self.features(image))
        with autocast_disabled(image.device.type):
            features = features.to(self.coordinates[0].weight.dtype)
            return torch.sigmoid(self.coordinates(features)).unflatten(1, (self.num_anchors, self.ndim))


class LocalStructuralPrior(nn.Module):
    """Eqs. 2-5, the local structural prior module (LSPM).

    [B, C, *spatial] -> a texture map in (0, 1), [B, 1, *spatial], and mixed features, [B, C, *spatial]. Training keeps
    its input alone and computes it again.

    Args:
        channels: C.
        kernel_size: of the level, 3 on each axis where it is not flat; the texture's is 2 wider there.
        width: hidden channels of the spatial gate.
    """

    def __init__(self, channels: int, kernel_size: Sequence[int], width: int) -> None:
        super().__init__()
        ndim = len(kernel_size)
        smoothing_kernel = [k if k == 1 else k + 2 for k in kernel_size]
        self.smoothing = same_conv(channels, channels, smoothing_kernel, groups=channels)
        self.smoothing_norm = GroupNorm(NORM_GROUPS, channels)
        self.texture = pointwise_conv(ndim, channels, 1)
        self.spatial_gate = nn.Sequential(
            same_conv(channels, width, kernel_size),
            NormAct(width),
            same_conv(width, width, kernel_size),
            NormAct(width),
            pointwise_conv(ndim, width, 1),
            nn.Sigmoid(),
        )
        self.weights = pointwise_conv(ndim, 1, 2)
        self.experts = nn.ModuleList(pointwise_conv(ndim, channels, channels) for _ in range(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The smoothing starts as the mean over its kernel, so the texture is a high-pass from the first step."""
        self.smoothing.weight.fill_(1 / math.prod(self.smoothing.kernel_size))
        self.smoothing.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return recomputed(self._outputs, x) if may_keep_less(self) else self._outputs(x)

    def _outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residue = (x - self.smoothing_norm(self.smoothing(x))).abs()
        texture = torch.sigmoid(self.texture(residue))
        return texture, mixture(self.weights(self.spatial_gate(x)), [expert(x) for expert in self.experts])


class FiLM(nn.Module):
    """Eq. 6: (1 + gamma) x + beta, with gamma and beta for each channel linear in the anchors' coordinates.

    [B, C, *spatial] and [B, K, ndim] -> [B, C, *spatial]. It starts near the identity.
    """

    def __init__(self, channels: int, num_coordinates: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(num_coordinates, channels)
        self.beta = nn.Linear(num_coordinates, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.gamma, self.beta):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
        per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
        with autocast_disabled(x.device.type):
            coordinates = anchors.flatten(1)
            factor = (1 + self.gamma(coordinates)).to(x.dtype).view(per_channel)
            shift = self.beta(coordinates).to(x.dtype).view(per_channel)
        return torch.addcmul(shift, x, factor)


class ChannelAffine(nn.Module):
    """(1 + gamma) x + beta with a learned gamma and beta for each channel: FiLM's control, which sees no anchors.

    [B, C, *spatial] -> the same shape.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        per_channel = (-1, *[1] * (x.ndim - 2))
        factor, shift = (1 + self.gamma).to(x.dtype), self.beta.to(x.dtype)
        return torch.addcmul(shift.view(per_channel), x, factor.view(per_channel))


class PositionBias(nn.Module):
    """Eqs. 14 and 15, added to a feature map: a 1x1x1 convolution of M_k = (z - a_kz) + (y - a_ky) + (x - a_kx).

    [B, C, *spatial] and [B, K, ndim] -> [B, C, *spatial]. Voxel centres run over (0, 1) on each axis. Because the
    offsets along the axes are summed, every M_k is the same ramp less a constant, so with weights W and bias b

        P_c = (sum_k W_ck) (z + y + x) + b_c - sum_k W_ck (a_kz + a_ky + a_kx),

    and no map of K channels is made. In prediction it works in the memory of its input.
    """

    def __init__(self, num_anchors: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_anchors, channels)

    def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
        with autocast_disabled(x.device.type):
            slope = self.linear.weight.sum(1)
            constant = self.linear(-anchors.sum(2))
            terms = []
            for axis, size in enumerate(x.shape[2:]):
                centres = (torch.arange(size, device=x.device, dtype=slope.dtype) + 0.5) / size
                shape = [1, 1, *(size if a == axis else 1 for a in range(x.ndim - 2))]
                terms.append(slope.view(1, -1, *[1] * (x.ndim - 2)) * centres.view(shape))
            terms[0] = terms[0] + constant.view(*constant.shape, *[1] * (x.ndim - 2))
            in_plane = sum(terms[1:]).to(x.dtype)
            through_plane = terms[0].to(x.dtype)
        if torch.is_grad_enabled():
            return x + in_plane + through_plane
        return x.add_(in_plane).add_(through_plane)
