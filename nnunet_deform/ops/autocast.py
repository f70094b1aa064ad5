"""What autocast rounds, and keeping a piece of arithmetic out of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor


def autocast_disabled(device_type: str) -> AbstractContextManager:
    """A context in which autocast does not round, for coordinates, softmaxes over volumes and the like.

    Args:
        device_type: "cpu", "cuda" and so on, as in ``tensor.device.type``.
    """
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager]:
    """A function that makes contexts in which autocast is as it is at the time of this call, for a backward pass.

    Args:
        device_type: "cpu", "cuda" and so on, as in ``tensor.device.type``.
    """
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
    """What autocast casts the arguments of a convolution to; None where it is off.

    Args:
        device_type: "cpu", "cuda" and so on, as in ``tensor.device.type``.
    """
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of any shape in the dtype, as torch's autocast makes it: float64 and integers stay what they are.

    Args:
        tensor: any shape and dtype.
        dtype: of :func:`autocast_dtype`; with None the tensor itself is returned.
    """
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
