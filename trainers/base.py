"""What all our trainers share: a network made for the plan, and a word on memory before it runs out."""

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_deform.plans.architecture import Architecture
from nnunet_deform.plans.memory import estimated_gigabytes
from nnunet_deform.trainers.checkpoints import AtomicCheckpoints
from nnunet_deform.trainers.eager_fallback import EagerFallback
from nnunet_deform.trainers.numerical_guard import NumericalGuard
from nnunet_deform.trainers.operator_report import OperatorReport
from nnunet_deform.trainers.preflight import Preflight

MEMORY_ADVICE = (
    "train with the suffix _recompute behind the trainer's name (DeformUX-Net, dynamic convolutions), "
    "use a smaller batch or patch (a copy of the plans file with a smaller batch_size or patch_size under another "
    "plans_name, given with -p), or a device with more memory"
)


class PlannedNetworkTrainer(OperatorReport, EagerFallback, NumericalGuard, Preflight, AtomicCheckpoints):
    """nnU-Net's trainer with the network that ``architecture`` derives from the plan.

    A subclass sets ``architecture``, a function of :mod:`nnunet_deform.plans`, and an ablation of it
    ``network_options``, that function's further arguments.

    ``recomputes_blocks``: whether the network takes ``recompute``.
    """

    architecture: ClassVar[Callable[..., Architecture]]
    network_options: ClassVar[dict[str, Any]] = {}
    recomputes_blocks: ClassVar[bool] = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        # First, because nnU-Net's constructor makes the output folder, and a plan we cannot use should leave none.
        outputs = self._outputs(PlansManager(plans).get_configuration(configuration))
        super().__init__(plans, configuration, fold, dataset_json, device)
        # nnU-Net gives the coarsest output weight zero, so a single one would be weighted 0 / 0.
        if outputs < 2:
            self.enable_deep_supervision = False

    @classmethod
    def planned_architecture(cls, configuration_manager: ConfigurationManager) -> Architecture:
        """This trainer's network for a configuration, as a plan's ``architecture`` entry."""
        base = configuration_manager.configuration["architecture"]
        return cls.architecture(base, configuration_manager.patch_size, **cls.network_options)

    @classmethod
    def _outputs(cls, configuration_manager: ConfigurationManager) -> int:
        """The number of logits under deep supervision: one at each level but the coarsest."""
        return len(cls.planned_architecture(configuration_manager)["arch_kwargs"]["strides"]) - 1

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        architecture = cls.planned_architecture(configuration_manager)
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        scales = super()._get_deep_supervision_scales()
        return scales if scales is None else scales[: self._outputs(self.configuration_manager)]

    def on_train_start(self) -> None:
        super().on_train_start()
        self._report_memory()

    def _report_memory(self) -> None:
        """One line with the estimated memory beside the stock network's, and a warning if it exceeds the device's."""
        needed, stock = (
            estimated_gigabytes(
                architecture,
                self.configuration_manager.patch_size,
                self.batch_size,
                self.num_input_channels,
                self.label_manager.num_segmentation_heads,
                mixed_precision=self.device.type == "cuda",
            )
            for architecture in (
                self.planned_architecture(self.configuration_manager),
                self.configuration_manager.configuration["architecture"],
            )
        )
        plan_network = "no estimate" if stock is None else f"{stock:.1f} GB"
        self.print_to_log_file(
            f"Estimated memory for training: {needed:.1f} GB (the plan's own network: {plan_network}), patch "
            f"{list(self.configuration_manager.patch_size)}, batch {self.batch_size}."
        )
        available = _device_gigabytes(self.device)
        if available is not None and needed > available:
            self.print_to_log_file(
                f"WARNING: that is more than the {available:.1f} GB of {self.device}; if training runs out of memory, "
                f"{MEMORY_ADVICE}."
            )

    def run_training(self) -> None:
        try:
            super().run_training()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{error}\nOut of memory: {MEMORY_ADVICE}.") from error


class OutputStridesTrainer(PlannedNetworkTrainer):
    """For networks whose logits have strides of their own: ``output_strides`` among the architecture's arguments."""

    recomputes_blocks = False

    @classmethod
    def _outputs(cls, configuration_manager: ConfigurationManager) -> int:
        return len(cls.planned_architecture(configuration_manager)["arch_kwargs"]["output_strides"])

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        output_strides = self.planned_architecture(self.configuration_manager)["arch_kwargs"]["output_strides"]
        patch = self.configuration_manager.patch_size
        # Rounded up as the network does, because its strides need not divide the patch.
        return [
            [math.ceil(size / step) / size for size, step in zip(patch, total, strict=True)]
            for total in np.cumprod(output_strides, axis=0).tolist()
        ]


def _device_gigabytes(device: torch.device) -> float | None:
    """The device's memory in GB, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError):
        return None
