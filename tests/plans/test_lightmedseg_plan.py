import copy
import json

import pytest
from test_deformux_plan import PLAIN, RES_ENC, build, isotropic, stock

from nnunet_deform.networks import LightMedSeg
from nnunet_deform.plans import deformux_architecture, estimated_gigabytes, lightmedseg_architecture
from nnunet_deform.plans.lightmedseg import NETWORK


def parameters(architecture, **kwargs):
    """With the full-resolution head only, as in the paper."""
    network = build(architecture, **kwargs)
    coarser_heads = sum(p.numel() for head in network.decoder.seg_layers[:-1] for p in head.parameters())
    return sum(p.numel() for p in network.parameters()) - coarser_heads


@pytest.mark.parametrize("network_class_name", [PLAIN, RES_ENC])
def test_six_levels_become_the_papers_network(network_class_name):
    architecture = lightmedseg_architecture(isotropic(6, network_class_name=network_class_name), (128, 128, 128))
    arguments = architecture["arch_kwargs"]
    assert arguments["n_stages"] == 5
    assert arguments["features_per_stage"] == [8, 16, 32, 64, 64]
    assert arguments["strides"] == [[1, 1, 1], *[[2, 2, 2]] * 4]
    assert isinstance(build(architecture), LightMedSeg)
    assert parameters(architecture, input_channels=4, num_classes=3) == 477_493


def test_the_base_is_left_alone_and_the_result_is_json():
    base = isotropic(6)
    before = copy.deepcopy(base)
    architecture = lightmedseg_architecture(base, (128, 128, 128), op_off=True, num_anchors=16)
    assert base == before
    assert json.loads(json.dumps(architecture)) == architecture


@pytest.mark.parametrize(
    ("levels", "max_levels", "features", "count"),
    [
        (4, 5, [8, 16, 32, 32], 146_189),
        (7, 6, [8, 16, 32, 64, 64, 64], 750_463),
        (3, 5, [8, 16, 16], None),
        (2, 5, [8, 8], None),
    ],
)
def test_fewer_and_more_levels(levels, max_levels, features, count):
    architecture = lightmedseg_architecture(isotropic(levels), (128,) * 3, max_levels=max_levels)
    assert architecture["arch_kwargs"]["features_per_stage"] == features
    if count is not None:
        assert parameters(architecture, input_channels=4, num_classes=3) == count


def test_anisotropic_plan():
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    network = build(lightmedseg_architecture(stock(strides, kernels), (20, 320, 256)))
    assert network.strides == [tuple(stride) for stride in strides[:5]]
    assert network.stem[0].primary.kernel_size == (1, 3, 3)
    assert network.prior.smoothing.kernel_size == (1, 5, 5)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("options", [{}, {"num_anchors": 32}, {"ghost": False}], ids=str)
def test_the_twin_has_as_many_parameters(ndim, levels, options):
    base, patch = isotropic(levels, ndim=ndim), (64,) * ndim
    full = parameters(lightmedseg_architecture(base, patch, **options), input_channels=4, num_classes=3)
    architecture = lightmedseg_architecture(base, patch, op_off=True, **options)
    twin = parameters(architecture, input_channels=4, num_classes=3)
    assert twin == pytest.approx(full, rel=0.02)
    arguments = architecture["arch_kwargs"]
    assert (arguments["prior"], arguments["anchors"], arguments["router"]) == ("conv", "affine", "mean")


def test_a_plan_of_ours_keeps_its_arguments():
    ours = lightmedseg_architecture(isotropic(6), (128,) * 3, features_per_stage=(8, 8, 8, 8, 8), num_anchors=2)
    assert ours["network_class_name"] == NETWORK
    assert lightmedseg_architecture(ours, (128,) * 3) == ours
    changed = lightmedseg_architecture(ours, (128,) * 3, ghost=False)
    assert changed["arch_kwargs"] == {**ours["arch_kwargs"], "ghost": False}
    twin = lightmedseg_architecture(ours, (128,) * 3, op_off=True)
    assert twin["arch_kwargs"]["num_anchors"] == 2
    assert twin["arch_kwargs"]["bottleneck_channels"] % 4 == 0


@pytest.mark.parametrize(("width", "count"), [(1, 477_493), (2, 1_849_581), (4, 7_278_245)])
def test_all_widths_times_a_factor(width, count):
    base, patch = isotropic(6), (128,) * 3
    architecture = lightmedseg_architecture(base, patch, width=width)
    assert parameters(architecture, input_channels=4, num_classes=3) == count
    twin = lightmedseg_architecture(base, patch, width=width, op_off=True)
    assert parameters(twin, input_channels=4, num_classes=3) == pytest.approx(count, rel=0.02)
    network = build(architecture)
    detector = network.anchor_detector
    assert [stage[0].out_channels for stage in detector.features] == [8 * width] * 3
    assert [detector.coordinates[0].out_features, detector.coordinates[2].out_features] == [128 * width, 3 * 8]
    assert [network.prior.spatial_gate[index].out_channels for index in (0, 2)] == [16 * width] * 2
    assert [project.out_channels for project in network.decoder.router.projections] == [64 * width] * 4
    assert [stage.smooth[0].out_channels for stage in network.encoder.stages] == [w * width for w in (8, 16, 32, 64)]
    assert [mixture.branches[2][0].out_channels for mixture in network.decoder.mixtures] == [
        w * width for w in (64, 32, 16, 8)
    ]
    assert [network.bottleneck[index].out_channels for index in (0, 2)] == [64 * width] * 2
    gates = [stage.gate.gate[0].out_features for stage in network.encoder.stages]
    assert gates == [max(4, w * width // 4) for w in (8, 16, 32, 64)]


def test_a_plan_of_ours_is_widened_and_narrowed():
    base, patch = isotropic(6), (128,) * 3
    paper, wide = (lightmedseg_architecture(base, patch, width=width) for width in (1, 2))
    assert lightmedseg_architecture(wide, patch) == wide
    assert lightmedseg_architecture(paper, patch, width=2) == wide
    assert lightmedseg_architecture(wide, patch, width=1) == paper


@pytest.mark.parametrize("width", [0, -2, 1.5, "2"])
def test_bad_widths(width):
    for architecture in (isotropic(6), lightmedseg_architecture(isotropic(6), (128,) * 3)):
        with pytest.raises(ValueError, match=f"width={width!r} must be a whole number of at least 1"):
            lightmedseg_architecture(architecture, (128,) * 3, width=width)


def test_widths_that_the_groups_do_not_divide():
    architecture = lightmedseg_architecture(isotropic(6), (128,) * 3, features_per_stage=(8, 16, 32, 64, 66))
    with pytest.raises(ValueError, match=r"features_per_stage=\[.*66\] must be multiples of 4, the groups"):
        build(architecture)


def test_bad_plans():
    with pytest.raises(ValueError, match=r"the plan has 1 level .* larger patch than \[8, 8, 8\]"):
        lightmedseg_architecture(isotropic(1), (8, 8, 8))
    primus = {"network_class_name": "some.Transformer", "arch_kwargs": {}, "_kw_requires_import": []}
    with pytest.raises(ValueError, match=r"some\.Transformer has no strides and no kernel_sizes"):
        lightmedseg_architecture(primus, (96, 96, 96))


def test_a_patch_of_one_voxel_at_the_bottom_is_no_obstacle():
    """Unlike an InstanceNorm, a GroupNorm of two channels or more has something to normalise there."""
    assert build(lightmedseg_architecture(isotropic(3), (4, 4, 4))).strides[-1] == (2, 2, 2)


def test_memory_is_a_fraction_of_the_stock_networks():
    base = isotropic(6)
    ours = lightmedseg_architecture(base, (128,) * 3)
    sizes = ((128,) * 3, 2, 1, 2)
    estimate = estimated_gigabytes(ours, *sizes, mixed_precision=True)
    assert 0.4 < estimate / estimated_gigabytes(base, *sizes, mixed_precision=True) < 0.5
    assert estimate < estimated_gigabytes(deformux_architecture(base, (128,) * 3), *sizes, mixed_precision=True)
