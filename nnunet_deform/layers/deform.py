"""Deformable convolution layers: an offset branch and the operator it steers."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers.recomputation import may_keep_less, recomputed
from nnunet_deform.ops import autocast_disabled, deform_conv2d, deform_conv3d, steered_deform_conv

OffsetAxes = Literal["auto", "all"] | Sequence[int]


class _FromZero:
    """A convolution that starts at zero and draws no random numbers: what is drawn after it does not depend on it."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroConv2d(_FromZero, nn.Conv2d):
    """``nn.Conv2d`` that starts at zero."""


class ZeroConv3d(_FromZero, nn.Conv3d):
    """``nn.Conv3d`` that starts at zero."""


class DeformConv(nn.Module):
    """Deformable convolution that keeps channels and spatial size (DeformUX-Net, eq. 1-2), in 2D and 3D.

    A convolution of the layer's own input yields the offsets, in voxels. It starts at zero, so the layer starts as the
    ordinary convolution of the same weight.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``; says the number of axes and makes the offset branch.
        channels: C, in and out.
        kernel_size: odd, one value for each axis.
        depthwise: one kernel for each channel; False for a dense convolution.
        deformable: False leaves the offset branch out: the plain convolution, our control.
        offset_kernel: 1 (paper) or 3, the kernel of the offset branch on the axes where ``kernel_size`` is not 1.
        offset_axes: axes that taps may move along: "all", a selection such as (1, 2), or "auto" for those where
            ``kernel_size`` is not 1 (on the others a voxel is a whole slice away).
        offset_clamp: bound on the absolute offset in voxels; None for no bound.

    Raises:
        ValueError: an option outside what is listed here.
    """

    def __init__(
        self,
        conv_op: type[nn.Conv2d] | type[nn.Conv3d],
        channels: int,
        kernel_size: Sequence[int],
        *,
        depthwise: bool = True,
        deformable: bool = True,
        offset_kernel: int = 1,
        offset_axes: OffsetAxes = "auto",
        offset_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = tuple(kernel_size)
        self.ndim = len(self.kernel_size)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size={self.kernel_size} must be odd on every axis to keep the spatial size.")
        if offset_kernel not in (1, 3):
            raise ValueError(f"offset_kernel={offset_kernel} must be 1 or 3.")
        if offset_clamp is not None and offset_clamp <= 0:
            raise ValueError(f"offset_clamp={offset_clamp} must be positive, or None for no bound.")
        self.padding = tuple(k // 2 for k in self.kernel_size)
        self.groups = channels if depthwise else 1
        self.offset_clamp = offset_clamp
        self.weight = nn.Parameter(torch.empty(channels, channels // self.groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        self.taps = math.prod(self.kernel_size)
        axes = resolve_axes(offset_axes, self.kernel_size)
        self.offset_axes = axes if deformable else ()
        self.offset: nn.Module | None = None
        if self.offset_axes:
            branch_kernel = tuple(1 if k == 1 else offset_kernel for k in self.kernel_size)
            self.offset = (ZeroConv2d if conv_op is nn.Conv2d else ZeroConv3d)(
                channels,
                len(self.offset_axes) * self.taps,
                branch_kernel,
                padding=tuple(k // 2 for k in branch_kernel),
            )
        # Channels of the offset tensor that the plain form keeps for the operator.
        self.offset_channels = self.ndim * self.taps if self.offset_axes else 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial state, which a network-wide initialisation must restore: torch's default, offsets zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        if self.offset is not None:
            self.offset.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] -> [B, C, *spatial]. Training keeps the input, and computes the offsets again."""
        if self.offset is None:
            conv = F.conv2d if self.ndim == 2 else F.conv3d
            return conv(x, self.weight, self.bias, padding=self.padding, groups=self.groups)
        if may_keep_less(self):
            return self._steered(x, None)
        return self._convolved(x, self.offsets(x))

    def behind(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``forward(norm(x))`` in the form that keeps x alone, and makes the norm and the offsets again; for where
        ``may_keep_less`` says so of the module that holds both."""
        if self.offset is None:
            return recomputed(lambda x: self(norm(x)), x)
        if torch.compiler.is_compiling():
            return self._convolved(*recomputed(lambda x: self._prepared(x, norm), x))
        return self._steered(x, norm)

    def _steered(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """The convolution of norm(x), of which autograd keeps x."""
        parameters = [*self.offset.parameters(), *([] if norm is None else norm.parameters())]
        return steered_deform_conv(
            lambda x: self._prepared(x, norm), x, self.weight, self.bias, padding=self.padding, parameters=parameters
        )

    def _prepared(self, x: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
        """What is sampled, and the offsets."""
        features = x if norm is None else norm(x)
        return features, self.offsets(features)

    def _convolved(self, x: Tensor, offset: Tensor) -> Tensor:
        op = deform_conv2d if self.ndim == 2 else deform_conv3d
        return op(x, offset, self.weight, self.bias, padding=self.padding)

    def offsets(self, x: Tensor) -> Tensor:
        """Of a deformable layer, in voxels: [B, C, *spatial] -> [B, taps*ndim, *spatial], a tap's axes side by side."""
        # Offsets are coordinates: half precision would round them to a fraction of a voxel.
        with autocast_disabled(x.device.type):
            offset = self._project(x.to(self.offset.weight.dtype))
            if self.offset_clamp is not None:
                offset = offset.clamp(-self.offset_clamp, self.offset_clamp)
            return on_all_axes(offset, self.offset_axes, self.ndim)

    def _project(self, x: Tensor) -> Tensor:
        if any(k > 1 for k in self.offset.kernel_size):
            return self.offset(x)
        rows = x.movedim(1, -1).flatten(1, -2)
        planar = _PlanarProjection.apply(rows, self.offset.weight.flatten(1), self.offset.bias)
        return planar.unflatten(2, x.shape[2:])


class _PlanarProjection(torch.autograd.Function):
    """A 1x1 convolution of channels-last voxels that writes each output channel as one plane, with no copy either way.

    rows [B, V, C], weight [O, C], bias [O] -> [B, O, V]. The operator reads offsets fastest plane by plane, and the
    gradient of the rows comes back as rows, which autograd's own formula for a matrix product would not do.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.baddbmm(bias[:, None], weight.expand(len(rows), -1, -1), rows.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad.mT, weight.expand(len(rows), -1, -1)) if needs_rows else None,
            torch.bmm(grad, rows).sum(0) if needs_weight else None,
            grad.sum((0, 2)) if needs_bias else None,
        )


def on_all_axes(offset: Tensor, axes: Sequence[int], ndim: int) -> Tensor:
    """[B, taps*len(axes), *spatial], offsets along some axes, with zeros on the others: [B, taps*ndim, *spatial]."""
    if len(axes) == ndim:
        return offset
    moving = offset.unflatten(1, (-1, len(axes))).unbind(2)
    still = torch.zeros_like(moving[0])
    by_axis = [moving[axes.index(axis)] if axis in axes else still for axis in range(ndim)]
    return torch.stack(by_axis, dim=2).flatten(1, 2)


def resolve_axes(offset_axes: OffsetAxes, kernel_size: Sequence[int]) -> tuple[int, ...]:
    """The axes that taps may move along, see :class:`DeformConv`."""
    ndim = len(kernel_size)
    if offset_axes == "all":
        return tuple(range(ndim))
    if offset_axes == "auto":
        return tuple(axis for axis, k in enumerate(kernel_size) if k > 1)
    axes = tuple(offset_axes)
    if isinstance(offset_axes, str) or not axes or list(axes) != sorted(set(axes)) or not set(axes) <= set(range(ndim)):
        raise ValueError(
            f"offset_axes={offset_axes!r} must be 'auto', 'all' or ascending axes out of {tuple(range(ndim))}, "
            "0 being the first spatial axis."
        )
    return axes
