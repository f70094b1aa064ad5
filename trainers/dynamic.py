"""Other dynamic convolutions in nnU-Net, which MAGIC is compared with: DYConv, CondConv, ODConv, DCD and DDConv, and
twins of them with BatchNorm.

All are in the place of MAGIC's, with nnU-Net's recipe, so that the convolution differs only. Under InstanceNorm the
attention of DYConv, CondConv and DDConv sees hardly a difference between samples (:mod:`nnunet_deform.layers.dynamic`
says why). The twins have BatchNorm, as the papers' networks, and are for the 2d configuration, in which nnU-Net's
batches are large enough for it; ``nnUNetTrainerBN``, nnU-Net's own, is that of the stock network.
"""

import torch

from nnunet_deform.layers import set_temperature
from nnunet_deform.plans import dynamic_architecture, magic_architecture
from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.offset_rate import OffsetRate
from nnunet_deform.trainers.schedules import annealed_temperature

# The attention's, of the papers and the released codes: without what the networks of MAGIC have by default here.
LETTER = {"attention_norm": "none", "attention_init": "released"}


class Annealed(PlannedNetworkTrainer):
    """The temperature of every attention falls from 30 to 1, by the same amount each epoch."""

    initial_temperature = 30.0
    epochs_of_annealing = 29

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.annealing_epochs = self.epochs_of_annealing

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        temperature = annealed_temperature(
            self.current_epoch, start=self.initial_temperature, epochs=self.annealing_epochs
        )
        set_temperature(self.network, temperature)


class nnUNetTrainerDYConv(Annealed):
    """DYConv as published: four kernels, annealed over 29 epochs, on bare channel means. With ``attention_norm`` these
    would be standardised, as nnUNetTrainerMAGIC's vector is."""

    architecture = staticmethod(magic_architecture)
    network_options = {**LETTER, "attention": "dyconv"}


class nnUNetTrainerCondConv(PlannedNetworkTrainer):
    """CondConv as published: eight kernels, on bare channel means."""

    architecture = staticmethod(magic_architecture)
    network_options = {**LETTER, "attention": "condconv", "n_kernels": 8}


class nnUNetTrainerODConv(Annealed):
    """ODConv with four kernels, annealed over 10 epochs; its squeezed vector standardised by the statistics of the
    training so far, in training too, where the released code has BatchNorm."""

    architecture = staticmethod(dynamic_architecture)
    network_options = {"layer": "odconv"}
    epochs_of_annealing = 10

    def _do_i_compile(self) -> bool:
        compiles = super()._do_i_compile()
        if not compiles or self.network_options.get("attention_norm", "running") != "running":
            return compiles
        # Inductor's backward pass makes the standardisation again from statistics that the forward pass has updated.
        self.print_to_log_file(
            "ODConv is not compiled: its gradients would be wrong from the second step on (docs/versions.md)."
        )
        return False


class nnUNetTrainerODConv_layer(nnUNetTrainerODConv):
    """The squeezed vector standardised over its own entries instead, which leaves what samples have in common."""

    network_options = {"layer": "odconv", "attention_norm": "layer"}


class nnUNetTrainerDCD(PlannedNetworkTrainer):
    """DCD, the paper's equation: without the released code's BatchNorm in the residual."""

    architecture = staticmethod(dynamic_architecture)
    network_options = {"layer": "dcd"}


class nnUNetTrainerDDConv(OffsetRate):
    """DDConv with eight kernels; in 3D from level 3 on, because it is slow."""

    architecture = staticmethod(dynamic_architecture)
    network_options = {"layer": "ddconv"}


class nnUNetTrainerDDConv_slowOffsets(nnUNetTrainerDDConv):
    """For AdamW: the offsets at a hundredth of the rate. Each is a sum over channels and taps, every weight of which
    AdamW moves at once: at the full rate samples leave the image (docs/recipes.md)."""

    offset_rate = 0.01


class nnUNetTrainerDYConv_BN(nnUNetTrainerDYConv):
    """With BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerDYConv.network_options, "norm": "batch"}


class nnUNetTrainerCondConv_BN(nnUNetTrainerCondConv):
    """With BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerCondConv.network_options, "norm": "batch"}


class nnUNetTrainerODConv_BN(nnUNetTrainerODConv):
    """With BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerODConv.network_options, "norm": "batch"}


class nnUNetTrainerDCD_BN(nnUNetTrainerDCD):
    """With BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerDCD.network_options, "norm": "batch"}


class nnUNetTrainerDDConv_BN(nnUNetTrainerDDConv):
    """With BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerDDConv.network_options, "norm": "batch"}


class nnUNetTrainerDDConv_slowOffsets_BN(nnUNetTrainerDDConv_slowOffsets):
    """With BatchNorm, for the 2d configuration."""

    network_options = {**nnUNetTrainerDDConv.network_options, "norm": "batch"}
