"""MAGIC in nnU-Net: the trainers, the rows of the paper's Tables 6 and 7, the static twin, and twins with BatchNorm.

The mode of nnUNetTrainerMAGIC is the networks' default: the paper's mixing with a standardised attention and an
initialisation without dead kernels (:mod:`nnunet_deform.networks.magic` says why). Its subclasses inherit it, unless
they say that they are the letter of the paper, of the released code or of another method. A checkpoint from before the
standardisation loads in any of them, and is predicted with and trained on without it.
"""

from nnunet_deform.plans import magic_architecture
from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.dynamic import LETTER, Annealed, nnUNetTrainerCondConv, nnUNetTrainerDYConv


class nnUNetTrainerMAGIC(PlannedNetworkTrainer):
    """PlainConvUNet with four kernels in the encoder's convolutions, nnU-Net's recipe."""

    architecture = staticmethod(magic_architecture)


class nnUNetTrainerMAGIC_2x(nnUNetTrainerMAGIC):
    """Two kernels, in nnUNetTrainerMAGIC's mode."""

    network_options = {"n_kernels": 2}


class nnUNetTrainerMAGICResEnc(nnUNetTrainerMAGIC):
    """ResidualEncoderUNet with two kernels in the encoder's convolutions, in nnUNetTrainerMAGIC's mode."""

    network_options = {"encoder": "residual"}


class nnUNetTrainerMAGIC_static(nnUNetTrainerMAGIC):
    """The static twin of any mode: the same parameters, each kernel always with the same weight."""

    network_options = {"attention": "uniform", "keep_dead_attention": True}


class nnUNetTrainerMAGIC_letter(nnUNetTrainerMAGIC):
    """The letter of the paper, but for KR's BatchNorm: its mixing weights at temperature 1 on the bare DRF vector,
    initialised as the released code's."""

    network_options = {**LETTER, "mixing": "paper"}


class nnUNetTrainerMAGIC_released(nnUNetTrainerMAGIC):
    """The letter of the released code, but for KR's BatchNorm: its mixing weights at its temperature of 30 on the bare
    DRF vector, and its initialisation."""

    network_options = {**LETTER, "mixing": "released"}


class nnUNetTrainerMAGIC_annealed(Annealed, nnUNetTrainerMAGIC_released):
    """As released, the temperature lowered by 1 an epoch from 30 to 1, which the released code has a method for."""


class nnUNetTrainerMAGIC_DYConv(nnUNetTrainerDYConv):
    """nnUNetTrainerDYConv under its former name, which is in checkpoints and names folders."""


class nnUNetTrainerMAGIC_CondConv(nnUNetTrainerCondConv):
    """nnUNetTrainerCondConv under its former name, which is in checkpoints and names folders."""


class nnUNetTrainerMAGIC_BN(nnUNetTrainerMAGIC):
    """With BatchNorm in the U-Net, for the 2d configuration, in nnUNetTrainerMAGIC's mode."""

    network_options = {"norm": "batch"}


class nnUNetTrainerMAGIC_static_BN(nnUNetTrainerMAGIC_static):
    """The static twin with BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerMAGIC_static.network_options, "norm": "batch"}


class nnUNetTrainerMAGIC_spatial(nnUNetTrainerMAGIC):
    """Table 6, the spatial branch alone, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_channel": False, "use_global": False}


class nnUNetTrainerMAGIC_channel(nnUNetTrainerMAGIC):
    """Table 6, the channel branch alone, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_spatial": False, "use_global": False}


class nnUNetTrainerMAGIC_global(nnUNetTrainerMAGIC):
    """Table 6, the global branch alone, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_spatial": False, "use_channel": False}


class nnUNetTrainerMAGIC_spatialChannel(nnUNetTrainerMAGIC):
    """Table 6, without the global branch, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_global": False}


class nnUNetTrainerMAGIC_spatialGlobal(nnUNetTrainerMAGIC):
    """Table 6, without the channel branch, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_channel": False}


class nnUNetTrainerMAGIC_channelGlobal(nnUNetTrainerMAGIC):
    """Table 6, without the spatial branch, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_spatial": False}


class nnUNetTrainerMAGIC_noKR(nnUNetTrainerMAGIC):
    """Table 7, without kernel recalculation, in nnUNetTrainerMAGIC's mode."""

    network_options = {"use_kr": False}
