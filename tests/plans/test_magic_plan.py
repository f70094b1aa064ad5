import copy
import json

import pytest
from test_deformux_plan import PLAIN, RES_ENC, build, isotropic, stock

from nnunet_deform.networks import MagicPlainConvUNet, MagicResidualEncoderUNet
from nnunet_deform.plans import estimated_gigabytes, magic_architecture
from nnunet_deform.plans.magic import NETWORKS


def count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def res_enc(levels: int, ndim: int = 3):
    base = isotropic(levels, ndim, network_class_name=RES_ENC)
    base["arch_kwargs"]["n_blocks_per_stage"] = [1, 3, 4, 6, 6, 6, 6, 6][:levels]
    base["arch_kwargs"]["n_conv_per_stage_decoder"] = [1] * (levels - 1)
    return base


@pytest.mark.parametrize("base", [isotropic(6), res_enc(6)], ids=["plain-plan", "resenc-plan"])
def test_each_trainer_gets_its_network_from_either_plan(base):
    patch = (128, 128, 128)
    plain = build(magic_architecture(base, patch), num_classes=3)
    assert type(plain) is MagicPlainConvUNet
    assert count(plain) == 73_804_982
    residual = build(magic_architecture(base, patch, encoder="residual"), num_classes=3)
    assert type(residual) is MagicResidualEncoderUNet
    assert count(residual) == 196_253_299


def test_a_plans_own_numbers_are_kept():
    base = isotropic(4)
    base["arch_kwargs"]["n_conv_per_stage"] = [1, 2, 3, 1]
    arguments = magic_architecture(base, (64, 64, 64))["arch_kwargs"]
    assert arguments == base["arch_kwargs"]
    blocks = res_enc(4)
    blocks["arch_kwargs"]["n_blocks_per_stage"] = [1, 1, 2, 2]
    assert magic_architecture(blocks, (64,) * 3, encoder="residual")["arch_kwargs"] == blocks["arch_kwargs"]


def test_the_base_is_left_alone_and_the_result_is_json():
    base = isotropic(6)
    before = copy.deepcopy(base)
    architecture = magic_architecture(base, (128,) * 3, n_kernels=2, stages=[4, 5], scope="all", temperature=2.0)
    assert base == before
    assert json.loads(json.dumps(architecture)) == architecture
    network = build(architecture)
    assert {name.split(".convs")[0] for name in network.dynamic_convs()} == {
        "encoder.stages.4.0",
        "encoder.stages.5.0",
        "decoder.stages.0",
    }


def test_a_plan_of_ours_keeps_its_arguments():
    ours = magic_architecture(isotropic(5), (64,) * 3, n_kernels=3)
    assert magic_architecture(ours, (64,) * 3) == ours
    changed = magic_architecture(ours, (64,) * 3, mixing="released")
    assert changed["arch_kwargs"] == {**ours["arch_kwargs"], "mixing": "released"}
    other = magic_architecture(ours, (64,) * 3, encoder="residual")
    assert other["network_class_name"] == NETWORKS["residual"]
    assert other["arch_kwargs"]["n_kernels"] == 3
    assert other["arch_kwargs"]["n_blocks_per_stage"] == [1, 3, 4, 6, 6]


def test_anisotropic_plan():
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], *[[3, 3, 3]] * 5]
    network = build(magic_architecture(stock(strides, kernels), (20, 320, 256)))
    kernel_sizes = [conv.kernel_size for conv in network.dynamic_convs().values()]
    assert kernel_sizes == [(1, 3, 3)] * 3 + [(3, 3, 3)] * 10


def test_estimate_is_the_stock_networks_and_what_the_dynamic_convolutions_keep():
    arguments = (128,) * 3, 2, 1, 2
    stock_network = estimated_gigabytes(isotropic(6), *arguments, mixed_precision=True)
    ours = estimated_gigabytes(magic_architecture(isotropic(6), (128,) * 3), *arguments, mixed_precision=True)
    voxels = [128 // 2**level for level in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5)]
    kernels = 27 * sum(i * o for i, o in ((32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)))
    kernels += 27 * (256 * 320 + 3 * 320 * 320)
    added = (2 * sum(side**3 for side in voxels) + kernels) / 1.85
    assert ours - stock_network == pytest.approx(8 * added / 560e6, rel=1e-5)


def test_bad_plans():
    with pytest.raises(ValueError, match="encoder='transformer' must be 'plain' or 'residual'"):
        magic_architecture(isotropic(4), (64,) * 3, encoder="transformer")
    with pytest.raises(ValueError, match="the plan has 1 level"):
        magic_architecture(isotropic(1), (8, 8, 8))
    other = isotropic(4, network_class_name="nnunet_deform.networks.DeformUXNet")
    with pytest.raises(ValueError, match=r"DeformUXNet is none of nnU-Net's own U-Nets; start from nnUNetPlans"):
        magic_architecture(other, (64,) * 3)
    assert magic_architecture(isotropic(4, network_class_name=PLAIN), (64,) * 3)
