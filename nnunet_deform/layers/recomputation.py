"""Where a training step computes a piece of the network again in its backward pass instead of keeping it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

# torch.nn keeps one dictionary of each kind, from 2.6 on at least; they are filled in place.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)

# What a network computes again: norms and the like, as it does by default, or whole blocks at full resolution as well.
Recompute = Literal["cheap", "blocks"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_plain: ContextVar[bool] = ContextVar("_plain", default=False)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Within, networks are in their plain form, in which nothing is computed again."""
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
    return not _plain.get() and not any(map(_parts_have_hooks, modules))


def may_keep_less_compiled(x: Tensor, *modules: nn.Module) -> bool:
    """As :func:`may_keep_less`, where compilers, too, keep less of the form written for it; on GPUs, that is, on which
    memory is scarce."""
    if not (torch.compiler.is_compiling() and x.is_cuda):
        return may_keep_less(*modules)
    return torch.is_grad_enabled() and not any(map(_parts_have_hooks, modules))


def check_recompute(recompute: str) -> None:
    """Raises ValueError, naming the value, unless it is one of the choices."""
    if recompute not in ("cheap", "blocks"):
        raise ValueError(f"recompute={recompute!r} must be 'cheap' or 'blocks'.")


def may_recompute(*blocks: nn.Module) -> bool:
    """Whether these blocks may be called twice, once more in the backward pass.

    Compiled or not, that is so in training steps, unless a block would draw random numbers or take its input into
    statistics a second time. Hooks, a block's own and its parts', must see one call; a compiler does not ask for them.
    """
    if not torch.is_grad_enabled() or any(map(_changes_when_called, blocks)):
        return False
    # Before plain_forms is looked at: torch 2.6 cannot compile that.
    if torch.compiler.is_compiling():
        return True
    return not _plain.get() and not any(_hooks_of(block) or _parts_have_hooks(block) for block in blocks)


def _changes_when_called(block: nn.Module) -> bool:
    return block.training and any(
        isinstance(part, _DropoutNd) or getattr(part, "track_running_stats", False) for part in block.modules()
    )


def _parts_have_hooks(module: nn.Module) -> bool:
    return any(_GLOBAL_HOOKS) or any(_hooks_of(part) for part in module.modules() if part is not module)


def _hooks_of(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def recomputed(function: Callable[_P, _R], *inputs: _P.args) -> _R:
    """function(*inputs), of which autograd keeps the inputs alone: it is called again in the backward pass.

    Args:
        function: changes nothing, draws no random numbers, and takes parameters from modules.
        inputs: tensors, or anything else.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def recomputed_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """block(*inputs), where it may be of which autograd keeps the inputs alone."""
    return recomputed(block, *inputs) if may_recompute(block) else block(*inputs)
