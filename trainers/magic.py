"""MAGIC in nnU-Net: the trainers, the rows of the paper's Tables 6 and 7, its rivals, and the static twin."""

import torch

from nnunet_deform.layers import set_temperature
from nnunet_deform.plans import magic_architecture
from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.schedules import annealed_temperature


class nnUNetTrainerMAGIC(PlannedNetworkTrainer):
    """PlainConvUNet with four kernels in the encoder's convolutions, nnU-Net's recipe."""

    architecture = staticmethod(magic_architecture)


class nnUNetTrainerMAGIC_2x(nnUNetTrainerMAGIC):
    """Two kernels."""

    network_options = {"n_kernels": 2}


class nnUNetTrainerMAGICResEnc(nnUNetTrainerMAGIC):
    """ResidualEncoderUNet with two kernels in the encoder's convolutions."""

    network_options = {"encoder": "residual"}


class nnUNetTrainerMAGIC_static(nnUNetTrainerMAGIC):
    """The static twin: the same parameters, each kernel always with the same weight."""

    network_options = {"attention": "uniform", "keep_dead_attention": True}


class nnUNetTrainerMAGIC_released(nnUNetTrainerMAGIC):
    """The released code's mixing weights in the place of the paper's, at its temperature of 30."""

    network_options = {"mixing": "released"}


class nnUNetTrainerMAGIC_annealed(nnUNetTrainerMAGIC):
    """The released code's mixing weights, their temperature lowered by 1 an epoch from 30 to 1."""

    network_options = {"mixing": "released"}

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
    """DYConv's attention in the place of MAGIC's, annealed as there."""

    network_options = {"attention": "dyconv"}


class nnUNetTrainerMAGIC_CondConv(nnUNetTrainerMAGIC):
    """CondConv's attention in the place of MAGIC's, with its eight kernels."""

    network_options = {"attention": "condconv", "n_kernels": 8}


class nnUNetTrainerMAGIC_spatial(nnUNetTrainerMAGIC):
    """Table 6, the spatial branch alone."""

    network_options = {"use_channel": False, "use_global": False}


class nnUNetTrainerMAGIC_channel(nnUNetTrainerMAGIC):
    """Table 6, the channel branch alone."""

    network_options = {"use_spatial": False, "use_global": False}


class nnUNetTrainerMAGIC_global(nnUNetTrainerMAGIC):
    """Table 6, the global branch alone."""

    network_options = {"use_spatial": False, "use_channel": False}


class nnUNetTrainerMAGIC_spatialChannel(nnUNetTrainerMAGIC):
    """Table 6, without the global branch."""

    network_options = {"use_global": False}


class nnUNetTrainerMAGIC_spatialGlobal(nnUNetTrainerMAGIC):
    """Table 6, without the channel branch."""

    network_options = {"use_channel": False}


class nnUNetTrainerMAGIC_channelGlobal(nnUNetTrainerMAGIC):
    """Table 6, without the spatial branch."""

    network_options = {"use_spatial": False}


class nnUNetTrainerMAGIC_noKR(nnUNetTrainerMAGIC):
    """Table 7, without kernel recalculation."""

    network_options = {"use_kr": False}
