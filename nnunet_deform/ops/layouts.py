"""Memory layouts."""

import torch
from torch import Tensor

# By the number of spatial axes.
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def layout_of(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor is that and not contiguous as well, else contiguous."""
    channels_last = CHANNELS_LAST.get(tensor.ndim - 2)
    if channels_last and tensor.is_contiguous(memory_format=channels_last) and not tensor.is_contiguous():
        return channels_last
    return torch.contiguous_format
