"""The convolutional blocks of DeformUX-Net's skip encoders and decoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_deform.layers.norm import InstanceNorm2d, InstanceNorm3d, is_plain_instance_norm, normalized
from nnunet_deform.layers.recomputation import may_keep_less_compiled
from nnunet_deform.ops import autocast_dtype, residual_block

_COMPILED_BETTER = {nn.InstanceNorm2d: InstanceNorm2d, nn.InstanceNorm3d: InstanceNorm3d}


@dataclass(frozen=True)
class ConvStyle:
    """How a network's plain convolutions are built: operators and their arguments, in nnU-Net's terms.

    ``None`` leaves an operator out.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``; on [B, C, *spatial] all of them keep the spatial size.
        conv_bias: whether convolutions have a bias.
        norm_op, norm_op_kwargs: called with the number of channels.
        dropout_op, dropout_op_kwargs: called without it.
        nonlin, nonlin_kwargs: the activation.
    """

    conv_op: type[nn.Module]
    conv_bias: bool
    norm_op: type[nn.Module] | None
    norm_op_kwargs: dict[str, Any] = field(default_factory=dict)
    dropout_op: type[nn.Module] | None = None
    dropout_op_kwargs: dict[str, Any] = field(default_factory=dict)
    nonlin: type[nn.Module] | None = nn.LeakyReLU
    nonlin_kwargs: dict[str, Any] = field(default_factory=dict)

    def conv(self, in_channels: int, out_channels: int, kernel_size: Sequence[int]) -> nn.Module:
        """A convolution that keeps the spatial size."""
        padding = [k // 2 for k in kernel_size]
        return self.conv_op(in_channels, out_channels, tuple(kernel_size), padding=padding, bias=self.conv_bias)

    def norm(self, channels: int) -> nn.Module:
        if self.norm_op is None:
            return nn.Identity()
        return _COMPILED_BETTER.get(self.norm_op, self.norm_op)(channels, **self.norm_op_kwargs)

    def dropout(self) -> nn.Module:
        return nn.Identity() if self.dropout_op is None else self.dropout_op(**self.dropout_op_kwargs)

    def activation(self) -> nn.Module:
        return nn.Identity() if self.nonlin is None else self.nonlin(**self.nonlin_kwargs)


class ResidualBlock(nn.Module):
    """Two convolutions with norms and a residual connection, the residual block of UNETR's decoders.

    [B, in, *spatial], or parts of it along the channels -> [B, out, *spatial]. The shortcut is a normalised 1x1
    convolution where the widths differ. As the paper has it, without biases, affine norms and dropout, and with leaky
    ReLU, a training step keeps its input, half of its activations and its output, see
    :func:`nnunet_deform.ops.residual_block`.
    """

    def __init__(self, style: ConvStyle, in_channels: int, out_channels: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            style.conv(in_channels, out_channels, kernel_size),
            style.dropout(),
            style.norm(out_channels),
            style.activation(),
            style.conv(out_channels, out_channels, kernel_size),
            style.norm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                style.conv(in_channels, out_channels, [1] * len(kernel_size)), style.norm(out_channels)
            )
        self.activation = style.activation()
        # Elements that the plain form keeps for each voxel, counted as nnU-Net counts: the outputs of convolutions.
        self.conv_outputs_per_voxel = (2 if in_channels == out_channels else 3) * out_channels

    def forward(self, *parts: Tensor) -> Tensor:
        first, dropout, first_norm, activation, second, second_norm = self.body
        if may_keep_less_compiled(parts[0], self) and self._is_the_papers(parts):
            projection = None if isinstance(self.shortcut, nn.Identity) else self.shortcut[0].weight
            norms = [first_norm, second_norm, *([] if projection is None else [self.shortcut[1]])]
            return residual_block(
                *(parts, first.weight, second.weight, projection),
                padding=first.padding,
                eps=[norm.eps for norm in norms],
                negative_slope=activation.negative_slope,
            )
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        features = normalized(first_norm, dropout(first(x)), activation)
        return normalized(second_norm, second(features), self.activation, residual=self.shortcut(x))

    def _is_the_papers(self, parts: Sequence[Tensor]) -> bool:
        """Whether its layers are those that the form which keeps less is for."""
        first, dropout, first_norm, activation, second, second_norm = self.body
        projected = isinstance(self.shortcut, nn.Sequential)
        convs, norms = [first, second], [first_norm, second_norm]
        if projected:
            convs, norms = [*convs, self.shortcut[0]], [*norms, self.shortcut[1]]
        return (
            all(type(conv) in (nn.Conv2d, nn.Conv3d) and conv.bias is None for conv in convs)
            and all(map(is_plain_instance_norm, norms))
            and isinstance(dropout, nn.Identity)
            and all(type(act) is nn.LeakyReLU and act.negative_slope > 0 for act in (activation, self.activation))
            and activation.negative_slope == self.activation.negative_slope
            # Without a projection, autocast adds features of another precision as they are.
            and (projected or autocast_dtype(parts[0].device.type) in (None, parts[0].dtype))
            # torch's norm refuses a single voxel.
            and math.prod(parts[0].shape[2:]) > 1
        )


class UpBlock(nn.Module):
    """Transposed convolution to the next finer level, concatenation with the skip, residual block.

    [B, in, *coarse] and [B, out, *fine] -> [B, out, *fine]; ``stride`` is fine / coarse on each axis.
    """

    def __init__(
        self,
        style: ConvStyle,
        transposed_conv_op: type[nn.Module],
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        kernel_size: Sequence[int],
    ) -> None:
        super().__init__()
        self.up = transposed_conv_op(in_channels, out_channels, tuple(stride), tuple(stride), bias=style.conv_bias)
        self.block = ResidualBlock(style, 2 * out_channels, out_channels, kernel_size)
        self.conv_outputs_per_voxel = out_channels + self.block.conv_outputs_per_voxel

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.up(x), skip)
