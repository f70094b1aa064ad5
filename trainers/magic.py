"""MAGIC in nnU-Net: the trainers, the rows of the paper's Tables 6 and 7, its rivals, and the static twin.

The mode of nnUNetTrainerMAGIC is the networks' default: the paper's mixing with a standardised attention and an
initialisation without dead kernels (:mod:`nnunet_deform.networks.magic` says why). Its subclasses inherit it, unless
they say that they are the letter of the paper, of the released code or of another method. A checkpoint from before the
standardisation loads in any of them, and is predicted with and trained on without it.
"""

import torch

from nnunet_deform.layers import set_temperature
from nnunet_deform.plans import magic_architecture
from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.schedules import annealed_temperature

_LETTER = {"attention_norm": "none", "attention_init": "released"}


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

    network_options = {**_LETTER, "mixing": "paper"}


class nnUNetTrainerMAGIC_released(nnUNetTrainerMAGIC):
    """The letter of the released code, but for KR's BatchNorm: its mixing weights at its temperature of 30 on the bare
    DRF vector, and its initialisation."""

    network_options = {**_LETTER, "mixing": "released"}


class nnUNetTrainerMAGIC_annealed(nnUNetTrainerMAGIC_released):
    """As released, the temperature lowered by 1 an epoch from 30 to 1, which the released code has a method for."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_temperature = 30.0
        self.annealing_epochs = 29

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        temperature = annealed_temperature(
            self.current_epoch, start=self.initial_temperature, epochs=self.annealing_epochs
        )
        set_temperature(self.network, temperature)


class nnUNetTrainerMAGIC_DYConv(nnUNetTrainerMAGIC_annealed):
    """DYConv's attention in the place of MAGIC's, as published: annealed, on bare channel means. With
    ``attention_norm`` these would be standardised, as nnUNetTrainerMAGIC's vector is."""

    network_options = {**_LETTER, "attention": "dyconv"}


class nnUNetTrainerMAGIC_CondConv(nnUNetTrainerMAGIC):
    """CondConv's attention in the place of MAGIC's, as published: eight kernels, on bare channel means."""

    network_options = {**_LETTER, "attention": "condconv", "n_kernels": 8}


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
