"""Keeping a piece of arithmetic out of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_disabled(device_type: str) -> AbstractContextManager:
    """A context in which autocast does not round, for coordinates, softmaxes over volumes and the like."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def has_autocast(device_type: str) -> bool:
    """The meta device, on which networks are measured, has none."""
    # torch.amp.is_autocast_available would know, but older versions of torch.compile cannot look into it.
    return device_type != "meta"
