"""When a piece may keep less for the backward pass, and what computing it again gives."""

import pytest
import torch
from torch import Tensor, nn

from nnunet_deform.layers.recomputation import may_keep_less, may_recompute, recomputed, recomputed_block


def nothing(*_: object) -> None:
    pass


HOOKS = [
    lambda module: module.register_forward_hook(nothing),
    lambda module: module.register_forward_pre_hook(nothing),
    lambda module: module.register_full_backward_hook(nothing),
    lambda module: module.register_full_backward_pre_hook(nothing),
    lambda module: nn.modules.module.register_module_forward_hook(nothing),
    lambda module: nn.modules.module.register_module_forward_pre_hook(nothing),
    lambda module: nn.modules.module.register_module_full_backward_hook(nothing),
    lambda module: nn.modules.module.register_module_full_backward_pre_hook(nothing),
]


def test_only_where_gradients_are_recorded():
    layers = nn.Sequential(nn.Linear(2, 2))
    assert may_keep_less(layers)
    assert may_keep_less(layers.eval())
    with torch.no_grad():
        assert not may_keep_less(layers)
    with torch.inference_mode():
        assert not may_keep_less(layers)


@pytest.mark.parametrize("add", HOOKS)
def test_not_while_a_part_has_hooks(add):
    layers = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    handle = add(layers[0][0])
    assert not may_keep_less(layers[1], layers)
    handle.remove()
    assert may_keep_less(layers[1], layers)


def test_a_hook_on_the_piece_itself_is_no_reason():
    layers = nn.Sequential(nn.Linear(2, 2))
    layers.register_forward_hook(nothing)
    assert may_keep_less(layers)


@pytest.mark.parametrize("add", HOOKS)
@pytest.mark.parametrize("on_itself", [False, True])
def test_a_block_with_hooks_is_called_once(add, on_itself):
    block = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    assert may_recompute(block)
    handle = add(block if on_itself else block[0][0])
    assert not may_recompute(nn.ReLU(), block)
    handle.remove()
    assert may_recompute(nn.ReLU(), block)


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.Dropout3d(0.1), nn.BatchNorm1d(2), nn.InstanceNorm1d(2)])
def test_a_block_that_changes_when_called_is_called_once_in_training(part):
    block = nn.Sequential(nn.Linear(2, 2), part)
    changes = not isinstance(part, nn.InstanceNorm1d)
    assert may_recompute(block) is not changes
    assert may_recompute(block.eval())
    with torch.no_grad():
        assert not may_recompute(block)


def test_a_block_is_called_again_in_the_backward_pass():
    calls = []

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    block, x = Block(2, 2), torch.randn(3, 2)
    recomputed_block(block, x).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        recomputed_block(block, x)
    assert len(calls) == 3


def test_recomputed_keeps_the_inputs_alone():
    layers = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 3)).double()
    x, other = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    own = {parameter.data_ptr() for parameter in layers.parameters()}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.numel():
            kept.append(tensor.numel())
        return tensor

    def piece(x: Tensor, nothing: None, other: Tensor) -> tuple[Tensor, Tensor]:
        return layers(x) * other, layers(other)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours = recomputed(piece, x, None, other)
    assert kept == [15, 15]
    leaves, gradient = [x, other, *layers.parameters()], torch.randn(5, 3, dtype=torch.float64)
    theirs = piece(x, None, other)
    for one, two in zip(
        torch.autograd.grad(ours, leaves, [gradient] * 2, retain_graph=True),
        torch.autograd.grad(theirs, leaves, [gradient] * 2),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    # The graph was kept: once more.
    assert torch.autograd.grad(ours, x, [gradient] * 2)[0].shape == x.shape
