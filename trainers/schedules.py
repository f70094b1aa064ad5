"""Schedules that a continued training resumes exactly: each is a function of the epoch and the log."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


class WarmupCosineSchedule:
    """Linear warm-up to ``max_lr``, then a cosine to ``min_lr`` at the end of training, both by iteration.

    Args:
        optimizer: its groups all get the same rate.
        max_lr: the rate at the end of the warm-up.
        warmup_epochs: may be a fraction of an epoch.
        num_epochs: length of the training.
        iterations_per_epoch: iterations in an epoch.
        min_lr: the rate the cosine ends at.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_lr: float,
        *,
        warmup_epochs: float,
        num_epochs: int,
        iterations_per_epoch: int,
        min_lr: float = 1e-6,
    ) -> None:
        self.optimizer = optimizer
        self.max_lr = max_lr
        self.min_lr = min_lr
        self.warmup = warmup_epochs * iterations_per_epoch
        self.total = num_epochs * iterations_per_epoch
        self.iterations_per_epoch = iterations_per_epoch

    def rate(self, iteration: int) -> float:
        """The learning rate of one iteration, counted from 0 over all epochs."""
        if iteration + 1 < self.warmup:
            return self.max_lr * (iteration + 1) / self.warmup
        progress = min(1.0, (iteration + 1 - self.warmup) / max(1.0, self.total - self.warmup))
        return self.min_lr + (self.max_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def step(self, epoch: int, iteration: int = 0) -> None:
        """Set the rate for an iteration of an epoch, both counted from 0. nnU-Net calls this at each epoch's start."""
        _set_rate(self.optimizer, self.rate(epoch * self.iterations_per_epoch + iteration))


class PlateauSchedule:
    """torch's ReduceLROnPlateau on the losses logged so far, one an epoch.

    nnU-Net's checkpoints keep the log but no schedule, so the schedule is replayed from the log at each epoch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        initial_lr: float,
        *,
        factor: float,
        patience: int,
        losses: Callable[[], Sequence[float]],
    ) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.factor = factor
        self.patience = patience
        self.losses = losses

    def step(self, epoch: int) -> None:
        """Set the rate for an epoch, counted from 0, from the losses of the epochs before it."""
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=self.initial_lr)
        plateau = ReduceLROnPlateau(stand_in, factor=self.factor, patience=self.patience)
        for loss in self.losses()[:epoch]:
            plateau.step(loss)
        _set_rate(self.optimizer, stand_in.param_groups[0]["lr"])


class FactoredSchedule:
    """A schedule that gives every group the same rate, times the ``rate_factor`` of groups that have one.

    Args:
        schedule: sets the rates anew at each step, whatever they were.
        optimizer: the one it does this for.
    """

    def __init__(self, schedule: Any, optimizer: torch.optim.Optimizer) -> None:
        self.schedule = schedule
        self.optimizer = optimizer

    def step(self, *position: int) -> None:
        """The schedule's own step, then the factors."""
        self.schedule.step(*position)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("rate_factor", 1)


def give_own_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Move parameters out of their groups into ones that differ in the rate alone: for :class:`FactoredSchedule`."""
    moved = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in moved]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * factor, "rate_factor": factor})


def annealed_temperature(epoch: int, *, start: float, epochs: float) -> float:
    """Linear from ``start`` to 1 over ``epochs`` epochs (DYConv's scheme with 30 and 29), then 1. Counted from 0."""
    return 1 + (start - 1) * max(0.0, 1 - epoch / epochs)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
