"""Where half precision is not enough."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_disabled(device_type: str) -> AbstractContextManager:
    """For coordinates, which half precision would round to a fraction of a voxel."""
    # The meta device, on which networks are measured, has no autocast.
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
