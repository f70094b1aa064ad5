"""Backward passes on fake CUDA tensors, which torch's engine refuses where there is no GPU.

The engine asks CUDA for a device before it calls a node. Here the nodes are called from Python, in the engine's order,
each once and all gradients of its outputs added up before, so that memory is held and freed as the engine does.
"""

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Node = Any
OLDEST_TORCH = Version("2.11")


@contextmanager
def without_engine() -> Iterator[None]:
    """Within, ``torch.autograd.grad`` goes without the engine, and autocast is as on a machine with a GPU; for forward
    passes made within as well.

    Raises:
        RuntimeError: a torch older than 2.11, which was seen to crash on calls of nodes.
    """
    if Version(torch.__version__) < OLDEST_TORCH:
        raise RuntimeError(
            f"torch {torch.__version__} crashes on backward passes without its engine; measure with "
            f"torch {OLDEST_TORCH} or later."
        )
    apply = torch.autograd.Function.__dict__["apply"]
    tensors: dict[int, list[bool]] = {}

    def recorded(cls: type, *arguments: Any) -> Any:
        outputs = apply.__get__(None, cls)(*arguments)
        of = next((o for o in _tuple(outputs) if isinstance(o, Tensor) and o.grad_fn is not None), None)
        if of is not None:
            # A node of Python's returns a gradient for every argument, and has edges to tensors alone.
            tensors[of.grad_fn._sequence_nr()] = [isinstance(argument, Tensor) for argument in arguments]
        return outputs

    def grad(
        outputs: Tensor | Sequence[Tensor],
        inputs: Tensor | Sequence[Tensor],
        grad_outputs: Tensor | Sequence[Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor | None, ...]:
        gradients = [torch.ones_like(o) for o in _tuple(outputs)] if grad_outputs is None else grad_outputs
        # Lists are emptied, so that what they alone hold is freed on the way.
        outputs, gradients = (of if isinstance(of, list) else list(_tuple(of)) for of in (outputs, gradients))
        inputs = list(_tuple(inputs))
        return _run(outputs, gradients, inputs, tensors)

    with ExitStack() as stack:
        for target, replacement in (
            ("torch.autograd.Function.apply", classmethod(recorded)),
            ("torch.autograd.grad", grad),
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            # By it torch's checkpointing knows one backward pass from the next.
            ("torch._C._current_graph_task_id", lambda: 1),
        ):
            stack.enter_context(mock.patch(target, replacement))
        yield


def _tuple(one_or_more: Any) -> tuple:
    return tuple(one_or_more) if isinstance(one_or_more, (tuple, list)) else (one_or_more,)


def _stands_in(node: Node) -> bool:
    """Whether it only stands in for the history of another tensor, as of a wrapper's."""
    return type(node).__name__ in ("Error", "NotImplemented")


def _ends(node: Node) -> bool:
    """Whether nothing is before it. These nodes have no number of their own."""
    return type(node).__name__ == "AccumulateGrad" or _stands_in(node)


def _run(
    outputs: list[Tensor], gradients: list[Tensor | None], inputs: list[Tensor], tensors: dict[int, list[bool]]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs; the lists of outputs and gradients are emptied, so that what they held can be freed."""
    histories = [x.grad_fn for x in inputs]
    of_leaf = {id(x if fn is None else fn): i for i, (x, fn) in enumerate(zip(inputs, histories, strict=True))}
    of_node = {
        (fn._sequence_nr(), x.output_nr): i
        for i, (x, fn) in enumerate(zip(inputs, histories, strict=True))
        if fn is not None and not _ends(fn)
    }
    found: list[Tensor | None] = [None] * len(inputs)
    waiting = _users([output.grad_fn for output in outputs])
    ready: list[int] = []
    # By number: a node held here would hold what it has saved.
    nodes: dict[int, Node] = {}
    given: dict[int, dict[int, Tensor]] = {}

    def give(node: Node, index: int, gradient: Tensor | None) -> None:
        number = node._sequence_nr()
        nodes[number] = node
        sums = given.setdefault(number, {})
        if gradient is not None:
            sums[index] = gradient if index not in sums else sums[index] + gradient
        if not waiting.get(number) and -number not in ready:
            heapq.heappush(ready, -number)

    def found_at(leaf: Tensor | Node, gradient: Tensor | None) -> None:
        place = of_leaf.get(id(leaf))
        if place is not None and gradient is not None:
            found[place] = gradient if found[place] is None else found[place] + gradient

    while outputs:
        output, gradient = outputs.pop(), gradients.pop()
        if output.grad_fn is not None and not _ends(output.grad_fn):
            give(output.grad_fn, output.output_nr, gradient)
        else:
            found_at(output if output.grad_fn is None else output.grad_fn, gradient)
        del output, gradient
    with torch.no_grad():
        while ready:
            number = -heapq.heappop(ready)
            node, sums = nodes.pop(number), given.pop(number)
            for index, gradient in sums.items():
                if (number, index) in of_node:
                    found[of_node[number, index]] = gradient
            gradient = None
            edges = node.next_functions
            through = _called(node, sums, tensors) if sums else (None,) * len(edges)
            del node, sums
            for (following, index), gradient in zip(edges, through, strict=True):
                if following is None:
                    continue
                if gradient is not None and not _stands_in(following):
                    wanted = following._input_metadata[index]
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                if _ends(following):
                    found_at(getattr(following, "variable", following), gradient)
                    continue
                waiting[following._sequence_nr()] -= 1
                give(following, index, gradient)
            following = gradient = through = edges = None
    return tuple(found)


def _users(roots: Sequence[Node]) -> dict[int, int]:
    """How many edges lead to each node from those below the roots, by its number."""
    users: dict[int, int] = {}
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or _ends(node) or node._sequence_nr() in seen:
            continue
        seen.add(node._sequence_nr())
        for following, _ in node.next_functions:
            if following is not None and not _ends(following):
                users[following._sequence_nr()] = users.get(following._sequence_nr(), 0) + 1
                stack.append(following)
    return users


def _called(node: Node, sums: dict[int, Tensor], tensors: dict[int, list[bool]]) -> tuple[Tensor | None, ...]:
    """The gradients along the node's edges; ``sums`` is emptied."""
    wanted = node._input_metadata
    gradients = [sums.pop(index, None) for index in range(len(wanted))]
    if not isinstance(node, BackwardCFunction):
        return _tuple(node(*gradients))
    gradients = [
        torch.zeros(of.shape, dtype=of.dtype, device=of.device) if gradient is None else gradient
        for gradient, of in zip(gradients, wanted, strict=True)
    ]
    through = _tuple(node.apply(*gradients))
    return tuple(g for g, is_tensor in zip(through, tensors[node._sequence_nr()], strict=True) if is_tensor)
