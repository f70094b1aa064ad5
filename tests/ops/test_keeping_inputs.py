"""Norms and mixtures that keep what they are given, against torch's operations, which keep what they make as well."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_deform.ops import CHANNELS_LAST, group_norm_silu, mixture_behind_norms

SIZES = [(4, 5, 6), (7, 6)]
LAYOUTS = ["contiguous", "channels last"]
GROUPS = 2


def leaf(*shape: int, layout: str = "contiguous") -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64)
    if layout == "channels last":
        tensor = tensor.contiguous(memory_format=CHANNELS_LAST[tensor.ndim - 2])
    return tensor.requires_grad_()


def assert_same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Results and gradients are equal, also a second time, and nothing but the leaves and their statistics is kept."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = ours()
    given = {one.data_ptr() for one in leaves}
    assert max((tensor.numel() for tensor in kept if tensor.data_ptr() not in given), default=0) <= 2 * GROUPS
    expected = theirs()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert output.stride() == leaves[0].stride() or leaves[0].shape != output.shape
    gradient = torch.randn_like(expected)
    first = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
    again = torch.autograd.grad(output, leaves, gradient)
    for one, two, twice in zip(first, torch.autograd.grad(expected, leaves, gradient), again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        assert torch.equal(one, twice)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_silu(size, layout):
    x, weight, bias = leaf(2, 6, *size, layout=layout), leaf(6), leaf(6)
    assert_same(
        lambda: group_norm_silu(x, GROUPS, weight, bias, 1e-3),
        lambda: F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-3)),
        [x, weight, bias],
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixture_behind_norms(size, layout):
    logits = leaf(2, 3, *size, layout=layout)
    maps = [leaf(2, 6, *size, layout=layout) for _ in range(3)]
    weights, biases = ([leaf(6) for _ in range(3)] for _ in range(2))
    eps = [1e-3, 1e-5, 1e-2]

    def plain() -> Tensor:
        norms = [
            F.group_norm(one, GROUPS, weight, bias, e)
            for one, weight, bias, e in zip(maps, weights, biases, eps, strict=True)
        ]
        return sum(share * F.silu(norm) for share, norm in zip(logits.softmax(1).split(1, 1), norms, strict=True))

    leaves = [*maps, logits, *weights, *biases]
    assert_same(lambda: mixture_behind_norms(logits, maps, weights, biases, GROUPS, eps), plain, leaves)


def test_only_what_is_asked_for():
    logits, maps = leaf(2, 2, 4, 4), [leaf(2, 6, 4, 4) for _ in range(2)]
    weights, biases = ([leaf(6) for _ in range(2)] for _ in range(2))
    for frozen in (logits, maps[0], weights[1], biases[0]):
        frozen.requires_grad_(False)
    mixture_behind_norms(logits, maps, weights, biases, GROUPS, [1e-5] * 2).sum().backward()
    for one in (logits, *maps, *weights, *biases):
        assert (one.grad is not None) == one.requires_grad
    x, weight, bias = leaf(1, 4, 5, 5), leaf(4), leaf(4)
    weight.requires_grad_(False)
    group_norm_silu(x, GROUPS, weight, bias, 1e-5).square().sum().backward()
    assert [one.grad is not None for one in (x, weight, bias)] == [True, False, True]
