"""How the networks of ``phantom_evidence.py`` are trained and scored.

Network and twin are trained from the same weights at a seed on the same phantoms, a fresh batch at each step, by
nnU-Net's loss and AdamW with warm-up and cosine. Every network of a task is scored on the same further phantoms.
"""

import contextlib
import time
from dataclasses import asdict
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from phantom_tasks import Distortion, Phantoms, Task
from torch import Tensor, nn

from nnunet_deform.layers import offset_parameters
from nnunet_deform.trainers.schedules import FactoredSchedule, WarmupCosineSchedule, give_own_rate

BATCH = 8
TEST_PHANTOMS = 40


def loss_function() -> nn.Module:
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)


def operating(task: Task, arm: str) -> contextlib.AbstractContextManager[None]:
    """In which an arm's network is trained and used."""
    return task.switched_off() if arm == "mutant" else contextlib.nullcontext()


def trained(task: Task, arm: str, seed: int) -> nn.Module:
    """The arm's network ("network", "twin" or "mutant") after the task's steps, in evaluation mode."""
    network = task.network(seed, operator=arm != "twin")
    optimizer = torch.optim.AdamW(network.parameters(), task.rate, weight_decay=1e-4)
    if branches := offset_parameters(network):
        give_own_rate(optimizer, branches, task.offset_rate)
    course = WarmupCosineSchedule(
        optimizer, task.rate, warmup_epochs=0.1, num_epochs=1, iterations_per_epoch=task.steps
    )
    schedule = FactoredSchedule(course, optimizer)
    loss = loss_function()
    generator = torch.Generator().manual_seed(1000 + seed)
    with operating(task, arm):
        for step in range(task.steps):
            schedule.step(0, step)
            phantoms = task.draw(BATCH, generator)
            optimizer.zero_grad(set_to_none=True)
            loss(network(phantoms.images), phantoms.labels).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
    return network.eval()


def held_out(task: Task) -> Phantoms:
    """Of no training's stream."""
    return task.draw(TEST_PHANTOMS, torch.Generator().manual_seed(1))


@torch.no_grad()
def predicted(task: Task, arm: str, network: nn.Module, images: Tensor) -> Tensor:
    """[n, 1, height, width], the class of each pixel."""
    with operating(task, arm):
        return network(images).argmax(1, keepdim=True)


def dice_of(prediction: Tensor, labels: Tensor) -> list[float]:
    """Of each phantom; there is no phantom without a structure."""
    axes = (1, 2, 3)
    return (2 * (prediction * labels).sum(axes) / (prediction.sum(axes) + labels.sum(axes))).tolist()


def follows(offsets: Tensor, shift: Tensor) -> list[float]:
    """For each tap by how many pixels it moves along the rows for each pixel of shift, by least squares.

    offsets: [n, taps, 2, height, width]; shift: [n, height, width]."""
    along = (offsets[:, :, 1] * shift.unsqueeze(1)).sum((0, 2, 3)) / shift.square().sum()
    return along.tolist()


def observed(task: Task, network: nn.Module, phantoms: Phantoms) -> dict[str, Any]:
    """What the operator does with what it should find out; empty for a twin.

    follows: see above; across: mean distance that taps move across the rows; shares: of the kernels, mean over scans
    with a bright tube and over those with a dark one.
    """
    found = network.observe_operators(phantoms.images)
    if not found:
        return {}
    (observation,) = found.values()
    if isinstance(task, Distortion):
        across = float(observation.values[:, :, 0].abs().mean())
        return {"follows": follows(observation.values, phantoms.cause), "across": across}
    shares = observation.shares()
    return {"shares": [shares[phantoms.cause == tube].mean(0).tolist() for tube in (1, -1)]}


def run(name: str, task: Task, arm: str, seed: int) -> dict[str, Any]:
    """One training and its scores, with CPU seconds."""
    start = time.process_time()
    network = trained(task, arm, seed)
    phantoms = held_out(task)
    dice = dice_of(predicted(task, arm, network, phantoms.images), phantoms.labels)
    with operating(task, arm):
        operator = observed(task, network, phantoms)
    settings = {"task": name, "arm": arm, "seed": seed, **asdict(task)}
    return {**settings, "dice": dice, "operator": operator, "seconds": round(time.process_time() - start, 1)}
