import math

import pytest
import torch

from nnunet_deform.trainers.schedules import PlateauSchedule, WarmupCosineSchedule


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(2)]}], lr=123.0)


def rate(optimizer: torch.optim.Optimizer) -> float:
    (value,) = {group["lr"] for group in optimizer.param_groups}
    return value


def test_warmup_rises_linearly_and_the_cosine_falls_to_the_end(optimizer) -> None:
    schedule = WarmupCosineSchedule(
        optimizer, 1e-3, warmup_epochs=2, num_epochs=10, iterations_per_epoch=5, min_lr=1e-6
    )
    seen = []
    for epoch in range(10):
        for iteration in range(5):
            schedule.step(epoch, iteration)
            seen.append(rate(optimizer))
    assert seen[:10] == pytest.approx([1e-4 * (i + 1) for i in range(10)])
    assert seen[10:] == pytest.approx(
        [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(1, 41)]
    )
    assert seen[-1] == pytest.approx(1e-6)


def test_stepping_by_epoch_alone_gives_its_first_iteration(optimizer) -> None:
    schedule = WarmupCosineSchedule(optimizer, 1e-3, warmup_epochs=2, num_epochs=10, iterations_per_epoch=5)
    schedule.step(1)
    assert rate(optimizer) == pytest.approx(6e-4)


def test_a_fraction_of_an_epoch_of_warmup(optimizer) -> None:
    schedule = WarmupCosineSchedule(optimizer, 5e-4, warmup_epochs=0.4, num_epochs=4, iterations_per_epoch=20)
    assert [schedule.rate(i) for i in range(8)] == pytest.approx([5e-4 * (i + 1) / 8 for i in range(8)])
    assert schedule.rate(8) < 5e-4


def test_plateau_is_replayed_from_the_log(optimizer) -> None:
    # Best at epoch 2; the patience of 3 runs out at the fourth epoch without a better loss, and again four later.
    losses = [1.0, 0.5, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3]
    schedule = PlateauSchedule(optimizer, 1e-2, factor=0.9, patience=3, losses=lambda: losses)
    expected = [1e-2] * 7 + [0.9e-2] * 4 + [0.81e-2] * 2
    seen = []
    for epoch in range(13):
        schedule.step(epoch)
        seen.append(rate(optimizer))
    assert seen == pytest.approx(expected)
    schedule.step(7)
    assert rate(optimizer) == pytest.approx(0.9e-2)
