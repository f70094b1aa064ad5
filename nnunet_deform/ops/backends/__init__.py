"""Which implementation of the deformable convolution runs, and why.

A backend is one module with three functions:

- ``unable(input, offset, weight) -> str | None``: why it cannot run on these tensors, or None when it can;
- ``forward(input, offset, weight, bias, stride, padding, dilation) -> Tensor``;
- ``backward(grad_output, input, offset, weight, stride, padding, dilation, needs) -> tuple of four``: the gradients
  of input, offset, weight and bias, None where ``needs`` says that nobody asks.

They get arguments that :mod:`nnunet_deform.ops.checks` has accepted.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from nnunet_deform.ops.backends import cpu, preflight, reference, torch_, triton_

logger = logging.getLogger("nnunet_deform.ops")

BACKEND_VARIABLE = "NNUNET_DEFORM_BACKEND"


class Backend(Protocol):
    """The functions of a backend module. Shapes are those of :func:`nnunet_deform.ops.deform_conv3d`: input
    [B, C, *spatial], offset [B, G * taps * axes, *out] in voxels, weight [C_out, C / groups, *kernel]."""

    def unable(self, input: Tensor, offset: Tensor, weight: Tensor) -> str | None:
        """Why it cannot run on these tensors, or None when it can."""
        ...

    def forward(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        """[B, C_out, *out], in the input's dtype; the last three arguments have a value for each axis."""
        ...

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """From grad_output [B, C_out, *out] the gradients of input, offset, weight and bias, in their shapes; None
        where ``needs`` has False."""
        ...


_BACKENDS: dict[str, Backend] = {"cpu": cpu, "reference": reference, "torch": torch_, "triton": triton_}

# Fastest first. The reference is slow by design and runs only when it is asked for.
_PREFERENCE = ("triton", "cpu", "torch")


def choose_backend(input: Tensor, offset: Tensor, weight: Tensor) -> tuple[str, Backend]:
    """The backend for these tensors: the one NNUNET_DEFORM_BACKEND names, else the fastest that can run.

    Before it is chosen for the first time on a machine, the Triton backend is tried in a process of its own, which
    takes up to a minute; see :mod:`nnunet_deform.ops.backends.preflight`.

    Args:
        input, offset, weight: as of :func:`nnunet_deform.ops.deform_conv3d`: [B, C, *spatial],
            [B, G * taps * axes, *out] in voxels, [C_out, C / groups, *kernel].

    Returns:
        Its name and itself.

    Raises:
        ValueError: the environment variable names no backend.
        RuntimeError: the backend it names cannot run on these tensors; the message says why.
    """
    requested = os.environ.get(BACKEND_VARIABLE)
    if requested:
        if requested not in _BACKENDS:
            raise ValueError(
                f"{BACKEND_VARIABLE}={requested!r} names no backend; choose one of {', '.join(sorted(_BACKENDS))} "
                "or unset it."
            )
        reason = _BACKENDS[requested].unable(input, offset, weight)
        if reason is not None:
            raise RuntimeError(f"{BACKEND_VARIABLE}={requested!r} cannot run here: {reason}; unset it.")
        return requested, _BACKENDS[requested]

    passed_over = []
    for name in _PREFERENCE:
        reason = _BACKENDS[name].unable(input, offset, weight)
        if reason is None and name == "triton":
            reason = preflight.objection(preflight.Trial.of(input, offset, weight))
        if reason is None:
            _log_choice(name, input.device.type, str(input.dtype), "; ".join(passed_over))
            return name, _BACKENDS[name]
        passed_over.append(f"not {name}: {reason}")
    raise RuntimeError(f"no backend can run this deformable convolution ({'; '.join(passed_over)})")


def trial_due(input: Tensor, offset: Tensor, weight: Tensor) -> preflight.Trial | None:
    """What the first use of these tensors' backend would try, so that it can be done before; None for nothing."""
    if os.environ.get(BACKEND_VARIABLE) or triton_.unable(input, offset, weight) is not None:
        return None
    return preflight.Trial.of(input, offset, weight)


def backends_for(input: Tensor, offset: Tensor, weight: Tensor) -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run on these tensors, or None when it can.

    Args:
        input, offset, weight: as of :func:`choose_backend`, [B, C, *spatial] and so on.
    """
    return {name: backend.unable(input, offset, weight) for name, backend in _BACKENDS.items()}


@functools.cache
def _log_choice(name: str, device: str, dtype: str, passed_over: str) -> None:
    """Log a choice once per process, not once per call."""
    logger.info("deformable convolution on %s in %s: %s backend %s", device, dtype, name, passed_over)
