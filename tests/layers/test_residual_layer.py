"""The residual and up blocks of skip encoders and decoder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers import ConvStyle, ResidualBlock, UpBlock, residual
from nnunet_deform.layers.recomputation import plain_forms

CONV = {2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
TRANSPOSED_OP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def paper_style(ndim: int) -> ConvStyle:
    return ConvStyle(
        conv_op=nn.Conv2d if ndim == 2 else nn.Conv3d,
        conv_bias=False,
        norm_op=nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d,
        nonlin_kwargs={"negative_slope": 0.01, "inplace": True},
    )


def instance_norm(x: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(axes, keepdim=True) + 1e-5)


def leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def residual_by_hand(block: ResidualBlock, x: Tensor) -> Tensor:
    first, second, *shortcut = (parameter for parameter in block.parameters() if parameter.ndim > 1)
    conv = CONV[x.ndim - 2]
    same = [k // 2 for k in first.shape[2:]]
    y = leaky_relu(instance_norm(conv(x, first, padding=same)))
    y = instance_norm(conv(y, second, padding=same))
    return leaky_relu(y + (instance_norm(conv(x, shortcut[0])) if shortcut else x))


@pytest.mark.parametrize(
    ("channels", "count"),
    [
        ((1, 48), 63_552),
        ((48, 96), 377_856),
        ((96, 192), 1_511_424),
        ((192, 384), 6_045_696),
        ((384, 768), 24_182_784),
        ((48, 48), 124_416),
    ],
    ids=str,
)
def test_residual_block_has_the_papers_parameters(channels: tuple[int, int], count: int):
    with torch.device("meta"):
        block = ResidualBlock(paper_style(3), *channels, (3, 3, 3))
    assert sum(parameter.numel() for parameter in block.parameters()) == count


@pytest.mark.parametrize(
    ("channels", "count"),
    [((768, 384), 14_598_144), ((384, 192), 3_649_536), ((192, 96), 912_384), ((96, 48), 228_096)],
    ids=str,
)
def test_up_block_has_the_papers_parameters(channels: tuple[int, int], count: int):
    with torch.device("meta"):
        block = UpBlock(paper_style(3), nn.ConvTranspose3d, *channels, (2, 2, 2), (3, 3, 3))
    assert sum(parameter.numel() for parameter in block.parameters()) == count


@pytest.mark.parametrize("channels", [(3, 3), (2, 5)], ids=["identity", "projection"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (3, 3, 3), (1, 3, 3)], ids=str)
def test_residual_block_by_hand(kernel_size: tuple[int, ...], channels: tuple[int, int]):
    block = ResidualBlock(paper_style(len(kernel_size)), *channels, kernel_size).double()
    x = torch.randn(2, channels[0], *(4, 6, 5)[: len(kernel_size)], dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(block(x), residual_by_hand(block, x), rtol=0, atol=1e-12)
    # The activations work in place, which must not reach the input through the identity.
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("stride", "kernel_size"), [((2, 2), (3, 3)), ((1, 2, 2), (1, 3, 3)), ((2, 2, 2), (3, 3, 3))], ids=str
)
def test_up_block_by_hand(stride: tuple[int, ...], kernel_size: tuple[int, ...]):
    ndim = len(stride)
    block = UpBlock(paper_style(ndim), TRANSPOSED_OP[ndim], 5, 3, stride, kernel_size).double()
    coarse = (2, 3, 4)[:ndim]
    x = torch.randn(2, 5, *coarse, dtype=torch.float64)
    fine = [size * step for size, step in zip(coarse, stride, strict=True)]
    skip = torch.randn(2, 3, *fine, dtype=torch.float64)
    assert block.up.bias is None
    up = TRANSPOSED[ndim](x, block.up.weight, stride=stride)
    expected = residual_by_hand(block.block, torch.cat((up, skip), dim=1))
    torch.testing.assert_close(block(x, skip), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [(48, 48), (16, 48)], ids=["identity", "projection"])
def test_conv_outputs_are_what_the_convolutions_put_out(channels: tuple[int, int]):
    up = UpBlock(paper_style(2), nn.ConvTranspose2d, 7, channels[0], (2, 2), (3, 3))
    residual = ResidualBlock(paper_style(2), *channels, (3, 3))
    counted: list[int] = []
    for module in (*up.modules(), *residual.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda *args: counted.append(args[-1].numel()))
    up(torch.zeros(1, 7, 2, 3), torch.zeros(1, channels[0], 4, 6))
    assert sum(counted) == 24 * up.conv_outputs_per_voxel
    counted.clear()
    residual(torch.zeros(1, channels[0], 3, 3))
    assert sum(counted) == 9 * residual.conv_outputs_per_voxel


@pytest.mark.parametrize("channels", [(5, 5), (3, 5)], ids=["identity", "projection"])
def test_training_keeps_the_input_half_of_the_activations_and_the_output(channels: tuple[int, int]):
    block = ResidualBlock(paper_style(2), *channels, (3, 3))
    x = torch.randn(1, channels[0], 6, 7)
    assert kept_maps(block, x) == sorted([x.numel(), 5 * 42, 5 * 42])
    up = UpBlock(paper_style(2), nn.ConvTranspose2d, 7, channels[0], (2, 2), (3, 3))
    coarse, skip = torch.randn(1, 7, 3, 2), torch.randn(1, channels[0], 6, 4)
    # The transposed convolution's input and result, the skip, activation and output; no concatenation.
    assert kept_maps(up, coarse, skip) == sorted([coarse.numel(), *[skip.numel()] * 4])


def kept_maps(module: nn.Module, *inputs: Tensor) -> list[int]:
    """Elements of each feature map that autograd keeps."""
    own = {parameter.data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    maps = sorted(tensor.numel() for key, tensor in kept.items() if key not in own and tensor.ndim > 1)
    output.sum().backward()
    return maps


def reached(block: ResidualBlock) -> list[str]:
    """The names of the parts that a forward pass calls."""
    called: list[str] = []
    for name, part in block.named_modules():
        part.forward = record(name, part.forward, called)
    block(torch.randn(2, 4, 6, 6))
    return called


def record(name: str, forward: Callable[..., Tensor], called: list[str]) -> Callable[..., Tensor]:
    def recording(*inputs: Tensor) -> Tensor:
        called.append(name)
        return forward(*inputs)

    return recording


@pytest.mark.parametrize(
    "other",
    [
        {"conv_bias": True},
        {"norm_op": nn.BatchNorm2d},
        {"norm_op_kwargs": {"affine": True}},
        {"norm_op_kwargs": {"track_running_stats": True}},
        {"dropout_op": nn.Dropout2d, "dropout_op_kwargs": {"p": 0.5}},
        {"nonlin": nn.ELU, "nonlin_kwargs": {}},
        {"nonlin_kwargs": {"negative_slope": 0.0}},
        {"norm_op": None},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_styles_than_the_papers_call_their_parts(other: dict[str, Any]):
    assert "body.0" in reached(ResidualBlock(replace(paper_style(2), **other), 4, 5, (3, 3)))
    assert reached(ResidualBlock(paper_style(2), 4, 5, (3, 3))) == [""]


def test_style_is_used_throughout():
    style = ConvStyle(
        conv_op=nn.Conv2d,
        conv_bias=True,
        norm_op=nn.BatchNorm2d,
        norm_op_kwargs={"eps": 1e-3},
        dropout_op=nn.Dropout2d,
        dropout_op_kwargs={"p": 0.3},
        nonlin=nn.ELU,
        nonlin_kwargs={"alpha": 0.5},
    )
    block = ResidualBlock(style, 2, 4, (3, 3))

    def of_type(kind: type[nn.Module]) -> list[nn.Module]:
        return [module for module in block.modules() if isinstance(module, kind)]

    assert [conv.bias is not None for conv in of_type(nn.Conv2d)] == [True] * 3
    assert [norm.eps for norm in of_type(nn.BatchNorm2d)] == [1e-3] * 3
    assert [dropout.p for dropout in of_type(nn.Dropout2d)] == [0.3]
    assert [nonlin.alpha for nonlin in of_type(nn.ELU)] == [0.5] * 2
    x = torch.randn(2, 2, 5, 5)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_style_may_leave_everything_out():
    style = ConvStyle(conv_op=nn.Conv2d, conv_bias=False, norm_op=None, nonlin=None)
    block = ResidualBlock(style, 2, 3, (3, 3)).double()
    first, second, shortcut = block.parameters()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    expected = F.conv2d(F.conv2d(x, first, padding=1), second, padding=1) + F.conv2d(x, shortcut)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_form_for_gpus_compiles(backend: str, monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    block = ResidualBlock(paper_style(3), 6, 4, [3, 3, 3]).double()
    parts = [torch.randn(2, 3, 4, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def outputs_and_gradients(module: Callable[..., Tensor]) -> list[Tensor]:
        output = module(*parts)
        return [output, *torch.autograd.grad(output.sin().sum(), [*parts, *block.parameters()])]

    with plain_forms():
        expected = outputs_and_gradients(block)
    # On a CPU compilers are given the plain form.
    monkeypatch.setattr(residual, "may_keep_less_compiled", lambda x, *blocks: True)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for one, other in zip(outputs_and_gradients(compiled), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
