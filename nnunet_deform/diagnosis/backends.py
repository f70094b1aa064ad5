"""Which backend computes the deformable convolution on each of this machine's devices, and why others do not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nnunet_deform.ops import backends_for, choose_backend
from nnunet_deform.ops.backends import preflight, trial_due


@dataclass(frozen=True)
class DeviceBackends:
    """One device of this machine.

    Args:
        name: what torch calls it.
        states: by backend, "used", "available" or why it cannot run; empty where none can.
        problem: a sentence where no backend can run.
        note: a sentence where Triton cannot run on a GPU.
    """

    name: str
    states: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    note: str | None = None


def survey() -> list[DeviceBackends]:
    """Every device of this machine; the Triton backend is not tried, what its preflight remembers is looked up."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [_device_backends(device) for device in devices]


def _device_backends(device: str) -> DeviceBackends:
    tensors = (
        torch.zeros(1, 16, 4, 4, 4, device=device),
        torch.zeros(1, 81, 4, 4, 4, device=device),
        torch.zeros(16, 1, 3, 3, 3, device=device),
    )
    trial = trial_due(*tensors)
    verdict = None if trial is None else preflight.recalled(trial)
    untried = trial is not None and verdict is None
    try:
        # Which would try it now.
        chosen = "triton" if untried else choose_backend(*tensors)[0]
    except (ValueError, RuntimeError) as error:
        return DeviceBackends(device, problem=f"On {device}: {error}")
    reasons = backends_for(*tensors)
    if verdict is not None and verdict.fault is not None:
        reasons["triton"] = f"it {verdict.fault} in its preflight; {preflight.SELFTEST} tries it again"
    states = {}
    for name, reason in reasons.items():
        state = "used" if name == chosen else "available"
        if untried and name == chosen:
            state = "used, if it passes its preflight"
        states[name] = state if reason is None else f"cannot run: {reason}"
    return DeviceBackends(device, states, note=gpu_note(chosen, reasons) if device == "cuda" else None)


def gpu_note(chosen: str, reasons: Mapping[str, str | None]) -> str | None:
    """Why Triton does not compute deformable convolutions on this machine's GPU, and what does; None where it does.

    Args:
        chosen: the backend that computes them.
        reasons: by backend, why it cannot run there; None where it can.
    """
    if reasons["triton"] is None:
        return None
    return (
        f"The triton backend cannot run on cuda: {reasons['triton']}. The {chosen} backend computes the deformable "
        "convolutions there, slower, and everything else works as it does with Triton."
    )
