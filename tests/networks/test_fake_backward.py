"""Gradients without torch's engine are torch's, and so is what is held on the way."""

import pytest
import torch
from network_cases import TWO_DIMENSIONAL, as_list, stir
from packaging.version import Version
from torch import Tensor

from nnunet_deform.networks.fake_backward import OLDEST_TORCH, without_engine

with_torch = pytest.mark.skipif(Version(torch.__version__) < OLDEST_TORCH, reason=f"needs torch {OLDEST_TORCH}")


def step(network: torch.nn.Module, image: Tensor) -> list[Tensor | None]:
    outputs = as_list(network(image))
    gradients = [torch.cos(output.detach()) for output in outputs]
    return [*torch.autograd.grad(outputs, [image, *network.parameters()], gradients, allow_unused=True)]


@with_torch
@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@pytest.mark.parametrize("name", ["DeformUXNet", "LightMedSeg", "MagicPlainConvUNet"])
def test_gradients_are_the_engines(name: str, recompute: str):
    network = stir(TWO_DIMENSIONAL.network(name, deep_supervision=True, recompute=recompute).double()).eval()
    image = TWO_DIMENSIONAL.image(batch=2, dtype=torch.float64).requires_grad_()
    expected = step(network, image)
    with without_engine():
        ours = step(network, image)
    assert sum(gradient is not None for gradient in ours) > 20
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@with_torch
def test_gradients_of_what_is_no_leaf_and_of_what_is_not_reached():
    x, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    inner = x * 2
    with without_engine():
        found = torch.autograd.grad([(inner * inner).sum(), x], [inner, x, other], [torch.ones(()), torch.ones(3)])
    torch.testing.assert_close(found[0], 2 * inner)
    torch.testing.assert_close(found[1], 8 * x + 1)
    assert found[2] is None


@with_torch
def test_the_engine_is_back_afterwards():
    before = torch.autograd.grad, torch.autograd.Function.__dict__["apply"], torch._C._current_graph_task_id
    with without_engine():
        assert torch.autograd.grad is not before[0]
    assert before == (torch.autograd.grad, torch.autograd.Function.__dict__["apply"], torch._C._current_graph_task_id)


def test_a_torch_that_crashes_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(RuntimeError, match=r"^torch 2\.10\.0 crashes on backward passes without its engine"):
        without_engine().__enter__()
