"""Modules that wire operators together. They know no network and nothing of nnU-Net."""

from nnunet_deform.layers.deform import DeformConv
from nnunet_deform.layers.magic import MagicConv, MagicConv2d, MagicConv3d, set_temperature
from nnunet_deform.layers.norm import ChannelLayerNorm
from nnunet_deform.layers.residual import ConvStyle, ResidualBlock, UpBlock

__all__ = [
    "ChannelLayerNorm",
    "ConvStyle",
    "DeformConv",
    "MagicConv",
    "MagicConv2d",
    "MagicConv3d",
    "ResidualBlock",
    "UpBlock",
    "set_temperature",
]
