"""DDConv: its equations by sampling voxel by voxel, its counts, its two forms, and its controls."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamic_cases import (
    RESNET18,
    RESNET18_STATIC,
    assert_same_gradients,
    behind_a_norm,
    count,
    normalised,
    stirred,
)
from torch import Tensor, nn

from nnunet_deform.layers import DDConv2d, DDConv3d
from nnunet_deform.ops import dynamic_conv3d

LAYER = {2: DDConv2d, 3: DDConv3d}
SIZE = {2: (4, 5), 3: (2, 4, 3)}


def volume(ndim: int, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *SIZE[ndim], dtype=torch.float64)


def sampled(x: Tensor, positions: Tensor) -> Tensor:
    """All channels of one sample [C, *spatial] at positions [N, ndim], linear in between, zero outside: [C, N]."""
    floor = positions.detach().floor()
    total = torch.zeros(len(x), len(positions), dtype=x.dtype)
    for corner in itertools.product((0, 1), repeat=positions.shape[1]):
        voxels = floor + torch.tensor(corner)
        share = (1 - (positions - voxels).abs()).prod(1)
        inside = ((voxels >= 0) & (voxels < torch.tensor(x.shape[1:]))).all(1)
        index = (voxels * inside[:, None]).long().unbind(1)
        total = total + x[(slice(None), *index)] * share * inside
    return total


def oracle(layer: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """One sample at a time."""
    ndim, n_kernels = x.ndim - 2, layer.n_kernels
    axes = [axis for axis, k in enumerate(layer.kernel_size) if k > 1]
    conv = F.conv2d if ndim == 2 else F.conv3d
    outputs = []
    for sample in x:
        means = sample.flatten(1).mean(1)

        def gates(name: str, means: Tensor) -> Tensor:
            if n_kernels == 1:
                return torch.ones(1, dtype=x.dtype)
            return 1 / (1 + torch.exp(-(p[f"{name}.weight"] @ means + p[f"{name}.bias"])))

        kernels = p["offset_weight"].unflatten(0, (n_kernels, -1))
        kernel = sum(gate * one for gate, one in zip(gates("offset_gates", means), kernels, strict=True))
        padding = [k // 2 for k in kernel.shape[2:]]
        offset = conv(sample.unsqueeze(0), kernel, p["offset_bias"], layer.stride, padding)[0]
        if layer.offset_clamp is not None:
            offset = offset.clamp(-layer.offset_clamp, layer.offset_clamp)
        offset = offset.unflatten(0, (-1, len(axes)))
        taps = list(itertools.product(*map(range, layer.kernel_size)))
        moved = [offset[:, axes.index(a)] if a in axes else 0 * offset[:, 0] for a in range(ndim)]
        moved = torch.stack(moved, -1).flatten(1, -2)
        voxels = torch.tensor(list(itertools.product(*map(range, offset.shape[2:]))), dtype=x.dtype)
        stride, padding, dilation = (torch.tensor(v) for v in (layer.stride, layer.padding, layer.dilation))
        start = voxels * stride - padding + (torch.tensor(taps) * dilation).unsqueeze(1)
        columns = sampled(sample, (start + moved).flatten(0, 1)).unflatten(1, (len(taps), -1)).permute(2, 1, 0)
        routed = columns.mean((0, 1)) if layer.routing == "sampled" else means
        weights = p["weight"].unflatten(0, (n_kernels, -1)).flatten(3)
        weight = sum(gate * one for gate, one in zip(gates("kernel_gates", routed), weights, strict=True))
        output = torch.einsum("vtc,oct->ov", columns, weight)
        if "bias" in p:
            output = output + p["bias"][:, None]
        outputs.append(output.view(-1, *offset.shape[2:]))
    return torch.stack(outputs)


EQUATIONS = [
    pytest.param(2, {}, id="2d"),
    pytest.param(2, {"routing": "sampled", "stride": 2, "bias": False}, id="2d-sampled-strided"),
    pytest.param(2, {"n_kernels": 1, "offset_clamp": 0.3, "dilation": 2, "padding": 2}, id="2d-clamped-dilated-1"),
    pytest.param(3, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "routing": "sampled"}, id="flat-sampled"),
    pytest.param(3, {"n_kernels": 2, "stride": 2}, id="3d-strided"),
]


@pytest.mark.parametrize("conv_impl", ["loop", "grouped"])
@pytest.mark.parametrize(("ndim", "options"), EQUATIONS)
def test_equations_and_every_gradient(ndim: int, options: dict[str, Any], conv_impl: str):
    options = {"kernel_size": 3, "padding": 1, "n_kernels": 3, **options}
    layer = stirred(LAYER[ndim](3, 2, conv_impl=conv_impl, **options).double(), 0.2)
    x = volume(ndim).requires_grad_()
    parameters = dict(layer.named_parameters())
    assert_same_gradients(layer(x), oracle(layer, parameters, x), {"input": x, **parameters})


@pytest.mark.parametrize("routing", ["input", "sampled"])
def test_gradcheck(routing: str):
    layer = stirred(DDConv2d(2, 2, 3, padding=1, n_kernels=2, routing=routing).double(), 0.2)
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    # Each parameter has its oracle above.
    assert torch.autograd.gradcheck(function, (x, *(p for _, p in layer.named_parameters())), fast_mode=True)


def test_with_zero_offsets_it_is_a_dynamic_convolution():
    layer = DDConv3d(3, 4, 3, 2, 1).double()
    x = volume(3)
    assert layer.offsets(x).count_nonzero() == 0
    kernels, bias, _ = layer.kernels(x)
    torch.testing.assert_close(layer(x), dynamic_conv3d(x, kernels, bias, 2, 1), rtol=0, atol=1e-12)


def test_without_gates_it_is_a_deformable_convolution():
    layer = DDConv2d(3, 4, 3, padding=1, n_kernels=1)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "offset_weight", "offset_bias"]
    assert not layer.dynamic
    assert torch.equal(layer.mixing_weights(torch.randn(2, 3, 4, 5)), torch.ones(2, 1))


def test_flat_kernels_do_not_move_along_depth():
    layer = stirred(DDConv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)).double())
    assert len(layer.offset_bias) == 18
    assert layer.offset_weight.shape[2:] == (1, 3, 3)
    offsets = layer.offsets(volume(3)).unflatten(1, (9, 3))
    assert offsets[:, :, 0].count_nonzero() == 0
    assert (offsets[:, :, 1:] != 0).all()


def test_only_the_ratios_of_the_gates_pass_a_norm_behind_it():
    torch.manual_seed(0)
    layer = DDConv2d(8, 8, 3, padding=1, n_kernels=4).double()
    layer.reset_parameters()
    x = behind_a_norm(4, 8, (6, 7))
    kernels, _, _ = layer.kernels(x)
    with torch.no_grad():
        layer.offset_bias.uniform_(-0.5, 0.5)
    output = normalised(layer(x), eps=0)
    gates = layer._gates_and_offsets
    factor = torch.linspace(0.5, 2, 4)[:, None]
    layer._gates_and_offsets = lambda x: (gates(x)[0] * factor, *gates(x)[1:])
    assert (normalised(layer(x), eps=0) - output).abs().max() < 1e-12
    layer._gates_and_offsets = lambda x: (gates(x)[0] * torch.linspace(0.5, 2, 4), *gates(x)[1:])
    assert (normalised(layer(x), eps=0) - output).abs().max() > 0.1
    assert kernels.shape == (4, 8, 8, 3, 3)


def test_routing_dropout_is_for_training():
    layer = stirred(DDConv2d(8, 4, 3, padding=1, routing_dropout=0.5).double())
    x = volume(2, 8)
    assert not torch.equal(layer.mixing_weights(x), layer.mixing_weights(x))
    assert torch.equal(layer.eval().mixing_weights(x), layer.mixing_weights(x))


@pytest.mark.parametrize(
    ("arguments", "bias", "expected"),
    [
        ((64, 64, 3), False, 378_914),
        ((32, 32, (3, 3, 3)), True, 781_697),
        ((64, 64, (3, 3, 3)), True, 2_005_665),
        ((320, 320, (3, 3, 3)), True, 27_722_657),
    ],
)
def test_parameters(arguments: tuple, bias: bool, expected: int):
    with torch.device("meta"):
        layer = (DDConv3d if isinstance(arguments[2], tuple) else DDConv2d)(*arguments, padding=1, bias=bias)
    assert count(layer) == expected
    channels, out, taps, axes = layer.in_channels, layer.out_channels, layer.taps, layer.ndim
    formula = 8 * out * channels * taps + bias * out + 16 * (channels + 1)
    assert count(layer) == formula + 8 * axes * taps * channels * 3**axes + axes * taps
    if arguments[0] == 32:
        assert layer.offset_weight.numel() == 559_872


def test_the_sixteen_convolutions_of_resnet18():
    with torch.device("meta"):
        total = sum(count(DDConv2d(i, o, 3, padding=1, bias=False)) for i, o in RESNET18)
    assert total - RESNET18_STATIC == 81_349_152


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups=2 must be 1 for DDConv3d; use a plain convolution here"),
        ({"kernel_size": 4}, r"kernel_size=\(4, 4, 4\) must be odd on every axis for DDConv3d"),
        ({"padding": 0}, r"padding=\(0, 0, 0\) must be \(1, 1, 1\) for DDConv3d"),
        ({"routing": "output"}, "routing='output' must be one of 'input', 'sampled'"),
        ({"routing_dropout": 1.0}, "routing_dropout=1.0 must be at least 0 and less than 1"),
        ({"offset_clamp": 0.0}, "offset_clamp=0.0 must be positive, or None for no bound"),
        ({"offset_axes": (3,)}, r"offset_axes=\(3,\) must be 'auto', 'all' or ascending axes"),
        (
            {"kernel_size": 1, "padding": 0},
            r"kernel_size=\(1, 1, 1\) is 1 on every axis: with offset_axes='auto' no tap",
        ),
        ({"conv_impl": "auto"}, "conv_impl='auto' must be one of 'loop', 'grouped'"),
        ({"n_kernels": 0}, "n_kernels=0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DDConv3d(8, 6, **{"kernel_size": 3, "padding": 1, **options})
