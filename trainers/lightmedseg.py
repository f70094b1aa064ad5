"""LightMedSeg in nnU-Net: the trainer, the paper's recipe and loss, the rows of its Table 4, the op-off twin."""

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunet_deform.losses import BoundaryWeightedLoss
from nnunet_deform.plans import lightmedseg_architecture
from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.recipes import AdamWRecipe


class nnUNetTrainerLightMedSeg(AdamWRecipe, PlannedNetworkTrainer):
    """LightMedSeg with nnU-Net's loss and deep supervision and our AdamW recipe at five times its learning rate.

    The paper's rate is not known. Adam moves each weight by about the rate, whatever the width, so a layer's output
    changes with its number of inputs; this network has 8 channels where nnU-Net's has 32. 5e-3 is the best of six rates
    in short trainings; docs/recipes.md has them.
    """

    learning_rate = 5e-3
    architecture = staticmethod(lightmedseg_architecture)


class nnUNetTrainerLightMedSeg_paper(nnUNetTrainerLightMedSeg):
    """The paper's loss (eq. 22) and 300 epochs, without deep supervision. Its batch of 8 is for the plan to say."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 300
        self.enable_deep_supervision = False

    def _build_loss(self) -> BoundaryWeightedLoss:
        stock = super()._build_loss()
        architecture = self.planned_architecture(self.configuration_manager)
        return BoundaryWeightedLoss(
            regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
            batch_dice=self.configuration_manager.batch_dice,
            boundary_kernel=[1 if k == 1 else 3 for k in architecture["arch_kwargs"]["kernel_sizes"][0]],
            scale_weights=stock.weight_factors if isinstance(stock, DeepSupervisionWrapper) else None,
        )


class nnUNetTrainerLightMedSegStandard(nnUNetTrainerLightMedSeg):
    """Table 4, without ghost convolutions: standard ones in their place, 0.66 M parameters."""

    network_options = {"ghost": False}


class nnUNetTrainerLightMedSeg_noLSPM(nnUNetTrainerLightMedSeg):
    """Table 4, without the local structural prior module, and so without texture routing."""

    network_options = {"prior": "none"}


class nnUNetTrainerLightMedSeg_noAnchors(nnUNetTrainerLightMedSeg):
    """Table 4, without anchors, and so without FiLM and position bias."""

    network_options = {"anchors": "none"}


class nnUNetTrainerLightMedSeg_noRouter(nnUNetTrainerLightMedSeg):
    """Table 4, without the skip router: each decoder stage takes the features of its own level."""

    network_options = {"router": "none"}


class nnUNetTrainerLightMedSeg_anchors16(nnUNetTrainerLightMedSeg):
    """Table 4, 16 anchors in the place of 8."""

    network_options = {"num_anchors": 16}


class nnUNetTrainerLightMedSeg_anchors32(nnUNetTrainerLightMedSeg):
    """Table 4, 32 anchors in the place of 8."""

    network_options = {"num_anchors": 32}


class nnUNetTrainerLightMedSeg_w2(nnUNetTrainerLightMedSeg):
    """All widths times 2: of stem, encoder, bottleneck, decoder and skips, and the hidden ones of router, structural
    prior and anchor detector; 1.85 M parameters. The recipe, the number of anchors and the norms' four groups stay, and
    gates have a quarter of their channels as hidden units, at least 4, at every width."""

    network_options = {"width": 2}


class nnUNetTrainerLightMedSeg_w4(nnUNetTrainerLightMedSeg):
    """All widths times 4, as in nnUNetTrainerLightMedSeg_w2; 7.28 M parameters."""

    network_options = {"width": 4}


class nnUNetTrainerLightMedSeg_opOff(nnUNetTrainerLightMedSeg):
    """The op-off twin: plain convolutions, per-channel affines and equal weights in the place of the structural prior,
    FiLM and the learned router, and as many parameters."""

    network_options = {"op_off": True}
