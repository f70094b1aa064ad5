"""When several steps are to be one operation."""

import torch
from torch import Tensor


def compiled_on_cpu(tensor: Tensor) -> bool:
    """Whether torch.compile is recording what is done with this tensor, on a CPU and without autocast.

    Inductor makes a C++ file of each group of elementwise steps between two convolutions, and compiling one takes most
    of a second. There, steps that torch has kernels for are better left to these, as one operation. On CUDA its fused
    kernels are what one compiles for.

    Args:
        tensor: any shape; only its device matters.
    """
    return torch.compiler.is_dynamo_compiling() and tensor.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
