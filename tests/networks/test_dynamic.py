"""ODConv, DCD and DDConv in nnU-Net's U-Nets: what is replaced, the counts, freezing, and what is refused."""

from typing import Any

import pytest
import torch
from network_cases import CASES, ISOTROPIC, TWO_DIMENSIONAL, network_class, parameter_count, plan, stir
from test_magic import PLAIN, PLAIN_2D, PLAIN_3D, RES_ENC_M, stock_of

from nnunet_deform.layers import DCD3d, DDConv2d, DDConv3d, ODConv3d, set_temperature
from nnunet_deform.networks import NETWORKS, DynamicPlainConvUNet
from nnunet_deform.networks.without_values import without_values

LAYERS = ["odconv", "dcd", "ddconv"]
layers = pytest.mark.parametrize("layer", LAYERS)


def test_every_network_is_among_the_cases():
    assert {network_class(name) for name in CASES} == set(NETWORKS.values())


# In millions, of nnU-Net's plans: ODConv with 1, 2 and 4 kernels, DCD, DDConv with 8 and 4.
@pytest.mark.parametrize(
    ("name", "plan", "options", "convolutions", "odconv", "dcd", "ddconv"),
    [
        ("DynamicPlainConvUNet", PLAIN_3D, PLAIN, 11, (31.31, 45.33, 73.37), 32.91, (162.94, 90.06)),
        ("DynamicPlainConvUNet", PLAIN_2D, PLAIN, 15, (46.74, 65.61, 103.35), 51.36, (184.34, 105.90)),
        ("DynamicResidualEncoderUNet", PLAIN_3D, RES_ENC_M, 52, (103.07, 193.22, 373.51), 113.97, (942.31, 477.26)),
    ],
    ids=["plain-3d", "plain-2d", "resenc"],
)
def test_parameter_counts(name, plan, options, convolutions, odconv, dcd, ddconv):
    every_level = list(range(len(plan.strides)))

    def millions(layer: str, **chosen: Any) -> float:
        network = plan.network(f"{name}-{layer}", **options, min_channels=9, stages=every_level, **chosen)
        assert len(network.dynamic_convs()) == convolutions
        return parameter_count(network) / 1e6

    with without_values():
        assert [millions("odconv", n_kernels=k) for k in (1, 2, 4)] == pytest.approx(odconv, abs=0.0051)
        assert millions("dcd") == pytest.approx(dcd, abs=0.0051)
        assert [millions("ddconv", n_kernels=k) for k in (8, 4)] == pytest.approx(ddconv, abs=0.0051)


def test_default_numbers_of_kernels():
    def kernels(name: str) -> set[int]:
        return {conv.n_kernels for conv in TWO_DIMENSIONAL.network(name, n_kernels=None).dynamic_convs().values()}

    assert kernels("DynamicPlainConvUNet-odconv") == {4}
    assert kernels("DynamicResidualEncoderUNet-odconv") == {2}
    assert kernels("DynamicPlainConvUNet-ddconv") == kernels("DynamicResidualEncoderUNet-ddconv") == {8}
    assert kernels("DynamicPlainConvUNet-dcd") == {1}


@layers
def test_the_same_convolutions_as_in_magics_network_are_replaced(layer: str):
    """At the default of 9 channels or more."""
    network = ISOTROPIC.network(f"DynamicPlainConvUNet-{layer}", min_channels=9)
    magic = ISOTROPIC.network("MagicPlainConvUNet", reduction=8)
    assert list(network.dynamic_convs()) == list(magic.dynamic_convs())
    kind = {"odconv": ODConv3d, "dcd": DCD3d, "ddconv": DDConv3d}[layer]
    for name, conv in network.dynamic_convs().items():
        block = network.get_submodule(name.removesuffix(".conv"))
        assert block.all_modules[0] is block.conv is conv
        assert type(conv) is kind
        assert conv.stride == magic.dynamic_convs()[name].stride


@layers
def test_frozen_kernels_are_the_mean_over_the_calibration_set(layer: str):
    network = stir(ISOTROPIC.network(f"DynamicPlainConvUNet-{layer}"), 0.1).double().eval()
    image = ISOTROPIC.image(dtype=torch.float64)
    calibration = [ISOTROPIC.image(batch=2, dtype=torch.float64), image]
    name, first = next(iter(network.dynamic_convs().items()))
    seen = []
    first.register_forward_hook(lambda conv, inputs, output: seen.extend(conv.kernels(inputs[0])[0]))
    for batch in calibration:
        network(batch)
    frozen = network.freeze_kernels(calibration)
    weight = frozen.get_submodule(name).weight
    torch.testing.assert_close(weight, torch.stack(seen[:3]).mean(0), rtol=0, atol=1e-12)
    # With one image as calibration set, that image is segmented as before.
    same = network.freeze_kernels([image])
    torch.testing.assert_close(same(image), network(image), rtol=0, atol=1e-9)
    if layer == "ddconv":
        assert {type(conv) for conv in same.dynamic_convs().values()} == {DDConv3d}
        assert not any(conv.dynamic for conv in same.dynamic_convs().values())
        assert network.observe_operators(image).keys() > same.observe_operators(image).keys()
    else:
        assert not same.dynamic_convs()
        stock = stock_of("MagicPlainConvUNet", ISOTROPIC).double()
        stock.load_state_dict(same.state_dict(), strict=True)
        torch.testing.assert_close(stock(image), same(image), rtol=0, atol=1e-12)


def test_mixing_weights():
    images = TWO_DIMENSIONAL.image(batch=2)
    for layer, kernels in (("odconv", 4), ("ddconv", 2)):
        network = stir(TWO_DIMENSIONAL.network(f"DynamicPlainConvUNet-{layer}"))
        weights = network.mixing_weights(images)
        assert list(weights) == list(network.dynamic_convs())
        assert all(of_layer.shape == (2, kernels) for of_layer in weights.values())
    assert TWO_DIMENSIONAL.network("DynamicPlainConvUNet-dcd").mixing_weights(images) == {}


def test_temperature_of_all_layers():
    network = TWO_DIMENSIONAL.network("DynamicPlainConvUNet-odconv")
    set_temperature(network, 12.5)
    fresh = TWO_DIMENSIONAL.network("DynamicPlainConvUNet-odconv")
    assert {float(conv.attention.temperature) for conv in fresh.dynamic_convs().values()} == {1}
    fresh.load_state_dict(network.state_dict())
    assert {float(conv.attention.temperature) for conv in fresh.dynamic_convs().values()} == {12.5}


def test_offsets_of_a_strided_layer_are_observed_at_its_inputs_level():
    network = plan("pair", (8, 12), [(2, 2)], (8, 16)).network("DynamicPlainConvUNet-ddconv", n_conv_per_stage=1)
    (conv,) = network.dynamic_convs().values()
    with torch.no_grad():
        conv.offset_bias.fill_(0.25)
    observed = network.observe_operators(torch.randn(2, 1, 8, 12))
    offsets = observed["encoder.stages.1.0.convs.0.conv"]
    assert (offsets.level, offsets.stride, offsets.size) == (0, (2, 2), (8, 12))
    assert offsets.values.shape == (2, 9, 2, 4, 6)
    assert (offsets.values == 0.25).all()
    assert observed["encoder.stages.1.0.convs.0.conv.kernel_gates"].values.shape == (2, 2)


@pytest.mark.parametrize("layer", ["odconv", "dcd"])
def test_exports_at_batch_1(layer: str):
    network = stir(ISOTROPIC.network(f"DynamicPlainConvUNet-{layer}"), 0.1).eval()
    image = ISOTROPIC.image()
    exported = torch.export.export(network, (image,), strict=False)
    torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "dyconv"}, "layer='dyconv' must be one of 'magic', 'odconv', 'dcd', 'ddconv'"),
        ({"layer": "dcd", "n_kernels": 4}, "n_kernels=4 is no option of layer='dcd', which has one kernel"),
        ({"layer": "ddconv", "stages": None}, r"layer='ddconv' needs stages in 3D.* give the coarsest of \[0, 1, 2\]"),
        ({"layer": "odconv", "min_channels": 25}, "none has 25 or more input channels and a kernel larger than 1"),
        ({"layer": "odconv", "attention_norm": "group"}, "attention_norm='group' must be one of"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ISOTROPIC.network("DynamicPlainConvUNet-odconv", **options)
    with pytest.raises(TypeError, match="residual_norm"):
        ISOTROPIC.network("DynamicPlainConvUNet-odconv", residual_norm="batch")


def test_ddconv_takes_every_level_in_2d():
    arguments = TWO_DIMENSIONAL.arguments("DynamicPlainConvUNet-ddconv")
    del arguments["stages"]
    network = DynamicPlainConvUNet(1, num_classes=3, **arguments)
    assert {type(conv) for conv in network.dynamic_convs().values()} == {DDConv2d}
    assert len(network.dynamic_convs()) == 4
