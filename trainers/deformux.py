"""DeformUX-Net in nnU-Net: the trainer, the paper's recipe, the rows of the paper's Table 3, and the op-off twin."""

import torch

from nnunet_deform.networks.deformux import UX_NET_OPTIONS
from nnunet_deform.plans import deformux_architecture
from nnunet_deform.trainers.offset_rate import OffsetRate
from nnunet_deform.trainers.schedules import PlateauSchedule


class nnUNetTrainerDeformUX(OffsetRate):
    """DeformUX-Net with nnU-Net's recipe (SGD, polynomial decay, deep supervision)."""

    architecture = staticmethod(deformux_architecture)


class nnUNetTrainerDeformUX_offsetRate3(nnUNetTrainerDeformUX):
    """The offset branches at three times the learning rate."""

    offset_rate = 3


class nnUNetTrainerDeformUX_offsetRate10(nnUNetTrainerDeformUX):
    """The offset branches at ten times the learning rate."""

    offset_rate = 10


class nnUNetTrainerDeformUX_paper(nnUNetTrainerDeformUX):
    """The paper's optimisation: AdamW at 1e-4 with weight decay 0.08, the rate times 0.9 after 10 epochs without a
    lower validation loss, 40,000 steps (160 epochs of nnU-Net's 250)."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-4
        self.weight_decay = 0.08
        self.num_epochs = 160

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PlateauSchedule]:
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.initial_lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=self.weight_decay
        )
        schedule = PlateauSchedule(
            optimizer,
            self.initial_lr,
            factor=0.9,
            patience=10,
            losses=lambda: self.logger.get_value("val_losses", step=None),
        )
        return optimizer, schedule


class nnUNetTrainerDeformUX_opOff(nnUNetTrainerDeformUX):
    """The op-off twin: plain depthwise convolutions in the place of the deformable ones."""

    network_options = {"deformable": False}


class nnUNetTrainerDeformUX_convnext(nnUNetTrainerDeformUX):
    """The block of the released training code in the place of eq. 3."""

    network_options = {"block": "convnext"}


class nnUNetTrainerDeformUX_dense(nnUNetTrainerDeformUX):
    """Table 3, standard deformable convolution: dense in the place of depthwise."""

    network_options = {"depthwise": False}


class nnUNetTrainerDeformUX_offsetKernel3(nnUNetTrainerDeformUX):
    """Table 3, offset kernel 3x3x3."""

    network_options = {"offset_kernel": 3}


class nnUNetTrainerDeformUX_triPlanar(nnUNetTrainerDeformUX):
    """Table 3, tri-planar: offsets along all axes, where ours leaves out axes with kernel size 1."""

    network_options = {"offset_axes": "all"}


class nnUNetTrainerDeformUX_xy(nnUNetTrainerDeformUX):
    """Table 3, offsets in the x-y plane: the last two axes. 3D only."""

    network_options = {"offset_axes": (1, 2)}


class nnUNetTrainerDeformUX_xz(nnUNetTrainerDeformUX):
    """Table 3, offsets in the x-z plane: the first and the last axis. 3D only."""

    network_options = {"offset_axes": (0, 2)}


class nnUNetTrainerDeformUX_yz(nnUNetTrainerDeformUX):
    """Table 3, offsets in the y-z plane: the first two axes. 3D only."""

    network_options = {"offset_axes": (0, 1)}


class nnUNetTrainerDeformUX_noMLP(nnUNetTrainerDeformUX):
    """Table 3, without the MLP."""

    network_options = {"scaling": "none"}


class nnUNetTrainerDeformUX_depthwiseScaling(nnUNetTrainerDeformUX):
    """Table 3, 3D UX-Net's depthwise scaling in the place of the MLP."""

    network_options = {"scaling": "depthwise"}


class nnUNetTrainerUXNet(nnUNetTrainerDeformUX):
    """Table 3's reference, 3D UX-Net."""

    network_options = UX_NET_OPTIONS
