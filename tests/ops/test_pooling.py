"""Statistics over voxels, against their definitions in plain float64 operations under autograd."""

import pytest
import torch
from torch import Tensor

from nnunet_deform.ops import voxel_statistics

SIZES = [(3, 4, 5), (7, 6), (1, 1, 1), (5,)]


def by_definition(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    axes = tuple(range(2, x.ndim))
    logits = torch.einsum("bc...,c->b...", x, weight) + bias
    attention = (logits - logits.amax()).exp()
    attention = attention / attention.sum(tuple(range(1, x.ndim - 1)), keepdim=True)
    context = (x * attention.unsqueeze(1)).sum(axes)
    return x.mean(axes), x.max(1).values.mean(tuple(range(1, x.ndim - 1))), context


def draw(size: tuple[int, ...], channels: int = 6, batch: int = 2) -> list[Tensor]:
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    return [x, torch.randn(channels, dtype=torch.float64), torch.randn(1, dtype=torch.float64)]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_every_gradient(size: tuple[int, ...], layout: str):
    leaves = draw(size)
    if layout == "channels-last":
        leaves[0] = leaves[0].movedim(1, -1).contiguous().movedim(-1, 1)
    for leaf in leaves:
        leaf.requires_grad_()
    expected = by_definition(*leaves)
    ours = voxel_statistics(*leaves)
    grad_outputs = [torch.randn_like(output) for output in expected]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(expected, leaves, grad_outputs)
    for one, other in zip(torch.autograd.grad(ours, leaves, grad_outputs), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_each_statistic_may_be_left_out():
    x, weight, bias = draw((3, 4))
    mean, peak, context = voxel_statistics(x, weight, bias)
    x.requires_grad_()
    only_mean = voxel_statistics(x, with_peak=False)
    assert only_mean[1] is only_mean[2] is None
    assert torch.equal(only_mean[0], mean)
    (gradient,) = torch.autograd.grad(only_mean[0].sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 12), rtol=0, atol=1e-15)
    assert torch.equal(voxel_statistics(x)[1], peak)
    assert torch.equal(voxel_statistics(x, weight, bias, with_peak=False)[2], context)


def test_equal_maxima_share_no_gradient():
    """The sum over channels is 1 / N at each voxel, however many channels attain the maximum."""
    x = torch.ones(1, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(voxel_statistics(x)[1].sum(), x)
    torch.testing.assert_close(gradient.sum(1), torch.full((1, 5), 0.2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 8, 20])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, channels: int):
    """100,000 voxels: in half precision the softmax would vanish and the mean would stop growing."""
    x, weight, bias = draw((100, 1000), channels)
    x = (x + 3).to(dtype).requires_grad_()
    weight, bias = (tensor.float().requires_grad_() for tensor in (weight, bias))
    exact = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), bias.detach().double()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = voxel_statistics(x, weight, bias)
    expected = by_definition(*exact)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    # Large enough that half precision holds the share of a voxel, and small enough for the voxel with the most.
    grad_outputs = [1e3 * torch.randn_like(output) for output in expected]
    theirs = torch.autograd.grad(expected, exact[:2], grad_outputs)
    grads = torch.autograd.grad(ours, [x, weight, bias], [g.float() for g in grad_outputs])
    assert grads[0].dtype == dtype
    error = (grads[0].double() - theirs[0]).norm() / theirs[0].norm()
    assert error < (1e-3 if dtype == torch.float16 else 6e-3)
    # A difference of sums that are several times larger.
    torch.testing.assert_close(grads[1].double(), theirs[1], rtol=0, atol=1e-3 * theirs[1].abs().max().item())


def test_autograd_keeps_the_input_and_two_numbers_for_each_voxel():
    x, weight, bias = (tensor.float().requires_grad_() for tensor in draw((8, 9, 10), channels=16))
    given = [tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias)]
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        voxel_statistics(x, weight, bias)
    assert sorted(kept) == [2 * 720 * 2, 2 * 720 * 4]


def test_autograd_keeps_the_input_alone_where_maps_are_made_again():
    x, weight, bias = (tensor.float().requires_grad_() for tensor in draw((8, 9, 10), channels=16))
    given = [tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias)]
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = voxel_statistics(x, weight, bias, keep_maps=False)
    assert kept == []
    expected = voxel_statistics(x, weight, bias)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
    gradients = [torch.randn_like(result) for result in results]
    for ours, theirs in zip(
        torch.autograd.grad(results, [x, weight, bias], gradients),
        torch.autograd.grad(expected, [x, weight, bias], gradients),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(dtype: torch.dtype):
    compiled = torch.compile(voxel_statistics, fullgraph=True, backend="aot_eager")
    leaves = [tensor.float().requires_grad_() for tensor in draw((5, 6))]
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()

    def outputs_and_gradients(function) -> list[Tensor]:
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(sum(output.sin().sum() for output in outputs), leaves)]

    for one, other in zip(outputs_and_gradients(compiled), outputs_and_gradients(voxel_statistics), strict=True):
        torch.testing.assert_close(one, other)


def test_there_is_no_second_derivative():
    x, weight, bias = (tensor.requires_grad_() for tensor in draw((3, 4)))
    mean, _, context = voxel_statistics(x, weight, bias)
    (gradient,) = torch.autograd.grad((mean * context).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
