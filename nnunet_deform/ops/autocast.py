"""Keeping a piece of arithmetic out of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_disabled(device_type: str) -> AbstractContextManager:
    """A context in which autocast does not round, for coordinates, softmaxes over volumes and the like."""
    # The meta device, on which networks are measured, has no autocast.
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
