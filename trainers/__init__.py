"""The trainers: recipes and nnU-Net's contract, no mathematics of networks.

``__all__`` lists every trainer by name. Any of them, and any of nnU-Net's own, also takes a variant suffix:
see :mod:`nnunet_deform.trainers.variants`.
"""

from nnunet_deform.trainers.deformux import (
    nnUNetTrainerDeformUX,
    nnUNetTrainerDeformUX_convnext,
    nnUNetTrainerDeformUX_dense,
    nnUNetTrainerDeformUX_depthwiseScaling,
    nnUNetTrainerDeformUX_noMLP,
    nnUNetTrainerDeformUX_offsetKernel3,
    nnUNetTrainerDeformUX_opOff,
    nnUNetTrainerDeformUX_paper,
    nnUNetTrainerDeformUX_triPlanar,
    nnUNetTrainerDeformUX_xy,
    nnUNetTrainerDeformUX_xz,
    nnUNetTrainerDeformUX_yz,
    nnUNetTrainerUXNet,
)
from nnunet_deform.trainers.magic import (
    nnUNetTrainerMAGIC,
    nnUNetTrainerMAGIC_2x,
    nnUNetTrainerMAGIC_annealed,
    nnUNetTrainerMAGIC_channel,
    nnUNetTrainerMAGIC_channelGlobal,
    nnUNetTrainerMAGIC_CondConv,
    nnUNetTrainerMAGIC_DYConv,
    nnUNetTrainerMAGIC_global,
    nnUNetTrainerMAGIC_noKR,
    nnUNetTrainerMAGIC_released,
    nnUNetTrainerMAGIC_spatial,
    nnUNetTrainerMAGIC_spatialChannel,
    nnUNetTrainerMAGIC_spatialGlobal,
    nnUNetTrainerMAGIC_static,
    nnUNetTrainerMAGICResEnc,
)

__all__ = [
    "nnUNetTrainerDeformUX",
    "nnUNetTrainerDeformUX_convnext",
    "nnUNetTrainerDeformUX_dense",
    "nnUNetTrainerDeformUX_depthwiseScaling",
    "nnUNetTrainerDeformUX_noMLP",
    "nnUNetTrainerDeformUX_offsetKernel3",
    "nnUNetTrainerDeformUX_opOff",
    "nnUNetTrainerDeformUX_paper",
    "nnUNetTrainerDeformUX_triPlanar",
    "nnUNetTrainerDeformUX_xy",
    "nnUNetTrainerDeformUX_xz",
    "nnUNetTrainerDeformUX_yz",
    "nnUNetTrainerMAGIC",
    "nnUNetTrainerMAGICResEnc",
    "nnUNetTrainerMAGIC_2x",
    "nnUNetTrainerMAGIC_CondConv",
    "nnUNetTrainerMAGIC_DYConv",
    "nnUNetTrainerMAGIC_annealed",
    "nnUNetTrainerMAGIC_channel",
    "nnUNetTrainerMAGIC_channelGlobal",
    "nnUNetTrainerMAGIC_global",
    "nnUNetTrainerMAGIC_noKR",
    "nnUNetTrainerMAGIC_released",
    "nnUNetTrainerMAGIC_spatial",
    "nnUNetTrainerMAGIC_spatialChannel",
    "nnUNetTrainerMAGIC_spatialGlobal",
    "nnUNetTrainerMAGIC_static",
    "nnUNetTrainerUXNet",
]
