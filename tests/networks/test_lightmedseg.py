"""LightMedSeg itself: the paper's numbers, its options, its initialisation, and the whole forward pass by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_cases import (
    ANISOTROPIC,
    ISOTROPIC,
    SMALL_PLANS,
    TWO_DIMENSIONAL,
    TWO_LEVELS,
    Plan,
    cropped_sizes,
    kept_by_autograd,
    parameter_count,
    plan,
    stir,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_deform.layers import AnchorDetector, ChannelAffine, FiLM, LocalStructuralPrior, PositionBias
from nnunet_deform.layers.few_channels import FewChannelConv2d, FewChannelConv3d
from nnunet_deform.networks import LightMedSeg
from nnunet_deform.networks.without_values import without_values

# Five levels: two decoder stages are routed, as in the paper.
FIVE_LEVELS = plan("five-levels", (16, 16, 32), [(2, 2, 2)] * 4, (8, 12, 16, 20, 24))


def paper_network(levels: int = 5, ndim: int = 3, **options: Any) -> LightMedSeg:
    """On the meta device: for counting."""
    features = [min(8 * 2**level, 64) for level in range(levels - 1)]
    like_the_paper = plan("", (8,) * ndim, [(2,) * ndim] * (levels - 1), [*features, features[-1]])
    with without_values():
        return like_the_paper.network("LightMedSeg", **{"input_channels": 4, "num_classes": 3, **options})


def count_with_one_head(network: LightMedSeg) -> int:
    """The paper has the full-resolution head only."""
    return parameter_count(network) - parameter_count(network.decoder.seg_layers[:-1])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 477_493),
        ({"ghost": False}, 658_609),
        ({"num_anchors": 16}, 487_309),
        ({"num_anchors": 24}, 497_125),
        ({"num_anchors": 32}, 506_941),
        ({"num_anchors": 40}, 516_757),
        ({"input_channels": 1, "num_classes": 4}, 476_530),
        ({"levels": 4}, 146_189),
        ({"levels": 6}, 750_463),
        ({"ndim": 2, "input_channels": 1, "num_classes": 2}, 231_064),
    ],
    ids=str,
)
def test_parameter_counts(options: dict[str, Any], count: int):
    assert count_with_one_head(paper_network(**options)) == count
    assert count_with_one_head(paper_network(deep_supervision=True, **options)) == count


def test_parameters_of_each_module():
    network = paper_network()
    decoder = network.decoder
    assert parameter_count(network.stem) == 556
    assert parameter_count(network.anchor_detector) == 8_616
    assert parameter_count(network.prior) == 11_662
    assert parameter_count(network.prior.spatial_gate) == 10_481
    assert parameter_count(network.prior.experts) == 144
    assert [parameter_count(stage) for stage in network.encoder.stages] == [1_776, 3_676, 11_576, 40_048]
    assert [parameter_count(network.bottleneck[:2]), parameter_count(network.bottleneck[2])] == [110_720, 4_160]
    assert parameter_count(decoder.router.projections) == 7_936
    assert [parameter_count(controller) for controller in decoder.router.controllers] == [16_708, 16_708]
    assert [parameter_count(output) for output in decoder.router.outputs] == [4_160, 2_080]
    assert [parameter_count(skip) for skip in decoder.skips] == [144, 72]
    stages = zip(decoder.fusions, decoder.mixtures, strict=True)
    assert [sum(map(parameter_count, stage)) for stage in stages] == [167_763, 51_627, 13_655, 3_823]
    # Coarsest first, as in nnU-Net's decoders, where transfer learning looks for them.
    assert [parameter_count(head) for head in decoder.seg_layers] == [195, 99, 51, 27]


def film(widths: Sequence[int], coordinates: int) -> int:
    return sum(2 * (coordinates + 1) * width for width in widths)


def test_parameters_of_each_ablation():
    full = 477_493
    position_biases = 9 * (64 + 32 + 16 + 8)
    assert count_with_one_head(paper_network(prior="none")) == full - 11_662
    without_anchors = full - 8_616 - film((8, 16, 32, 64), 24) - position_biases
    assert count_with_one_head(paper_network(anchors="none")) == without_anchors
    affine = full - film((8, 16, 32, 64), 24) + 2 * 120
    assert count_with_one_head(paper_network(anchors="affine")) == affine
    router = 7_936 + 2 * 16_708 + 4_160 + 2_080
    # The encoder stage at level s has the width of the decoder at level s - 1.
    same_level = (32 * 64 + 64) + (16 * 32 + 32)
    assert count_with_one_head(paper_network(router="none")) == full - router + same_level
    assert count_with_one_head(paper_network(router="mean")) == full - 2 * 16_708
    convs = 2 * 27 * 8 * 24 + 2 * 24 + 8
    assert count_with_one_head(paper_network(prior="conv")) == full - 11_662 + convs
    wider = (27 * 64 + 2 + 64) * 16
    assert count_with_one_head(paper_network(bottleneck_channels=80)) == full + wider


def test_papers_multiplications():
    """14.48 G at 4 x 128^3; the paper's 14.64 with eqs. 14 and 15 taken literally."""
    network = paper_network()

    def gmac(size: int) -> float:
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 4, size, size, size, device="meta"))
        return counter.get_total_flops() / 2e9

    assert round(gmac(128), 2) == 14.48
    assert gmac(128) == pytest.approx(14.64, rel=0.02)
    assert [round(gmac(size), 1) for size in (96, 160)] == [6.1, 28.3]


def forward_by_hand(network: LightMedSeg, plan: Plan, x: Tensor) -> list[Tensor]:
    """The equations out of a checkpoint, as the paper writes them: the offsets to each anchor as a map of K channels,
    projection before resampling, and the pair sum as a convolution in groups of two."""
    state = network.state_dict()
    used: set[str] = set()
    ndim = plan.ndim
    n = len(plan.strides) - 1
    conv = F.conv2d if ndim == 2 else F.conv3d
    up_conv = F.conv_transpose2d if ndim == 2 else F.conv_transpose3d
    pool = F.max_pool2d if ndim == 2 else F.max_pool3d
    linear_mode = "bilinear" if ndim == 2 else "trilinear"

    def of(name: str) -> Tensor:
        used.add(name)
        return state[name]

    def both(prefix: str) -> tuple[Tensor, Tensor]:
        return of(f"{prefix}.weight"), of(f"{prefix}.bias")

    def same(z: Tensor, prefix: str, groups: int = 1, stride: Sequence[int] = (1, 1, 1)) -> Tensor:
        weight = of(f"{prefix}.weight")
        bias = of(f"{prefix}.bias") if f"{prefix}.bias" in state else None
        padding = [k // 2 for k in weight.shape[2:]]
        return conv(z, weight, bias, stride=tuple(stride)[:ndim], padding=padding, groups=groups)

    def norm(z: Tensor, prefix: str) -> Tensor:
        return F.group_norm(z, 4, *both(prefix))

    def norm_act(z: Tensor, prefix: str) -> Tensor:
        return F.silu(norm(z, f"{prefix}.0"))

    def ghost(z: Tensor, prefix: str, stride: Sequence[int] = (1, 1, 1)) -> Tensor:
        primary = same(z, f"{prefix}.primary", stride=stride)
        return torch.cat((primary, same(primary, f"{prefix}.ghost", groups=primary.shape[1])), 1)

    def gate(z: Tensor, prefix: str) -> Tensor:
        hidden = F.silu(F.linear(z.flatten(2).mean(2), *both(f"{prefix}.gate.0")))
        return z * torch.sigmoid(F.linear(hidden, *both(f"{prefix}.gate.2"))).reshape(*z.shape[:2], *[1] * ndim)

    def resample(z: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(z, size=tuple(size), mode=linear_mode, align_corners=False)

    f0 = norm(ghost(x, "stem.0", stride=plan.strides[1]), "stem.1")

    v = x
    for i in range(3):
        v = norm_act(
            same(v, f"anchor_detector.features.{i}.0", stride=plan.strides[min(i + 1, n)]),
            f"anchor_detector.features.{i}.1",
        )
    v = F.silu(F.linear(v.flatten(2).mean(2), *both("anchor_detector.coordinates.0")))
    a = torch.sigmoid(F.linear(v, *both("anchor_detector.coordinates.2")))  # [B, K * ndim]

    residue = (f0 - norm(same(f0, "prior.smoothing", groups=f0.shape[1]), "prior.smoothing_norm")).abs()
    texture = torch.sigmoid(same(residue, "prior.texture"))
    g = norm_act(same(f0, "prior.spatial_gate.0"), "prior.spatial_gate.1")
    g = norm_act(same(g, "prior.spatial_gate.2"), "prior.spatial_gate.3")
    alpha = same(torch.sigmoid(same(g, "prior.spatial_gate.4")), "prior.weights").softmax(1)
    h = alpha[:, :1] * same(f0, "prior.experts.0") + alpha[:, 1:] * same(f0, "prior.experts.1")

    features = []
    for i in range(n):
        stage = f"encoder.stages.{i}"
        if i > 0:
            h = pool(h, plan.strides[i + 1], plan.strides[i + 1])
        z = norm_act(ghost(h, f"{stage}.features.0"), f"{stage}.features.1")
        gamma, beta = (
            F.linear(a, *both(f"{stage}.modulation.{which}")).reshape(*z.shape[:2], *[1] * ndim)
            for which in ("gamma", "beta")
        )
        z = (1 + gamma) * z + beta
        detail = norm_act(same(z, f"{stage}.detail.0", groups=z.shape[1]), f"{stage}.detail.1")
        smooth = norm_act(same(z, f"{stage}.smooth.0"), f"{stage}.smooth.1")
        t = resample(texture, z.shape[2:])
        h = gate(t * detail + (1 - t) * smooth, f"{stage}.gate")
        features.append(h)

    y = same(norm_act(same(h, "bottleneck.0"), "bottleneck.1"), "bottleneck.2")
    outputs = []
    routed = max(n - 2, 1) if n > 1 else 0
    for i in range(n):
        fusion, mixture = f"decoder.fusions.{i}", f"decoder.mixtures.{i}"
        level = n - 1 - i
        y = up_conv(y, *both(f"{fusion}.up"), stride=plan.strides[level + 1])
        size = y.shape[2:]
        if i < routed:
            projected = [
                resample(same(feature, f"decoder.router.projections.{j}"), size) for j, feature in enumerate(features)
            ]
            controller = f"decoder.router.controllers.{i}"
            hidden = F.silu(same(torch.cat(projected, 1), f"{controller}.0"))
            omega = same(hidden, f"{controller}.2").softmax(1)
            mixed = torch.einsum("jb...,jbc...->bc...", omega.movedim(1, 0), torch.stack(projected))
            skip = same(mixed, f"decoder.router.outputs.{i}")
        else:
            skip = resample(same(f0 if level == 0 else features[level - 1], f"decoder.skips.{i - routed}"), size)
        centres = torch.meshgrid(*((torch.arange(s, dtype=x.dtype) + 0.5) / s for s in size), indexing="ij")
        offsets = sum(
            centre - a.unflatten(1, (-1, ndim))[:, :, axis].reshape(len(x), -1, *[1] * ndim)
            for axis, centre in enumerate(centres)
        )  # [B, K, *size]
        weight, bias = both(f"{fusion}.position_bias.linear")
        p = conv(offsets, weight.reshape(*weight.shape, *[1] * ndim), bias)
        f = gate(torch.cat((y + p, skip), 1), f"{fusion}.recalibration")
        pi = same(f, f"{mixture}.selector").softmax(1)
        width = y.shape[1]
        paired = torch.stack((f[:, :width], f[:, width:]), 2).flatten(1, 2)
        depthwise = of(f"{mixture}.branches.0.0.depthwise.weight")
        pairs = torch.cat((depthwise[:width], depthwise[width:]), 1)
        f1 = conv(paired, pairs, padding=[k // 2 for k in pairs.shape[2:]], groups=width)
        f2 = ghost(f, f"{mixture}.branches.1.0")
        f3 = same(f, f"{mixture}.branches.2.0")
        y = sum(
            pi[:, b : b + 1] * norm_act(branch, f"{mixture}.branches.{b}.1") for b, branch in enumerate((f1, f2, f3))
        )
        y = gate(y, f"{mixture}.recalibration")
        outputs.insert(0, same(y, f"decoder.seg_layers.{i}"))
    assert used == set(state)
    return outputs


@pytest.mark.parametrize("plan", [*SMALL_PLANS, TWO_LEVELS, FIVE_LEVELS], ids=str)
def test_forward_by_hand(plan: Plan):
    network = stir(plan.network("LightMedSeg", input_channels=2, deep_supervision=True, num_anchors=3)).double()
    image = plan.image(batch=2, channels=2, dtype=torch.float64)
    with torch.no_grad():
        expected = forward_by_hand(network, plan, image)
        predicted = network(image)
    for outputs in (network(image), predicted):
        assert len(outputs) == len(expected) == len(plan.strides) - 1
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_prediction_leaves_the_image_alone():
    network = stir(ISOTROPIC.network("LightMedSeg"))
    image = ISOTROPIC.image()
    before = image.clone()
    with torch.no_grad():
        network(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("levels", "size"),
    [(5, (97, 101, 75)), (5, (56, 192, 160)), (5, (16, 16, 16)), (4, (40, 56, 40))],
    ids=str,
)
def test_sizes_at_the_papers_widths(levels: int, size: tuple[int, ...]):
    network = paper_network(levels, deep_supervision=True)
    outputs = network(torch.empty(1, 4, *size, device="meta"))
    assert [tuple(output.shape[2:]) for output in outputs] == cropped_sizes(size, network.strides)


def test_memory_estimate_at_the_papers_widths():
    network = paper_network(deep_supervision=True).to_empty(device="cpu")
    with kept_by_autograd(network) as kept:
        network(torch.zeros(1, 4, 32, 32, 32))
    assert network.compute_conv_feature_map_size((32, 32, 32)) == pytest.approx(sum(kept) / 1.85, rel=0.03)
    # nnU-Net's planner hands over an array.
    assert network.compute_conv_feature_map_size(torch.tensor([32, 32, 32]).numpy()) == 4_035_552


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"prior": "none"}, ["prior"]),
        ({"prior": "conv"}, []),
        ({"anchors": "none"}, ["anchor_detector", "position_bias", "modulation"]),
        ({"anchors": "affine"}, []),
        ({"router": "mean"}, ["controllers"]),
        ({"router": "none"}, ["router"]),
        ({"ghost": False}, ["ghost"]),
        ({"prior": "conv", "anchors": "affine", "router": "mean"}, ["controllers"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", [FIVE_LEVELS, ANISOTROPIC, TWO_DIMENSIONAL], ids=str)
def test_ablations_train_without_what_they_leave_out(plan: Plan, options: dict[str, Any], gone: list[str]):
    network = plan.network("LightMedSeg", deep_supervision=True, **options)
    outputs = network(plan.image(batch=2))
    sum((output * torch.randn_like(output)).mean() for output in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name
        assert not set(gone) & set(name.split(".")), name


def test_ablations_by_hand():
    """Each part that replaces another, beside the equation it stands in."""
    image = FIVE_LEVELS.image(dtype=torch.float64)

    def network(**options: Any) -> LightMedSeg:
        return stir(FIVE_LEVELS.network("LightMedSeg", **options)).double()

    even = network(router="mean")
    learned = network()
    shared = {name: value for name, value in even.state_dict().items()}
    learned.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for controller in learned.decoder.router.controllers:
            controller[2].weight.zero_()
            controller[2].bias.zero_()
    torch.testing.assert_close(even(image), learned(image), rtol=0, atol=1e-10)

    affine = network(anchors="affine")
    steered = network()
    steered.load_state_dict({k: v for k, v in affine.state_dict().items() if "modulation" not in k}, strict=False)
    with torch.no_grad():
        for plain, stage in zip(affine.encoder.stages, steered.encoder.stages, strict=True):
            for name in ("gamma", "beta"):
                getattr(stage.modulation, name).weight.zero_()
                getattr(stage.modulation, name).bias.copy_(getattr(plain.modulation, name))
    torch.testing.assert_close(affine(image), steered(image), rtol=0, atol=1e-10)

    plain = network(prior="none")
    with_prior = network()
    with_prior.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        # A texture of one half, and both experts the identity.
        with_prior.prior.texture.weight.zero_()
        with_prior.prior.texture.bias.zero_()
        for expert in with_prior.prior.experts:
            expert.weight.copy_(torch.eye(8).view_as(expert.weight))
            expert.bias.zero_()
    torch.testing.assert_close(plain(image), with_prior(image), rtol=0, atol=1e-10)


def test_learns_a_small_case():
    network = plan("", (16, 16, 16), [(2, 2, 2)] * 2, (8, 16, 32)).network("LightMedSeg", num_classes=2)
    network.apply(network.initialize)
    z, y, x = torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij")
    target = ((z - 8) ** 2 + (y - 6) ** 2 + (x - 9) ** 2 < 16).long()[None]
    image = target[:, None] + 0.5 * torch.randn(1, 1, 16, 16, 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(image), target, weight=torch.tensor([0.1, 1.0])).backward()
        optimizer.step()
    with torch.no_grad():
        found = network(image).argmax(1)
    dice = 2 * (found * target).sum() / (found.sum() + target.sum())
    assert dice > 0.9


@pytest.mark.parametrize("value", [0.0, 1.0, -1000.0], ids=str)
def test_constant_images_stay_finite(value: float):
    network = ISOTROPIC.network("LightMedSeg", deep_supervision=True)
    outputs = network(torch.full((1, 1, *ISOTROPIC.patch), value))
    sum(output.square().mean() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 1)], ids=str)
def test_images_smaller_than_the_detectors_strides(size: tuple[int, ...]):
    assert stir(ISOTROPIC.network("LightMedSeg"))(torch.randn(1, 1, *size)).isfinite().all()


def test_one_class_and_one_anchor():
    network = ISOTROPIC.network("LightMedSeg", num_classes=1, num_anchors=1)
    assert network(ISOTROPIC.image()).shape == (1, 1, *ISOTROPIC.patch)


@pytest.mark.parametrize("plan", [*SMALL_PLANS, FIVE_LEVELS], ids=str)
def test_initialisation_starts_from_anything(plan: Plan):
    network = plan.network("LightMedSeg", num_anchors=16)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, FewChannelConv2d | FewChannelConv3d | FiLM):
                for parameter in module.parameters():
                    parameter.fill_(5)
    network.apply(network.initialize)

    smoothing = network.prior.smoothing
    taps = math.prod(5 if k > 1 else 1 for k in plan.kernel_sizes[1])
    assert torch.equal(smoothing.weight, torch.full_like(smoothing.weight, 1 / taps))
    for module in network.modules():
        if isinstance(module, FewChannelConv2d | FewChannelConv3d):
            assert module.bias is None or module.bias.count_nonzero() == 0
            if module is not smoothing:
                weight = module.weight
                std = math.sqrt(2 / (1 + 0.01**2) / weight[0].numel())
                # Five standard errors of a standard deviation from so many normal numbers.
                assert weight.std(correction=0).item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
        if isinstance(module, FiLM):
            assert module.gamma.bias.count_nonzero() == module.beta.bias.count_nonzero() == 0
            assert 0.015 < torch.cat((module.gamma.weight, module.beta.weight)).std() < 0.025

    # Anchors spread over the patch: on each axis one in each sixteenth of (0.1, 0.9).
    bias = network.anchor_detector.coordinates[2].bias
    spread = torch.sigmoid(bias).view(16, plan.ndim).sort(0).values
    edges = 0.1 + 0.8 * torch.arange(17)[:, None] / 16
    assert (spread >= edges[:-1] - 1e-6).all()
    assert (spread <= edges[1:] + 1e-6).all()
    assert network.anchor_detector.coordinates[2].weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_kernels_and_strides_follow_the_plan():
    strides = [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
    network = plan("", (4, 16, 16), strides, (8, 8, 12, 16, 16), flat=2).network("LightMedSeg")
    assert (network.stem[0].primary.kernel_size, network.stem[0].primary.stride) == ((1, 3, 3), (1, 2, 2))
    convs = [block[0] for block in network.anchor_detector.features]
    assert [conv.stride for conv in convs] == strides[:3]
    assert [conv.kernel_size for conv in convs] == [(1, 3, 3), (3, 3, 3), (3, 3, 3)]
    assert network.prior.smoothing.kernel_size == (1, 5, 5)
    assert [pool.kernel_size for pool in network.encoder.pools] == strides[1:]
    assert [pool.stride for pool in network.encoder.pools] == strides[1:]
    assert isinstance(network.encoder.pools[0], nn.MaxPool3d)
    assert [stage.detail[0].kernel_size for stage in network.encoder.stages] == [(1, 3, 3), *[(3, 3, 3)] * 3]
    assert [fusion.up.stride for fusion in network.decoder.fusions] == strides[::-1]
    kernels = [mixture.branches[0][0].depthwise.kernel_size for mixture in network.decoder.mixtures]
    assert kernels == [(3, 3, 3), (3, 3, 3), (1, 3, 3), (1, 3, 3)]


def test_heads_that_are_never_used_are_not_trained():
    network = ISOTROPIC.network("LightMedSeg", deep_supervision=False)
    assert [head.weight.requires_grad for head in network.decoder.seg_layers] == [False, True]
    network = ISOTROPIC.network("LightMedSeg", deep_supervision=True)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_one_encoder_stage_has_nothing_to_route():
    network = TWO_LEVELS.network("LightMedSeg")
    assert network.decoder.router is None
    assert network(TWO_LEVELS.image()).shape == (1, 3, *TWO_LEVELS.patch)


def test_anchors_option_builds_what_it_says():
    def kinds(**options: Any) -> list[int]:
        network = ISOTROPIC.network("LightMedSeg", **options)
        kinds = (AnchorDetector, FiLM, ChannelAffine, PositionBias, LocalStructuralPrior)
        return [sum(isinstance(module, kind) for module in network.modules()) for kind in kinds]

    assert kinds() == [1, 2, 0, 2, 1]
    assert kinds(anchors="affine") == [1, 0, 2, 2, 1]
    assert kinds(anchors="none") == [0, 0, 0, 0, 1]
    assert kinds(prior="conv") == [1, 2, 0, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_stages": 1}, "n_stages=1: LightMedSeg needs at least 2"),
        ({"features_per_stage": [8, 16]}, r"features_per_stage=\[8, 16\] has 2 values for n_stages=3"),
        ({"features_per_stage": [8, 10, 16]}, r"features_per_stage=\[8, 10, 16\] must be multiples of 4"),
        ({"features_per_stage": [0, 8, 16]}, r"features_per_stage=\[0, 8, 16\] must be multiples of 4"),
        ({"bottleneck_channels": 30}, "bottleneck_channels=30 must be multiples of 4"),
        ({"kernel_sizes": [[2, 2, 2], [3, 3, 3], [3, 3, 3]]}, r"kernel_sizes=.* odd"),
        ({"strides": [[1, 2, 2]] + [[2, 2, 2]] * 2}, r"strides\[0\]=\[1, 2, 2\] must be all ones"),
        ({"num_anchors": 0}, "num_anchors=0 must be at least 1"),
        ({"skip_channels": 0}, "skip_channels=0 must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"input_channels": 0}, "input_channels=0 must be at least 1"),
        ({"anchors": "FiLM"}, "anchors='FiLM' must be one of 'film', 'affine', 'none'"),
        ({"prior": True}, "prior=True must be one of 'lspm', 'conv', 'none'"),
        ({"router": "max"}, "router='max' must be one of 'learned', 'mean', 'none'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ISOTROPIC.network("LightMedSeg", **arguments)


def test_an_image_of_another_dimension_is_named():
    with pytest.raises(ValueError, match=r"input has shape \(1, 1, 8, 8\); this network needs 3 spatial axes"):
        ISOTROPIC.network("LightMedSeg")(torch.zeros(1, 1, 8, 8))
