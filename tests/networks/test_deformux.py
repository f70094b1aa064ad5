"""DeformUX-Net itself: the paper's numbers, its options, its initialisation, and the whole forward pass by hand."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_cases import (
    ANISOTROPIC,
    ISOTROPIC,
    LARGE_PLANS,
    PAPER,
    SMALL_PLANS,
    TWO_DIMENSIONAL,
    TWO_LEVELS,
    Plan,
    parameter_count,
    plan,
    stir,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_deform.layers import ChannelLayerNorm, DeformConv
from nnunet_deform.networks import DeformUXNet
from nnunet_deform.networks.deformux import UX_NET_OPTIONS, DeformUXBlock, DepthwiseScaling, LayerScale, Mlp
from nnunet_deform.networks.without_values import without_values
from nnunet_deform.ops import deform_conv2d, deform_conv3d

# The paper's network apart from its blocks, with one input channel and 16 classes at full resolution.
WITHOUT_BLOCKS = 52_488_208
PAPER_STAGES = (48, 96, 192, 384)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)

small_plans = pytest.mark.parametrize("plan", SMALL_PLANS, ids=str)


def paper_network(**options: Any) -> DeformUXNet:
    with without_values():
        return PAPER.network(num_classes=16, **{"n_blocks_per_stage": 2, **options})


def count_with_one_head(network: DeformUXNet) -> int:
    """The paper has the full-resolution head only."""
    return parameter_count(network) - parameter_count(network.decoder.seg_layers[:-1])


def modules_of(network: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, kind)]


def offset_branches(network: nn.Module) -> list[nn.Module]:
    return [module.offset for module in modules_of(network, DeformConv)]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 55_792_216),
        ({"layer_scale_init": 1e-6}, 55_795_096),
        ({"block": "convnext"}, 55_790_776),
        (UX_NET_OPTIONS, 53_006_608),
    ],
    ids=["eq3", "eq3-layer-scale", "convnext", "ux-net"],
)
def test_papers_parameter_counts(options: dict[str, Any], count: int):
    assert count_with_one_head(paper_network(**options)) == count
    assert count_with_one_head(paper_network(deep_supervision=True, **options)) == count


def test_parameters_of_each_module():
    network = paper_network()
    encoder, decoder = network.encoder, network.decoder
    assert parameter_count(encoder.stem) == 16_608
    assert parameter_count(encoder.downsamplings) == 775_488
    assert parameter_count(encoder.norms) == 1_440
    assert [parameter_count(block) for block in network.skip_encoders] == [
        63_552,
        377_856,
        1_511_424,
        6_045_696,
        24_182_784,
    ]
    assert [parameter_count(up) for up in decoder.ups] == [14_598_144, 3_649_536, 912_384, 228_096]
    assert parameter_count(decoder.last) == 124_416
    # Coarsest first, as in nnU-Net's decoders, where transfer learning looks for them.
    assert [parameter_count(head) for head in decoder.seg_layers] == [384 * 16 + 16, 192 * 16 + 16, 96 * 16 + 16, 784]
    offsets = sum(parameter_count(branch) for branch in offset_branches(network))
    assert offsets == 117_288
    assert sum(parameter_count(conv) for conv in modules_of(network, DeformConv)) - offsets == 40_320
    assert sum(parameter_count(mlp) for mlp in modules_of(network, Mlp)) == 3_140_640
    assert count_with_one_head(network) - parameter_count(encoder.stages) == WITHOUT_BLOCKS


def block_parameters(
    c: int,
    *,
    taps: int = 27,
    dense: bool = False,
    offset_taps: int = 1,
    axes: int = 3,
    ratio: int = 4,
    mix: str = "mlp",
) -> int:
    conv = taps * c * (c if dense else 1) + c
    offsets = axes * taps * (c * offset_taps + 1)
    mixing = {"mlp": 2 * ratio * c * c + (ratio + 1) * c, "depthwise": (3 * ratio + 1) * c, "none": 0}[mix]
    norms = 2 * c * (1 if mix == "none" else 2)
    return conv + offsets + mixing + norms


# The millions were computed for the paper's Table 3 before this code existed.
@pytest.mark.parametrize(
    ("options", "expected", "millions"),
    [
        ({"depthwise": False}, {"dense": True}, 66.33),
        ({"depthwise": False, "scaling": "depthwise"}, {"dense": True, "mix": "depthwise"}, 63.21),
        ({"scaling": "depthwise"}, {"mix": "depthwise"}, 52.67),
        ({"scaling": "none"}, {"mix": "none"}, 52.65),
        ({"offset_kernel": 3}, {"offset_taps": 27}, 58.82),
        ({"offset_kernel": 3, "scaling": "depthwise"}, {"offset_taps": 27, "mix": "depthwise"}, 55.70),
        ({"offset_axes": (1, 2)}, {"axes": 2}, 55.75),
        ({"offset_axes": (0, 2), "offset_kernel": 3}, {"axes": 2, "offset_taps": 27}, 57.77),
        (
            {"offset_axes": (0, 1), "offset_kernel": 3, "scaling": "depthwise"},
            {"axes": 2, "offset_taps": 27, "mix": "depthwise"},
            54.65,
        ),
        ({"deformable": False}, {"axes": 0}, 55.67),
        ({"mlp_ratio": 2}, {"ratio": 2}, 54.22),
        ({"mlp_ratio": 1}, {"ratio": 1}, 53.44),
    ],
    ids=str,
)
def test_parameters_of_each_ablation(options: dict[str, Any], expected: dict[str, Any], millions: float):
    count = count_with_one_head(paper_network(**options))
    assert count == WITHOUT_BLOCKS + 2 * sum(block_parameters(c, **expected) for c in PAPER_STAGES)
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("n_blocks", [1, 3, [1, 2, 3, 4], (2, 0, 1, 1)], ids=str)
def test_number_of_blocks(n_blocks: int | Sequence[int]):
    network = paper_network(n_blocks_per_stage=n_blocks)
    each = [n_blocks] * 4 if isinstance(n_blocks, int) else list(n_blocks)
    assert [len(stage) for stage in network.encoder.stages] == each
    blocks = sum(n * block_parameters(c) for n, c in zip(each, PAPER_STAGES, strict=True))
    assert count_with_one_head(network) == WITHOUT_BLOCKS + blocks


def test_papers_multiplications():
    """581.7 GMAC at 96^3, with its parts; the taps of the deformable convolutions (0.4) are not counted."""
    network = paper_network()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 1, 96, 96, 96, device="meta"))
    counts = counter.get_flop_counts()

    def gmac(part: str) -> float:
        prefix = f"DeformUXNet.{part}"
        # Containers are not called, so only their members are listed: the shortest names below the part.
        names = [name for name in counts if name == prefix or name.startswith(prefix + ".")]
        depth = min(name.count(".") for name in names)
        return round(sum(sum(counts[name].values()) for name in names if name.count(".") == depth) / 2e9, 1)

    assert counter.get_total_flops() / 2e9 == pytest.approx(581.7, abs=0.1)
    assert gmac("skip_encoders") == 134.6
    assert gmac("decoder.ups") == 324.9
    assert gmac("decoder.last") == 110.1
    assert gmac("encoder.stages") == pytest.approx(8.8, abs=0.1)


def instance_norm(x: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def forward_by_hand(network: DeformUXNet, plan: Plan, x: Tensor) -> list[Tensor]:
    """The network as the paper draws it, out of a checkpoint: plain functions, and the order of the parts in sight."""
    state = network.state_dict()
    used: set[str] = set()
    ndim = plan.ndim
    conv = F.conv2d if ndim == 2 else F.conv3d
    up_conv = F.conv_transpose2d if ndim == 2 else F.conv_transpose3d
    deform = deform_conv2d if ndim == 2 else deform_conv3d

    def of(name: str) -> Tensor:
        used.add(name)
        return state[name]

    def both(prefix: str) -> tuple[Tensor, Tensor]:
        return of(f"{prefix}.weight"), of(f"{prefix}.bias")

    def norm(z: Tensor, prefix: str) -> Tensor:
        return F.layer_norm(z.movedim(1, -1), z.shape[1:2], *both(prefix), eps=1e-6).movedim(-1, 1)

    def ddc(z: Tensor, prefix: str, kernel: Sequence[int]) -> Tensor:
        offset = conv(z, *both(f"{prefix}.offset"))
        axes = [axis for axis in range(ndim) if kernel[axis] > 1]
        wide = z.new_zeros(len(z), math.prod(kernel), ndim, *z.shape[2:])
        wide[:, :, axes] = offset.unflatten(1, (-1, len(axes)))
        return deform(z, wide.flatten(1, 2), *both(prefix), padding=[k // 2 for k in kernel])

    def mlp(z: Tensor, prefix: str) -> Tensor:
        hidden = F.linear(z.movedim(1, -1), *both(f"{prefix}.expand"))
        return F.linear(F.gelu(hidden), *both(f"{prefix}.reduce")).movedim(-1, 1)

    def residual(z: Tensor, prefix: str, kernel: Sequence[int]) -> Tensor:
        same = [k // 2 for k in kernel]
        y = F.leaky_relu(instance_norm(conv(z, of(f"{prefix}.body.0.weight"), padding=same)), 0.01)
        y = instance_norm(conv(y, of(f"{prefix}.body.4.weight"), padding=same))
        shortcut = f"{prefix}.shortcut.0.weight"
        return F.leaky_relu(y + (instance_norm(conv(z, of(shortcut))) if shortcut in state else z), 0.01)

    stem_kernel = [7 if k > 1 else 1 for k in plan.kernel_sizes[0]]
    z = conv(x, *both("encoder.stem.0"), stride=plan.strides[1], padding=[k // 2 for k in stem_kernel])
    z = norm(z, "encoder.stem.1")
    skips = [residual(x, "skip_encoders.0", plan.kernel_sizes[0])]
    for level in range(1, len(plan.strides)):
        if level > 1:
            down = f"encoder.downsamplings.{level - 2}"
            z = conv(norm(z, f"{down}.0"), *both(f"{down}.1"), stride=plan.strides[level])
        branches = f"encoder.stages.{level - 1}.0.branches"
        z = z + ddc(norm(z, f"{branches}.0.0"), f"{branches}.0.1", plan.kernel_sizes[level])
        z = z + mlp(norm(z, f"{branches}.1.0"), f"{branches}.1.1")
        # Only the skip is normalised; the next stage takes z as it is.
        skip = norm(z, f"encoder.norms.{level - 1}")
        skips.append(residual(skip, f"skip_encoders.{level}", plan.kernel_sizes[level]))

    y = skips.pop()
    outputs = []
    for index, level in enumerate(reversed(range(len(skips)))):
        up = f"decoder.ups.{index}"
        y = up_conv(y, of(f"{up}.up.weight"), stride=plan.strides[level + 1])
        y = residual(torch.cat((y, skips[level]), dim=1), f"{up}.block", plan.kernel_sizes[level])
        if level == 0:
            y = residual(y, "decoder.last", plan.kernel_sizes[0])
        outputs.insert(0, conv(y, *both(f"decoder.seg_layers.{index}")))
    assert used == set(state)
    return outputs


@pytest.mark.parametrize("plan", [*SMALL_PLANS, TWO_LEVELS], ids=str)
def test_forward_by_hand(plan: Plan):
    network = stir(plan.network(input_channels=2, deep_supervision=True)).double()
    image = plan.image(batch=2, channels=2, dtype=torch.float64)
    outputs = network(image)
    expected = forward_by_hand(network, plan, image)
    assert len(outputs) == len(expected) == len(plan.strides) - 1
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", [*SMALL_PLANS, TWO_LEVELS], ids=str)
@pytest.mark.parametrize("block", ["eq3", "convnext"])
def test_starts_as_its_twin_without_deformation(plan: Plan, block: str):
    options = {"block": block, "layer_scale_init": 1.0, "deep_supervision": True, "n_blocks_per_stage": 2}
    twin = plan.network(deformable=False, **options).double()
    network = plan.network(**options).double()
    missing, unexpected = network.load_state_dict(twin.state_dict(), strict=False)
    assert not unexpected
    expected = {key for key in network.state_dict() if ".offset." in key}
    assert set(missing) == expected
    assert len(expected) == 2 * 2 * (len(plan.strides) - 1)
    image = plan.image(batch=2, dtype=torch.float64)
    for ours, theirs in zip(network(image), twin(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    with torch.no_grad():
        for branch in offset_branches(network):
            branch.bias.fill_(0.5)
    assert (network(image)[0] - twin(image)[0]).abs().amax() > 1e-3


def he_std(weight: Tensor, negative_slope: float = 0.01) -> float:
    """As torch counts the fan-in, of transposed convolutions too."""
    return math.sqrt(2 / (1 + negative_slope**2) / weight[0].numel())


@small_plans
def test_nnunets_initialisation(plan: Plan):
    """He for skip encoders, decoder and heads; torch's default in the encoder; offsets at zero."""
    arguments = {**plan.arguments("DeformUXNet"), "conv_op": f"torch.nn.Conv{plan.ndim}d"}
    network = get_network_from_plans("nnunet_deform.networks.DeformUXNet", arguments, ["conv_op"], 1, 3, True)
    check_initial_state(network, plan)


@small_plans
def test_initialisation_starts_from_anything(plan: Plan):
    network = plan.network()
    touched = [*modules_of(network.skip_encoders, CONVOLUTIONS), *modules_of(network.decoder, CONVOLUTIONS)]
    with torch.no_grad():
        for module in (*touched, *modules_of(network, DeformConv)):
            for parameter in module.parameters():
                parameter.fill_(5)
    network.apply(network.initialize)
    check_initial_state(network, plan)


def check_initial_state(network: DeformUXNet, plan: Plan) -> None:
    branches = offset_branches(network)
    assert len(branches) == len(plan.strides) - 1
    for branch in branches:
        assert branch.weight.count_nonzero() == 0
        assert branch.bias.count_nonzero() == 0

    he = [*modules_of(network.skip_encoders, CONVOLUTIONS), *modules_of(network.decoder, CONVOLUTIONS)]
    assert len(he) > 10
    for module in he:
        weight = module.weight
        # Five standard errors of a standard deviation from so many normal numbers.
        assert weight.std(correction=0).item() == pytest.approx(he_std(weight), rel=5 / math.sqrt(2 * weight.numel()))
        if module.bias is not None:
            assert module.bias.count_nonzero() == 0

    default = modules_of(network.encoder, (nn.Linear, *CONVOLUTIONS, DeformConv))
    default = [module for module in default if module not in branches]
    assert len(default) == 4 * len(branches)
    for module in default:
        # Uniform between plus and minus one over the root of the fan-in; He's normal numbers go far beyond.
        bound = 1 / math.sqrt(module.weight[0].numel())
        assert 0.8 * bound < module.weight.abs().amax() <= bound
        assert 0 < module.bias.abs().amax() <= bound
    for norm in modules_of(network, ChannelLayerNorm):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


def test_two_levels_are_enough():
    network = stir(TWO_LEVELS.network(deep_supervision=True))
    assert len(network.encoder.stages) == len(network.decoder.seg_layers) == 1
    assert len(network.encoder.downsamplings) == 0
    image = TWO_LEVELS.image()
    (only,) = network(image)
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), only)


def test_heads_that_are_never_used_are_not_trained():
    network = ISOTROPIC.network(deep_supervision=False)
    assert [head.weight.requires_grad for head in network.decoder.seg_layers] == [False, True]
    network = ISOTROPIC.network(deep_supervision=True)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_stem_is_wide_where_the_first_level_is():
    assert ISOTROPIC.network().encoder.stem[0].kernel_size == (7, 7, 7)
    stem = ANISOTROPIC.network().encoder.stem[0]
    assert (stem.kernel_size, stem.stride, stem.padding) == ((1, 7, 7), (1, 2, 2), (0, 3, 3))


def test_kernels_follow_the_plan():
    kernels = ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    network = plan("flat", (4, 16, 16), [(1, 2, 2), (2, 2, 2)], (8, 16, 24), flat=2).network()
    assert [conv.kernel_size for conv in modules_of(network, DeformConv)] == list(kernels[1:])
    assert [block.body[0].kernel_size for block in network.skip_encoders] == list(kernels)
    assert [up.block.body[0].kernel_size for up in network.decoder.ups] == [kernels[1], kernels[0]]
    assert [up.up.kernel_size for up in network.decoder.ups] == [(2, 2, 2), (1, 2, 2)]
    assert [down[1].kernel_size for down in network.encoder.downsamplings] == [(2, 2, 2)]
    assert network.decoder.last.body[4].kernel_size == kernels[0]
    # Through-plane offsets only where the kernel reaches other slices.
    assert [conv.offset_axes for conv in modules_of(network, DeformConv)] == [(1, 2), (0, 1, 2)]
    assert [branch.out_channels for branch in offset_branches(network)] == [2 * 9, 3 * 27]


def test_kernel_size_override_keeps_flat_kernels_flat():
    flat = plan("flat", (4, 16, 16), [(1, 2, 2), (2, 2, 2)], (8, 16, 24), flat=2)
    network = flat.network(kernel_size=7)
    assert [conv.kernel_size for conv in modules_of(network, DeformConv)] == [(1, 7, 7), (7, 7, 7)]
    assert [conv.padding for conv in modules_of(network, DeformConv)] == [(0, 3, 3), (3, 3, 3)]
    assert [branch.out_channels for branch in offset_branches(network)] == [2 * 49, 3 * 343]
    assert [block.body[0].kernel_size for block in network.skip_encoders] == [(1, 3, 3), (1, 3, 3), (3, 3, 3)]
    assert network(flat.image()).shape == (1, 3, 4, 16, 16)


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        ({"offset_clamp": 1.5}, {"offset_clamp": 1.5}),
        ({"offset_axes": "all"}, {"offset_axes": (0, 1, 2)}),
        ({"offset_axes": (0, 2)}, {"offset_axes": (0, 2)}),
        ({"deformable": False}, {"offset": None, "offset_axes": ()}),
        ({"depthwise": False}, {"groups": 1}),
    ],
    ids=str,
)
def test_operator_options_reach_every_block(options: dict[str, Any], attributes: dict[str, Any]):
    network = ANISOTROPIC.network(n_blocks_per_stage=2, **options)
    operators = modules_of(network, DeformConv)
    assert len(operators) == 4
    for operator, (name, value) in itertools.product(operators, attributes.items()):
        assert getattr(operator, name) == value
    assert network(ANISOTROPIC.image()).isfinite().all()


def test_offset_kernel_reaches_every_block():
    network = plan("flat", (4, 16, 16), [(1, 2, 2), (2, 2, 2)], (8, 16, 24), flat=2).network(offset_kernel=3)
    assert [branch.kernel_size for branch in offset_branches(network)] == [(1, 3, 3), (3, 3, 3)]


def test_block_and_scaling_options():
    def kinds(**options: Any) -> tuple[int, int, int, int]:
        network = ISOTROPIC.network(**options)
        branches = {len(block.branches) for block in modules_of(network, DeformUXBlock)}
        (n_branches,) = branches
        return n_branches, *(len(modules_of(network, kind)) for kind in (Mlp, DepthwiseScaling, LayerScale))

    assert kinds() == (2, 2, 0, 0)
    assert kinds(block="convnext") == (1, 2, 0, 2)
    assert kinds(block="convnext", layer_scale_init=None) == (1, 2, 0, 0)
    assert kinds(layer_scale_init=0.1) == (2, 2, 0, 4)
    assert kinds(scaling="depthwise") == (2, 0, 2, 0)
    assert kinds(scaling="none") == (1, 0, 0, 0)
    for scale in modules_of(ISOTROPIC.network(block="convnext"), LayerScale):
        assert torch.equal(scale.gamma, torch.full_like(scale.gamma, 1e-6))
    assert [mlp.expand.out_features for mlp in modules_of(ISOTROPIC.network(mlp_ratio=3), Mlp)] == [24, 48]


def test_ux_net_is_the_same_code_without_deformation():
    network = ISOTROPIC.network(**UX_NET_OPTIONS)
    assert [conv.kernel_size for conv in modules_of(network, DeformConv)] == [(7, 7, 7)] * 2
    assert not [key for key in network.state_dict() if "offset" in key]
    assert len(modules_of(network, DepthwiseScaling)) == len(modules_of(network, LayerScale)) == 2
    assert network(ISOTROPIC.image()).isfinite().all()


def test_papers_norm_and_activation_by_default():
    network = ISOTROPIC.network()
    norms = modules_of(network, nn.InstanceNorm3d)
    assert len(norms) == 3 * 3 + 2 * 3 + 2
    assert {(norm.affine, norm.eps, norm.track_running_stats) for norm in norms} == {(False, 1e-5, False)}
    assert {nonlin.negative_slope for nonlin in modules_of(network, nn.LeakyReLU)} == {0.01}
    assert not modules_of(network, nn.Dropout)
    assert [module.bias is None for module in modules_of(network.decoder, nn.ConvTranspose3d)] == [True, True]
    assert len(modules_of(TWO_DIMENSIONAL.network(), nn.InstanceNorm2d)) == 4 * 3 + 3 * 3 + 2


def test_norm_dropout_nonlin_and_bias_are_used():
    network = ISOTROPIC.network(
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-3, "affine": True},
        dropout_op=nn.Dropout3d,
        dropout_op_kwargs={"p": 0.5},
        nonlin=nn.ELU,
        nonlin_kwargs={"alpha": 0.3},
    )
    assert {(norm.affine, norm.eps) for norm in modules_of(network, nn.InstanceNorm3d)} == {(True, 1e-3)}
    assert {nonlin.alpha for nonlin in modules_of(network, nn.ELU)} == {0.3}
    assert not modules_of(network, nn.LeakyReLU)
    outside = [network.skip_encoders, network.decoder]
    assert all(conv.bias is not None for part in outside for conv in modules_of(part, CONVOLUTIONS))
    assert [dropout.p for dropout in modules_of(network, nn.Dropout3d)] == [0.5] * 6
    # The encoder is the paper's whatever the plan says.
    assert not modules_of(network.encoder, nn.Dropout3d)

    image = ISOTROPIC.image()
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


def test_nonlin_changes_the_numbers_as_it_should():
    relu = stir(ISOTROPIC.network(nonlin=nn.ReLU, nonlin_kwargs={"inplace": True}))
    flat = ISOTROPIC.network(nonlin_kwargs={"negative_slope": 0.0})
    flat.load_state_dict(relu.state_dict())
    leaky = ISOTROPIC.network()
    leaky.load_state_dict(relu.state_dict())
    image = ISOTROPIC.image()
    torch.testing.assert_close(flat(image), relu(image), rtol=0, atol=1e-5)
    assert (leaky(image) - relu(image)).abs().amax() > 1e-3


@pytest.mark.parametrize("nonlin_kwargs", [None, {}], ids=str)
def test_nonlin_without_arguments(nonlin_kwargs: dict[str, Any] | None):
    network = ISOTROPIC.network(nonlin=nn.ReLU, nonlin_kwargs=nonlin_kwargs)
    assert len(modules_of(network, nn.ReLU)) == 2 * (3 + 2 + 1)


# The formula apart from the code: 3F or 2F for each residual block and F for each transposed
# convolution, C for the stem and each downsampling, the classes, and (12C + offsets) / 1.85 for each of two blocks.
@pytest.mark.parametrize(
    ("plan", "num_classes", "expected"),
    [
        (LARGE_PLANS[0], 16, 605_997_691),
        (LARGE_PLANS[1], 16, 1_436_438_971),
        (LARGE_PLANS[2], 3, 1_642_436_497),
        (LARGE_PLANS[3], 3, 59_601_405),
        (LARGE_PLANS[4], 3, 86_821_881),
    ],
    ids=str,
)
def test_memory_estimate_of_the_papers_widths(plan: Plan, num_classes: int, expected: int):
    with without_values():
        network = plan.network(num_classes=num_classes, n_blocks_per_stage=2)
    assert network.compute_conv_feature_map_size(plan.patch) == expected
    # nnU-Net's planner hands over an array, the trainer a list.
    assert network.compute_conv_feature_map_size(list(plan.patch)) == expected


def test_memory_estimate_written_out():
    network = TWO_LEVELS.network(num_classes=5)  # features 8 and 16
    fine, coarse = 6 * 8 * 6, 3 * 4 * 3
    residual_blocks = 3 * 8 * fine + 3 * 16 * coarse
    decoder = (8 + 3 * 8) * fine + 2 * 8 * fine + 5 * fine
    stage = 8 * coarse + (12 * 8 + 81) * coarse / 1.85
    expected = round(residual_blocks + decoder + stage)
    assert network.compute_conv_feature_map_size((6, 8, 6)) == expected
    # Sizes are rounded up, as the padding does.
    assert network.compute_conv_feature_map_size((6, 7, 5)) > network.compute_conv_feature_map_size((6, 6, 4))


def test_zero_padding_reaches_the_end_of_each_axis_only():
    """An image with zeros there already gives the same, one with zeros in front does not."""
    network = stir(TWO_LEVELS.network()).double()
    image = torch.randn(1, 1, 5, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(
        network(image), network(F.pad(image, (0, 1, 0, 1, 0, 1)))[..., :5, :7, :5], rtol=0, atol=1e-12
    )
    in_front = network(F.pad(image, (1, 0, 1, 0, 1, 0)))[..., 1:, 1:, 1:]
    assert (network(image) - in_front).abs().amax() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_stages": 1}, "n_stages=1: DeformUX-Net needs at least 2"),
        ({"n_stages": 0}, "n_stages=0: DeformUX-Net needs at least 2"),
        ({"features_per_stage": [8, 16]}, r"features_per_stage=\[8, 16\] has 2 values for n_stages=3"),
        ({"kernel_sizes": [[3, 3, 3]] * 4}, r"kernel_sizes=.* has 4 values for n_stages=3"),
        ({"strides": [[1, 1, 1], [2, 2, 2]]}, r"strides=\[\[1, 1, 1\], \[2, 2, 2\]\] has 2 values for n_stages=3"),
        (
            {"kernel_sizes": [[3, 3, 3], [3, 3], [3, 3, 3]]},
            r"kernel_sizes=\[\[3, 3, 3\], \[3, 3\], \[3, 3, 3\]\] must have 3 values at each level",
        ),
        (
            {"strides": [[1, 1], [2, 2], [2, 2]]},
            r"strides=\[\[1, 1\], \[2, 2\], \[2, 2\]\] must have 3 values at each level",
        ),
        ({"strides": [[1, 2, 2]] + [[2, 2, 2]] * 2}, r"strides\[0\]=\[1, 2, 2\] must be all ones"),
        ({"block": "resnet"}, "block='resnet' must be 'eq3' or 'convnext'"),
        ({"scaling": "MLP"}, "scaling='MLP' must be 'mlp', 'depthwise' or 'none'"),
        ({"n_blocks_per_stage": [2, 2, 2]}, r"n_blocks_per_stage=\[2, 2, 2\] has 3 values for 2 encoder stages"),
        ({"n_blocks_per_stage": [2]}, r"n_blocks_per_stage=\[2\] has 1 values for 2 encoder stages"),
        ({"n_blocks_per_stage": -1}, "n_blocks_per_stage=-1 must be at least 0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 at least 1"),
        ({"kernel_sizes": [[2, 2, 2], [3, 3, 3], [3, 3, 3]]}, r"kernel_sizes=.* odd"),
        ({"kernel_size": 4}, r"kernel_size=\(4, 4, 4\) must be odd"),
        ({"offset_kernel": 5}, "offset_kernel=5 must be 1 or 3"),
        ({"offset_axes": (1, 3)}, r"offset_axes=\(1, 3\) must be"),
        ({"offset_clamp": 0}, "offset_clamp=0 must be positive"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ISOTROPIC.network(**arguments)


def test_an_input_without_the_right_axes_is_named():
    with pytest.raises(ValueError, match=r"shape \(1, 1, 16, 16\); this network needs 3 spatial axes"):
        ISOTROPIC.network()(torch.zeros(1, 1, 16, 16))


def test_axes_of_the_convolution_and_the_plan_must_agree():
    with pytest.raises(ValueError, match=r"kernel_sizes=.* must have 2 values at each level, one for each axis"):
        ISOTROPIC.network(conv_op=nn.Conv2d)
