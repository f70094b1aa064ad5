"""Convolution with kernels of each sample's own, against sums over voxels written out."""

import itertools

import pytest
import torch
from torch import Tensor

from nnunet_deform.ops import dynamic_conv2d, dynamic_conv3d, mixed_conv

OPERATOR = {2: dynamic_conv2d, 3: dynamic_conv3d}

# name, spatial size, kernel, (in, out, groups), batch, stride, padding, dilation
CASES = [
    pytest.param((5, 6), (3, 3), (4, 6, 1), 3, (1, 1), (1, 1), (1, 1), id="2d"),
    pytest.param((7, 5), (1, 3), (4, 2, 2), 2, (2, 1), (0, 2), (1, 2), id="2d-strided-dilated-groups"),
    pytest.param((3, 4, 5), (3, 3, 3), (2, 3, 1), 2, (1, 1, 1), (1, 1, 1), (1, 1, 1), id="3d"),
    pytest.param((4, 5, 3), (1, 3, 2), (4, 4, 4), 3, (1, 2, 1), (0, 1, 1), (1, 1, 1), id="3d-depthwise"),
    pytest.param((3, 4, 4), (3, 3, 3), (4, 6, 2), 1, (1, 2, 2), (1, 1, 1), (1, 1, 1), id="3d-single-sample"),
]


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    """y_b(o, v) = sum over c, t of W_b(o, c, t) x_b(c, v * stride - padding + t * dilation) + bias_b(o)."""
    batch, out_channels, group_channels, *kernel = weight.shape
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    y = x.new_zeros(batch, out_channels, *size)
    out_group = out_channels // groups
    for v, t in itertools.product(itertools.product(*map(range, size)), itertools.product(*map(range, kernel))):
        q = [a * step - p + b * d for a, b, step, p, d in zip(v, t, stride, padding, dilation, strict=True)]
        if all(0 <= position < s for position, s in zip(q, x.shape[2:], strict=True)):
            for g in range(groups):
                seen = x[(slice(None), slice(g * group_channels, (g + 1) * group_channels), *q)]
                taps = weight[(slice(None), slice(g * out_group, (g + 1) * out_group), slice(None), *t)]
                y[(slice(None), slice(g * out_group, (g + 1) * out_group), *v)] += (taps * seen[:, None]).sum(2)
    return y if bias is None else y + bias.view(batch, out_channels, *[1] * len(size))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("conv_impl", ["auto", "grouped", "loop"])
@pytest.mark.parametrize(("size", "kernel", "channels", "batch", "stride", "padding", "dilation"), CASES)
def test_output_and_every_gradient(size, kernel, channels, batch, stride, padding, dilation, conv_impl, with_bias):
    c, o, groups = channels
    leaves = [
        torch.randn(batch, c, *size, dtype=torch.float64),
        torch.randn(batch, o, c // groups, *kernel, dtype=torch.float64),
        *([torch.randn(batch, o, dtype=torch.float64)] if with_bias else []),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    bias = leaves[2] if with_bias else None
    expected = by_hand(*leaves[:2], bias, stride, padding, dilation, groups)
    output = OPERATOR[len(size)](*leaves[:2], bias, stride, padding, dilation, groups, conv_impl)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    grad_output = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, leaves, grad_output)
    for ours, other in zip(torch.autograd.grad(output, leaves, grad_output), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-11)


def test_the_grouped_form_takes_any_layout():
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2, 3, 4, 3, 3)
    for conv_impl in ("grouped", "loop"):
        expected = dynamic_conv2d(x.contiguous(), weight, padding=1, conv_impl="loop")
        torch.testing.assert_close(dynamic_conv2d(x, weight, padding=1, conv_impl=conv_impl), expected)


def test_automatic_choice_on_the_cpu_is_one_grouped_convolution():
    x, weight = torch.randn(2, 4, 5, 5, 5), torch.randn(2, 3, 4, 3, 3, 3)
    assert torch.equal(dynamic_conv3d(x, weight), dynamic_conv3d(x, weight, conv_impl="grouped"))


@pytest.mark.parametrize("conv_impl", ["grouped", "loop"])
def test_compiles_as_one_graph(conv_impl: str):
    compiled = torch.compile(dynamic_conv3d, fullgraph=True, backend="aot_eager")
    arguments = torch.randn(2, 4, 5, 5, 5), torch.randn(2, 3, 4, 3, 3, 3), torch.randn(2, 3)
    torch.testing.assert_close(compiled(*arguments, conv_impl=conv_impl), dynamic_conv3d(*arguments))


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        (((2, 4, 5, 5), (2, 3, 4, 3, 3)), {}, r"input has shape \(2, 4, 5, 5\) .* 3D .* needs 5 and 6"),
        (((2, 4, 5, 5, 5), (3, 4, 3, 3, 3)), {}, r"weight \(3, 4, 3, 3, 3\); a 3D"),
        (((2, 4, 5, 5, 5), (3, 3, 4, 3, 3, 3)), {}, "kernels for 3 samples, but input has 2"),
        (((0, 4, 5, 5, 5), (0, 3, 4, 3, 3, 3)), {}, "input has 0; give at least one"),
        (((2, 4, 5, 5, 5), (2, 3, 4, 3, 3, 3)), {"groups": 2}, "groups=2 does not go with 4 input and 3 output"),
        (((2, 4, 5, 5, 5), (2, 4, 4, 3, 3, 3)), {"groups": 2}, r"shape \(2, 4, 4, 3, 3, 3\), \[B, C_out, C/groups"),
        (((2, 4, 5, 5, 5), (2, 3, 4, 3, 3, 3), (3,)), {}, r"bias has shape \(3,\); expected \(2, 3\)"),
        (((2, 4, 5, 5, 5), (2, 3, 4, 3, 3, 3)), {"stride": 0}, "stride=0 must be at least 1"),
        (((2, 4, 5, 5, 5), (2, 3, 4, 3, 3, 3)), {"conv_impl": "fast"}, "conv_impl='fast' must be 'auto', 'grouped' or"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(shapes, arguments, message):
    with pytest.raises(ValueError, match=message):
        dynamic_conv3d(*(torch.zeros(shape) for shape in shapes), **arguments)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("conv_impl", ["grouped", "loop"])
@pytest.mark.parametrize(("size", "kernel", "channels", "batch", "stride", "padding", "dilation"), CASES)
def test_mixed_kernels_are_made_again(size, kernel, channels, batch, stride, padding, dilation, conv_impl, with_bias):
    c, o, groups = channels
    shapes = [(batch, c, *size), (batch, 3), (3, o, c // groups, *kernel), *([(3, o)] if with_bias else [])]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, mixing, kernels = leaves[:3]
    biases = leaves[3] if with_bias else None
    weight = torch.einsum("bk,k...->b...", mixing, kernels)
    expected = OPERATOR[len(size)](
        *(x, weight, None if biases is None else mixing @ biases), stride, padding, dilation, groups, conv_impl
    )
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = mixed_conv(x, mixing, kernels, biases, stride, padding, dilation, groups, conv_impl)
    assert set(kept) <= {leaf.data_ptr() for leaf in leaves}
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, leaves, gradient)
    for ours, other in zip(torch.autograd.grad(output, leaves, gradient), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("conv_impl", ["grouped", "loop"])
def test_mixed_conv_gives_what_is_asked_for(conv_impl, frozen):
    leaves = [torch.randn(shape, requires_grad=True) for shape in [(2, 4, 5, 5), (2, 3), (3, 6, 4, 3, 3), (3, 6)]]
    leaves[frozen].requires_grad_(False)
    mixed_conv(*leaves, (1, 1), (1, 1), (1, 1), conv_impl=conv_impl).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index != frozen for index in range(4)]
