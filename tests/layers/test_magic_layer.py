"""MAGIC's layer: the equations, its options and controls, its counts, and what it says of bad input."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import magic_oracle
import pytest
import torch
import torch.nn.functional as F
from dynamic_cases import RESNET18, RESNET18_STATIC, count
from torch import Tensor, nn

from nnunet_deform.layers import MagicConv, MagicConv2d, MagicConv3d

LAYER = {2: MagicConv2d, 3: MagicConv3d}
SIZE = {2: (5, 6), 3: (3, 4, 5)}


def stirred(layer: MagicConv, scale: float = 0.5) -> MagicConv:
    """Noise on every parameter: nothing stays at an initial zero or one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return layer


def alive(make: Callable[[], MagicConv], x: Tensor) -> MagicConv:
    """A layer none of whose ReLUs is zero for every sample, as the few there are may be."""
    outputs: list[Tensor] = []
    for _ in range(1000):
        layer = make()
        hooks = [
            module.register_forward_hook(lambda *args: outputs.append(args[-1]))
            for module in layer.modules()
            if isinstance(module, nn.ReLU)
        ]
        layer.mixing_weights(x)
        for hook in hooks:
            hook.remove()
        if all((output > 0).any(0).all() for output in outputs):
            return layer
        outputs.clear()
    raise AssertionError("some ReLU is always dead")


def layer_of(ndim: int, channels: int = 16, out: int = 6, kernel_size: Any = 3, **options: Any) -> MagicConv:
    options = {"padding": 1, "reduction": 4, **options}
    return stirred(LAYER[ndim](channels, out, kernel_size, **options).double())


def volume(ndim: int, channels: int = 16, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, *SIZE[ndim], dtype=torch.float64)


EQUATIONS = [
    pytest.param({"n_kernels": 4}, id="4"),
    pytest.param({"n_kernels": 2}, id="2"),
    pytest.param({"n_kernels": 3, "channels": 9}, id="3-odd-channels"),
    pytest.param({"n_kernels": 8, "channels": 10}, id="8"),
    pytest.param({"temperature": 3.0}, id="temperature"),
    pytest.param({"kr_norm": "batch"}, id="batch-norm"),
    pytest.param({"attention_norm": "running"}, id="running"),
    pytest.param({"attention_norm": "layer"}, id="layer"),
    pytest.param({"bottleneck": 2.0, "bottleneck_norm_affine": False}, id="wide-bottleneck"),
    pytest.param({"use_kr": False}, id="no-kr"),
    pytest.param({"use_spatial": False}, id="no-spatial"),
    pytest.param({"use_channel": False}, id="no-channel"),
    pytest.param({"use_global": False}, id="no-global"),
    pytest.param({"use_channel": False, "use_global": False}, id="only-spatial"),
    pytest.param({"bias": False, "stride": 2}, id="no-bias-strided"),
    pytest.param({"groups": 2, "dilation": 2, "padding": 2, "conv_impl": "loop"}, id="groups-dilated-loop"),
]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("mixing", ["paper", "released"])
@pytest.mark.parametrize("options", EQUATIONS)
def test_equations_and_every_gradient(ndim: int, mixing: str, options: dict[str, Any]):
    x = volume(ndim, options.get("channels", 16)).requires_grad_()
    layer = alive(lambda: layer_of(ndim, mixing=mixing, **options), x)
    of_attention = {k: v for k, v in options.items() if k.startswith("use_") or k.endswith("_norm")}
    temperature = options.get("temperature", 1.0 if mixing == "paper" else 30.0)
    parameters = dict(layer.named_parameters())

    weights = magic_oracle.mixing_weights(parameters, x, mixing=mixing, temperature=temperature, **of_attention)
    geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    expected = magic_oracle.forward(parameters, x, weights, **geometry)
    torch.testing.assert_close(layer.mixing_weights(x), weights, rtol=0, atol=1e-12)
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)

    grad_output = torch.randn_like(expected)
    leaves = [x, *parameters.values()]
    theirs = torch.autograd.grad(expected, leaves, grad_output)
    ours = torch.autograd.grad(output, leaves, grad_output)
    for name, one, other in zip(["input", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        if name != "attention.mask.bias":
            assert other.count_nonzero() > 0, name


def test_paper_weights_are_gates_times_a_softmax_and_released_ones_sum_to_one():
    x = volume(3)
    released, paper = (layer_of(3, mixing=mixing).mixing_weights(x) for mixing in ("released", "paper"))
    torch.testing.assert_close(released.sum(1), torch.ones(3, dtype=torch.float64))
    assert (paper.sum(1) < 1).all()
    ungated = layer_of(3, use_kr=False).mixing_weights(x)
    torch.testing.assert_close(ungated.sum(1), torch.ones(3, dtype=torch.float64))


def test_any_order_of_the_voxels_gives_the_same_weights():
    layer = layer_of(3)
    x = volume(3)
    shuffled = x.flatten(2)[:, :, torch.randperm(60)].view_as(x)
    for other in (x.flip(2, 4), shuffled):
        torch.testing.assert_close(layer.mixing_weights(other), layer.mixing_weights(x), rtol=0, atol=1e-12)


def test_samples_get_kernels_of_their_own():
    layer = layer_of(3)
    x = volume(3)
    weights = layer.mixing_weights(x)
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    for sample in range(3):
        alone = layer(x[sample : sample + 1])
        torch.testing.assert_close(layer(x)[sample], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_kernels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("channels", "bottleneck", "norm_affine"), [(32, 0.5, True), (64, 0.5, True), (320, 0.5, True), (64, 2.0, False)]
)
def test_parameter_formula(channels: int, bottleneck: float, norm_affine: bool, n_kernels: int):
    options = {"bottleneck": bottleneck, "bottleneck_norm_affine": norm_affine, "keep_dead_attention": True}
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        layer = MagicConv3d(channels, 24, (1, 3, 3), n_kernels=n_kernels, **options)
    p, h, a = int(channels * bottleneck), channels // 8, n_kernels // 2
    attention = 2 * channels * p + (3 if norm_affine else 1) * p + 2 * channels + 1 + channels * h + h * n_kernels
    attention += 2 * n_kernels * a + 2 * a if n_kernels > 1 else 0
    assert count(layer) == n_kernels * (24 * channels * 9 + 24) + attention


# The sums were verified against the released module before this code existed.
@pytest.mark.parametrize(
    ("channels", "n_kernels", "expected"),
    [(32, 1, 1_269), (32, 4, 1_301), (64, 1, 4_841), (64, 4, 4_885), (320, 1, 116_361), (320, 4, 116_501)],
)
def test_attention_has_the_released_parameters(channels: int, n_kernels: int, expected: int):
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        layer = MagicConv2d(channels, 8, 3, n_kernels=n_kernels, kr_norm="batch", keep_dead_attention=True)
    assert count(layer.attention) == expected


@pytest.mark.parametrize(("norm_affine", "added"), [(True, 4_707_768), (False, 4_694_200)])
def test_table_5(norm_affine: bool, added: int):
    """The sixteen 3x3 convolutions of ResNet18: what attention and further kernels add, as in the paper's Table 5."""

    def total(n_kernels: int) -> int:
        options = {"n_kernels": n_kernels, "bottleneck": 2, "bottleneck_norm_affine": norm_affine, "bias": False}
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return sum(count(MagicConv2d(i, o, 3, keep_dead_attention=True, **options)) for i, o in RESNET18)

    static = RESNET18_STATIC
    assert static == sum(9 * i * o for i, o in RESNET18)
    assert total(1) - static == added
    for n_kernels in (2, 4):
        # One more row of F2 for each further kernel, and KR.
        of_kernels = sum((n_kernels - 1) * (i // 8) + 2 * (n_kernels // 2) * (n_kernels + 1) for i, _ in RESNET18)
        assert total(n_kernels) == static * n_kernels + added + of_kernels


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({"attention": "dyconv", "reduction": 4, "n_kernels": 4}, 33_258_816),
        ({"attention": "condconv", "n_kernels": 8}, 76_956_160),
    ],
    ids=["dyconv", "condconv"],
)
def test_table_5_of_its_rivals(options: dict[str, Any], added: int):
    """The implementations that give the table's numbers have no bias for each kernel's logit, which the layers have."""
    with torch.device("meta"):
        total = sum(count(MagicConv2d(i, o, 3, **options)) - options["n_kernels"] for i, o in RESNET18)
    assert total - RESNET18_STATIC == added


def test_one_kernel_is_a_plain_convolution_with_a_warning():
    with pytest.warns(UserWarning, match="n_kernels=1 is built as a plain convolution: a softmax over one kernel is 1"):
        layer = MagicConv3d(16, 6, 3, padding=1, n_kernels=1).double()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    x = volume(3)
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight, layer.bias, padding=1), rtol=0, atol=1e-13)
    assert torch.equal(layer.mixing_weights(x), torch.ones(3, 1, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:n_kernels=1")
@pytest.mark.parametrize("options", [{"n_kernels": 1}, {"attention": "uniform"}], ids=["one-kernel", "uniform"])
def test_dead_attention_has_gradients_of_zero(options: dict[str, Any]):
    layer = layer_of(2, keep_dead_attention=True, **options)
    plain = layer_of(2, **options)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = volume(2)
    assert torch.equal(layer(x), plain(x))
    layer(x).sin().sum().backward()
    assert count(layer.attention) > 0
    for parameter in layer.attention.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_uniform_is_the_mean_kernel_for_every_sample():
    layer = layer_of(3, attention="uniform", n_kernels=4)
    x = volume(3)
    weight, bias = layer.weight.unflatten(0, (4, 6)).mean(0), layer.bias.unflatten(0, (4, 6)).mean(0)
    torch.testing.assert_close(layer(x), F.conv3d(x, weight, bias, padding=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.mixing_weights(x), torch.full((3, 4), 0.25, dtype=torch.float64))
    assert layer.attention is None
    twin = LAYER[3](16, 6, 3, attention="uniform", keep_dead_attention=True, n_kernels=4)
    assert count(twin) == count(LAYER[3](16, 6, 3, n_kernels=4))


norms = pytest.mark.parametrize("norm", ["none", "running", "layer"])


@norms
def test_dyconv(norm: str):
    layer = layer_of(3, attention="dyconv", n_kernels=3, temperature=2.0, attention_norm=norm)
    x = volume(3)
    p = dict(layer.named_parameters())
    means = torch.stack(magic_oracle.standardised(list(x.mean((2, 3, 4))), norm))
    hidden = (means @ p["attention.fusion.0.weight"].T).clamp(min=0)
    logits = hidden @ p["attention.fusion.2.weight"].T + p["attention.fusion.2.bias"]
    weights = magic_oracle.softmax(logits / 2)
    torch.testing.assert_close(layer.mixing_weights(x), weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), magic_oracle.forward(p, x, weights, padding=1), rtol=0, atol=1e-11)
    assert MagicConv3d(16, 6, 3, attention="dyconv").attention.temperature == 30
    assert count(MagicConv3d(32, 6, 3, attention="dyconv").attention) == 32 * 4 + 4 * 4 + 4


@norms
def test_condconv(norm: str):
    layer = layer_of(2, attention="condconv", n_kernels=5, attention_norm=norm)
    x = volume(2)
    p = dict(layer.named_parameters())
    means = torch.stack(magic_oracle.standardised(list(x.mean((2, 3))), norm))
    weights = torch.sigmoid(means @ p["attention.routing.weight"].T + p["attention.routing.bias"])
    torch.testing.assert_close(layer.mixing_weights(x), weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), magic_oracle.forward(p, x, weights, padding=1), rtol=0, atol=1e-11)
    assert count(layer.attention) == 16 * 5 + 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixing": "released"},
        {"use_kr": False},
        {"attention": "dyconv"},
        {"attention": "condconv"},
        {"attention_norm": "running", "attention_init": "calibrated"},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_a_trained_convolution(options: dict[str, Any], bias: bool):
    conv = nn.Conv3d(16, 6, (1, 3, 3), 2, (0, 1, 1), groups=2, bias=bias).double()
    x = volume(3)
    exact = MagicConv3d.from_conv(conv, 4, noise=0, **options)
    torch.testing.assert_close(exact(x), conv(x), rtol=0, atol=1e-12)
    layer = alive(lambda: MagicConv3d.from_conv(conv, 4, **options), x)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=0.1 * conv(x).std().item())
    kernels = layer.weight.unflatten(0, (4, 6))
    assert kernels.std(0).mean() > 0
    torch.testing.assert_close(kernels.mean(0), exact.weight.unflatten(0, (4, 6)).mean(0), rtol=0, atol=1e-12)
    # It can be trained on: the attention gets gradients.
    layer(x).sin().sum().backward()
    last = [p for name, p in layer.attention.named_parameters() if name.endswith("weight")][-1]
    assert last.grad.count_nonzero() > 0


def test_only_zero_padded_convolutions_of_as_many_axes_can_be_taken_over():
    with pytest.raises(ValueError, match=r"Conv2d\(16, 6.* does not have the 3 axes of MagicConv3d"):
        MagicConv3d.from_conv(nn.Conv2d(16, 6, 3))
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        with pytest.raises(ValueError, match="must be padded with zeros, and by a number of voxels"):
            MagicConv2d.from_conv(nn.Conv2d(16, 6, 3, **options))


@pytest.mark.parametrize("ndim", [2, 3])
def test_folded_is_the_convolution_of_fixed_weights(ndim: int):
    layer = layer_of(ndim, stride=2, groups=2)
    x = volume(ndim)
    conv = layer.folded(*(of_sample[1] for of_sample in layer.kernels(x)))
    assert type(conv) is (nn.Conv2d if ndim == 2 else nn.Conv3d)
    torch.testing.assert_close(conv(x)[1], layer(x)[1], rtol=0, atol=1e-12)


def test_initial_state():
    layer = MagicConv3d(64, 48, 3, n_kernels=4)
    bound = math.sqrt(6 / (64 * 27))
    assert 0.99 * bound < layer.weight.detach().abs().max() <= bound
    assert layer.bias.count_nonzero() == 0
    for name, parameter in layer.attention.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    # Kaiming normal by fan-out.
    assert layer.attention.bottleneck[3].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert layer.attention.mask.weight.std().item() == pytest.approx(math.sqrt(2), rel=0.25)

    stirred(layer)
    layer.reset_parameters(nn.init.kaiming_normal_)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 27)), rel=0.02)
    assert layer.attention.recalculation[1].weight.eq(1).all()

    mean = layer.weight.unflatten(0, (4, 48)).mean(0)
    assert mean.std().item() == pytest.approx(math.sqrt(2 / (64 * 27)) / 2, rel=0.02)
    compensated = MagicConv3d(64, 48, 3, n_kernels=4, init="compensated")
    assert compensated.weight.abs().max().item() == pytest.approx(2 * bound, rel=0.01)


@pytest.mark.parametrize(
    ("options", "calibrated"),
    [
        ({}, {"fusion.2.weight": 0.0530, "recalculation.3.weight": 0.0757}),
        ({"attention": "dyconv"}, {"fusion.2.weight": 0.0530}),
        ({"attention": "condconv"}, {"routing.weight": 0.0437}),
    ],
    ids=["magic", "dyconv", "condconv"],
)
def test_calibrated_start(options: dict[str, Any], calibrated: dict[str, float]):
    """Only the last layers differ from the released start: 0.7 / sqrt(C), with a hidden layer 0.7 / sqrt(0.682 C), and
    of the gates 0.35 / 0.7 / sqrt(0.682 K)."""
    torch.manual_seed(0)
    attention = MagicConv3d(256, 8, 1, n_kernels=64, attention_init="calibrated", **options).attention
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif parameter.ndim == 2 and len(parameter) > 1:
            expected = calibrated.get(name, math.sqrt(2 / len(parameter)))
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name

    # What it is for: standardised vectors give logits that vary by 0.7, and gates' that vary by 0.35.
    vectors = torch.randn(1000, 256)
    logits = attention.routing(vectors) if options.get("attention") == "condconv" else attention.fusion(vectors)
    assert logits.std(0).mean().item() == pytest.approx(0.7, rel=0.1)
    if not options:
        assert attention.recalculation(logits).std(0).mean().item() == pytest.approx(0.35, rel=0.1)


@norms
@pytest.mark.parametrize("attention", ["magic", "dyconv", "condconv"])
def test_a_batch_of_one_can_be_trained_with(attention: str, norm: str):
    layer = layer_of(3, attention=attention, attention_norm=norm)
    for _ in range(3):
        layer(volume(3, batch=1)).sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    weights = [layer.mixing_weights(x) for x in volume(3, batch=2).unsqueeze(1)]
    assert (weights[0] - weights[1]).abs().max() > 1e-4


def test_the_norms_have_no_parameters_and_only_running_has_a_state():
    plain, layer, running = (layer_of(2, attention_norm=norm) for norm in ("none", "layer", "running"))
    assert [*plain.state_dict()] == [*layer.state_dict()]
    assert [name for name, _ in running.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert running.state_dict().keys() - plain.state_dict().keys() == {
        f"attention.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_running_statistics_are_taken_in_in_training_only_and_kept():
    layer = layer_of(3, attention_norm="running")
    x, other = volume(3), volume(3)
    untrained = layer.eval().mixing_weights(x)
    assert torch.equal(untrained, layer.mixing_weights(x))
    trained = layer.train().mixing_weights(x)
    assert (trained - untrained).abs().max() > 1e-3
    layer.eval()
    assert torch.equal(layer.mixing_weights(x), trained)
    layer.mixing_weights(other)
    assert torch.equal(layer.mixing_weights(x), trained)
    fresh = layer_of(3, attention_norm="running")
    fresh.load_state_dict(layer.state_dict())
    for twin in (fresh.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    # Nothing is shared with the copy.
    copy.deepcopy(layer).train()(other)
    assert torch.equal(layer.mixing_weights(x), trained)
    layer.reset_parameters()
    assert layer.attention.norm.num_batches_tracked == 0


def test_running_statistics_in_float32_under_autocast():
    layer = layer_of(3, attention_norm="running").float()
    twin = copy.deepcopy(layer)
    x = volume(3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = layer.mixing_weights(x)
    assert torch.equal(weights, twin.mixing_weights(x))
    assert layer.attention.norm.running_mean.dtype == torch.float32
    assert torch.equal(layer.attention.norm.running_var, twin.attention.norm.running_var)


def test_a_compiled_layer_takes_the_same_statistics_in():
    layer = layer_of(3, attention_norm="running", attention_init="calibrated").float()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in (True, True, False):
        layer.train(mode)
        twin.train(mode)
        x = volume(3).float()
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    norm = layer.attention.norm
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_var, twin.attention.norm.running_var, rtol=1e-5, atol=1e-6)


def test_weights_without_statistics_turn_the_norm_off_and_those_with_them_on():
    old, new = (layer_of(3, attention_norm=norm) for norm in ("none", "running"))
    x = volume(3)
    new(x)
    with_norm = new.eval()(x)
    kept = copy.deepcopy(new.state_dict())
    # Weights that say nothing of the attention leave it as it is.
    new.load_state_dict({"bias": new.bias.detach().clone()}, strict=False)
    assert torch.equal(new(x), with_norm)

    new.load_state_dict(old.state_dict(), strict=True)
    for mode in (True, False):
        assert torch.equal(new.train(mode)(x), old(x))
    # So they are saved, and copied, as they came.
    assert new.state_dict().keys() == old.state_dict().keys()
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(x), old(x))

    new.load_state_dict(kept, strict=True)
    assert torch.equal(new.eval()(x), with_norm)
    del kept["attention.norm.running_var"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "attention.norm.running_var"'):
        new.load_state_dict(kept, strict=True)


def test_high_temperature_makes_the_weights_even():
    layer = MagicConv3d(64, 8, 3, mixing="released")
    x = torch.randn(2, 64, 6, 6, 6)
    even = torch.full((2, 4), 0.25)
    deviation = {}
    for temperature in (1, 30, 1e6):
        layer.attention.set_temperature(temperature)
        deviation[temperature] = (layer.mixing_weights(x) - even).abs().max().item()
    assert deviation[1] > 3 * deviation[30]
    assert deviation[1e6] < 1e-5


def test_temperature_is_saved():
    layer = layer_of(2, mixing="released")
    layer.attention.set_temperature(7)
    fresh = layer_of(2, mixing="released")
    assert fresh.attention.temperature == 30
    fresh.load_state_dict(layer.state_dict())
    assert fresh.attention.temperature == 7
    x = volume(2)
    assert torch.equal(fresh(x), layer(x))


def test_batch_norm_is_that_of_torch():
    """Running statistics in evaluation, none in training; two samples in training are their signs."""
    layer = layer_of(3, kr_norm="batch", n_kernels=4)
    norm = layer.attention.recalculation[1]
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = volume(3, batch=2)
    layer.mixing_weights(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0][0].mean(0), rtol=0, atol=1e-12)
    normalised = (seen[0][1] - norm.bias) / norm.weight
    torch.testing.assert_close(normalised.abs(), torch.ones_like(normalised), rtol=0, atol=1e-3)
    layer.eval()
    one = layer.mixing_weights(x[:1])
    torch.testing.assert_close(layer.mixing_weights(x)[:1], one, rtol=0, atol=1e-12)


def test_autocast_at_128():
    layer = MagicConv3d(16, 4, 3, stride=4, padding=1)
    x = torch.randn(1, 16, 128, 128, 128)
    # A feature map is not noise: a bright corner gives the softmax over voxels something to find.
    x[:, ::2, :40, :40, :40] += 2
    with torch.no_grad():
        weights, output = layer.mixing_weights(x), layer(x)
        for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
            with torch.autocast("cpu", dtype=dtype):
                assert (layer.mixing_weights(x) - weights).abs().max() <= 1e-6
                half = layer(x.to(dtype))
                assert (layer.mixing_weights(x.to(dtype)) - weights).abs().max() <= tolerance
            assert half.dtype == dtype
            assert (half.float() - output).norm() <= 1e-2 * output.norm()


def test_kernels_are_mixed_in_float32_under_autocast():
    layer = MagicConv2d(16, 6, 3)
    weights = layer.mixing_weights(volume(2).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernels, bias = layer._mixed(weights)
    expected = torch.einsum("bk,k...->b...", weights.double(), layer.weight.double().unflatten(0, (4, 6)))
    assert kernels.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(kernels.double(), expected, rtol=0, atol=1e-6)


# The first is in the networks of test_compiled_networks.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"mixing": "released", "kr_norm": "batch"},
        {"attention": "condconv", "attention_norm": "layer"},
    ],
    ids=str,
)
def test_compiles_as_one_graph(options: dict[str, Any]):
    layer = layer_of(3, **options).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = volume(3).float()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strict", "norm"),
    [
        (True, "running"),
        *(pytest.param(True, norm, marks=pytest.mark.slow) for norm in ("none", "layer")),
        *((False, norm) for norm in ("none", "running", "layer")),
    ],
)
def test_exports_at_batch_1(strict: bool, norm: str):
    layer = layer_of(3, attention_norm=norm)
    layer(volume(3))
    layer.eval()
    x = volume(3, batch=1)
    exported = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=0, atol=1e-12)


def test_copies_give_the_same_output():
    layer = layer_of(3)
    x = volume(3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_the_whole_layer_runs_in_half_precision():
    layer = MagicConv3d(16, 6, 3, padding=1)
    x = volume(3).float()
    expected = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.03 * expected.norm()


def test_a_batch_of_one_in_training_is_named_where_batch_norm_cannot_take_it():
    layer = layer_of(3, kr_norm="batch")
    with pytest.raises(ValueError, match=r"at least 2 samples in training, got a batch of 1; use kr_norm='none'"):
        layer(volume(3, batch=1))
    layer.eval()
    assert layer(volume(3, batch=1)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 8, 3), {}, "in_channels=8 must be more than reduction=8; use a plain convolution"),
        ((16, 8, 3), {"reduction": 16}, "in_channels=16 must be more than reduction=16"),
        ((16, 8, 3), {"reduction": 0}, "must be more than reduction=0"),
        ((8, 8, 3), {"attention": "dyconv"}, "in_channels=8 must be more than reduction=8"),
        ((16, 8, 3), {"n_kernels": 0}, "n_kernels=0 must be at least 1"),
        ((16, 8, 3), {"groups": 3}, "groups=3 must divide in_channels=16 and out_channels=8"),
        ((16, 9, 3), {"groups": 2}, "groups=2 must divide in_channels=16 and out_channels=9"),
        ((16, 8, 3), {"attention": "odconv"}, "attention='odconv' must be one of 'magic', 'dyconv', 'condconv', 'unif"),
        ((16, 8, 3), {"mixing": "code"}, "mixing='code' must be one of 'paper', 'released'"),
        ((16, 8, 3), {"kr_norm": "layer"}, "kr_norm='layer' must be one of 'none', 'batch'"),
        ((16, 8, 3), {"attention_norm": "batch"}, "attention_norm='batch' must be one of 'none', 'running', 'layer'"),
        ((16, 8, 3), {"attention_init": "he"}, "attention_init='he' must be one of 'released', 'calibrated'"),
        ((16, 8, 3), {"init": "he"}, "init='he' must be one of 'released', 'compensated'"),
        ((16, 8, 3), {"conv_impl": "fold"}, "conv_impl='fold' must be one of 'auto', 'grouped', 'loop'"),
        ((16, 8, 3), {"temperature": 0.0}, r"temperature=0.0 must be positive"),
        ((16, 8, 3), {"bottleneck": 0.01}, "bottleneck=0.01 of 16 channels leaves none"),
        ((16, 8, 3), dict.fromkeys(["use_spatial", "use_channel", "use_global"], False), "are all False"),
        ((16, 8, (3, 3)), {}, r"kernel_size=\(3, 3\) has 2 values, but there are 3 axes"),
    ],
    ids=str,
)
def test_bad_options_are_named(arguments: tuple, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MagicConv3d(*arguments, **options)
