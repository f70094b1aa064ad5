"""Grad-CAM++ against hand-made networks, its definition, and the usual implementation."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunet_deform.inspection.activation_maps import activation_maps, grad_cam_plus_plus, levels


class TwoLevels(nn.Module):
    """Channel 0 of the features is the image, channel 1 its negative, both rectified; a level below, their mean over
    2 x 2; logits: head 0 reads channel 0, head 1 channel 1 of the coarse level."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(inplace=True))
        self.coarse = nn.AvgPool2d(2)
        self.up = nn.Upsample(scale_factor=2)
        self.seg_layers = nn.ModuleList([nn.Conv2d(4, 2, 1, bias=False)])
        with torch.no_grad():
            self.fine[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.seg_layers[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]).view(2, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.seg_layers[0](torch.cat([fine, self.up(self.coarse(fine))], 1))


@pytest.fixture
def image() -> Tensor:
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, :2, :2] = 3.0
    x[0, 0, 4:6, 4:6] = -2.0
    return x


def test_levels_are_the_last_blocks_before_the_logits(image: Tensor) -> None:
    found = levels(TwoLevels(), image)
    # The block is the last at full resolution, whatever layers and heads follow.
    assert [(layer.name, layer.size) for layer in found] == [("coarse", (4, 4)), ("fine", (8, 8))]


def test_a_hand_made_network_has_the_map_it_must_have(image: Tensor) -> None:
    everywhere = torch.ones(8, 8, dtype=torch.bool)
    maps = activation_maps(TwoLevels(), image, [(0, everywhere), (1, everywhere)], ["fine", "coarse"])
    # Head 0: gradient 1 at each of 64 voxels of channel 0, whose sum is 12: 64 / (2 + 12) times the channel.
    expected = torch.zeros(8, 8)
    expected[:2, :2] = 3 * 64 / 14
    torch.testing.assert_close(maps[0, 0], expected)
    assert not maps[0, 1].any()  # head 0 does not read the coarse level
    # Head 1: each of 16 coarse voxels is read by four; the sum of channel 1 there is 2.
    small = torch.zeros(1, 1, 4, 4)
    small[0, 0, 2, 2] = 2 * 16 * 4 / (2 + 2 * 4)
    torch.testing.assert_close(maps[1, 1], nn.functional.interpolate(small, (8, 8), mode="bilinear")[0, 0])


def test_only_voxels_of_the_mask_count(image: Tensor) -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, 0] = True
    maps = activation_maps(TwoLevels(), image, [(0, mask), (0, mask & False)], ["fine"])
    expected = torch.zeros(8, 8)
    expected[:2, :2] = 3 / 14
    torch.testing.assert_close(maps[0, 0], expected)
    assert not maps[1].any()


def test_the_definition_with_its_quotient() -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = torch.rand(2, 3, 4, 5, 6, generator=generator), torch.randn(2, 3, 4, 5, 6, generator=generator)
    total = a.sum((2, 3, 4), keepdim=True)
    alpha = g**2 / (2 * g**2 + total * g**3)
    expected = ((alpha * g.relu()).sum((2, 3, 4), keepdim=True) * a).sum(1).relu()
    torch.testing.assert_close(grad_cam_plus_plus(a, g), expected)


def test_a_gradient_s_scale_does_not_vanish_in_a_constant() -> None:
    a, g = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4)
    ratio = grad_cam_plus_plus(a, 1e-6 * g) / grad_cam_plus_plus(a, 2e-6 * g)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), rtol=1e-4, atol=0)


def test_the_network_is_left_as_it_was(image: Tensor) -> None:
    network = TwoLevels()
    activation_maps(network, image, [(0, torch.ones(8, 8, dtype=torch.bool))], ["fine"])
    levels(network, image)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_usual_implementation_gives_the_same_map(ndim: int) -> None:
    cam = pytest.importorskip("pytorch_grad_cam", reason="the second opinion, grad-cam, is not installed")
    torch.manual_seed(1)
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    features = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU())
    network = nn.Sequential(features, conv(4, 2, 1))
    image = torch.randn(1, 1, *[8] * ndim)
    mask = network(image)[0, 1] > 0
    ours = activation_maps(network, image, [(1, mask)], ["0"])[0, 0].numpy()

    def target(logits: Tensor) -> Tensor:
        return logits[1][mask].sum()

    (theirs,) = cam.GradCAMPlusPlus(network, [features])(image, [target])
    # Each of its maps is stretched over 0 to 1, which is why patches of its maps do not fit together.
    np.testing.assert_allclose((ours - ours.min()) / (ours.max() - ours.min()), theirs, atol=1e-4)
