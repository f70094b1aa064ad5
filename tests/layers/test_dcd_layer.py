"""DCD: the paper's equation and the released code's, its counts, and what a norm behind it does to it."""

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
from torch import Tensor

from nnunet_deform.layers import DCD, DCD2d, DCD3d
from nnunet_deform.layers.dcd import cell_means

LAYER = {2: DCD2d, 3: DCD3d}
POOL = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def hard_gate(t: Tensor) -> Tensor:
    return (t + 3).clamp(0, 6) / 3


def fusion(p: dict[str, Tensor], x: Tensor, cells: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    u = POOL[x.ndim - 2](x, cells).flatten(1) @ p["squeeze.weight"].T
    y = hard_gate(u @ p["gate.weight"].T) * u
    latent = p["compress.weight"].shape[0]
    return hard_gate(y @ p["to_lambda.weight"].T), (y @ p["to_phi.weight"].T).view(len(x), latent, latent)


def released(p: dict[str, Tensor], x: Tensor, cells: tuple[int, ...], norm: str, geometry: dict) -> Tensor:
    """By feature maps, as in the released code: two norms and a skip between Q and P."""
    ndim = x.ndim - 2
    scale, phi = fusion(p, x, cells)
    static = CONV[ndim](x, p["weight"], **geometry)

    def normed(v: Tensor, number: int) -> Tensor:
        if norm == "batch":
            mean = v.mean((0, 2), keepdim=True)
            v = (v - mean) / torch.sqrt(((v - mean) ** 2).mean((0, 2), keepdim=True) + 1e-5)
        return v * p[f"norm{number}.weight"][:, None] + p[f"norm{number}.bias"][:, None]

    stride = geometry["stride"]
    strided = x[(..., *(slice(None, None, step) for step in stride))].flatten(2)
    v = normed(torch.einsum("lc,bcv->blv", p["compress.weight"], strided), 1)
    residual = normed(torch.einsum("blm,bmv->blv", phi, v), 2) + v
    residual = torch.einsum("ol,blv->bov", p["expand.weight"], residual).unflatten(2, static.shape[2:])
    output = static * scale.view(*scale.shape, *[1] * ndim) + residual
    return output + p["bias"].view(-1, *[1] * ndim) if "bias" in p else output


EQUATIONS = [
    pytest.param({}, id="basic"),
    pytest.param({"stride": 2, "bias": False}, id="strided-no-bias"),
    pytest.param({"dilation": 2, "padding": 2}, id="dilated"),
    pytest.param({"kernel_size": 1, "padding": 0}, id="pointwise"),
    pytest.param({"kernel_size": 1, "padding": 0, "pool": 2, "latent": 4, "squeeze": 5}, id="mobile"),
    pytest.param({"latent": 2, "squeeze": 4, "pool": 1}, id="bottleneck"),
    pytest.param({"kernel_size": 5, "padding": 2, "conv_impl": "loop"}, id="5-loop"),
]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("options", EQUATIONS)
def test_equations_and_every_gradient(ndim: int, norm: str, options: dict[str, Any]):
    options = {"kernel_size": 3, "padding": 1, **options}
    layer = stirred(LAYER[ndim](8, 6, residual_norm=norm, **options).double(), 0.2)
    x = volume(ndim).requires_grad_()
    parameters = dict(layer.named_parameters())
    for found, expected in zip(layer.fusion(x), fusion(parameters, x, layer.cells), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
    assert_same_gradients(
        layer(x), released(parameters, x, layer.cells, norm, geometry), {"input": x, **parameters}, tolerance=1e-8
    )


def test_one_kernel_is_the_papers_equation():
    layer = stirred(DCD2d(8, 6, 3, padding=1, bias=False).double())
    with torch.no_grad():
        layer.norm1.bias.zero_(), layer.norm2.bias.zero_(), layer.norm1.weight.fill_(1), layer.norm2.weight.fill_(1)
    x = volume(2)
    scale, phi = layer.fusion(x)
    expected = scale[:, :, None, None, None] * layer.weight
    # With the released code's skip.
    residual = layer.expand.weight @ (phi + torch.eye(layer.latent)) @ layer.compress.weight
    expected[:, :, :, 1, 1] = expected[:, :, :, 1, 1] + residual
    kernels, bias = layer.kernels(x)
    torch.testing.assert_close(kernels, expected, rtol=0, atol=1e-12)
    assert torch.equal(bias, torch.zeros(3, 6, dtype=torch.float64))


def test_in_evaluation_batch_norm_is_a_factor_and_an_offset():
    layer = stirred(DCD3d(8, 6, (1, 3, 3), 2, (0, 1, 1), residual_norm="batch").double(), 0.2)
    x = volume(3)
    layer(x)
    layer.eval()
    parameters = dict(layer.named_parameters())
    scale, phi = layer.fusion(x)
    static = F.conv3d(x, layer.weight, None, layer.stride, layer.padding)
    v = torch.einsum("lc,bcv->blv", layer.compress.weight, x[..., ::2, ::2, ::2].flatten(2))
    residual = layer.norm2(phi @ layer.norm1(v)) + layer.norm1(v)
    residual = torch.einsum("ol,blv->bov", layer.expand.weight, residual).view_as(static)
    expected = static * scale[..., None, None, None] + residual + parameters["bias"].view(-1, 1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)
    # Without statistics it is "none".
    for norm in (layer.norm1, layer.norm2):
        norm.reset_running_stats()
    none = DCD3d(8, 6, (1, 3, 3), 2, (0, 1, 1)).double()
    none.load_state_dict(parameters, strict=True)
    torch.testing.assert_close(layer(x), none(x), rtol=1e-4, atol=1e-4)


def test_cells():
    x = torch.randn(2, 3, 5, 4, 1, dtype=torch.float64)
    for cells in ((1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)):
        torch.testing.assert_close(cell_means(x, cells), F.adaptive_avg_pool3d(x, cells), rtol=0, atol=1e-14)
    # 70,000 ones do not add up in float16.
    assert cell_means(torch.ones(1, 1, 70_000, 2, dtype=torch.float16), (2, 1)).eq(1).all()
    assert cell_means(torch.ones(1, 1, 4, 4, dtype=torch.bfloat16), (2, 2)).dtype == torch.float32


# Channels, L and s.
SIZES = [(32, 11, 8), (64, 16, 16), (128, 22, 32), (256, 32, 64), (320, 35, 80), (512, 45, 128)]


@pytest.mark.parametrize(("channels", "latent", "squeeze"), SIZES)
def test_sizes_by_the_rule_for_3x3(channels: int, latent: int, squeeze: int):
    with torch.device("meta"):
        for layer, kernel, cells in ((DCD2d, 3, 4), (DCD3d, 3, 8), (DCD3d, (1, 3, 3), 4), (DCD2d, 1, 1)):
            dcd = layer(channels, 8, kernel, padding=_same(kernel, layer))
            assert (dcd.latent, dcd.squeeze.out_features) == (latent, squeeze)
            assert dcd.squeeze.in_features == cells * channels


def _same(kernel: int | tuple[int, ...], layer: type[DCD]) -> tuple[int, ...]:
    sizes = (kernel,) * layer.ndim if isinstance(kernel, int) else kernel
    return tuple(k // 2 for k in sizes)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(
    ("channels", "out", "added"),
    [
        (64, 64, 11_584),
        (64, 128, 13_632),
        (128, 128, 42_712),
        (128, 256, 49_624),
        (256, 256, 168_064),
        (256, 512, 192_640),
        (512, 512, 649_524),
    ],
)
def test_parameters_beyond_a_static_convolution(channels: int, out: int, added: int, norm: str):
    with torch.device("meta"):
        layer = DCD2d(channels, out, 3, padding=1, bias=False, residual_norm=norm)
    assert count(layer) - 9 * channels * out == added


@pytest.mark.parametrize(
    ("channels", "kernel", "bias", "expected"),
    [
        (32, (3, 3, 3), True, 31_764),
        (64, (3, 3, 3), True, 126_336),
        (320, (3, 3, 3), True, 3_122_460),
        (320, (1, 3, 3), False, 1_176_540),
    ],
)
def test_parameters_in_3d(channels: int, kernel: tuple[int, ...], bias: bool, expected: int):
    with torch.device("meta"):
        assert count(DCD3d(channels, channels, kernel, padding=_same(kernel, DCD3d), bias=bias)) == expected


def test_parameter_formula():
    for latent, squeeze, pool in ((None, None, None), (4, 5, 2), (3, 7, 1)):
        with torch.device("meta"):
            layer = DCD3d(24, 20, 3, padding=1, latent=latent, squeeze=squeeze, pool=pool)
        n_latent, width, cells = latent or 9, squeeze or 6, 1 if pool == 1 else 8
        expected = 20 * 24 * 27 + 20 + 24 * n_latent + n_latent * 20 + 4 * n_latent
        expected += cells * 24 * width + width**2 + width * n_latent**2 + width * 20
        assert count(layer) == expected


def test_the_sixteen_convolutions_of_resnet18():
    with torch.device("meta"):
        total = sum(count(DCD2d(i, o, 3, padding=1, bias=False)) for i, o in RESNET18)
        assert total - RESNET18_STATIC == 2_883_132
        # MAGIC's table has 15.86 M, which only the mobile networks' sizes with a squeeze of a quarter give.
        total = 0
        for i, o in RESNET18:
            cells, rho = (4, 8) if i < o else (1, 2)
            while (min(cells * i, o) // rho) ** 2 > 2 * cells * i:
                rho *= 2
            latent = max(min(cells * i, o) // rho, 4)
            sizes = {"latent": latent, "squeeze": max(cells * i, latent**2) // 4, "pool": 2 if cells == 4 else 1}
            total += count(DCD2d(i, o, 3, padding=1, bias=False, **sizes))
    assert total - RESNET18_STATIC == 3_523_776


def test_what_a_norm_behind_it_divides_out():
    torch.manual_seed(0)
    layer = DCD2d(16, 16, 3, padding=1).double()
    x = behind_a_norm(8, 16, (7, 6))
    x = x * torch.linspace(0.5, 4, 8)[:, None, None, None]
    scale, phi = layer.fusion(x)
    assert (scale - 1).abs().max() > 0.03
    with_lambda = normalised(layer(x))
    layer.fusion = lambda x: (torch.ones_like(scale), phi)
    assert (normalised(layer(x)) - with_lambda).abs().max() > 1e-2
    with torch.no_grad():
        layer.expand.weight.zero_()
    without = normalised(layer(x))
    layer.fusion = lambda x: (scale, phi)
    assert (normalised(layer(x)) - without).abs().max() < 1e-10


def test_mirrored_patches_get_other_kernels_unless_there_is_one_cell():
    x = volume(3)
    for pool, same in ((1, True), (None, False)):
        layer = stirred(DCD3d(8, 6, 3, padding=1, pool=pool).double())
        difference = (layer.fusion(x.flip(2, 4))[1] - layer.fusion(x)[1]).abs().max()
        assert difference < 1e-12 if same else difference > 1e-3


@pytest.mark.parametrize("channels", [32, 64, 320])
def test_both_terms_start_at_the_same_size(channels: int):
    torch.manual_seed(0)
    layer = DCD2d(channels, channels, 3, padding=1)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * channels)), rel=0.02)
    x = behind_a_norm(2, channels, (12, 12)).float()
    with torch.no_grad():
        static = F.conv2d(x, layer.weight, padding=1).std()
        layer.weight.zero_()
        residual = layer(x).std()
        phi = layer.fusion(x)[1]
    assert 0.7 < static < 1.3
    assert 0.7 < residual < 1.6
    assert 0.02 < phi.square().mean().sqrt() < 0.3


def test_one_voxel_in_training_is_named_where_batch_norm_cannot_take_it():
    layer = DCD3d(8, 6, 3, padding=1, residual_norm="batch")
    message = "residual_norm='batch' needs several samples or voxels in training, got a batch of 1 with an output of 1"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 8, 1, 1, 1))
    assert layer(torch.randn(2, 8, 1, 1, 1)).isfinite().all()
    assert layer.eval()(torch.randn(1, 8, 1, 1, 1)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups=2 must be 1 for DCD3d: its residual joins all channels; use a plain convolution here"),
        ({"kernel_size": (3, 3, 2)}, r"kernel_size=\(3, 3, 2\) must be odd on every axis for DCD3d"),
        (
            {"padding": 0},
            r"padding=\(0, 0, 0\) must be \(1, 1, 1\) for DCD3d with kernel_size=\(3, 3, 3\) and dilation=",
        ),
        ({"dilation": 2}, r"padding=\(1, 1, 1\) must be \(2, 2, 2\) for DCD3d"),
        ({"pool": 3}, "pool=3 must be 1 or 2 on every axis"),
        ({"latent": 0}, "latent=0 must be at least 1"),
        ({"squeeze": 0}, "squeeze=0 must be at least 1"),
        ({"residual_norm": "instance"}, "residual_norm='instance' must be one of 'none', 'batch'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DCD3d(8, 6, **{"kernel_size": 3, "padding": 1, **options})
