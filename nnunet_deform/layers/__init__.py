"""Modules that wire operators together. They know no network and nothing of nnU-Net."""

from nnunet_deform.layers.dcd import DCD, DCD2d, DCD3d
from nnunet_deform.layers.ddconv import DDConv, DDConv2d, DDConv3d
from nnunet_deform.layers.deform import DeformConv
from nnunet_deform.layers.dynamic import DynamicConv, set_temperature
from nnunet_deform.layers.lightmed import (
    AnchorDetector,
    ChannelAffine,
    FiLM,
    LocalStructuralPrior,
    PositionBias,
    SqueezeExcite,
)
from nnunet_deform.layers.magic import MagicConv, MagicConv2d, MagicConv3d
from nnunet_deform.layers.norm import ChannelLayerNorm, RunningNorm
from nnunet_deform.layers.odconv import ODConv, ODConv2d, ODConv3d
from nnunet_deform.layers.offset_branches import offset_parameters
from nnunet_deform.layers.residual import ConvStyle, ResidualBlock, UpBlock

__all__ = [
    "DCD",
    "AnchorDetector",
    "ChannelAffine",
    "ChannelLayerNorm",
    "ConvStyle",
    "DCD2d",
    "DCD3d",
    "DDConv",
    "DDConv2d",
    "DDConv3d",
    "DeformConv",
    "DynamicConv",
    "FiLM",
    "LocalStructuralPrior",
    "MagicConv",
    "MagicConv2d",
    "MagicConv3d",
    "ODConv",
    "ODConv2d",
    "ODConv3d",
    "PositionBias",
    "ResidualBlock",
    "RunningNorm",
    "SqueezeExcite",
    "UpBlock",
    "offset_parameters",
    "set_temperature",
]
