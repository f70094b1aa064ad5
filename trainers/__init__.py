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
from nnunet_deform.trainers.lightmedseg import (
    nnUNetTrainerLightMedSeg,
    nnUNetTrainerLightMedSeg_anchors16,
    nnUNetTrainerLightMedSeg_anchors32,
    nnUNetTrainerLightMedSeg_noAnchors,
    nnUNetTrainerLightMedSeg_noLSPM,
    nnUNetTrainerLightMedSeg_noRouter,
    nnUNetTrainerLightMedSeg_opOff,
    nnUNetTrainerLightMedSeg_paper,
    nnUNetTrainerLightMedSegStandard,
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
    "nnUNetTrainerLightMedSeg",
    "nnUNetTrainerLightMedSegStandard",
    "nnUNetTrainerLightMedSeg_anchors16",
    "nnUNetTrainerLightMedSeg_anchors32",
    "nnUNetTrainerLightMedSeg_noAnchors",
    "nnUNetTrainerLightMedSeg_noLSPM",
    "nnUNetTrainerLightMedSeg_noRouter",
    "nnUNetTrainerLightMedSeg_opOff",
    "nnUNetTrainerLightMedSeg_paper",
    "nnUNetTrainerUXNet",
]
