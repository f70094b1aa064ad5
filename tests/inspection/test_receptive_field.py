"""The effective receptive field against its closed form for stacks of convolutions."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_deform.inspection.receptive_field import centre, patch_around, radius_of_share, receptive_field


def stack(layers: int, ndim: int = 3, channels: int = 1) -> nn.Module:
    """3^d convolutions whose weights are all one."""
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    widths = [channels, *[1] * layers]
    network = nn.Sequential(*(conv(i, o, 3, padding=1, bias=False) for i, o in pairwise(widths)))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    return network


def trinomial(layers: int, size: int) -> np.ndarray:
    """(1 + x + x^2)^layers, in the middle of ``size``."""
    row = np.ones(1)
    for _ in range(layers):
        row = np.convolve(row, np.ones(3))
    out = np.zeros(size)
    start = size // 2 - layers
    out[start : start + len(row)] = row
    return out


@pytest.mark.parametrize("layers", [1, 3])
def test_a_stack_of_convolutions_has_the_powers_of_a_trinomial(layers: int) -> None:
    patch = torch.randn(1, 9, 10, 11)
    found = receptive_field(stack(layers), [patch, torch.randn_like(patch)], head=0).values
    z, y, x = (trinomial(layers, size) for size in patch.shape[1:])
    np.testing.assert_allclose(found, z[:, None, None] * y[:, None] * x, rtol=1e-5)


def test_2d_and_a_dilated_convolution() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=2, dilation=2, bias=False)
    nn.init.ones_(conv.weight)
    expected = np.zeros((8, 9))
    expected[2:7:2, 2:7:2] = 1
    np.testing.assert_allclose(receptive_field(conv, [torch.zeros(1, 8, 9)], head=1).values, expected)


def test_channels_are_weighed_by_their_gradient() -> None:
    network = stack(1, channels=3)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -3.0, 0.0]).view(1, 3, 1, 1, 1).expand_as(network[0].weight))
    found = receptive_field(network, [torch.randn(3, 5, 5, 5)], head=0)
    np.testing.assert_allclose(found.channels, [0.25, 0.75, 0.0], rtol=1e-6)
    assert found.values[2, 2, 2] == pytest.approx(4)


def test_a_network_without_an_image_sees_nothing() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(1, 1, *x.shape[2:])

    found = receptive_field(Constant(), [torch.zeros(1, 4, 4)], head=0)
    assert found.values.sum() == 0
    assert found.channels.tolist() == [0.0]
    assert math.isnan(radius_of_share(found.values, (1, 1)))


def test_no_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        receptive_field(stack(1), [], head=0)


def test_patches_have_their_voxel_in_the_middle() -> None:
    image = torch.arange(5 * 6.0).view(1, 5, 6)
    for voxel in ((0, 0), (2, 3), (4, 5)):
        patch = patch_around(image, voxel, (4, 3))
        assert patch.shape == (1, 4, 3)
        assert patch[(0, *centre((4, 3)))] == image[(0, *voxel)]
    assert patch_around(image, (0, 0), (4, 3)).tolist() == [[[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 6, 7]]]


def test_radius_in_mm_by_hand() -> None:
    values = np.zeros((5, 5))
    values[2, 2], values[2, 3], values[3, 2], values[0, 2] = 4, 1, 2, 1
    # Distances with spacing (3, 1): 0, 1, 3 and 6 mm; sums 4, 5, 7, 8.
    spacing = (3.0, 1.0)
    assert radius_of_share(values, spacing, 0.5) == 0
    assert radius_of_share(values, spacing, 0.6) == 1
    assert radius_of_share(values, spacing, 0.75) == 3
    assert radius_of_share(values, spacing, 1.0) == 6
    with pytest.raises(ValueError, match="share=0"):
        radius_of_share(values, spacing, 0)


def test_radius_grows_with_the_root_of_depth() -> None:
    """Of L layers of variance 2/3 an axis, a Gaussian of variance 2L/3: half lies within its chi quantile."""
    layers = 12
    rows = trinomial(layers, 41)
    values = rows[:, None] * rows
    median = math.sqrt(2 * math.log(2) * 2 * layers / 3)
    assert radius_of_share(values, (1, 1)) == pytest.approx(median, abs=0.25)  # radii are of a lattice
