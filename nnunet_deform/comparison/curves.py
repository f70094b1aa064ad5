"""Learning curves, as nnU-Net's logs have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

Curve = tuple[Sequence[int], Sequence[float], Sequence[float]]
"""Epochs, training and validation losses of one training."""


def read_curve(folder: Path) -> Curve:
    """Epochs, training and validation losses from nnU-Net's logs of one fold; later runs replace earlier ones."""
    losses: dict[int, dict[str, float]] = {}
    for log in sorted(folder.glob("training_log_*.txt")):
        epoch = None
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := re.search(r": Epoch (\d+)\s*$", line):
                epoch = int(found[1])
            elif epoch is not None and (found := re.search(r": (train_loss|val_loss) (\S+)", line)):
                losses.setdefault(epoch, {})[found[1]] = float(found[2])
    epochs = sorted(epoch for epoch, values in losses.items() if len(values) == 2)
    return epochs, [losses[e]["train_loss"] for e in epochs], [losses[e]["val_loss"] for e in epochs]
