"""The networks, one in a file, and their registry. They know no trainer."""

from nnunet_deform.networks.deformux import DeformUXNet
from nnunet_deform.networks.dynamic import DynamicPlainConvUNet, DynamicResidualEncoderUNet
from nnunet_deform.networks.lightmedseg import LightMedSeg
from nnunet_deform.networks.magic import MagicPlainConvUNet, MagicResidualEncoderUNet

NETWORKS = {
    "DeformUXNet": DeformUXNet,
    "DynamicPlainConvUNet": DynamicPlainConvUNet,
    "DynamicResidualEncoderUNet": DynamicResidualEncoderUNet,
    "LightMedSeg": LightMedSeg,
    "MagicPlainConvUNet": MagicPlainConvUNet,
    "MagicResidualEncoderUNet": MagicResidualEncoderUNet,
}

__all__ = [
    "NETWORKS",
    "DeformUXNet",
    "DynamicPlainConvUNet",
    "DynamicResidualEncoderUNet",
    "LightMedSeg",
    "MagicPlainConvUNet",
    "MagicResidualEncoderUNet",
]
