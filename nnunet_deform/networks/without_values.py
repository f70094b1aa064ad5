"""Networks that are counted and measured, and whose parameters nobody reads."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nnunet_deform.networks.paired_start import InPlaceChanges


@contextmanager
def without_values() -> Iterator[None]:
    """Within, networks are built on the meta device, and nothing is drawn into their parameters.

    Torch runs each draw on that device in Python, which takes most of the time of building a network there.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(InPlaceChanges):
    """Leaves parameters as they are, but for whether they are trained."""

    def changes_parameter(self, parameter: nn.Parameter, change: functools.partial[Tensor]) -> Tensor:
        return change() if change.func is Tensor.requires_grad_ else parameter
