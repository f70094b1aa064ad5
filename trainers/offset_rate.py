"""A learning rate of their own for the convolutions that steer samples."""

import math
from typing import ClassVar

import torch

from nnunet_deform.layers import offset_parameters
from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.schedules import FactoredSchedule, give_own_rate


class OffsetRate(PlannedNetworkTrainer):
    """nnU-Net's trainer for a network with offset branches.

    ``offset_rate``: learning rate of the offset branches as a multiple of the recipe's, at every step. AdamW's decay,
    which goes with the rate, is multiplied as well.
    """

    offset_rate: ClassVar[float] = 1

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        if not (isinstance(self.offset_rate, (int, float)) and 0 < self.offset_rate < math.inf):
            raise ValueError(f"offset_rate={self.offset_rate!r} of {type(self).__name__} must be a positive number.")
        super().__init__(plans, configuration, fold, dataset_json, device)

    def initialize(self) -> None:
        super().initialize()
        # With factor 1 the optimiser's groups stay those that checkpoints of other trainers of this network have.
        if self.offset_rate != 1:
            parameters = offset_parameters(self.network)
            if not parameters:
                raise ValueError(
                    f"offset_rate={self.offset_rate} of {type(self).__name__} has nothing to act on: its network has "
                    "no offset branch."
                )
            give_own_rate(self.optimizer, parameters, self.offset_rate)
            self.lr_scheduler = FactoredSchedule(self.lr_scheduler, self.optimizer)
