"""The deformable convolution whose offsets are made again, against the operator."""

import pytest
import torch
from torch import Tensor

from nnunet_deform.ops import deform_conv2d, deform_conv3d, steered_deform_conv

OPS = {2: deform_conv2d, 3: deform_conv3d}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


class Case:
    def __init__(self, ndim: int) -> None:
        taps = 3**ndim
        self.x, self.weight, self.bias = leaf(2, 4, *(4, 5, 3)[:ndim]), leaf(4, 1, *[3] * ndim), leaf(4)
        self.gain, self.steering = leaf(4), leaf(taps * ndim, 4)
        self.ndim = ndim

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias, self.gain, self.steering]

    def prepared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(x * self.gain.view(-1, *[1] * self.ndim))
        return features, torch.einsum("oc,bc...->bo...", self.steering, features)

    def ours(self) -> Tensor:
        return steered_deform_conv(
            self.prepared,
            self.x,
            self.weight,
            self.bias,
            padding=[1] * self.ndim,
            parameters=[self.gain, self.steering],
        )

    def plain(self) -> Tensor:
        return OPS[self.ndim](*self.prepared(self.x), self.weight, self.bias, padding=1)


@pytest.mark.parametrize("ndim", [2, 3])
def test_equals_the_operator(ndim):
    case = Case(ndim)
    ours, plain = case.ours(), case.plain()
    assert torch.equal(ours, plain)
    gradient = torch.randn_like(plain)
    first = torch.autograd.grad(ours, case.leaves, gradient, retain_graph=True)
    again = torch.autograd.grad(ours, case.leaves, gradient)
    for one, two, twice in zip(first, torch.autograd.grad(plain, case.leaves, gradient), again, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
        torch.testing.assert_close(one, twice, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "gain", "steering"])
def test_only_what_is_asked_for(frozen):
    case = Case(3)
    getattr(case, frozen).requires_grad_(False)
    case.ours().sum().backward()
    assert [leaf.grad is not None for leaf in case.leaves] == [leaf.requires_grad for leaf in case.leaves]


def test_nothing_behind_it_needs_gradients():
    case = Case(3)
    for leaf_ in (case.x, case.gain, case.steering):
        leaf_.requires_grad_(False)
    case.ours().sum().backward()
    assert [one.grad is not None for one in (case.weight, case.bias, case.x)] == [True, True, False]


def test_keeps_what_the_features_are_made_from():
    case = Case(3)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.ours()
    assert {key for key in kept} <= {leaf_.data_ptr() for leaf_ in case.leaves}


def test_hooks_that_hand_out_copies_leave_no_gradient_out():
    case = Case(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor.clone()):
        output = case.ours()
    output.sum().backward()
    assert all(leaf_.grad.abs().sum() > 0 for leaf_ in case.leaves)


def test_the_second_call_is_under_the_same_autocast():
    case = Case(3)
    leaves = [leaf_.detach().float().requires_grad_() for leaf_ in case.leaves]
    case.x, case.weight, case.bias, case.gain, case.steering = leaves
    seen: list[tuple[bool, torch.dtype]] = []
    prepared = case.prepared

    def watched(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        features, offset = prepared(x)
        return features, offset.float()

    case.prepared = watched
    with torch.autocast("cpu", torch.float16):
        output = case.ours()
    assert output.dtype == torch.float16
    output.float().sum().backward()
    assert seen == [(True, torch.float16)] * 2
