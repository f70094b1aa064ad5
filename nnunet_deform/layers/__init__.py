"""Modules that wire operators together. They know no network and nothing of nnU-Net."""

from nnunet_deform.layers.deform import DeformConv
from nnunet_deform.layers.lightmed import (
    AnchorDetector,
    ChannelAffine,
    FiLM,
    LocalStructuralPrior,
    PositionBias,
    SqueezeExcite,
)
from nnunet_deform.layers.magic import MagicConv, MagicConv2d, MagicConv3d, set_temperature
from nnunet_deform.layers.norm import ChannelLayerNorm, RunningNorm
from nnunet_deform.layers.residual import ConvStyle, ResidualBlock, UpBlock

__all__ = [
    "AnchorDetector",
    "ChannelAffine",
    "ChannelLayerNorm",
    "ConvStyle",
    "DeformConv",
    "FiLM",
    "LocalStructuralPrior",
    "MagicConv",
    "MagicConv2d",
    "MagicConv3d",
    "PositionBias",
    "ResidualBlock",
    "RunningNorm",
    "SqueezeExcite",
    "UpBlock",
    "set_temperature",
]
