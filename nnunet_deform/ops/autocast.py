"""What autocast rounds, and keeping a piece of arithmetic out of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def autocast_disabled(device_type: str) -> AbstractContextManager:
    """A context in which autocast does not round, for coordinates, softmaxes over volumes and the like."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager]:
    """What makes a context, such as for a backward pass, in which autocast is as it is at the time of this call."""
    if not has_autocast(device_type):
        return nullcontext
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def has_autocast(device_type: str) -> bool:
    """The meta device, on which networks are measured, has none."""
    # torch.amp.is_autocast_available would know, but older versions of torch.compile cannot look into it.
    return device_type != "meta"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts the arguments of a convolution to; None where it is off."""
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As torch's autocast: float64 and integers stay what they are, and so does everything without a dtype."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
