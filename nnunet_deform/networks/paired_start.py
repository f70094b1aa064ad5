"""Variants of a network that start alike, so that a contrast between them does not measure their first weights.

Each parameter is drawn from a stream of its own, seeded by the parameter's name and one draw from torch's generator. At
one state of the generator, what variants of a network share by name and shape is then bit-equal, and the generator goes
on from one state for all of them. How a parameter is distributed is not decided here: the streams serve whatever is
drawn in place into it, such as by ``torch.nn.init`` and ``reset_parameters``.

Only what is drawn on a CPU, where nnU-Net initialises, is paired.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_P = ParamSpec("_P")


def paired_start(
    constructor: Callable[Concatenate[nn.Module, _P], None],
) -> Callable[Concatenate[nn.Module, _P], None]:
    """Decorator of a network's constructor, for a paired start without a call of ``initialize``.

    Values are drawn after the constructor, so it must not compute with those of a parameter.
    """

    @functools.wraps(constructor)
    def construct(network: nn.Module, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if torch.get_default_device().type != "cpu":
            constructor(network, *args, **kwargs)
            return
        # Modules draw as they are made, before the network gives them their names.
        with torch.random.fork_rng(devices=[]), _Postponed() as postponed:
            constructor(network, *args, **kwargs)
        kept = {id(parameter) for parameter in network.parameters()}
        with drawn_by_name(network), torch.no_grad():
            for parameter, change in postponed.changes:
                if id(parameter) in kept:
                    change()

    return construct


@contextmanager
def drawn_by_name(network: nn.Module) -> Iterator[None]:
    """Within, what is drawn in place into a parameter of ``network`` comes from the parameter's own stream."""
    if any(parameter.device.type != "cpu" for parameter in network.parameters()):
        yield
        return
    draw = torch.empty((), dtype=torch.int64).random_().item()
    with torch.random.fork_rng(devices=[]), _Named(network, draw):
        yield


class InPlaceChanges(TorchFunctionMode):
    """Passes on what changes a parameter in place, which are methods and functions of ``torch.nn.init``."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        in_place = function.__name__.endswith("_") and not function.__name__.endswith("__")
        if in_place and isinstance(target, nn.Parameter):
            return self.changes_parameter(target, functools.partial(function, *args, **kwargs))
        return function(*args, **kwargs)

    def changes_parameter(self, parameter: nn.Parameter, change: functools.partial[Tensor]) -> Tensor:
        raise NotImplementedError


class _Postponed(InPlaceChanges):
    """Collects the changes in their order instead of making them."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def changes_parameter(self, parameter: nn.Parameter, change: functools.partial[Tensor]) -> Tensor:
        self.changes.append((parameter, change))
        return parameter


class _Named(InPlaceChanges):
    """Makes each change with the generator at the start of the parameter's stream."""

    def __init__(self, network: nn.Module, draw: int) -> None:
        super().__init__()
        self.seeds = {}
        for name, parameter in network.named_parameters():
            digest = hashlib.sha256(f"{draw} {name}".encode()).digest()
            self.seeds[id(parameter)] = int.from_bytes(digest[:8], "little")

    def changes_parameter(self, parameter: nn.Parameter, change: functools.partial[Tensor]) -> Tensor:
        if id(parameter) in self.seeds:
            # Not torch.manual_seed, which reaches the generators of all devices.
            torch.default_generator.manual_seed(self.seeds[id(parameter)])
        return change()
