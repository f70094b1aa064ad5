"""Half precision: what is computed again is no less exact than what is kept."""

from contextlib import nullcontext
from statistics import median

import pytest
import torch
from network_cases import ISOTROPIC, TWO_DIMENSIONAL, Plan, stir
from torch import Tensor, nn

from nnunet_deform.layers.recomputation import plain_forms

MODES = ("plain", "cheap", "blocks")
DRAWS = 5


def gradient(network: nn.Module, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Of all parameters, in one row; the loss scaled as nnU-Net's GradScaler does for float16."""
    scale = 1024
    # Without oneDNN: of torch 2.15 it reads memory it has not written for the bfloat16 gradient of a 3D convolution's
    # weight where the depth is 2, on processors with AVX512-BF16.
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            outputs = network(image)
        loss = scale * sum(output.float().square().mean() for output in outputs)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([one.flatten() for one in gradients]) / scale


def errors(name: str, plan: Plan, dtype: torch.dtype) -> dict[str, float]:
    """Of each mode, the distance to the gradient of the plain form in float32, relative to its length."""
    # In evaluation: standardised by two samples, MAGIC's attention makes a rounding as large as a difference.
    networks = {
        mode: plan.network(name, deep_supervision=True, recompute="blocks" if mode == "blocks" else "cheap").eval()
        for mode in MODES
    }
    weights = stir(networks["plain"], scale=0.1).state_dict()
    image = plan.image(batch=2)
    with plain_forms():
        exact = gradient(networks["plain"], image, torch.float32)
    found = {}
    for mode, network in networks.items():
        network.load_state_dict(weights)
        with plain_forms() if mode == "plain" else nullcontext():
            found[mode] = ((gradient(network, image, dtype) - exact).norm() / exact.norm()).item()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("plan", [TWO_DIMENSIONAL, pytest.param(ISOTROPIC, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["DeformUXNet", "LightMedSeg", "MagicPlainConvUNet"])
def test_gradients_under_autocast_are_as_near_to_float32s_as_the_plain_forms(name: str, plan: Plan, dtype):
    drawn = [errors(name, plan, dtype) for _ in range(DRAWS)]
    # Eleven bits of a float16 number, eight of a bfloat16 one, and some tens of roundings in a row.
    assert 0 < median(of_draw["plain"] for of_draw in drawn) < 256 * torch.finfo(dtype).eps, drawn
    # At one draw or another roundings add up in one form and cancel in the other.
    for mode in ("cheap", "blocks"):
        assert median(of_draw[mode] / of_draw["plain"] for of_draw in drawn) < 1.2, drawn
