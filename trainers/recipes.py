"""Recipes that more than one trainer follows."""

from typing import ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_deform.trainers.schedules import WarmupCosineSchedule


class AdamWRecipe(nnUNetTrainer):
    """AdamW with warm-up and cosine, both by iteration."""

    learning_rate: ClassVar[float] = 1e-3

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.learning_rate
        self.weight_decay = 1e-4
        self.warmup_epochs = 10
        self._iteration = 0

    def configure_optimizers(self, stage: str | None = None) -> tuple[torch.optim.Optimizer, WarmupCosineSchedule]:
        # nnU-Net's warm-up trainers (Primus) ask again at each stage of theirs; here there is one.
        if stage is not None:
            return self.optimizer, self.lr_scheduler
        matrices, vectors = [], []
        for parameter in self.network.parameters():
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.initial_lr,
        )
        schedule = WarmupCosineSchedule(
            optimizer,
            self.initial_lr,
            warmup_epochs=self.warmup_epochs,
            num_epochs=self.num_epochs,
            iterations_per_epoch=self.num_iterations_per_epoch,
        )
        return optimizer, schedule

    def on_train_epoch_start(self) -> None:
        self._iteration = 0
        super().on_train_epoch_start()

    def train_step(self, batch: dict) -> dict:
        self.lr_scheduler.step(self.current_epoch, self._iteration)
        self._iteration += 1
        return super().train_step(batch)
