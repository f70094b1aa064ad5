import copy
import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_deform.networks import DeformUXNet
from nnunet_deform.networks.without_values import without_values
from nnunet_deform.plans import deformux_architecture
from nnunet_deform.plans.deformux import NETWORK

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RES_ENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def stock(strides, kernel_sizes, network_class_name=PLAIN):
    """What nnU-Net's planners write, as far as we read it."""
    blocks = "n_conv_per_stage" if network_class_name == PLAIN else "n_blocks_per_stage"
    return {
        "network_class_name": network_class_name,
        "arch_kwargs": {
            "n_stages": len(strides),
            "features_per_stage": [min(32 * 2**level, 320) for level in range(len(strides))],
            "conv_op": f"torch.nn.modules.conv.Conv{len(strides[0])}d",
            "kernel_sizes": kernel_sizes,
            "strides": strides,
            blocks: [2] * len(strides),
            "n_conv_per_stage_decoder": [2] * (len(strides) - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{len(strides[0])}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def isotropic(levels, ndim=3, **kwargs):
    return stock([[1] * ndim, *[[2] * ndim] * (levels - 1)], [[3] * ndim] * levels, **kwargs)


def build(architecture, input_channels=1, num_classes=16):
    with without_values():
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            input_channels,
            num_classes,
            allow_init=False,
            deep_supervision=True,
        )


@pytest.mark.parametrize("network_class_name", [PLAIN, RES_ENC])
def test_six_levels_become_the_papers_network(network_class_name):
    architecture = deformux_architecture(isotropic(6, network_class_name=network_class_name), (128, 128, 128))
    arguments = architecture["arch_kwargs"]
    assert arguments["n_stages"] == 5
    assert arguments["features_per_stage"] == [48, 96, 192, 384, 768]
    assert arguments["strides"] == [[1, 1, 1], *[[2, 2, 2]] * 4]
    assert arguments["norm_op_kwargs"]["affine"] is False
    assert arguments["conv_bias"] is False
    network = build(architecture)
    assert isinstance(network, DeformUXNet)
    coarser_heads = sum(p.numel() for head in network.decoder.seg_layers[:-1] for p in head.parameters())
    assert sum(p.numel() for p in network.parameters()) - coarser_heads == 55_792_216


def test_the_base_is_left_alone_and_the_result_is_json():
    base = isotropic(6)
    before = copy.deepcopy(base)
    architecture = deformux_architecture(base, (128, 128, 128), offset_axes="all")
    assert base == before
    assert json.loads(json.dumps(architecture)) == architecture


def test_more_levels_on_request_are_capped_in_width():
    arguments = deformux_architecture(isotropic(7), (256, 256, 256), max_levels=7)["arch_kwargs"]
    assert arguments["features_per_stage"] == [48, 96, 192, 384, 768, 768, 768]
    features = (32, 64, 128, 256, 320, 320)
    narrow = deformux_architecture(isotropic(6), (128,) * 3, max_levels=6, features_per_stage=features)
    assert narrow["arch_kwargs"]["features_per_stage"] == list(features)


def test_anisotropic_plan():
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    architecture = deformux_architecture(stock(strides, kernels), (20, 320, 256))
    assert architecture["arch_kwargs"]["strides"] == strides[:5]
    assert architecture["arch_kwargs"]["kernel_sizes"] == kernels[:5]
    network = build(architecture)
    assert network.encoder.stem[0].kernel_size == (1, 7, 7)
    assert network.encoder.stem[0].stride == (1, 2, 2)
    assert [stage[0].branches[0][1].offset_axes for stage in network.encoder.stages] == [(1, 2), *[(0, 1, 2)] * 3]


def test_2d_plan():
    architecture = deformux_architecture(isotropic(7, ndim=2), (512, 512))
    network = build(architecture, input_channels=3, num_classes=2)
    assert isinstance(network.encoder.stem[0], torch.nn.Conv2d)
    assert network.encoder.stages[0][0].branches[0][1].offset.out_channels == 2 * 9
    outputs = network(torch.empty(1, 3, 512, 512, device="meta"))
    assert [tuple(o.shape) for o in outputs] == [(1, 2, 512 >> level, 512 >> level) for level in range(4)]


def test_scalar_strides_and_kernels_are_accepted():
    base = isotropic(3)
    base["arch_kwargs"]["strides"] = [1, 2, 2]
    base["arch_kwargs"]["kernel_sizes"] = [3, 3, 3]
    arguments = deformux_architecture(base, (32, 32, 32))["arch_kwargs"]
    assert arguments["strides"] == [[1] * 3, [2] * 3, [2] * 3]
    assert arguments["kernel_sizes"] == [[3] * 3] * 3


def test_a_plan_of_ours_keeps_its_arguments():
    ours = deformux_architecture(isotropic(6), (128,) * 3, features_per_stage=(8, 16, 32, 64, 128), mlp_ratio=2)
    assert ours["network_class_name"] == NETWORK
    assert deformux_architecture(ours, (128,) * 3) == ours
    changed = deformux_architecture(ours, (128,) * 3, deformable=False)
    assert changed["arch_kwargs"] == {**ours["arch_kwargs"], "deformable": False}


def test_bad_plans():
    with pytest.raises(ValueError, match=r"the plan has 1 level .* larger patch than \[8, 8, 8\]"):
        deformux_architecture(isotropic(1), (8, 8, 8))
    with pytest.raises(ValueError, match=r"\[4, 4, 4\] shrinks to a single voxel"):
        deformux_architecture(isotropic(3), (4, 4, 4))
    primus = {"network_class_name": "some.Transformer", "arch_kwargs": {}, "_kw_requires_import": []}
    with pytest.raises(ValueError, match=r"some\.Transformer has no strides and no kernel_sizes"):
        deformux_architecture(primus, (96, 96, 96))
    for axes in ((0, 2), (0, 1)):
        with pytest.raises(NotImplementedError, match=rf"offset_axes=\({axes[0]}, {axes[1]}\).*has 2"):
            deformux_architecture(isotropic(4, ndim=2), (64, 64), offset_axes=axes)
