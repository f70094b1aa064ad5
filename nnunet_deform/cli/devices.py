"""The device that a command computes on."""

from enum import Enum
from typing import Annotated

import typer

from nnunet_deform.cli.messages import fail


class Device(str, Enum):
    """What torch computes on."""

    CUDA = "cuda"
    CPU = "cpu"
    MPS = "mps"


DeviceOption = Annotated[
    Device | None, typer.Option("--device", help="Default: the GPU if there is one.", show_default=False)
]


def device_or_fail(asked: Device | None) -> str:
    """The device's name for torch; ends the command where it is not there."""
    chosen = best_device() if asked is None else asked.value
    if (reason := unavailable(chosen)) is not None:
        raise fail(f"--device {chosen}: {reason}")
    return chosen


def unavailable(device: str) -> str | None:
    """Why torch has no such device here, with what to do; None where it has."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device here; look at nvidia-smi and at the build of torch, or give --device cpu."
    if device == "mps" and not torch.backends.mps.is_available():
        return "torch finds no MPS device here; give --device cpu."
    return None


def best_device() -> str:
    """cuda, mps or cpu, the first that there is."""
    return next(device for device in ("cuda", "mps", "cpu") if unavailable(device) is None)
