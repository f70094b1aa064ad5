r"""DCD: dynamic convolution decomposition. One static kernel, scaled, and a residual of low rank for each sample.

Y. Li et al., "Revisiting Dynamic Convolution via Matrix Decomposition", ICLR 2021.

.. math:: W(x) = \Lambda(x) W_0 + P \, \Phi(x) \, Q^T

with P [O, L] and Q [C, L] static, Phi [L, L] and the diagonal Lambda of each sample, from the means p of the input over
2 cells an axis:

    u = S p,   y = h(G u) u,   Phi = Fp y,   lambda = h(Fl y),   h(t) = relu6(t + 3) / 3,   all without biases.

The released code adds a skip in the latent space and two norms there, with which, in its order,

    v = norm1(Q^T x),   y = lambda (W0 * x) + P (norm2(Phi v) + v).

It puts the residual at the kernel's centre; the paper's forms for larger kernels are not in it, and not here.

Differences from the released code: by default the norms keep only their factors and offsets, so that all of it is one
kernel and one bias for each sample (``residual_norm="none"``); three axes; the bias, if there is one, is not scaled.

Cells make the kernel depend on position: mirrored patches get other kernels, unlike with the other dynamic
convolutions; with ``pool=1`` they get the same. A norm over each channel of each sample behind the layer divides out a
common factor of both terms, so that lambda acts as the mix of the two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers.dynamic import ChannelAffine, DynamicConv, require_choice
from nnunet_deform.ops import ConvImpl, autocast_disabled
from nnunet_deform.ops.checks import spatial_argument

ResidualNorm = Literal["none", "batch"]


class DCD(DynamicConv):
    """Dynamic convolution decomposition; see the module's docstring for the equations.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``nn.Conv3d``; kernels
            are odd, padded so that they are centred, and ``groups`` is 1: P and Q are dense.
        latent: L, by default int(sqrt(4 C)).
        squeeze: the length of u, by default max(4 C, L^2) // 16 and at least 4.
        pool: cells on each axis, 1 or 2; by default 2 where the kernel is larger than 1.
        residual_norm: "none" for factors and offsets only, or "batch" for BatchNorm over samples and voxels, as
            released, which in training takes feature maps of L channels.
        conv_impl: see :func:`nnunet_deform.ops.dynamic_conv3d`.

    Raises:
        ValueError: an option outside what is listed here. In training, a single sample of one voxel with
            ``residual_norm="batch"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        latent: int | None = None,
        squeeze: int | None = None,
        pool: int | Sequence[int] | None = None,
        residual_norm: ResidualNorm = "none",
        conv_impl: ConvImpl = "auto",
    ) -> None:
        require_choice("residual_norm", residual_norm, ("none", "batch"))
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, conv_impl=conv_impl
        )
        if groups != 1:
            raise ValueError(
                f"groups={groups} must be 1 for {type(self).__name__}: its residual joins all channels; use a plain "
                "convolution here."
            )
        self._require_centred_kernel()
        self.latent = math.isqrt(4 * in_channels) if latent is None else latent
        width = max(max(4 * in_channels, self.latent**2) // 16, 4) if squeeze is None else squeeze
        for name, value in (("latent", self.latent), ("squeeze", width)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        cells = tuple(2 if k > 1 else 1 for k in self.kernel_size) if pool is None else pool
        self.cells = tuple(spatial_argument("pool", cells, self.ndim, 1))
        if max(self.cells) > 2:
            raise ValueError(f"pool={pool} must be 1 or 2 on every axis.")
        self.residual_norm = residual_norm
        self.compress = nn.Linear(in_channels, self.latent, bias=False)
        self.expand = nn.Linear(self.latent, out_channels, bias=False)
        norm = nn.BatchNorm1d if residual_norm == "batch" else ChannelAffine
        self.norm1, self.norm2 = norm(self.latent), norm(self.latent)
        self.squeeze = nn.Linear(math.prod(self.cells) * in_channels, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.to_phi = nn.Linear(width, self.latent**2, bias=False)
        self.to_lambda = nn.Linear(width, out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self, initialize: Callable[[Tensor], Any] = nn.init.kaiming_normal_) -> None:
        """The initial state: kernel by ``initialize``, bias zero; both terms start at about the same size."""
        super().reset_parameters(initialize)
        batch = self.residual_norm == "batch"
        nn.init.normal_(self.compress.weight, std=math.sqrt(2 / (self.latent if batch else self.in_channels)))
        nn.init.normal_(self.expand.weight, std=math.sqrt(2 / self.out_channels if batch else 1 / self.latent))
        for module in (self.norm1, self.norm2, self.squeeze, self.gate, self.to_phi, self.to_lambda):
            module.reset_parameters()

    def neutralise(self) -> tuple[float, float]:
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.to_lambda.weight)
        return 1.0, 1.0

    def fusion(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """lambda [B, C_out] and Phi [B, L, L] of [B, C, *spatial], float32 or better."""
        with autocast_disabled(x.device.type):
            u = self.squeeze(cell_means(x, self.cells).to(self.squeeze.weight.dtype).flatten(1))
            y = _hard_gate(self.gate(u)) * u
            return _hard_gate(self.to_lambda(y)), self.to_phi(y).unflatten(1, (self.latent, self.latent))

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of :class:`DynamicConv`; with ``residual_norm="batch"`` by the running statistics, as in evaluation."""
        scale, phi = self.fusion(x)
        with autocast_disabled(x.device.type):
            factor1, offset1 = _factor_and_offset(self.norm1)
            factor2, offset2 = _factor_and_offset(self.norm2)
            latent = (factor2.unsqueeze(1) * phi + torch.eye(self.latent, dtype=phi.dtype, device=phi.device)) * factor1
            centre = self.expand.weight @ latent @ self.compress.weight
            around = [side for k in reversed(self.kernel_size) for side in (k // 2, k // 2)]
            ones = (1,) * self.ndim
            kernels = scale.view(*scale.shape, 1, *ones) * self.weight + F.pad(
                centre.view(*centre.shape, *ones), around
            )
            bias = (factor2 * (phi @ offset1) + offset2 + offset1) @ self.expand.weight.mT
            return kernels, bias if self.bias is None else bias + self.bias

    def divided(self, x: Tensor) -> tuple[tuple[Tensor | None, ...], Callable[..., Tensor]] | None:
        by_batch = self.residual_norm == "batch" and self.training
        return None if by_batch else super().divided(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] -> [B, C_out, *spatial']."""
        if self.residual_norm == "batch" and self.training:
            return self._by_batch_statistics(x)
        return super().forward(x)

    def _by_batch_statistics(self, x: Tensor) -> Tensor:
        scale, phi = self.fusion(x)
        conv = F.conv2d if self.ndim == 2 else F.conv3d
        static = conv(x, self.weight, None, self.stride, self.padding, self.dilation)
        if len(x) * math.prod(static.shape[2:]) < 2 and isinstance(self.norm1, nn.BatchNorm1d):
            raise ValueError(
                "residual_norm='batch' needs several samples or voxels in training, got a batch of 1 with an output of "
                "1 voxel; use residual_norm='none'."
            )
        ones = (1,) * self.ndim
        v = self.norm1(
            conv(x, self.compress.weight.view(*self.compress.weight.shape, *ones), None, self.stride).flatten(2)
        )
        with autocast_disabled(x.device.type):
            # Phi is not bounded: its product may not fit half precision.
            v = v.to(phi.dtype)
            residual = self.norm2(phi @ v) + v
        residual = conv(
            residual.unflatten(2, static.shape[2:]).to(static.dtype),
            self.expand.weight.view(*self.expand.weight.shape, *ones),
            self.bias,
        )
        return static * scale.view(*scale.shape, *ones).to(static.dtype) + residual

    def kept_by_autograd(self, size: Sequence[int]) -> int:
        """Numbers kept for each sample of this size in training, beyond a static convolution's: the kernel, the
        residual's centre and its factors, or with ``residual_norm="batch"`` the latent maps."""
        if self.residual_norm == "batch":
            return (4 * self.latent + self.out_channels) * math.prod(self.output_size(size))
        return self.weight.numel() + self.out_channels * self.latent + 3 * self.latent**2

    def autocast_surplus(self, size: Sequence[int]) -> int:
        """As of :class:`DynamicConv`: the maps on both sides of Phi are float32."""
        return 2 * self.latent * math.prod(self.output_size(size)) if self.residual_norm == "batch" else 0


class DCD2d(DCD):
    """As :class:`DCD`, of images: [B, C, H, W] -> [B, C_out, H_out, W_out]."""

    ndim = 2


class DCD3d(DCD):
    """As :class:`DCD`, of volumes: [B, C, D, H, W] -> [B, C_out, D_out, H_out, W_out]."""

    ndim = 3


def cell_means(x: Tensor, cells: Sequence[int]) -> Tensor:
    """Means of [B, C, *spatial] over 1 or 2 cells on each axis, [B, C, *cells], in float32 or better.

    Of an odd number of voxels the middle one is in both cells, as in torch's adaptive average pooling, and so both
    cells of a single voxel are that voxel.
    """
    means = x
    for axis in range(x.ndim - 1, 1, -1):
        size = means.shape[axis]
        dtype = torch.promote_types(means.dtype, torch.float32)
        parts = [means] if cells[axis - 2] == 1 else [means.narrow(axis, s, -(-size // 2)) for s in (0, size // 2)]
        means = torch.stack([part.mean(axis, dtype=dtype) for part in parts], axis)
    return means


def _hard_gate(t: Tensor) -> Tensor:
    """Between 0 and 2, 1 at 0."""
    return F.relu6(t + 3) / 3


def _factor_and_offset(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm of the latent space does to each of its entries, BatchNorm's by running statistics."""
    if isinstance(norm, ChannelAffine):
        return norm.weight, norm.bias
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return factor, norm.bias - norm.running_mean * factor
