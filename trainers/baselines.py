"""Networks to compare with, of MONAI and nnU-Net, in nnU-Net's harness.

MONAI's networks train with nnU-Net's recipe, or any other by a suffix; Primus with its own, that of nnU-Net's trainers.
"""

import math

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import (
    AbstractPrimus,
    nnUNet_Primus_B_Trainer,
    nnUNet_Primus_L_Trainer,
    nnUNet_Primus_M_Trainer,
    nnUNet_Primus_S_Trainer,
    nnUNet_PrimusV2B_Trainer,
    nnUNet_PrimusV2L_Trainer,
    nnUNet_PrimusV2M_Trainer,
    nnUNet_PrimusV2S_Trainer,
    nnUNet_PrimusV3B_Trainer,
    nnUNet_PrimusV3L_Trainer,
    nnUNet_PrimusV3M_Trainer,
    nnUNet_PrimusV3S_Trainer,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_deform.networks.padding import PaddedNetwork, SegmentationHead, Strides
from nnunet_deform.networks.topology import padded_size
from nnunet_deform.plans.baselines import baseline_architecture
from nnunet_deform.trainers.base import OutputStridesTrainer
from nnunet_deform.trainers.checkpoints import AtomicCheckpoints
from nnunet_deform.trainers.numerical_guard import NumericalGuard


class MonaiTrainer(OutputStridesTrainer):
    """One of MONAI's networks, with nnU-Net's recipe. ``network_options`` names it."""

    architecture = staticmethod(baseline_architecture)

    def _report_memory(self) -> None:
        self.print_to_log_file("The memory of MONAI's networks is not estimated.")
        _report_padding(self, self.planned_architecture(self.configuration_manager)["arch_kwargs"]["strides"])


def _report_padding(trainer: nnUNetTrainer, strides: Strides) -> None:
    patch = list(trainer.configuration_manager.patch_size)
    padded = padded_size(patch, strides)
    times = math.prod(padded) / math.prod(patch)
    trainer.print_to_log_file(f"The network sees the patch {patch} as {padded}, {times:.2f} times as many voxels.")


class nnUNetTrainerSwinUNETR(MonaiTrainer):
    """Swin UNETR with 48 features, without deep supervision."""

    network_options = {"network": "SwinUNETR"}


class nnUNetTrainerUNETR(MonaiTrainer):
    """UNETR with ViT-B, without deep supervision."""

    network_options = {"network": "UNETR"}


class nnUNetTrainerSegResNet(MonaiTrainer):
    """SegResNet with 32 filters, without deep supervision."""

    network_options = {"network": "SegResNet"}


class nnUNetTrainerDynUNet(MonaiTrainer):
    """DynUNet, MONAI's nnU-Net, with the plan's strides, kernels and widths."""

    network_options = {"network": "DynUNet"}


class nnUNetTrainerUNetPlusPlus(MonaiTrainer):
    """UNet++ of five levels, with deep supervision of its four paths at full resolution."""

    network_options = {"network": "UNetPlusPlus"}


class nnUNetTrainerMedNeXt_S(MonaiTrainer):
    """MedNeXt S with kernel 3."""

    network_options = {"network": "MedNeXt", "variant": "S"}


class nnUNetTrainerMedNeXt_B(MonaiTrainer):
    """MedNeXt B with kernel 3."""

    network_options = {"network": "MedNeXt", "variant": "B"}


class nnUNetTrainerMedNeXt_M(MonaiTrainer):
    """MedNeXt M with kernel 3."""

    network_options = {"network": "MedNeXt", "variant": "M"}


class nnUNetTrainerMedNeXt_L(MonaiTrainer):
    """MedNeXt L with kernel 3."""

    network_options = {"network": "MedNeXt", "variant": "L"}


class _ContinuedWarmup(nnUNetTrainer):
    """Continues nnU-Net's warm-up trainers, whose own method reads no checkpoint from torch 2.6 on.

    nnU-Net's master has mended that; this can go when a release that has it is the oldest that is supported.
    """

    def load_checkpoint(self, checkpoint: str | dict) -> None:
        nnUNetTrainer.load_checkpoint(self, checkpoint)
        # Not when it is finished, and perhaps was all warm-up: there is no rate beyond the last epoch.
        if self.warmup_duration_whole_net <= self.current_epoch < self.num_epochs:
            self.optimizer, self.lr_scheduler = self.configure_optimizers("train")


_PRIMUS_STRIDES = [[1] * 3, [8] * 3]


class PrimusTrainer(NumericalGuard, AtomicCheckpoints, _ContinuedWarmup, AbstractPrimus):
    """nnU-Net's trainers of Primus, for patches of any size: https://arxiv.org/abs/2503.01835. 3D only."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        # First, because nnU-Net's constructor makes the output folder.
        self._require(PlansManager(plans).get_configuration(configuration))
        super().__init__(plans, configuration, fold, dataset_json, device)

    @classmethod
    def _require(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises NotImplementedError for a plan that the network cannot take."""
        patch_size = list(configuration_manager.patch_size)
        if len(patch_size) != 3:
            raise NotImplementedError(
                f"Primus has three axes, but the patch {patch_size} has {len(patch_size)}; use a 3D configuration."
            )

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        cls._require(configuration_manager)
        padded = padded_size(configuration_manager.patch_size, _PRIMUS_STRIDES)
        network = super().build_network_architecture(
            plans_manager,
            ConfigurationManager({**configuration_manager.configuration, "patch_size": padded}),
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        # All of it, because its widths go from the token's to the number of classes.
        network.up_projection = SegmentationHead(network.up_projection)
        return PaddedNetwork(network, _PRIMUS_STRIDES, [[1] * 3], [], deep_supervision=False)

    def on_train_start(self) -> None:
        super().on_train_start()
        _report_padding(self, _PRIMUS_STRIDES)


class nnUNetTrainerPrimus_S(PrimusTrainer, nnUNet_Primus_S_Trainer):
    """Primus S with its own recipe."""


class nnUNetTrainerPrimus_B(PrimusTrainer, nnUNet_Primus_B_Trainer):
    """Primus B with its own recipe."""


class nnUNetTrainerPrimus_M(PrimusTrainer, nnUNet_Primus_M_Trainer):
    """Primus M with its own recipe."""


class nnUNetTrainerPrimus_L(PrimusTrainer, nnUNet_Primus_L_Trainer):
    """Primus L with its own recipe."""


class NormalisedPrimusTrainer(PrimusTrainer):
    """For Primus with an embedding that normalises each channel over the tokens, of which one is too few."""

    @classmethod
    def _require(cls, configuration_manager: ConfigurationManager) -> None:
        super()._require(configuration_manager)
        patch_size = list(configuration_manager.patch_size)
        if max(patch_size) <= 8:
            raise NotImplementedError(
                f"PrimusV2 and V3 normalise over tokens of 8 voxels a side, and the patch {patch_size} is a single "
                "one; plan with a patch of more than 8 voxels on an axis."
            )


class nnUNetTrainerPrimusV2_S(NormalisedPrimusTrainer, nnUNet_PrimusV2S_Trainer):
    """PrimusV2 S, with a residual encoder as its patch embedding, with its own recipe."""


class nnUNetTrainerPrimusV2_B(NormalisedPrimusTrainer, nnUNet_PrimusV2B_Trainer):
    """PrimusV2 B with its own recipe."""


class nnUNetTrainerPrimusV2_M(NormalisedPrimusTrainer, nnUNet_PrimusV2M_Trainer):
    """PrimusV2 M with its own recipe."""


class nnUNetTrainerPrimusV2_L(NormalisedPrimusTrainer, nnUNet_PrimusV2L_Trainer):
    """PrimusV2 L with its own recipe."""


class nnUNetTrainerPrimusV3_S(NormalisedPrimusTrainer, nnUNet_PrimusV3S_Trainer):
    """PrimusV3 S, with a wider residual encoder with skips to its end, with its own recipe."""


class nnUNetTrainerPrimusV3_B(NormalisedPrimusTrainer, nnUNet_PrimusV3B_Trainer):
    """PrimusV3 B with its own recipe."""


class nnUNetTrainerPrimusV3_M(NormalisedPrimusTrainer, nnUNet_PrimusV3M_Trainer):
    """PrimusV3 M with its own recipe."""


class nnUNetTrainerPrimusV3_L(NormalisedPrimusTrainer, nnUNet_PrimusV3L_Trainer):
    """PrimusV3 L with its own recipe."""
