"""The MLP as one operation for compilers."""

import pytest
import torch
from torch import Tensor

from nnunet_deform.ops import mlp


def arguments(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 5, 6), (24, 6), (24,), (6, 24), (6,)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(function, leaves: list[Tensor]) -> list[Tensor]:
    output = function(*leaves)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


def test_compiled_equals_eager():
    torch.compiler.reset()
    leaves = arguments(torch.float64)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for one, other in zip(outputs_and_gradients(compiled, leaves), outputs_and_gradients(mlp, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_compiled_under_autocast_is_as_near_as_eager():
    torch.compiler.reset()
    leaves = arguments(torch.float32)
    exact = outputs_and_gradients(mlp, leaves)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = outputs_and_gradients(mlp, leaves), outputs_and_gradients(compiled, leaves)
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - truth).norm() <= 1.1 * (other - truth).norm()


@pytest.mark.parametrize("shape", [(2, 3, 6), (5, 6)], ids=str)
def test_passes_torchs_checks_of_operators(shape):
    leaves = [torch.randn(shape, requires_grad=True), *arguments(torch.float32)[1:]]
    torch.library.opcheck(torch.ops.nnunet_deform.mlp, leaves)
