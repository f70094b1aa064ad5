"""ODConv: the released equations, its counts, and what a norm in front and behind does to it."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamic_cases import (
    CONV,
    RESNET18,
    RESNET18_STATIC,
    assert_same_gradients,
    behind_a_norm,
    count,
    normalised,
    stirred,
    volume,
)
from torch import Tensor, nn

from nnunet_deform.layers import ODConv, ODConv2d, ODConv3d

LAYER = {2: ODConv2d, 3: ODConv3d}


def attentions(p: dict[str, Tensor], x: Tensor, temperature: float, norm: str) -> dict[str, Tensor]:
    """By name, of a layer in training that has seen this batch only."""
    z = x.flatten(2).mean(2) @ p["attention.squeeze.weight"].T
    if norm == "layer":
        mean = z.mean(1, keepdim=True)
        z = (z - mean) / torch.sqrt(((z - mean) ** 2).mean(1, keepdim=True) + 1e-5)
    elif norm != "none":
        # "running" takes the statistics for constants.
        source = z.detach() if norm == "running" else z
        mean = source.mean(0)
        z = (z - mean) / torch.sqrt(((source - mean) ** 2).mean(0) + 1e-5)
    z = (z * p["attention.affine.weight"] + p["attention.affine.bias"]).clamp(min=0)
    found = {}
    for name in ("channel", "filter", "spatial", "kernel"):
        if f"attention.{name}.weight" in p:
            logits = (z @ p[f"attention.{name}.weight"].T + p[f"attention.{name}.bias"]) / temperature
            found[name] = logits.softmax(1) if name == "kernel" else 1 / (1 + torch.exp(-logits))
    return found


def released(p: dict[str, Tensor], x: Tensor, found: dict[str, Tensor], n_kernels: int, geometry: dict) -> Tensor:
    """As the released code: channels scaled before the convolution, filters behind it, taps and kernels in between."""
    ndim, outputs = x.ndim - 2, []
    kernels = p["weight"].unflatten(0, (n_kernels, -1))
    for b, sample in enumerate(x):
        shares = found["kernel"][b] if "kernel" in found else torch.ones(1, dtype=x.dtype)
        kernel = sum(share * one for share, one in zip(shares, kernels, strict=True))
        if "spatial" in found:
            kernel = kernel * found["spatial"][b].view(kernel.shape[2:])
        if "channel" in found:
            sample = sample * found["channel"][b].view(-1, *[1] * ndim)
        output = CONV[ndim](sample.unsqueeze(0), kernel, **geometry)
        if "bias" in p:
            biases = p["bias"].unflatten(0, (n_kernels, -1))
            bias = sum(share * one for share, one in zip(shares, biases, strict=True))
            output = output + bias.view(-1, *[1] * ndim)
        if "filter" in found:
            output = output * found["filter"][b].view(-1, *[1] * ndim)
        outputs.append(output)
    return torch.cat(outputs)


EQUATIONS = [
    pytest.param({}, id="4"),
    pytest.param({"n_kernels": 1}, id="1"),
    pytest.param({"n_kernels": 2, "attention_norm": "batch"}, id="2-batch"),
    pytest.param({"n_kernels": 3, "attention_norm": "layer"}, id="3-layer"),
    pytest.param({"n_kernels": 8, "attention_norm": "none"}, id="8-none"),
    pytest.param({"stride": 2, "bias": False}, id="strided-no-bias"),
    pytest.param({"dilation": 2, "padding": 2, "temperature": 30.0, "conv_impl": "loop"}, id="dilated-T30-loop"),
    pytest.param({"kernel_size": 1, "padding": 0}, id="pointwise"),
    pytest.param({"kernel_size": 1, "padding": 0, "n_kernels": 1}, id="pointwise-1"),
    pytest.param({"kernel_size": 5, "padding": 2}, id="5"),
    pytest.param({"kernel_size": 2}, id="even"),
    pytest.param({"groups": 4}, id="groups"),
    pytest.param({"groups": 8, "out": 8}, id="depthwise"),
    pytest.param({"groups": 8, "out": 16, "n_kernels": 1}, id="depthwise-multiplied"),
    pytest.param({"channels": 80, "reduction": 4}, id="wide-squeeze"),
    pytest.param({"use_channel": False}, id="no-channel"),
    pytest.param({"use_filter": False}, id="no-filter"),
    pytest.param({"use_spatial": False}, id="no-spatial"),
    pytest.param({"use_channel": False, "use_filter": False}, id="neither"),
]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("options", EQUATIONS)
def test_equations_and_every_gradient(ndim: int, options: dict[str, Any]):
    options = {"kernel_size": 3, "padding": 1, "channels": 8, "out": 12, **options}
    channels, out = options.pop("channels"), options.pop("out")
    layer = stirred(LAYER[ndim](channels, out, **options).double())
    x = volume(ndim, channels).requires_grad_()
    parameters = dict(layer.named_parameters())
    found = attentions(parameters, x, options.get("temperature", 1.0), options.get("attention_norm", "running"))
    ours = layer.attention(x)._asdict()
    for name, expected in found.items():
        torch.testing.assert_close(ours.pop(name), expected, rtol=0, atol=1e-12)
    assert all(value is None or torch.equal(value, torch.ones_like(value)) for value in ours.values())
    # Of the same batch twice the running statistics are the batch's.
    geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    theirs = released(parameters, x, found, layer.n_kernels, geometry)
    assert_same_gradients(layer(x), theirs, {"input": x, **parameters})


def test_in_evaluation_running_is_batch_norms_formula_with_the_same_statistics():
    running, batch = (stirred(ODConv2d(8, 6, 3, attention_norm=norm).double()) for norm in ("running", "batch"))
    batch.load_state_dict(running.state_dict())
    for layer in (running, batch):
        layer.attention.norm.running_mean.copy_(torch.arange(16.0) / 100)
        layer.attention.norm.running_var.copy_(0.5 + torch.arange(16.0) / 16)
    x = volume(2)
    torch.testing.assert_close(running.eval()(x), batch.eval()(x), rtol=0, atol=1e-12)
    # Running statistics of BatchNorm are torch's.
    batch.train()(x)
    z = x.flatten(2).mean(2) @ batch.attention.squeeze.weight.T
    expected = 0.9 * (0.5 + torch.arange(16.0) / 16) + 0.1 * z.var(0)
    torch.testing.assert_close(batch.attention.norm.running_var, expected, rtol=0, atol=1e-6, check_dtype=False)


def parameters_of(channels: int, out: int, taps: int, n_kernels: int, groups: int, bias: bool, reduction: int) -> int:
    hidden = max(channels // reduction, 16)
    total = n_kernels * out * (channels // groups) * taps + bias * n_kernels * out
    total += channels * hidden + 2 * hidden + (hidden + 1) * channels
    total += (hidden + 1) * out if not groups == channels == out else 0
    total += (hidden + 1) * taps if taps > 1 else 0
    return total + ((hidden + 1) * n_kernels if n_kernels > 1 else 0)


@pytest.mark.parametrize("norm", ["running", "batch", "layer", "none"])
@pytest.mark.parametrize("n_kernels", [1, 4])
@pytest.mark.parametrize(
    ("channels", "out", "groups"), [(64, 64, 1), (320, 256, 1), (32, 32, 32), (32, 64, 32), (64, 32, 4)]
)
def test_parameter_formula(channels: int, out: int, groups: int, n_kernels: int, norm: str):
    for kernel, reduction, bias in ((1, 16, False), (3, 16, True), ((1, 3, 3), 4, True)):
        with torch.device("meta"):
            options = {"groups": groups, "bias": bias, "n_kernels": n_kernels, "reduction": reduction}
            layer = ODConv3d(channels, out, kernel, attention_norm=norm, **options)
        taps = math.prod(layer.kernel_size)
        assert count(layer) == parameters_of(channels, out, taps, n_kernels, groups, bias, reduction)


# Counted with the released code, but for those of three axes.
@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((64, 64, 3), {}, 150_909),
        ((64, 64, 1), {"groups": 64, "n_kernels": 1}, 2_208),
        ((64, 64, 1), {"groups": 64}, 2_468),
        ((64, 64, 3), {"groups": 64, "n_kernels": 1}, 2_873),
        ((64, 64, 3), {"groups": 64}, 4_669),
        ((32, 64, 1), {"n_kernels": 1}, 4_224),
        ((32, 64, 1), {}, 10_436),
        ((16, 16, 3), {"n_kernels": 1}, 3_289),
        ((16, 16, 3), {}, 10_269),
        ((32, 32, (3, 3, 3)), {"n_kernels": 1, "bias": True}, 29_771),
        ((32, 32, (3, 3, 3)), {"bias": True}, 112_879),
    ],
    ids=str,
)
def test_parameters(arguments: tuple, options: dict[str, Any], expected: int):
    layer = ODConv3d if isinstance(arguments[2], tuple) else ODConv2d
    with torch.device("meta"):
        assert count(layer(*arguments, **{"bias": False, **options})) == expected


@pytest.mark.parametrize(("n_kernels", "added"), [(1, 254_432), (2, 11_240_544), (4, 33_212_128)])
def test_the_sixteen_convolutions_of_resnet18(n_kernels: int, added: int):
    with torch.device("meta"):
        total = sum(count(ODConv2d(i, o, 3, bias=False, n_kernels=n_kernels)) for i, o in RESNET18)
    assert total - RESNET18_STATIC == added


def test_flat_kernels_have_nine_taps_and_pointwise_ones_no_spatial_attention():
    assert ODConv3d(8, 8, (1, 3, 3)).attention.spatial.out_features == 9
    assert ODConv3d(8, 8, 3).attention.spatial.out_features == 27
    assert ODConv3d(8, 8, 1).attention.spatial is None


def with_attention(layer: ODConv, **replaced: Any) -> ODConv:
    """A copy with some of its attentions replaced by functions of themselves."""
    twin = copy.deepcopy(layer)
    twin.attention.register_forward_hook(
        lambda module, inputs, found: found._replace(**{k: f(getattr(found, k)) for k, f in replaced.items()})
    )
    return twin


def test_what_a_norm_behind_it_divides_out():
    torch.manual_seed(0)
    layer = ODConv2d(16, 16, 3, padding=1).double()
    x = behind_a_norm(8, 16, (7, 6))
    layer(x)
    layer.eval()
    raw, output = layer(x), normalised(layer(x))

    def change(**replaced: Any) -> float:
        return (normalised(with_attention(layer, **replaced)(x)) - output).abs().max().item()

    assert (with_attention(layer, filter=torch.ones_like)(x) - raw).abs().max() > 0.1 * raw.abs().max()
    assert change(filter=torch.ones_like) < 1e-10
    # A factor of the sample goes as well; ratios stay.
    assert change(channel=lambda c: c * torch.linspace(0.5, 2, 8)[:, None]) < 1e-10
    assert change(spatial=lambda s: s * torch.linspace(0.5, 2, 8)[:, None]) < 1e-10
    assert change(kernel=lambda a: torch.full_like(a, 0.25)) > 0.1
    assert change(channel=lambda c: c.mean(1, keepdim=True).expand_as(c)) > 0.1
    assert change(spatial=lambda s: s.mean(1, keepdim=True).expand_as(s)) > 0.1
    (normalised(layer(x)) * torch.randn_like(output)).mean().backward()
    assert layer.attention.filter.weight.grad.norm() < 1e-10
    assert layer.attention.kernel.weight.grad.norm() > 1e-4


def test_standardised_over_samples_it_sees_differences_that_a_norm_in_front_leaves():
    """A random network with InstanceNorm; the spread over samples of the mixing weights, mean over layers."""
    torch.manual_seed(1)
    sharp = torch.randn(48, 1, 32, 32)
    smooth = F.interpolate(torch.randn(48, 1, 4, 4), size=32, mode="bilinear", align_corners=True)
    images = torch.rand(48, 1, 1, 1) * sharp + 3 * torch.rand(48, 1, 1, 1) * smooth
    images = images.sign() * images.abs() ** (0.5 + 1.5 * torch.rand(48, 1, 1, 1))
    spreads: dict[str, list[float]] = {"running": [], "layer": []}
    x, channels = images, 1
    for _ in range(6):
        x = F.conv2d(x, torch.randn(16, channels, 3, 3) * math.sqrt(2 / (9 * channels)), padding=1)
        x, channels = F.leaky_relu(F.instance_norm(x), 0.01), 16
        for norm, found in spreads.items():
            torch.manual_seed(2)
            layer = ODConv2d(16, 16, 3, attention_norm=norm)
            with torch.no_grad():
                layer.mixing_weights(x[:24])
                found.append(layer.eval().mixing_weights(x[24:]).std(0).mean().item())
    assert sum(spreads["running"]) >= 5 * sum(spreads["layer"])
    assert sum(spreads["running"]) / 6 > 0.05


def test_evaluation_right_after_a_step_is_the_same_function_and_its_statistics_are_kept():
    layer = stirred(ODConv3d(8, 6, 3, padding=1))
    x = volume(3).float()
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=0, atol=1e-6)
    fresh = ODConv3d(8, 6, 3, padding=1).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in layer.modules())


def test_initial_state():
    layer = ODConv2d(64, 48, 3, n_kernels=3)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (48 * 9)), rel=0.02)
    assert layer.bias.count_nonzero() == 0
    # Kaiming normal by fan-out.
    assert layer.attention.squeeze.weight.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.1)
    assert layer.attention.channel.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    c, f, s, a = layer.attention(torch.randn(4, 64, 9, 9))
    for gate in (c, f, s):
        assert gate.mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(a.sum(1), torch.ones(4))


def test_a_batch_of_one_in_training_is_named_where_batch_norm_cannot_take_it():
    layer = ODConv3d(8, 6, 3, attention_norm="batch")
    message = "attention_norm='batch' needs at least 2 samples in training, got a batch of 1; use attention_norm='run"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 8, 3, 4, 5))
    assert layer.eval()(torch.randn(1, 8, 3, 4, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_norm": "instance"},
            "attention_norm='instance' must be one of 'running', 'batch', 'layer', 'none'",
        ),
        ({"n_kernels": 0}, "n_kernels=0 must be at least 1"),
        ({"groups": 3}, "groups=3 must divide in_channels=8 and out_channels=6"),
        ({"reduction": 0}, "reduction=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"conv_impl": "fold"}, "conv_impl='fold' must be one of 'auto', 'grouped', 'loop'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ODConv3d(8, 6, 3, **options)
