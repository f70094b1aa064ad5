"""LightMedSeg's layers by themselves; together they are checked in tests/networks/test_lightmedseg.py."""

import pytest
import torch

from nnunet_deform.layers import AnchorDetector, FiLM, LocalStructuralPrior, PositionBias, SqueezeExcite
from nnunet_deform.layers.few_channels import resampled
from nnunet_deform.layers.lightmed import GhostFeatures


def detector(**options) -> AnchorDetector:
    return AnchorDetector(1, **{"num_anchors": 8, "kernel_sizes": [[3] * 3] * 3, "strides": [[2] * 3] * 3, **options})


@pytest.mark.parametrize("size", [(5, 7, 6), (4, 9)], ids=str)
def test_position_bias_is_the_convolution_of_all_offsets(size):
    layer = PositionBias(3, 2).double()
    ndim = len(size)
    x, anchors = torch.randn(2, 2, *size, dtype=torch.float64), torch.rand(2, 3, ndim, dtype=torch.float64)
    expected = x.clone()
    for b in range(2):
        for voxel in torch.cartesian_prod(*(torch.arange(s) for s in size)):
            centre = (voxel.double() + 0.5) / torch.tensor(size)
            offsets = (centre - anchors[b]).sum(1)  # [K]
            expected[(b, slice(None), *voxel)] += layer.linear(offsets)
    torch.testing.assert_close(layer(x, anchors), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.clone(), anchors), expected, rtol=0, atol=1e-12)


def test_position_bias_sees_the_sum_of_an_anchors_coordinates_only():
    layer = PositionBias(4, 2)
    anchors = torch.rand(1, 4, 3)
    x = torch.zeros(1, 2, 3, 4, 5)
    torch.testing.assert_close(layer(x, anchors), layer(x, anchors.flip(2)))


def test_anchors_start_spread_out():
    anchors = detector()(torch.randn(2, 1, 16, 16, 16))
    assert anchors.shape == (2, 8, 3)
    assert (anchors.amax(1) - anchors.amin(1) > 0.4).all()
    torch.manual_seed(1)
    assert not torch.equal(detector().coordinates[2].bias, detector().coordinates[2].bias)


def test_anchors_do_not_round_under_autocast():
    layer = detector()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 1, 8, 8, 8)).dtype == torch.float32


def test_film_starts_near_the_identity_and_follows_the_anchors():
    layer = FiLM(4, 6)
    x, anchors = torch.randn(2, 4, 3, 3, 3), torch.rand(2, 2, 3)
    assert (layer(x, anchors) - x).abs().amax() < 0.3
    expected = torch.stack(
        [
            (1 + layer.gamma(a.flatten())).view(4, 1, 1, 1) * sample + layer.beta(a.flatten()).view(4, 1, 1, 1)
            for sample, a in zip(x, anchors, strict=True)
        ]
    )
    torch.testing.assert_close(layer(x, anchors), expected)


def test_texture_is_flat_where_the_image_is():
    """A high-pass from the first step: nothing in the middle of a constant, something at an edge."""
    layer = LocalStructuralPrior(4, (3, 3, 3), 8)
    torch.nn.init.ones_(layer.texture.weight)
    x = torch.zeros(1, 4, 16, 16, 16)
    x[..., 8:] = 1
    # The norm is made the identity of the smoothed map: its mean and deviation restored.
    smoothed = layer.smoothing(x)
    layer.smoothing_norm = torch.nn.Identity()
    texture, _ = layer(x)
    assert smoothed[..., 8, 8, 2].abs().amax() == 0
    torch.testing.assert_close(texture[0, 0, 8, 8, 2], texture[0, 0, 8, 8, 13])
    assert texture[0, 0, 8, 8, 7] > texture[0, 0, 8, 8, 2] + 0.05


def test_mixer_weights_sum_to_one():
    layer = LocalStructuralPrior(4, (3, 3), 8)
    with torch.no_grad():
        layer.experts[1].load_state_dict(layer.experts[0].state_dict())
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(layer(x)[1], layer.experts[0](x))


@pytest.mark.parametrize(("channels", "hidden"), [(8, 4), (16, 4), (32, 8), (128, 32)])
def test_squeeze_excite(channels, hidden):
    layer = SqueezeExcite(channels)
    assert layer.gate[0].out_features == hidden
    x = torch.randn(2, channels, 3, 4, 5)
    gate = layer.gate(x.flatten(2).mean(2)).view(2, channels, 1, 1, 1)
    torch.testing.assert_close(layer(x), x * gate)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.clone()), x * gate)
    assert 0.9 < gate.min() < gate.max() < 0.98, "it starts open, and not so far that it cannot close"


def test_ghosts_are_a_depthwise_convolution_of_the_first_half():
    layer = GhostFeatures(3, 8, (3, 3, 3), (2, 2, 2))
    x = torch.randn(1, 3, 8, 8, 8)
    output = layer(x)
    assert output.shape == (1, 8, 4, 4, 4)
    torch.testing.assert_close(output[:, 4:], layer.ghost(output[:, :4]))
    assert layer.ghost.groups == 4
    assert layer.primary.bias is None
    assert layer.ghost.bias is None


def test_resampling_is_linear_with_voxels_as_cells():
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert resampled(x, (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert resampled(x, (1, 2)) is x
