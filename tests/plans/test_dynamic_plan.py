"""The architectures of ODConv, DCD and DDConv for a plan, and BatchNorm in the place of the plan's norm."""

import copy
import json

import pytest
from test_deformux_plan import build, isotropic
from test_magic_plan import res_enc
from torch import nn

from nnunet_deform.networks import DynamicPlainConvUNet, DynamicResidualEncoderUNet, MagicPlainConvUNet
from nnunet_deform.plans import dynamic_architecture, magic_architecture


@pytest.mark.parametrize("base", [isotropic(4), res_enc(4)], ids=["plain-plan", "resenc-plan"])
def test_each_encoder_from_either_plan(base):
    before = copy.deepcopy(base)
    for encoder, network in (("plain", DynamicPlainConvUNet), ("residual", DynamicResidualEncoderUNet)):
        architecture = dynamic_architecture(base, (32,) * 3, layer="dcd", encoder=encoder)
        assert json.loads(json.dumps(architecture)) == architecture
        built = build(architecture)
        assert type(built) is network
        assert built.layer == "dcd"
    assert base == before


@pytest.mark.parametrize(("levels", "stages"), [(6, [3, 4, 5]), (4, [3]), (3, [2]), (2, [1])])
def test_ddconv_is_for_coarse_levels_in_3d(levels: int, stages: list[int]):
    arguments = dynamic_architecture(isotropic(levels), (64,) * 3, layer="ddconv")["arch_kwargs"]
    assert arguments["stages"] == stages
    chosen = dynamic_architecture(isotropic(levels), (64,) * 3, layer="ddconv", stages=[1])["arch_kwargs"]
    assert chosen["stages"] == [1]
    assert "stages" not in dynamic_architecture(isotropic(levels, 2), (64,) * 2, layer="ddconv")["arch_kwargs"]
    assert "stages" not in dynamic_architecture(isotropic(levels), (64,) * 3, layer="odconv")["arch_kwargs"]


def test_batch_norm_in_2d():
    base = isotropic(3, 2)
    for architecture, kind in (
        (dynamic_architecture(base, (32, 32), layer="odconv", norm="batch"), DynamicPlainConvUNet),
        (magic_architecture(base, (32, 32), norm="batch"), MagicPlainConvUNet),
    ):
        network = build(architecture)
        assert type(network) is kind
        norms = [m for m in network.modules() if isinstance(m, (nn.InstanceNorm2d, nn.BatchNorm2d))]
        assert norms
        assert {type(norm) for norm in norms} == {nn.BatchNorm2d}
        changed = {k for k, v in architecture["arch_kwargs"].items() if base["arch_kwargs"].get(k) != v}
        assert changed - {"layer"} <= {"norm_op", "norm_op_kwargs"}


def test_bad_choices():
    with pytest.raises(NotImplementedError, match=r"norm='batch' is for 2D, .* \[64, 64, 64\] has three axes"):
        magic_architecture(isotropic(4), (64,) * 3, norm="batch")
    with pytest.raises(ValueError, match="norm='layer' must be 'plan' or 'batch'"):
        dynamic_architecture(isotropic(4), (64,) * 3, layer="dcd", norm="layer")
    with pytest.raises(ValueError, match="encoder='transformer' must be 'plain' or 'residual'"):
        dynamic_architecture(isotropic(4), (64,) * 3, layer="dcd", encoder="transformer")
