"""What networks say of their operators, against operators set by hand."""

import json
import math
import pickle

import pytest
import torch
from network_cases import ANISOTROPIC, ISOTROPIC, SMALL_PLANS, TWO_DIMENSIONAL, Plan, every_case, stir
from torch import Tensor, nn

from nnunet_deform.layers import AnchorDetector, DeformConv
from nnunet_deform.layers.magic import MagicAttention
from nnunet_deform.networks.observation import (
    Anchors,
    ChannelFusion,
    MixingWeights,
    ObservableNetwork,
    Offsets,
    Routing,
    joined,
    read_epochs,
    recorded,
    summarise,
    write_epoch,
)

KINDS = {
    "DeformUXNet": {Offsets},
    "LightMedSeg": {Anchors, Routing},
    "MagicPlainConvUNet": {MixingWeights},
    "MagicResidualEncoderUNet": {MixingWeights},
    "DynamicPlainConvUNet-odconv": {MixingWeights},
    "DynamicPlainConvUNet-dcd": {ChannelFusion},
    "DynamicPlainConvUNet-ddconv": {MixingWeights, Offsets},
    "DynamicResidualEncoderUNet-odconv": {MixingWeights},
}
TWINS = {
    "DeformUXNet": {"deformable": False},
    "LightMedSeg": {"prior": "conv", "anchors": "affine", "router": "mean"},
    "MagicPlainConvUNet": {"attention": "uniform", "keep_dead_attention": True},
    "MagicResidualEncoderUNet": {"attention": "uniform"},
}
small_plans = pytest.mark.parametrize("plan", SMALL_PLANS, ids=str)


def set_offsets(layer: DeformConv, offsets: Tensor) -> None:
    """Let every voxel have the offsets [taps, moving axes], whatever the layer sees."""
    with torch.no_grad():
        layer.offset.weight.zero_()
        layer.offset.bias.copy_(offsets.flatten())


@every_case
@small_plans
@pytest.mark.parametrize("deep_supervision", [True, False], ids=["ds", "no-ds"])
def test_a_network_says_what_its_operators_do_and_is_as_it_was(name: str, plan: Plan, deep_supervision: bool):
    network = stir(plan.network(name, deep_supervision=deep_supervision))
    network.train()
    frozen = next(module for module in network.modules() if not list(module.children()))
    frozen.eval()
    modes = {key: module.training for key, module in network.named_modules()}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    pickled = pickle.dumps(network)
    images = plan.image(batch=3)
    assert isinstance(network, ObservableNetwork)
    observed = network.observe_operators(images)
    assert {type(observation) for observation in observed.values()} == KINDS[name]
    layers = dict(network.named_modules())
    for key, observation in observed.items():
        assert key in layers
        assert observation.values.shape[0] == 3
        assert observation.values.isfinite().all()
        assert not observation.values.requires_grad
    values, line = summarise(observed)
    assert all(math.isfinite(value) for value in values.values())
    assert "\n" not in line
    assert {key: module.training for key, module in network.named_modules()} == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert pickle.dumps(network) == pickled
    # The samples one by one are those of the batch.
    apart = joined([network.observe_operators(images[:2]), network.observe_operators(images[2:])])
    for key, observation in observed.items():
        torch.testing.assert_close(apart[key].values, observation.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_nothing_to_say(name: str):
    network = TWO_DIMENSIONAL.network(name, **TWINS[name])
    assert network.observe_operators(TWO_DIMENSIONAL.image()) == {}
    assert summarise({}) == ({}, "")


@every_case
def test_it_needs_no_gradients_and_works_under_autocast(name: str):
    network = stir(ISOTROPIC.network(name))
    images = ISOTROPIC.image(batch=2)
    exact, _ = summarise(network.observe_operators(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = summarise(network.observe_operators(images))
    assert rounded == pytest.approx(exact, rel=0.1, abs=0.05)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("plan", [ISOTROPIC, TWO_DIMENSIONAL], ids=str)
def test_offsets_set_by_hand_come_out_in_voxels(plan: Plan):
    network = plan.network("DeformUXNet")
    layers = {key: layer for key, layer in network.named_modules() if isinstance(layer, DeformConv)}
    lengths = {}
    for number, layer in enumerate(layers.values(), start=1):
        # The first tap moves by 3 n along the first axis and 4 n along the last; all others stay.
        offsets = torch.zeros(layer.taps, layer.ndim)
        offsets[0, 0], offsets[0, -1] = 3 * number, -4 * number
        set_offsets(layer, offsets)
        lengths[number] = layer.taps
    observed = network.observe_operators(plan.image(batch=2))
    assert list(observed) == list(layers)
    first = observed["encoder.stages.0.0.branches.0.1"]
    assert first.level == 1
    assert (first.values[:, 0, 0] == 3).all()
    assert (first.values[:, 0, -1] == -4).all()
    assert first.values[:, 1:].count_nonzero() == 0
    values, _ = summarise(observed)
    for level, taps in lengths.items():
        assert values[f"offset_mean_level{level}"] == pytest.approx(5 * level / taps, rel=1e-5)
        assert values[f"offset_max_level{level}"] == pytest.approx(5 * level, rel=1e-6)


def test_a_level_has_the_mean_of_its_blocks_and_the_largest_of_all():
    layers = {key: Offsets(torch.full((1, 9, 2, 4, 4), value), 2, (3, 3)) for key, value in (("a", 3.0), ("b", 1.0))}
    values, _ = summarise(layers)
    assert values["offset_mean_level2"] == pytest.approx(2 * math.sqrt(2))
    assert values["offset_max_level2"] == pytest.approx(3 * math.sqrt(2))


def test_an_axis_without_offsets_stays():
    network = stir(ANISOTROPIC.network("DeformUXNet", offset_axes=(1, 2)), scale=1)
    for observation in network.observe_operators(ANISOTROPIC.image()).values():
        assert observation.values[:, :, 0].count_nonzero() == 0
        assert observation.values[:, :, 1:].count_nonzero() > 0


def test_samples_outside_are_counted_exactly():
    def outside(offset: tuple[float, float]) -> float:
        return Offsets(torch.tensor(offset).view(1, 1, 2, 1, 1).repeat(2, 3, 1, 4, 5), 1, (1, 3)).outside()

    # A row of three taps, -1, 0 and 1 along an axis of five: the outer two leave at one end each.
    assert outside((0, 0)) == pytest.approx(2 / 15)
    assert Offsets(torch.zeros(1, 3, 2, 4, 5), 1, (1, 3)).outside_undeformed() == pytest.approx(2 / 15)
    # Half a voxel along the axis: one end is just back, the other one's 4.5 is just inside.
    assert outside((0, 0.5)) == pytest.approx(1 / 15)
    assert outside((0, 1)) == pytest.approx((0 + 1 + 2) / 15)
    assert outside((-1, 0)) == pytest.approx(1 - 3 / 4 * 13 / 15)
    assert outside((-0.49, 0)) == pytest.approx(2 / 15)
    assert outside((0, 0.01)) == pytest.approx(2 / 15)
    assert outside((4, 0)) == 1


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 5, 3)], ids=str)
@pytest.mark.parametrize("size", [(1, 2, 7), (4, 5, 1)], ids=str)
def test_without_offsets_the_share_outside_is_that_of_the_padding(kernel, size):
    zeros = Offsets(torch.zeros(1, math.prod(kernel), 3, *size), 1, kernel)
    assert zeros.outside() == pytest.approx(zeros.outside_undeformed(), abs=1e-6)


def test_samples_are_read_where_the_report_says():
    """Voxels on whose positions the operator's output depends are those inside."""
    layer = DeformConv(nn.Conv2d, 1, (3, 3))
    torch.manual_seed(0)
    offsets = torch.randint(-3, 4, (9, 2)).float()
    set_offsets(layer, offsets)
    image = torch.ones(1, 1, 6, 7)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.zero_()
        # At integers each tap reads one voxel, 1, or nothing.
        read = layer(image).sum() / (9 * 6 * 7)
    observed = Offsets(layer.offsets(image).unflatten(1, (9, 2)), 1, (3, 3))
    assert 1 - observed.outside() == pytest.approx(float(read), abs=1e-6)


def test_of_a_strided_layer_positions_are_those_of_its_input():
    values = torch.zeros(1, 3, 2, 3, 1)
    strided = Offsets(values, 0, (3, 1), stride=(2, 1), size=(5, 1))
    # Voxels 0, 2 and 4 of five, each with its two neighbours: the first's and the last's lie outside.
    assert strided.outside() == pytest.approx(2 / 9)
    assert strided.outside_undeformed() == pytest.approx(2 / 9)
    values[:, 2, 0] = -1
    assert Offsets(values, 0, (3, 1), stride=(2, 1), size=(5, 1)).outside() == pytest.approx(1 / 9)


def test_a_fusion_set_by_hand():
    still = ChannelFusion(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2), outputs=2)
    moving = ChannelFusion(torch.tensor([[0.5, 1.0, 3.0, 4.0], [1.5, 1.0, 4.0, 3.0]]), outputs=2)
    values, line = summarise({"a": still})
    assert values == {
        "lambda_mean": 1.0,
        "lambda_spread_median": 0.0,
        "lambda_spread_min": 0.0,
        "phi_rms": 0.0,
        "phi_spread_median": 0.0,
        "phi_spread_min": 0.0,
    }
    values, line = summarise({"a": moving})
    assert values["lambda_spread_median"] == pytest.approx(math.sqrt(0.5) / 2)
    assert values["phi_spread_min"] == pytest.approx(math.sqrt(0.5))
    assert values["phi_rms"] == pytest.approx(math.sqrt(12.5))
    assert line.startswith("lambda mean 1.000, spread over samples median 0.3536, least 0.3536; |Phi| 3.536, spread")


def test_uniform_and_one_hot_mixing():
    uniform = MixingWeights(torch.full((4, 5), 0.3))
    one_hot = MixingWeights(2 * torch.eye(5)[[1, 1, 1, 1]])
    values, _ = summarise({"a": uniform})
    assert values["mixing_entropy_median"] == pytest.approx(1)
    assert values["mixing_spread_median"] == pytest.approx(0, abs=1e-7)
    assert (values["mixing_dead"], values["mixing_kernels"]) == (0, 5)
    values, _ = summarise({"a": one_hot})
    assert values["mixing_entropy_median"] == 0
    assert (values["mixing_dead"], values["mixing_spread_median"]) == (4, 0)
    values, line = summarise({"a": uniform, "b": uniform, "c": one_hot})
    assert values["mixing_entropy_median"] == pytest.approx(1)
    assert values["mixing_entropy_min"] == 0
    assert (values["mixing_dead"], values["mixing_kernels"]) == (4, 15)
    assert "4 of 15 kernels below 1%" in line


def test_a_kernel_of_some_samples_is_alive_and_its_share_spreads():
    # Shares 1 and 0 in turn: sample standard deviation of (1, 0, 1, 0).
    values, _ = summarise({"a": MixingWeights(torch.eye(2)[[0, 1, 0, 1]] * torch.tensor([[1.0], [7], [3], [0.1]]))})
    assert values["mixing_dead"] == 0
    assert values["mixing_spread_median"] == pytest.approx(math.sqrt(1 / 3))
    assert values["mixing_spread_min"] == values["mixing_spread_median"]


@pytest.mark.parametrize("name", ["MagicPlainConvUNet", "MagicResidualEncoderUNet"])
def test_the_attention_decides_what_is_seen(name: str, monkeypatch):
    network = ISOTROPIC.network(name)
    kernels = network.default_kernels
    one_hot = torch.zeros(kernels)
    one_hot[0] = 1
    for weights, entropy, dead in ((torch.full((kernels,), 0.7), 1.0, 0), (one_hot, 0.0, kernels - 1)):
        monkeypatch.setattr(MagicAttention, "forward", lambda self, x, weights=weights: weights.repeat(len(x), 1))
        observed = network.observe_operators(ISOTROPIC.image(batch=2))
        assert list(observed) == list(network.dynamic_convs())
        values, _ = summarise(observed)
        assert values["mixing_entropy_median"] == pytest.approx(entropy)
        assert values["mixing_entropy_min"] == pytest.approx(entropy)
        assert values["mixing_dead"] == dead * len(observed)
        assert values["mixing_kernels"] == kernels * len(observed)


def test_anchors_set_by_hand():
    network = ISOTROPIC.network("LightMedSeg", num_anchors=3)
    # A triangle with sides 0.3, 0.4 and 0.5, whatever the image.
    corners = torch.tensor([[0.2, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.5, 0.5]])
    detector = next(module for module in network.modules() if isinstance(module, AnchorDetector))
    with torch.no_grad():
        detector.coordinates[-1].weight.zero_()
        detector.coordinates[-1].bias.copy_(corners.logit().flatten())
    observed = network.observe_operators(ISOTROPIC.image(batch=4))
    torch.testing.assert_close(observed["anchor_detector"].values, corners.expand(4, -1, -1))
    values, _ = summarise(observed)
    assert values["anchor_distance"] == pytest.approx(0.4)
    assert values["anchor_spread"] == pytest.approx(0, abs=1e-7)


def test_anchors_that_move():
    points = torch.tensor([[[0.1, 0.1]], [[0.3, 0.5]]])
    values, _ = summarise({"anchors": Anchors(points)})
    assert values["anchor_spread"] == pytest.approx((0.2 + 0.4) / math.sqrt(2) / 2)
    assert math.isnan(values["anchor_distance"])


def test_routing_weights_are_those_of_the_forward_pass():
    network = stir(ISOTROPIC.network("LightMedSeg", deep_supervision=True))
    image = ISOTROPIC.image(batch=2)
    router = network.decoder.router
    (name,) = [name for name in network.observe_operators(image) if "router" in name]
    weights = network.observe_operators(image)[name].values
    assert weights.shape[:2] == (2, 2)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))

    def mixed(_name, controller, concatenated, output):
        first, second = concatenated.chunk(2, dim=1)
        return router.outputs[0](weights[:, :1] * first + weights[:, 1:] * second)

    expected = recorded(network, image, {"controller": router.controllers[0]}, mixed)["controller"]
    found = recorded(network, image, {"router": router.outputs[0]}, lambda name, layer, x, output: output)["router"]
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        for value, entropy in ((0.0, 1.0), (1000.0, 0.0)):
            router.controllers[0][2].weight.zero_()
            router.controllers[0][2].bias.copy_(torch.tensor([value, 0]))
            assert summarise(network.observe_operators(image))[0]["routing_entropy"] == pytest.approx(entropy)


def test_one_sample_has_no_spread():
    values, line = summarise({"a": MixingWeights(torch.rand(1, 4)), "b": Anchors(torch.rand(1, 8, 3))})
    assert math.isnan(values["mixing_spread_median"])
    assert math.isnan(values["anchor_spread"])
    assert math.isfinite(values["mixing_entropy_median"])
    assert "nan" in line


def test_epochs_of_a_stopped_run_are_replaced(tmp_path):
    file = tmp_path / "operators.jsonl"
    assert read_epochs(file) == {}
    for epoch in range(4):
        write_epoch(file, epoch, {"a": epoch + 0.5})
    write_epoch(file, 2, {"a": math.nan, "b": 7.0})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"epoch": 0, "a": 0.5},
        {"epoch": 1, "a": 1.5},
        {"epoch": 2, "a": None, "b": 7.0},
    ]
    found = read_epochs(file)
    assert list(found) == [0, 1, 2]
    assert found[0] == {"a": 0.5}
    assert math.isnan(found[2]["a"])
    assert found[2]["b"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["operators.jsonl"]
    # An incomplete copy.
    file.write_text(file.read_text()[:-5])
    write_epoch(file, 3, {"a": 1.0})
    assert list(read_epochs(file)) == [0, 1, 3]
