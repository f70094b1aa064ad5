"""Convolutions of few channels: the forms for a CPU beside torch's own."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from nnunet_deform.ops import CHANNELS_LAST, concatenate_channels, few_channel_conv

# In and out channels, kernel, stride, groups: a form of its own, or torch's.
CASES = [
    pytest.param(5, 3, (1, 1, 1), (1, 1, 1), 1, id="pointwise"),
    pytest.param(3, 20, (1, 1), (1, 1), 1, id="pointwise-2d"),
    pytest.param(8, 4, (1, 1, 1), (2, 1, 2), 1, id="strided-pointwise"),
    pytest.param(8, 16, (3, 3, 3), (1, 1, 1), 1, id="filled-up"),
    pytest.param(8, 6, (3, 3), (2, 1), 1, id="filled-up-2d"),
    pytest.param(5, 8, (1, 3, 3), (1, 2, 2), 1, id="filled-up-strided"),
    pytest.param(16, 5, (3, 3, 3), (1, 1, 1), 1, id="by-planes"),
    pytest.param(4, 3, (5, 1, 3), (1, 1, 1), 1, id="by-five-planes"),
    pytest.param(20, 3, (7, 3, 3), (1, 1, 1), 1, id="too-many-planes"),
    pytest.param(16, 5, (3, 3, 3), (2, 2, 2), 1, id="strided"),
    pytest.param(8, 8, (5, 5, 5), (1, 1, 1), 8, id="depthwise"),
    pytest.param(16, 32, (3, 3, 3), (1, 1, 1), 1, id="plain"),
]


def case(channels, out_channels, kernel, groups, size=None) -> tuple[Tensor, Tensor, Tensor]:
    size = size or (6, 5, 7)[: len(kernel)]
    image = torch.randn(2, channels, *size, dtype=torch.float64)
    image = image.contiguous(memory_format=CHANNELS_LAST[len(kernel)])
    weight = torch.randn(out_channels, channels // groups, *kernel, dtype=torch.float64)
    return image, weight, torch.randn(out_channels, dtype=torch.float64)


@pytest.mark.parametrize(("channels", "out_channels", "kernel", "stride", "groups"), CASES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_equals_torchs_convolution(channels, out_channels, kernel, stride, groups, with_bias):
    image, weight, bias = case(channels, out_channels, kernel, groups)
    conv = F.conv2d if len(kernel) == 2 else F.conv3d
    padding = [k // 2 for k in kernel]
    leaves = [image, weight, *([bias] if with_bias else [])]
    expected = conv(*leaves, stride=stride, padding=padding, groups=groups)
    before = image.clone()
    with torch.no_grad():
        predicted = few_channel_conv(image, weight, bias if with_bias else None, stride, padding, groups)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-11)
    assert torch.equal(image, before)

    for leaf in leaves:
        leaf.requires_grad_()
    gradient = torch.randn_like(expected)
    ours = few_channel_conv(*leaves[:2], leaves[2] if with_bias else None, stride, padding, groups)
    theirs = conv(*leaves, stride=stride, padding=padding, groups=groups)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, gradient), torch.autograd.grad(theirs, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("channels", "out_channels", "kernel", "stride", "groups"), CASES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_compiles_to_one_operation_each_way(channels, out_channels, kernel, stride, groups, with_bias):
    image, weight, bias = case(channels, out_channels, kernel, groups)
    leaves = [leaf.requires_grad_() for leaf in (image, weight, *([bias] if with_bias else []))]
    padding = [k // 2 for k in kernel]
    counts = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        counts.append(sum(node.op == "call_function" and "default" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(few_channel_conv, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    ours = compiled(*leaves[:2], leaves[2] if with_bias else None, stride, padding, groups)
    theirs = few_channel_conv(*leaves[:2], leaves[2] if with_bias else None, stride, padding, groups)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    gradient = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, gradient), torch.autograd.grad(theirs, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert counts == [1, 1]


# One of each form: what differs within a form are numbers, and all are compiled above.
CHECKED = ("pointwise", "filled-up-2d", "by-planes", "depthwise")


@pytest.mark.parametrize(
    ("channels", "out_channels", "kernel", "stride", "groups"),
    [pytest.param(*case.values, id=case.id, marks=() if case.id in CHECKED else pytest.mark.slow) for case in CASES],
)
def test_passes_torchs_checks_of_operators(channels, out_channels, kernel, stride, groups):
    leaves = [leaf.requires_grad_() for leaf in case(channels, out_channels, kernel, groups)]
    padding = [k // 2 for k in kernel]
    torch.library.opcheck(torch.ops.nnunet_deform.few_channel_conv, (*leaves, list(stride), padding, groups))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_images_with_fewer_planes_than_the_kernel(depth):
    image, weight, _ = case(16, 3, (5, 3, 3), 1, size=(depth, 4, 4))
    with torch.no_grad():
        ours = few_channel_conv(image, weight, None, (1, 1, 1), (2, 1, 1))
        torch.testing.assert_close(ours, F.conv3d(image, weight, padding=(2, 1, 1)), rtol=0, atol=1e-11)


def test_padding_that_changes_the_depth():
    image, weight, _ = case(16, 3, (3, 3, 3), 1)
    with torch.no_grad():
        ours = few_channel_conv(image, weight, None, (1, 1, 1), (0, 1, 1))
        torch.testing.assert_close(ours, F.conv3d(image, weight, padding=(0, 1, 1)), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("channels", "out_channels", "kernel", "stride", "groups"), CASES)
def test_stays_channels_last(channels, out_channels, kernel, stride, groups):
    """A change of layout on the way costs more than the convolution."""
    image, weight, bias = case(channels, out_channels, kernel, groups)
    # torch's convolutions of float64 are not channels last, nor is any of them fast.
    with torch.no_grad():
        output = few_channel_conv(image.float(), weight.float(), bias.float(), stride, [k // 2 for k in kernel], groups)
    assert output.is_contiguous(memory_format=CHANNELS_LAST[len(kernel)])


@pytest.mark.parametrize("grad", [True, False], ids=["training", "prediction"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_concatenation(grad, ndim):
    first, second = torch.randn(2, 3, *[4] * ndim), torch.randn(2, 2, *[4] * ndim)
    with torch.set_grad_enabled(grad):
        output = concatenate_channels(first, second)
    assert torch.equal(output, torch.cat((first, second), 1))
    with torch.set_grad_enabled(grad):
        assert concatenate_channels(first.bfloat16(), second).dtype == torch.float32
