"""LayerNorm over channels."""

import pytest
import torch
from torch import Tensor

from nnunet_deform.layers import ChannelLayerNorm

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def by_hand(x: Tensor, norm: ChannelLayerNorm) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    return (x - mean) / torch.sqrt(variance + 1e-6) * norm.weight.view(per_channel) + norm.bias.view(per_channel)


# At 1e-3 the epsilon is as large as the variance; at 1e-6 it is nearly all there is.
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4), (1, 1, 1)], ids=str)
def test_equals_mean_and_variance_by_hand(size: tuple[int, ...], scale: float):
    norm = ChannelLayerNorm(6).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = scale * torch.randn(2, 6, *size, dtype=torch.float64) + 0.5 * scale
    torch.testing.assert_close(norm(x), by_hand(x, norm), rtol=0, atol=1e-12)


def test_starts_as_the_identity_of_normalised_voxels():
    norm = ChannelLayerNorm(64)
    y = norm(3 + 2 * torch.randn(2, 64, 4, 5))
    assert norm.eps == 1e-6
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(2, 4, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(dim=1, correction=0), torch.ones(2, 4, 5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_channels_last_is_kept_without_a_copy(ndim: int):
    norm = ChannelLayerNorm(6)
    size = (4, 5, 7)[:ndim]
    x = torch.randn(2, 6, *size).contiguous(memory_format=CHANNELS_LAST[ndim])
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x)
    assert x.untyped_storage().data_ptr() in saved
    assert y.stride() == x.stride()
    assert y.is_contiguous(memory_format=CHANNELS_LAST[ndim])
    torch.testing.assert_close(y, norm(x.contiguous()), rtol=0, atol=1e-6)


def test_autocast_normalises_in_float32():
    norm = ChannelLayerNorm(8)
    # In bfloat16 the mean of 1000 would swallow these differences.
    x = 1000 + torch.randn(1, 8, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    torch.testing.assert_close(y.float(), by_hand(x.double(), norm.double()).float(), rtol=0, atol=2e-2)
