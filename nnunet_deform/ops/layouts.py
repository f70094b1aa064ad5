"""Memory layouts."""

import torch

# By the number of spatial axes.
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
