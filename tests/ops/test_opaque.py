"""Steps that are one operation for compilers, against the same steps in torch's own operations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers.few_channels import NormAct, mixture
from nnunet_deform.layers.lightmed import GhostFeatures, SqueezeExcite
from nnunet_deform.layers.norm import ChannelLayerNorm, GroupNorm, InstanceNorm2d, InstanceNorm3d, normalized
from nnunet_deform.ops import (
    CHANNELS_LAST,
    concatenate_channels,
    opaque_ghost_features,
    opaque_group_norm,
    opaque_layer_norm,
    opaque_mixture,
    opaque_squeeze_excite,
)

SIZES = [(4, 5, 6), (7, 6)]
LAYOUTS = ["contiguous", "channels last"]
GROUPS = 2


def leaf(*shape: int, layout: str = "contiguous") -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64)
    if layout == "channels last":
        tensor = tensor.contiguous(memory_format=CHANNELS_LAST[tensor.ndim - 2])
    return tensor.requires_grad_()


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, gradient), torch.autograd.grad(theirs, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("activation", ["identity", "silu", "leaky_relu"])
def test_group_norm(size, layout, affine, added, activation):
    x, residual = leaf(2, 6, *size, layout=layout), leaf(2, 6, *size, layout=layout) if added else None
    weight, bias = (leaf(6), leaf(6)) if affine else (None, None)
    ours = opaque_group_norm(
        x, GROUPS, weight, bias, 1e-3, residual=residual, activation=activation, negative_slope=0.1
    )
    before = F.group_norm(x, GROUPS, weight, bias, 1e-3)
    before = before if residual is None else before + residual
    theirs = {"identity": before, "silu": F.silu(before), "leaky_relu": F.leaky_relu(before, 0.1)}[activation]
    assert ours.stride() == x.stride()
    assert_equal(ours, theirs, [tensor for tensor in (x, weight, bias, residual) if tensor is not None])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layer_norm(size):
    x, weight, bias = leaf(2, *size, 6), leaf(6), leaf(6)
    assert_equal(opaque_layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (6,), weight, bias, 1e-3), [x, weight, bias])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_excite(size, layout):
    leaves = [leaf(2, 6, *size, layout=layout), leaf(4, 6), leaf(4), leaf(6, 4), leaf(6)]
    x, squeeze, squeeze_bias, excite, excite_bias = leaves
    hidden = F.silu(F.linear(x.flatten(2).mean(2), squeeze, squeeze_bias))
    gate = F.linear(hidden, excite, excite_bias).sigmoid()
    ours = opaque_squeeze_excite(*leaves)
    assert ours.stride() == x.stride()
    assert_equal(ours, x * gate.view(2, 6, *[1] * len(size)), leaves)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [2, 3])
def test_mixture(size, layout, number):
    logits = leaf(2, number, *size, layout=layout)
    maps = [leaf(2, 6, *size, layout=layout) for _ in range(number)]
    shares = logits.softmax(1).split(1, dim=1)
    theirs = sum(share * one for share, one in zip(shares, maps, strict=True))
    assert_equal(opaque_mixture(logits, maps), theirs, [logits, *maps])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_ghost_features(size, stride):
    ndim = len(size)
    x, primary, ghost = leaf(2, 5, *size, layout="channels last"), leaf(4, 5, *[3] * ndim), leaf(4, 1, *[3] * ndim)
    conv = F.conv2d if ndim == 2 else F.conv3d
    first = conv(x, primary, None, stride, 1)
    theirs = torch.cat([first, conv(first, ghost, None, 1, 1, groups=4)], dim=1)
    ours = opaque_ghost_features(x, primary, ghost, [stride] * ndim, [1] * ndim)
    assert ours.is_contiguous(memory_format=CHANNELS_LAST[ndim])
    assert_equal(ours, theirs, [x, primary, ghost])


def test_ghost_features_of_an_image_that_needs_no_gradient():
    x, primary, ghost = leaf(2, 5, 7, 6).detach(), leaf(4, 5, 3, 3), leaf(4, 1, 3, 3)
    first = F.conv2d(x, primary, None, 1, 1)
    theirs = torch.cat([first, F.conv2d(first, ghost, None, 1, 1, groups=4)], dim=1)
    assert_equal(opaque_ghost_features(x, primary, ghost, [1, 1], [1, 1]), theirs, [primary, ghost])


def operators() -> dict[str, tuple]:
    """Each of them with arguments."""
    size = (4, 5, 6)

    def tensor(*shape: int) -> Tensor:
        return leaf(*shape, layout="channels last" if len(shape) == 5 else "contiguous").detach().requires_grad_()

    volume = tensor(2, 6, *size)
    residual = (tensor(2, 6, *size), "leaky_relu", 0.1)
    return {
        "group_norm": (volume, GROUPS, tensor(6), tensor(6), 1e-3, None, "silu", 0.0),
        "group_norm with a residual": (volume, 6, None, None, 1e-3, *residual),
        "layer_norm": (tensor(2, *size[:2], 6), tensor(6), tensor(6), 1e-3),
        "squeeze_excite": (volume, tensor(4, 6), tensor(4), tensor(6, 4), tensor(6)),
        "mixture": (tensor(2, 2, *size), [tensor(2, 6, *size), tensor(2, 6, *size)]),
        "ghost_features": (volume, tensor(4, 6, 3, 3, 3), tensor(4, 1, 3, 3, 3), [1, 1, 1], [1, 1, 1]),
        "concatenate_channels": (volume, tensor(2, 3, *size)),
        "few_channel_conv": (volume, tensor(6, 1, 3, 3, 3), None, [1, 1, 1], [1, 1, 1], 6),
    }


@pytest.mark.parametrize("name", operators())
def test_passes_torchs_checks_of_operators(name):
    operator = getattr(torch.ops.nnunet_deform, name.split()[0])
    torch.library.opcheck(operator, operators()[name])


MODULES = {
    "NormAct": lambda: NormAct(8),
    "GroupNorm": lambda: GroupNorm(4, 8),
    "InstanceNorm": lambda: InstanceNorm3d(8, affine=True),
    "ChannelLayerNorm": lambda: ChannelLayerNorm(8),
    "SqueezeExcite": lambda: SqueezeExcite(8),
    "GhostFeatures": lambda: GhostFeatures(8, 6, (3, 3, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_compiles_to_one_operation_and_its_backward_pass(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    module = MODULES[name]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    twin, found = copy.deepcopy(module), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in graph.graph.nodes if "nnunet_deform" in str(node.target))
        return graph

    x = leaf(2, 8, 4, 5, 6, layout="channels last")
    compiled = torch.compile(module, fullgraph=True, backend=record)(x)
    assert len(found) == 1
    theirs = twin(x)
    torch.testing.assert_close(compiled, theirs, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(compiled, [x, *module.parameters()], gradient),
        torch.autograd.grad(theirs, [x, *twin.parameters()], gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
def test_norm_and_leaky_relu_compile_to_one_operation(added):
    torch.compiler.reset()
    norm, activation = InstanceNorm2d(6).double(), nn.LeakyReLU(0.1)
    x, residual = leaf(2, 6, 7, 6), leaf(2, 6, 7, 6) if added else None
    compiled = torch.compile(normalized, fullgraph=True, backend="aot_eager")(norm, x, activation, residual)
    assert_equal(compiled, normalized(norm, x, activation, residual), [x] if residual is None else [x, residual])


@pytest.mark.parametrize("function", [mixture, lambda logits, maps: concatenate_channels(*maps)])
def test_functions_of_several_maps_compile_to_the_same(function):
    torch.compiler.reset()
    logits = leaf(2, 2, 7, 6, layout="channels last")
    maps = [leaf(2, 6, 7, 6, layout="channels last") for _ in range(2)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(logits, maps)
    leaves = [logits, *maps] if function is mixture else maps
    assert_equal(compiled, function(logits, maps), leaves)
