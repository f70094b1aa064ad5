"""MAGIC in nnU-Net's U-Nets: what is replaced, the counts, initialisation, inspection and freezing."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from network_cases import (
    ANISOTROPIC,
    ISOTROPIC,
    SMALL_PLANS,
    Plan,
    kept_by_autograd,
    parameter_count,
    plan,
    stir,
)
from torch import Tensor, nn

from nnunet_deform.layers import MagicConv2d, MagicConv3d, RunningNorm, set_temperature
from nnunet_deform.networks.without_values import without_values

STOCK = {"MagicPlainConvUNet": PlainConvUNet, "MagicResidualEncoderUNet": ResidualEncoderUNet}
names = pytest.mark.parametrize("name", list(STOCK))


def stock_of(name: str, plan: Plan, **options: Any) -> nn.Module:
    arguments = {k: v for k, v in plan.arguments(name).items() if k not in ("reduction", "temperature")}
    return STOCK[name](**{"input_channels": 1, "num_classes": 3, **arguments, **options})


def nnunet_plan(ndim: int, levels: int, widest: int) -> Plan:
    widths = [min(32 * 2**level, widest) for level in range(levels)]
    return plan("nnunet", (128,) * ndim, [(2,) * ndim] * (levels - 1), widths)


PLAIN_3D = nnunet_plan(3, 6, 320)
PLAIN_2D = nnunet_plan(2, 8, 512)
PLAIN = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
RES_ENC_M = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": 1}


# The millions were computed for nnU-Net's plans before this code existed.
@pytest.mark.parametrize(
    ("name", "plan", "options", "scope", "convolutions", "base", "counts"),
    [
        ("MagicPlainConvUNet", PLAIN_3D, PLAIN, "encoder", 11, 31_196_399, (31_744_810, 45_764_860, 73_804_982)),
        ("MagicPlainConvUNet", PLAIN_3D, PLAIN, "all", 21, 31_196_399, (32_819_120, 62_185_770, 120_919_112)),
        ("MagicPlainConvUNet", PLAIN_2D, PLAIN, "encoder", 15, 46_326_581, (48_603_292, 67_474_126, 105_215_824)),
        ("MagicPlainConvUNet", PLAIN_2D, PLAIN, "all", 29, 46_326_581, (53_538_510, 95_997_960, 180_916_918)),
        (
            "MagicResidualEncoderUNet",
            PLAIN_3D,
            RES_ENC_M,
            "encoder",
            52,
            102_350_575,
            (106_106_791, 196_253_299, 376_546_419),
        ),
        (
            "MagicResidualEncoderUNet",
            PLAIN_3D,
            RES_ENC_M,
            "all",
            57,
            102_350_575,
            (106_965_076, 207_342_374, 408_097_084),
        ),
    ],
    ids=["plain-3d", "plain-3d-all", "plain-2d", "plain-2d-all", "resenc", "resenc-all"],
)
def test_parameter_counts(name, plan, options, scope, convolutions, base, counts):
    with without_values():
        assert parameter_count(stock_of(name, plan, **options)) == base
        for n_kernels, expected in zip((1, 2, 4), counts, strict=True):
            network = plan.network(
                name, **options, reduction=8, scope=scope, n_kernels=n_kernels, keep_dead_attention=True
            )
            assert len(network.dynamic_convs()) == convolutions
            assert parameter_count(network) == expected


def test_default_number_of_kernels():
    assert {conv.n_kernels for conv in ISOTROPIC.network("MagicPlainConvUNet").dynamic_convs().values()} == {4}
    assert {conv.n_kernels for conv in ISOTROPIC.network("MagicResidualEncoderUNet").dynamic_convs().values()} == {2}


def test_what_is_replaced():
    network = ISOTROPIC.network("MagicPlainConvUNet", n_conv_per_stage=2, scope="all", reduction=8)
    # Widths 8, 16, 24: no convolution of 8 channels, and of the decoder's those after the concatenation.
    assert list(network.dynamic_convs()) == [
        "encoder.stages.1.0.convs.1.conv",
        "encoder.stages.2.0.convs.0.conv",
        "encoder.stages.2.0.convs.1.conv",
        "decoder.stages.0.convs.0.conv",
        "decoder.stages.1.convs.0.conv",
    ]
    for name, conv in network.dynamic_convs().items():
        block = network.get_submodule(name.removesuffix(".conv"))
        assert block.all_modules[0] is block.conv is conv
        assert isinstance(conv, MagicConv3d)
        assert conv.padding == (1, 1, 1)
    strides = [conv.stride for conv in network.dynamic_convs().values()]
    assert strides == [(1, 1, 1), (2, 2, 2), *[(1, 1, 1)] * 3]
    # Wide inputs, as of many modalities, do not make the first convolution dynamic.
    for key in network.keys_to_in_proj:
        wide = ISOTROPIC.network("MagicPlainConvUNet", input_channels=12, reduction=8)
        assert type(wide.get_submodule(key)) is nn.Conv3d
    some = ISOTROPIC.network("MagicPlainConvUNet", n_conv_per_stage=2, scope="all", stages=[0, 2])
    assert {name.split(".convs")[0] for name in some.dynamic_convs()} == {
        "encoder.stages.0.0",
        "encoder.stages.2.0",
        "decoder.stages.1",
    }


def test_residual_blocks_keep_their_projections():
    network = ISOTROPIC.network("MagicResidualEncoderUNet")
    dynamic = list(network.dynamic_convs())
    assert dynamic == [f"encoder.stages.{s}.blocks.0.conv{c}.conv" for s in (0, 1, 2) for c in (1, 2)]
    assert type(network.encoder.stages[1].blocks[0].skip[1].conv) is nn.Conv3d
    assert type(network.encoder.stem.convs[0].conv) is nn.Conv3d
    # Bottleneck blocks have one convolution with a kernel larger than 1.
    bottlenecks = ISOTROPIC.network("MagicResidualEncoderUNet", block=BottleneckD, bottleneck_channels=8)
    assert list(bottlenecks.dynamic_convs()) == [f"encoder.stages.{s}.blocks.0.conv2.conv" for s in (0, 1, 2)]


def test_kernels_of_a_flat_stage_stay_flat():
    network = ANISOTROPIC.network("MagicPlainConvUNet")
    first = network.dynamic_convs()["encoder.stages.0.0.convs.1.conv"]
    assert first.kernel_size == (1, 3, 3)
    assert first.padding == (0, 1, 1)
    assert network.dynamic_convs()["encoder.stages.1.0.convs.0.conv"].stride == (1, 2, 2)


@names
@pytest.mark.parametrize("plan", SMALL_PLANS, ids=str)
def test_with_equal_kernels_it_is_the_stock_network(name: str, plan: Plan):
    """One kernel copied K times under weights that sum to one: nothing else of the network has changed."""
    stock = stir(stock_of(name, plan, deep_supervision=True)).double()
    network = plan.network(name, mixing="released", deep_supervision=True, scope="all").double()
    state = network.state_dict()
    for key, value in stock.state_dict().items():
        repeats = len(state[key]) // len(value)
        state[key] = torch.cat([value] * repeats)
    network.load_state_dict(state)
    image = plan.image(batch=2, dtype=torch.float64)
    for ours, theirs in zip(network(image), stock(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@names
@pytest.mark.filterwarnings("ignore:n_kernels=1")
def test_one_kernel_is_the_stock_network(name: str):
    """Its weights load with no change, and InstanceNorm makes a gate inert."""
    stock = stir(stock_of(name, ISOTROPIC))
    network = ISOTROPIC.network(name, n_kernels=1)
    network.load_state_dict(stock.state_dict(), strict=True)
    image = ISOTROPIC.image()
    torch.testing.assert_close(network(image), stock(image), rtol=0, atol=1e-5)


@names
def test_the_attention_is_standardised_and_calibrated_by_default(name: str):
    network = ISOTROPIC.network(name)
    for conv in network.dynamic_convs().values():
        assert type(conv.attention.norm) is RunningNorm
        assert conv.attention.init == "calibrated"
    letter = ISOTROPIC.network(name, attention_norm="none", attention_init="released")
    assert not any(isinstance(module, RunningNorm) for module in letter.modules())
    assert {conv.attention.init for conv in letter.dynamic_convs().values()} == {"released"}
    assert parameter_count(network) == parameter_count(letter)


def phantoms(count: int, size: tuple[int, ...]) -> Tensor:
    """Images as of patients, z-scored: smooth structures of several sizes, noise, a contrast and background each."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    images = []
    for _ in range(count):
        image = torch.rand(()) * torch.randn(size) / 2
        for cells in (2, 4, 8):
            coarse = torch.rand(()) * torch.randn(1, 1, *(cells,) * len(size))
            image += F.interpolate(coarse, size=size, mode=mode, align_corners=True)[0, 0]
        image = image.sign() * image.abs() ** (0.5 + 1.5 * torch.rand(()))
        if torch.rand(()) < 0.5:
            image[image < image.median()] = image.min()
        images.append((image - image.mean()) / image.std())
    return torch.stack(images).unsqueeze(1)


def initial_shares(seed: int, size: tuple[int, ...], passes: int, **options: Any) -> list[Tensor]:
    """Each layer's shares a / sum(a), [32, K], in nnU-Net's widths after training passes without a step."""
    torch.manual_seed(seed)
    ndim = len(size)
    wide = plan("wide", size, [(2,) * ndim] * 4, (32, 64, 128, 256, 320))
    network = wide.network("MagicPlainConvUNet", **{"reduction": 8, "temperature": None, **options})
    network.apply(network.initialize)
    with torch.no_grad():
        for _ in range(passes):
            network.encoder(phantoms(2, size))
    weights = network.mixing_weights(phantoms(32, size))
    return [a / a.sum(1, keepdim=True) for a in weights.values()]


@pytest.mark.parametrize(
    ("size", "seed"),
    [((32, 32), 1), *(pytest.param((32, 32, 32), seed, marks=pytest.mark.slow) for seed in (1, 2, 3))],
    ids=str,
)
def test_no_kernel_starts_dead_and_every_layer_is_dynamic(size: tuple[int, ...], seed: int):
    shares = initial_shares(seed, size, passes=100)
    assert min(share.mean(0).min().item() for share in shares) >= 0.01
    # Of the kernel in each layer whose share varies least.
    spreads = torch.stack([share.std(0).min() for share in shares])
    assert spreads.median() >= 0.03
    assert spreads.min() >= 0.01


def test_the_letter_starts_with_dead_kernels():
    """What it is about, and that the images above can tell."""
    shares = initial_shares(1, (32, 32), passes=0, attention_norm="none", attention_init="released")
    dead = [(share.mean(0) < 0.01).sum().item() for share in shares]
    assert sum(dead) > len(dead)


def test_one_kernel_is_warned_of():
    with pytest.warns(UserWarning, match="n_kernels=1 is built as a plain convolution"):
        ISOTROPIC.network("MagicPlainConvUNet", n_kernels=1)
    with warnings.catch_warnings(action="error"):
        ISOTROPIC.network("MagicPlainConvUNet", n_kernels=1, keep_dead_attention=True)


@names
def test_the_static_twin_has_equal_parameters_and_no_dynamics(name: str):
    network = ISOTROPIC.network(name, deep_supervision=True)
    twin = ISOTROPIC.network(name, attention="uniform", keep_dead_attention=True, deep_supervision=True)
    assert parameter_count(twin) == parameter_count(network)
    n_kernels = network.default_kernels
    for weights in twin.mixing_weights(ISOTROPIC.image(batch=2)).values():
        assert torch.equal(weights, torch.full((2, n_kernels), 1 / n_kernels))
    sum(output.square().mean() for output in twin(ISOTROPIC.image())).backward()
    dead = [p for key, p in twin.named_parameters() if ".attention." in key]
    assert dead
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in dead)


@names
def test_initialisation_is_nnunets_for_each_kernel(name: str):
    wide = plan("wide", (8, 8, 8), [(2, 2, 2)], (32, 64))
    network = wide.network(name, reduction=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7)
    network.apply(network.initialize)
    for conv in network.dynamic_convs().values():
        fan_in = conv.weight[0].numel()
        expected = math.sqrt(2 / (1 + 1e-4) / fan_in)
        for kernel in conv.weight.chunk(conv.n_kernels):
            assert kernel.std().item() == pytest.approx(expected, rel=0.03)
        assert conv.bias.count_nonzero() == 0
        # Not He's by fan-in, as for a convolution: by fan-out.
        channels = conv.in_channels
        assert conv.attention.bottleneck[3].weight.std().item() == pytest.approx(math.sqrt(2 / channels), rel=0.15)
        assert conv.attention.bottleneck[1].weight.eq(1).all()
    for module in network.modules():
        # nnU-Net leaves its norms as they are built.
        if not isinstance(module, nn.InstanceNorm3d):
            assert not any((parameter == 7).all() for parameter in module.parameters(recurse=False))
    if name == "MagicResidualEncoderUNet":
        assert network.encoder.stages[0].blocks[0].conv2.norm.weight.count_nonzero() == 0


@names
@pytest.mark.parametrize("scope", ["encoder", "all"])
def test_memory_estimate_adds_what_the_dynamic_convolutions_keep(name: str, scope: str):
    """Beyond the stock network's estimate, against what autograd keeps beyond the stock network."""
    plan = ANISOTROPIC
    network, stock = plan.network(name, scope=scope), stock_of(name, plan)
    kept: list[float] = []
    for module in (network, stock):
        with kept_by_autograd(module) as sizes:
            module(plan.image())
        kept.append(sum(sizes))
    added = network.compute_conv_feature_map_size(plan.patch) - stock.compute_conv_feature_map_size(plan.patch)
    assert added == pytest.approx((kept[0] - kept[1]) / 1.85, rel=0.02)


def test_a_strided_convolution_keeps_what_its_larger_input_takes():
    pair = plan("pair", (4, 12, 16), [(1, 2, 2)], (8, 16), flat=1)
    options = {"n_conv_per_stage": 1, "reduction": 4}
    added = pair.network("MagicPlainConvUNet", **options).compute_conv_feature_map_size(pair.patch)
    added -= stock_of("MagicPlainConvUNet", pair, n_conv_per_stage=1).compute_conv_feature_map_size(pair.patch)
    # Two numbers for each voxel of the input at level 0, and the mixed kernel.
    assert added == round((2 * 4 * 12 * 16 + 16 * 8 * 27) / 1.85)


@names
def test_mixing_weights_are_those_of_the_forward_pass(name: str):
    network = stir(ISOTROPIC.network(name, n_kernels=3, kr_norm="batch")).train()
    image = ISOTROPIC.image(batch=2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = network.mixing_weights(image)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert list(weights) == list(network.dynamic_convs())
    seen: dict[str, Tensor] = {}
    network.eval()
    for key, conv in network.dynamic_convs().items():
        conv.attention.register_forward_hook(lambda *args, key=key: seen.update({key: args[-1]}))
    network(image)
    for key, value in weights.items():
        assert value.shape == (2, 3)
        assert not value.requires_grad
        assert torch.equal(value, seen[key])


@names
def test_frozen_kernels_are_the_mean_over_the_calibration_set(name: str):
    network = stir(ISOTROPIC.network(name, mixing="paper", n_kernels=3)).double()
    calibration = [ISOTROPIC.image(batch=2, dtype=torch.float64), 3 * ISOTROPIC.image(dtype=torch.float64)]
    frozen = network.freeze_kernels(calibration)
    assert not frozen.dynamic_convs()
    assert network.dynamic_convs()
    assert parameter_count(frozen) == parameter_count(stock_of(name, ISOTROPIC))
    weights = [network.mixing_weights(batch) for batch in calibration]
    for key, conv in network.dynamic_convs().items():
        mean = torch.cat([w[key] for w in weights]).mean(0)
        expected = sum(a * kernel for a, kernel in zip(mean, conv.weight.chunk(3), strict=True))
        torch.testing.assert_close(frozen.get_submodule(key).weight, expected, rtol=0, atol=1e-12)

    # The stock network takes its weights.
    stock = stock_of(name, ISOTROPIC).double()
    stock.load_state_dict(frozen.state_dict(), strict=True)
    image = ISOTROPIC.image(dtype=torch.float64)
    torch.testing.assert_close(stock(image), frozen(image), rtol=0, atol=1e-12)

    # With one image as calibration set, that image is segmented as before.
    same = network.freeze_kernels([image])
    torch.testing.assert_close(same(image), network.eval()(image), rtol=0, atol=1e-9)


def test_freezing_needs_images():
    with pytest.raises(ValueError, match="calibration holds no batch"):
        ISOTROPIC.network("MagicPlainConvUNet").freeze_kernels([])


@names
def test_temperature_of_all_layers(name: str):
    network = ISOTROPIC.network(name, mixing="released")
    set_temperature(nn.ModuleDict({"wrapper": network}), 12.5)
    assert {float(conv.attention.temperature) for conv in network.dynamic_convs().values()} == {12.5}
    fresh = ISOTROPIC.network(name, mixing="released")
    fresh.load_state_dict(network.state_dict())
    assert {float(conv.attention.temperature) for conv in fresh.dynamic_convs().values()} == {12.5}


@names
def test_pretrained_keys_stay_valid(name: str):
    """nnU-Net's transfer learning looks the encoder and its first convolution up by these names."""
    network = ISOTROPIC.network(name)
    assert network.get_submodule(network.key_to_encoder)
    assert network.get_submodule(network.key_to_stem)
    first = [network.get_submodule(key) for key in network.keys_to_in_proj]
    assert first[0] is first[1]
    assert type(first[0]) is nn.Conv3d


# The exported file of a trained one is checked by test_export, which runs by default, the layer by test_magic_layer.
@pytest.mark.slow
@names
def test_exports_at_batch_1(name: str):
    network = stir(ISOTROPIC.network(name)).eval()
    image = ISOTROPIC.image()
    exported = torch.export.export(network, (image,), strict=False)
    torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "decoder"}, "scope='decoder' must be 'encoder' or 'all'"),
        ({"stages": [0, 3]}, r"stages=\[0, 3\] must be among \[0, 1, 2\], 0 being full resolution"),
        ({"reduction": 24}, r"with scope='encoder' and stages=\[0, 1, 2\] none has 25 or more input channels"),
        ({"stages": [0], "reduction": 8}, r"stages=\[0\] none has 9 or more input channels"),
        ({"attention_norm": "batch"}, "attention_norm='batch' must be one of 'none', 'running', 'layer'"),
        ({"mixing": "code"}, "mixing='code' must be one of 'paper', 'released'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ISOTROPIC.network("MagicPlainConvUNet", **options)


def test_unknown_options_and_wrong_inputs_are_named():
    with pytest.raises(TypeError, match="kernels"):
        ISOTROPIC.network("MagicPlainConvUNet", kernels=3)
    with pytest.raises(ValueError, match=r"input has shape \(1, 1, 8, 8\); this network needs 3 spatial axes"):
        ISOTROPIC.network("MagicPlainConvUNet")(torch.zeros(1, 1, 8, 8))


@names
def test_2d(name: str):
    network = plan("2d", (16, 12), [(2, 2)], (8, 16)).network(name)
    assert {type(conv) for conv in network.dynamic_convs().values()} == {MagicConv2d}
