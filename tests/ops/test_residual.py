"""The residual block that keeps two maps, against torch's operations."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_deform.ops import residual_block

CONV = {2: F.conv2d, 3: F.conv3d}
EPS = [1e-3, 1e-5, 1e-2]
FORMS = list(itertools.product(("identity", "projection"), (1, 2)))


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operands(ndim: int, form: str, n_parts: int) -> tuple[list[Tensor], list[Tensor | None]]:
    widths, size, kernel = [[4], [3, 2]][n_parts - 1], (5, 4, 6)[:ndim], (1, 3, 3)[-ndim:]
    parts = [leaf(2, width, *size) for width in widths]
    out = sum(widths) if form == "identity" else 3
    weights = [leaf(out, sum(widths), *kernel), leaf(out, out, *kernel)]
    return parts, [*weights, leaf(out, sum(widths), *[1] * ndim) if form == "projection" else None]


def ours(parts: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    padding = [k // 2 for k in weights[0].shape[2:]]
    return residual_block(parts, *weights, padding=padding, eps=EPS, negative_slope=0.1)


def plain(parts: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    first, second, shortcut = weights
    conv, padding = CONV[first.ndim - 2], [k // 2 for k in first.shape[2:]]
    x = torch.cat(parts, 1)
    between = F.leaky_relu(F.instance_norm(conv(x, first, padding=padding), eps=EPS[0]), 0.1)
    other = x if shortcut is None else F.instance_norm(conv(x, shortcut), eps=EPS[2])
    return F.leaky_relu(F.instance_norm(conv(between, second, padding=padding), eps=EPS[1]) + other, 0.1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, None], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("form", "n_parts"), FORMS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_equals_torchs_operations(ndim, form, n_parts, layout):
    parts, weights = operands(ndim, form, n_parts)
    given = parts
    if layout is None:
        layout = torch.channels_last if ndim == 2 else torch.channels_last_3d
        given = [part.contiguous(memory_format=layout) for part in parts]
    result, expected = ours(given, weights), plain(parts, weights)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    leaves = [*parts, *(weight for weight in weights if weight is not None)]
    gradient = torch.randn_like(expected)
    kept = torch.autograd.grad(result, leaves, gradient, retain_graph=True)
    again = torch.autograd.grad(result, leaves, gradient)
    for one, two, twice in zip(kept, torch.autograd.grad(expected, leaves, gradient), again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        assert torch.equal(one, twice)


@pytest.mark.parametrize(("form", "n_parts"), FORMS)
def test_keeps_parts_activation_and_output(form, n_parts):
    parts, weights = operands(3, form, n_parts)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = ours(parts, weights)
    own = {tensor.data_ptr() for tensor in weights if tensor is not None}
    maps = sorted(t.numel() for key, t in kept.items() if key not in own and t.ndim > 1)
    assert maps == sorted([*(part.numel() for part in parts), output.numel(), output.numel()])


@pytest.mark.parametrize("frozen", range(4))
def test_only_what_is_asked_for(frozen):
    parts, weights = operands(3, "projection", 2)
    leaves = [parts[1], *weights]
    leaves[frozen].requires_grad_(False)
    parts[0].requires_grad_(False)
    ours(parts, weights).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index != frozen for index in range(4)]
    assert parts[0].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["identity", "projection"])
def test_autocast_is_as_near_to_float32_as_torchs_operations(form, dtype):
    """What is inverted was rounded once more; the error of the gradients stays within a fifth of torch's own."""
    torch.manual_seed(3)
    width, size = 8, (12, 12, 12)
    x = torch.randn(2, width, *size)
    weights = [torch.randn(width, width, 3, 3, 3) / 15, torch.randn(width, width, 3, 3, 3) / 15]
    weights.append(torch.randn(width, width, 1, 1, 1) / 3 if form == "projection" else None)
    gradient = torch.randn(x.shape)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights) if tensor is not None]

    def gradients(function, enabled: bool) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=enabled):
            # An identity in the precision of the convolutions, as in the network.
            output = function([x.to(dtype) if enabled else x], weights)
        return torch.cat([g.flatten() for g in torch.autograd.grad(output, leaves, gradient.to(output.dtype))])

    exact = gradients(plain, False)
    error, theirs = ((gradients(function, True) - exact).norm() for function in (ours, plain))
    assert error < 1.2 * theirs
    assert theirs / exact.norm() < 0.1
