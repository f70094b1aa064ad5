r"""DDConv: dynamic deformable convolution. Both the kernel and the convolution that gives the offsets are dynamic.

T. Lei et al., "CiT-Net: Convolutional Neural Networks Hand in Hand with Vision Transformers for Medical Image
Segmentation", IJCAI 2023.

With m the mean over voxels of each of the C input channels,

    offsets  o = sum_i b_i U_i * x + u,   b = sigmoid(R1 m + r1) in R^K
    samples  X_t(v) = x(v stride - padding + t dilation + o_t(v)),   linear between voxels, zero outside
    output   y(v) = sum_t (sum_i g_i W_i)_t X_t(v),   g = sigmoid(R2 m' + r2) in R^K

The gates do not compete. m' is m by default, and as released the mean of the samples, over voxels and taps.

Differences from the released code: offsets start at zero, so that the layer starts as a dynamic convolution; they are
channels tap by tap; sampling starts where the convolution of the same padding does, which there it does for kernel 3
only; three axes, on which taps move along those where the kernel is larger than 1.

A norm over each channel of each sample behind the layer leaves only the ratios of the gates, and one in front of it
keeps these nearly the same for every sample: in nnU-Net this is a deformable convolution first of all.

It is slow: a dense deformable convolution gathers C values for each tap of each voxel. Forward and backward with
32 -> 32 channels and two samples take one core of an AMD EPYC (torch 2.14, float32) 0.66 s for 3x3x3 on 16^3 voxels, a
plain convolution 0.027 s; for 3x3 on 64^2 voxels 0.103 s and 0.0085 s. In 3D it is for coarse levels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers.deform import OffsetAxes, on_all_axes, resolve_axes
from nnunet_deform.layers.dynamic import DynamicConv, channel_means, mixed, require_choice
from nnunet_deform.ops import (
    autocast_disabled,
    deform_conv2d,
    deform_conv3d,
    dynamic_conv2d,
    dynamic_conv3d,
)

Routing = Literal["input", "sampled"]


class DDConv(DynamicConv):
    """Dynamic deformable convolution; see the module's docstring for the equations.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``nn.Conv3d``; kernels
            are odd, padded so that they are centred, ``groups`` is 1, and there is one bias.
        n_kernels: K. With 1 there are no gates: a dense deformable convolution, the control.
        routing: what g sees: "input" or, as released, "sampled", which samples once more.
        routing_dropout: the rate of dropout on what gates see, in training; 0.2 as released.
        offset_axes, offset_clamp: see :class:`nnunet_deform.layers.DeformConv`.
        conv_impl: "loop", a call for each sample, or "grouped", one call for the batch; they differ in speed only.

    Raises:
        ValueError: an option outside what is listed here.
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
        n_kernels: int = 8,
        routing: Routing = "input",
        routing_dropout: float = 0.0,
        offset_axes: OffsetAxes = "auto",
        offset_clamp: float | None = None,
        conv_impl: Literal["loop", "grouped"] = "loop",
    ) -> None:
        require_choice("routing", routing, ("input", "sampled"))
        require_choice("conv_impl", conv_impl, ("loop", "grouped"))
        if not 0 <= routing_dropout < 1:
            raise ValueError(f"routing_dropout={routing_dropout} must be at least 0 and less than 1.")
        if offset_clamp is not None and offset_clamp <= 0:
            raise ValueError(f"offset_clamp={offset_clamp} must be positive, or None for no bound.")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            n_kernels=n_kernels,
            conv_impl=conv_impl,
        )
        if groups != 1:
            raise ValueError(f"groups={groups} must be 1 for {type(self).__name__}; use a plain convolution here.")
        self._require_centred_kernel()
        self.dynamic = n_kernels > 1
        self.routing = routing
        self.routing_dropout = routing_dropout
        self.offset_clamp = offset_clamp
        self.offset_axes = resolve_axes(offset_axes, self.kernel_size)
        if not self.offset_axes:
            raise ValueError(
                f"kernel_size={self.kernel_size} is 1 on every axis: with offset_axes='auto' no tap moves."
            )
        self.taps = math.prod(self.kernel_size)
        channels = len(self.offset_axes) * self.taps
        offset_kernel = [1 if k == 1 else 3 for k in self.kernel_size]
        self.offset_padding = tuple(k // 2 for k in offset_kernel)
        self.offset_weight = nn.Parameter(torch.empty(n_kernels * channels, in_channels, *offset_kernel))
        self.offset_bias = nn.Parameter(torch.empty(channels))
        self.offset_gates = nn.Linear(in_channels, n_kernels) if self.dynamic else None
        self.kernel_gates = nn.Linear(in_channels, n_kernels) if self.dynamic else None
        self.reset_parameters()

    def reset_parameters(self, initialize: Callable[[Tensor], Any] = nn.init.kaiming_normal_) -> None:
        """The initial state: kernels by ``initialize``, biases and all of the offsets' convolution zero, the gates'
        layers Kaiming normal by fan-out."""
        super().reset_parameters(initialize)
        nn.init.zeros_(self.offset_weight)
        nn.init.zeros_(self.offset_bias)
        for gates in (self.offset_gates, self.kernel_gates):
            if gates is not None:
                nn.init.kaiming_normal_(gates.weight, mode="fan_out")
                nn.init.zeros_(gates.bias)

    def neutralise(self) -> tuple[float, float]:
        if self.kernel_gates is None:
            return 1.0, 1.0
        nn.init.zeros_(self.kernel_gates.weight)
        return self.n_kernels / 2, 1.0

    def offsets(self, x: Tensor) -> Tensor:
        """In voxels, float32 or better: [B, C, *spatial] -> [B, taps*ndim, *spatial'], a tap's axes side by side."""
        return self._gates_and_offsets(x)[1]

    def mixing_weights(self, x: Tensor) -> Tensor:
        """The gate g of each kernel for each sample, [B, C, *spatial] -> [B, K]; ones where there is one kernel."""
        return self._gates_and_offsets(x)[0]

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of each sample the kernels and biases as of :class:`DynamicConv`, and the kernels of the offsets'
        convolution, [B, taps*len(offset_axes), C, *offset_kernel]."""
        gates, _, offset_kernels = self._gates_and_offsets(x)
        with autocast_disabled(x.device.type):
            bias = None if self.bias is None else self.bias.expand(len(x), -1)
            return mixed(gates, self.weight), bias, offset_kernels.expand(len(x), *offset_kernels.shape[1:])

    def divided(self, x: Tensor) -> None:
        """As of :class:`DynamicConv`; its offsets are as many as voxels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] -> [B, C_out, *spatial']."""
        gates, offset, _ = self._gates_and_offsets(x)
        with autocast_disabled(x.device.type):
            kernels = mixed(gates, self.weight)
        op = deform_conv2d if self.ndim == 2 else deform_conv3d
        geometry = (self.stride, self.padding, self.dilation)
        if self.conv_impl == "loop":
            samples = zip(x.split(1), offset.split(1), kernels.unbind(), strict=True)
            return torch.cat([op(one, o, kernel, self.bias, *geometry) for one, o, kernel in samples])
        batch = len(x)
        one = x.reshape(1, batch * self.in_channels, *x.shape[2:])
        bias = None if self.bias is None else self.bias.repeat(batch)
        output = op(one, offset.reshape(1, -1, *offset.shape[2:]), kernels.flatten(0, 1), bias, *geometry)
        return output.reshape(batch, self.out_channels, *output.shape[2:])

    @torch.no_grad()
    def folded(self, kernel: Tensor, bias: Tensor | None, offset_kernel: Tensor) -> "DDConv":
        """The deformable convolution with these for every sample: a layer of one kernel without gates."""
        layer = type(self)(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=bias is not None,
            n_kernels=1,
            offset_axes=self.offset_axes,
            offset_clamp=self.offset_clamp,
            conv_impl=self.conv_impl,
        ).to(self.weight)
        layer.weight.copy_(kernel)
        layer.offset_weight.copy_(offset_kernel)
        layer.offset_bias.copy_(self.offset_bias)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def kept_by_autograd(self, size: Sequence[int]) -> int:
        """Numbers kept for each sample of this size in training, beyond a static convolution's: both mixed kernels and
        the offsets, with those of axes that do not move; where g sees the samples, also their mean over taps."""
        return self.weight.numel() // self.n_kernels + self._kept_in_float32(size)

    def autocast_surplus(self, size: Sequence[int]) -> int:
        """As of :class:`DynamicConv`: all but the finished kernel is float32, and the input is copied for it."""
        return self._kept_in_float32(size) + 2 * self.in_channels * math.prod(size)

    def _kept_in_float32(self, size: Sequence[int]) -> int:
        sampled = self.in_channels if self.dynamic and self.routing == "sampled" else 0
        clamped = len(self.offset_axes) * self.taps if self.offset_clamp is not None else 0
        of_voxels = (self.ndim * self.taps + clamped + sampled) * math.prod(self.output_size(size))
        return self.offset_weight.numel() // self.n_kernels + of_voxels

    def _exact(self, x: Tensor) -> Tensor:
        """The input in the parameters' dtype: half precision would round offsets to a fraction of a voxel."""
        return x.to(self.offset_weight.dtype)

    def _means(self, x: Tensor) -> Tensor | None:
        if self.offset_gates is None:
            return None
        return F.dropout(channel_means(x, self.offset_gates.weight), self.routing_dropout, self.training)

    def _offset_kernels(self, means: Tensor | None) -> Tensor:
        if self.offset_gates is None:
            return self.offset_weight.unsqueeze(0)
        return mixed(self.offset_gates(means).sigmoid(), self.offset_weight)

    def _offsets(self, x: Tensor, kernels: Tensor) -> Tensor:
        conv = dynamic_conv2d if self.ndim == 2 else dynamic_conv3d
        kernels = kernels.expand(len(x), *kernels.shape[1:])
        offset = conv(x, kernels, self.offset_bias.expand(len(x), -1), self.stride, self.offset_padding)
        if self.offset_clamp is not None:
            offset = offset.clamp(-self.offset_clamp, self.offset_clamp)
        return on_all_axes(offset, self.offset_axes, self.ndim)

    def _gates_and_offsets(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g [B, K], the offsets, and the kernels that gave them, with a first axis of 1 where all have the same."""
        with autocast_disabled(x.device.type):
            exact = self._exact(x)
            means = self._means(x)
            offset_kernels = self._offset_kernels(means)
            offset = self._offsets(exact, offset_kernels)
            if self.kernel_gates is None:
                return exact.new_ones(len(x), 1), offset, offset_kernels
            if self.routing == "sampled":
                op = deform_conv2d if self.ndim == 2 else deform_conv3d
                tap_mean = exact.new_full((self.in_channels, 1, *self.kernel_size), 1 / self.taps)
                sampled = op(exact, offset, tap_mean, None, self.stride, self.padding, self.dilation)
                means = F.dropout(channel_means(sampled, exact), self.routing_dropout, self.training)
            return self.kernel_gates(means).sigmoid(), offset, offset_kernels


class DDConv2d(DDConv):
    """As :class:`DDConv`, of images: [B, C, H, W] -> [B, C_out, H_out, W_out]."""

    ndim = 2


class DDConv3d(DDConv):
    """As :class:`DDConv`, of volumes: [B, C, D, H, W] -> [B, C_out, D_out, H_out, W_out]."""

    ndim = 3
