"""Where a training step computes a piece of the network again in its backward pass instead of keeping it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.utils.checkpoint import checkpoint

# torch.nn keeps one dictionary of each kind, from 2.6 on at least; they are filled in place.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_plain: ContextVar[bool] = ContextVar("_plain", default=False)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Within, networks are in the form that compilers get: nothing is computed again."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def may_keep_less(*modules: nn.Module) -> bool:
    """Whether these modules may work in a form that keeps less for the backward pass and does not call their parts.

    That is so in eager training steps. Compilers choose for themselves what to keep. Where a part has hooks, such as a
    user's that reads activations or the ones that look for what is not finite, it must be called, and once only.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not _plain.get() and not any(map(_has_hooks, modules))


def _has_hooks(module: nn.Module) -> bool:
    if any(_GLOBAL_HOOKS):
        return True
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
        if part is not module
    )


def recomputed(function: Callable[_P, _R], *inputs: _P.args) -> _R:
    """function(*inputs), of which autograd keeps the inputs alone: it is called again in the backward pass.

    Args:
        function: changes nothing, draws no random numbers, and takes parameters from modules.
        inputs: tensors, or anything else.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
