"""The deformable convolution layer: its offset branch, and what it hands to the operator."""

import copy
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_deform.layers import DeformConv
from nnunet_deform.ops import deform_conv2d, deform_conv3d

CONV_OP = {2: nn.Conv2d, 3: nn.Conv3d}
PLAIN = {2: F.conv2d, 3: F.conv3d}
DEFORM = {2: deform_conv2d, 3: deform_conv3d}
OPERATOR = torch.ops.nnunet_deform.deform_conv.default

CHANNELS = 4
KERNELS = [(3, 3), (1, 3), (5, 3), (3, 3, 3), (1, 3, 3)]


class OperatorCalls(TorchDispatchMode):
    """Records the offset and the value dtype of every call of the operator, whichever module makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is OPERATOR:
            self.dtypes.append(args[0].dtype)
            self.offsets.append(args[1])
        return func(*args, **(kwargs or {}))


def layer_of(kernel_size: Sequence[int], **options) -> DeformConv:
    return DeformConv(CONV_OP[len(kernel_size)], CHANNELS, kernel_size, **options).double()


def volume(ndim: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, *(4, 6, 5)[-ndim:], dtype=torch.float64)


@torch.no_grad()
def move(layer: DeformConv) -> DeformConv:
    """Offsets of about half a voxel that differ between taps, voxels and samples."""
    layer.offset.weight.normal_(std=0.3)
    layer.offset.bias.normal_(std=0.3)
    return layer


def offset_seen(layer: DeformConv, x: Tensor) -> Tensor:
    with torch.no_grad(), OperatorCalls() as calls:
        layer(x)
    (offset,) = calls.offsets
    return offset


@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "dense"])
@pytest.mark.parametrize("kernel_size", KERNELS, ids=str)
def test_starts_as_the_plain_convolution_of_its_weight(kernel_size: tuple[int, ...], depthwise: bool):
    layer = layer_of(kernel_size, depthwise=depthwise)
    assert tuple(layer.weight.shape) == (CHANNELS, 1 if depthwise else CHANNELS, *kernel_size)
    x = volume(len(kernel_size))
    padding = [k // 2 for k in kernel_size]
    groups = CHANNELS if depthwise else 1
    expected = PLAIN[len(kernel_size)](x, layer.weight, layer.bias, padding=padding, groups=groups)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("offset_kernel", [1, 3])
@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "dense"])
@pytest.mark.parametrize("kernel_size", KERNELS, ids=str)
def test_equals_the_operator_called_by_hand(kernel_size: tuple[int, ...], depthwise: bool, offset_kernel: int):
    layer = move(layer_of(kernel_size, depthwise=depthwise, offset_kernel=offset_kernel, offset_axes="all"))
    ndim = len(kernel_size)
    x = volume(ndim)
    # The offset branch is as wide as asked only where the kernel itself is.
    branch_padding = [0 if k == 1 or offset_kernel == 1 else 1 for k in kernel_size]
    offset = PLAIN[ndim](x, layer.offset.weight, layer.offset.bias, padding=branch_padding)
    assert offset.abs().amax() > 0.5
    expected = DEFORM[ndim](x, offset, layer.weight, layer.bias, padding=[k // 2 for k in kernel_size])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    assert not torch.allclose(expected, PLAIN[ndim](x, layer.weight, layer.bias, 1, layer.padding, 1, layer.groups))


@pytest.mark.parametrize(
    ("kernel_size", "offset_axes"),
    [((3, 3), "auto"), ((3, 3, 3), "all"), ((3, 3, 3), (0, 2)), ((3, 3, 3), (1,)), ((1, 3, 3), "auto")],
    ids=str,
)
def test_offset_channels_are_tap_major(kernel_size: tuple[int, ...], offset_axes):
    """One tap alone, moved by one voxel along one axis, reads the volume shifted there."""
    layer = layer_of(kernel_size, offset_axes=offset_axes)
    ndim = len(kernel_size)
    axes = {"auto": [a for a in range(ndim) if kernel_size[a] > 1], "all": list(range(ndim))}.get(
        offset_axes, offset_axes
    )
    x = volume(ndim)
    taps = list(itertools.product(*(range(k) for k in kernel_size)))
    for tap in (0, 5, len(taps) - 1):
        for place, axis in enumerate(axes):
            with torch.no_grad():
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[(slice(None), 0, *taps[tap])] = 1
                layer.offset.bias.zero_()
                layer.offset.bias[tap * len(axes) + place] = 1
            shift = [t - k // 2 + (a == axis) for a, (t, k) in enumerate(zip(taps[tap], kernel_size, strict=True))]
            wide = F.pad(x, [3] * (2 * ndim))
            window = [slice(3 + s, 3 + s + n) for s, n in zip(shift, x.shape[2:], strict=True)]
            torch.testing.assert_close(layer(x), wide[(..., *window)], rtol=0, atol=0, msg=f"tap {tap}, axis {axis}")


@pytest.mark.parametrize(
    ("kernel_size", "offset_axes", "moving"),
    [
        ((3, 3, 3), "auto", (0, 1, 2)),
        ((1, 3, 3), "auto", (1, 2)),
        ((1, 3, 3), "all", (0, 1, 2)),
        ((3, 1, 3), "auto", (0, 2)),
        ((3, 3, 3), (1, 2), (1, 2)),
        ((3, 3, 3), (0, 2), (0, 2)),
        ((3, 3, 3), [0, 1], (0, 1)),
        ((3, 3, 3), (2,), (2,)),
        ((1, 3), "auto", (1,)),
        ((3, 3), "auto", (0, 1)),
    ],
    ids=str,
)
def test_axes_left_out_do_not_move(kernel_size: tuple[int, ...], offset_axes, moving: tuple[int, ...]):
    layer = move(layer_of(kernel_size, offset_axes=offset_axes))
    taps, ndim = math.prod(kernel_size), len(kernel_size)
    assert layer.offset.out_channels == len(moving) * taps
    assert tuple(layer.offset.weight.shape) == (len(moving) * taps, CHANNELS, *[1] * ndim)
    x = volume(ndim)
    offset = offset_seen(layer, x)
    assert tuple(offset.shape) == (2, ndim * taps, *x.shape[2:])
    by_axis = offset.unflatten(1, (taps, ndim))
    for axis in range(ndim):
        if axis in moving:
            assert (by_axis[:, :, axis] != 0).all()
        else:
            assert by_axis[:, :, axis].count_nonzero() == 0
    branch = PLAIN[ndim](x, layer.offset.weight, layer.offset.bias).unflatten(1, (taps, len(moving)))
    torch.testing.assert_close(by_axis[:, :, list(moving)], branch, rtol=0, atol=1e-14)


def test_kernel_of_one_voxel_has_nothing_to_move_by_default():
    assert layer_of((1, 1, 1)).offset is None
    assert layer_of((1, 1, 1), offset_axes="all").offset.out_channels == 3


def test_clamp_bounds_each_offset():
    layer = move(layer_of((3, 3), offset_clamp=0.25))
    x = volume(2)
    raw = F.conv2d(x, layer.offset.weight, layer.offset.bias)
    assert raw.amax() > 0.5
    assert raw.amin() < -0.5
    clamped = torch.where(raw > 0.25, 0.25, torch.where(raw < -0.25, -0.25, raw))
    torch.testing.assert_close(offset_seen(layer, x), clamped, rtol=0, atol=0)
    expected = deform_conv2d(x, clamped, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("kernel_size", "branch_kernel", "branch_padding"),
    [((3, 3, 3), (3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 3, 3), (0, 1, 1)), ((7, 7), (3, 3), (1, 1))],
    ids=str,
)
def test_wide_offset_branch_keeps_the_size(kernel_size, branch_kernel, branch_padding):
    layer = move(layer_of(kernel_size, offset_kernel=3))
    assert layer.offset.kernel_size == branch_kernel
    assert layer.offset.padding == branch_padding
    x = volume(len(kernel_size))
    assert offset_seen(layer, x).shape[2:] == x.shape[2:]
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_offsets_in_float32(dtype: torch.dtype):
    """100.25 voxels: bfloat16 has only 100 and 100.5 there, and on alternating values they read 0 and 0.5."""
    layer = DeformConv(nn.Conv2d, 1, (3, 3), offset_axes=(1,))
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 1, 1] = 1
        layer.bias.zero_()
        layer.offset.bias[4] = 100.25
    x = (torch.arange(256) % 2).to(dtype).expand(1, 1, 4, 256)
    with torch.no_grad(), OperatorCalls() as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert calls.dtypes == [torch.bfloat16]
    assert calls.offsets[0].dtype == torch.float32
    torch.testing.assert_close(y[0, 0, :, :100].float(), torch.tensor([0.25, 0.75]).repeat(4, 50), rtol=0, atol=0)


def test_autocast_does_not_round_what_the_offsets_are_made_of():
    layer = DeformConv(nn.Conv2d, 2, (3, 3))
    x = torch.randn(1, 2, 5, 6)
    with torch.no_grad():
        layer.offset.weight.normal_()
        expected = F.conv2d(x.double(), layer.offset.weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offset = offset_seen(layer, x)
    torch.testing.assert_close(offset.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "dense"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 3, 3)], ids=str)
def test_undeformable_is_the_plain_convolution(kernel_size: tuple[int, ...], depthwise: bool):
    layer = layer_of(kernel_size, depthwise=depthwise, deformable=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    ndim = len(kernel_size)
    x = volume(ndim)
    groups = CHANNELS if depthwise else 1
    expected = PLAIN[ndim](x, layer.weight, layer.bias, padding=[k // 2 for k in kernel_size], groups=groups)
    with OperatorCalls() as calls:
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert not calls.offsets


@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "dense"])
def test_reset_restores_the_initial_state(depthwise: bool):
    layer = DeformConv(nn.Conv3d, 32, (3, 3, 3), depthwise=depthwise)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    layer.reset_parameters()
    assert layer.offset.weight.count_nonzero() == 0
    assert layer.offset.bias.count_nonzero() == 0
    # torch's default for a convolution: uniform between plus and minus one over the root of the fan-in.
    bound = 1 / math.sqrt(27 if depthwise else 27 * 32)
    for parameter in (layer.weight, layer.bias):
        assert 0.8 * bound < parameter.abs().amax() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_every_parameter_and_the_input_get_gradients():
    layer = layer_of((3, 3, 3), offset_axes=(0, 2))
    x = volume(3).requires_grad_()
    layer(x).sin().sum().backward()
    for name, tensor in (("input", x), *layer.named_parameters()):
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.count_nonzero() > 0.5 * tensor.numel(), name


@pytest.mark.parametrize(
    "frozen", [(), ("offset.weight",), ("offset.bias",), ("offset.weight", "offset.bias")], ids=str
)
@pytest.mark.parametrize("ndim", [2, 3])
def test_offset_branch_has_the_gradients_of_its_convolution(ndim: int, frozen: tuple[str, ...]):
    layer = move(layer_of((3,) * ndim))
    by_hand = copy.deepcopy(layer)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    x = volume(ndim).requires_grad_()
    same_x = x.detach().clone().requires_grad_()
    layer(x).sin().sum().backward()
    offset = PLAIN[ndim](same_x, by_hand.offset.weight, by_hand.offset.bias)
    DEFORM[ndim](same_x, offset, by_hand.weight, by_hand.bias, padding=1).sin().sum().backward()
    torch.testing.assert_close(x.grad, same_x.grad, rtol=0, atol=1e-13)
    for (name, parameter), expected in zip(layer.named_parameters(), by_hand.parameters(), strict=True):
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-12, msg=name)


def test_offsets_are_planes_and_gradients_rows():
    """The layouts that the operator is fastest with: nothing is copied between it and its neighbours."""
    layer = move(layer_of((3, 3, 3)))
    x = volume(3).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    assert offset_seen(layer, x).is_contiguous()
    output = layer(x)
    assert output.is_contiguous(memory_format=torch.channels_last_3d)
    output.sin().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("kernel_size", "options", "message"),
    [
        ((3, 2, 3), {}, r"kernel_size=\(3, 2, 3\) must be odd on every axis"),
        ((3, 3), {"offset_kernel": 2}, "offset_kernel=2 must be 1 or 3"),
        ((3, 3), {"offset_kernel": 5}, "offset_kernel=5 must be 1 or 3"),
        ((3, 3), {"offset_clamp": 0.0}, "offset_clamp=0.0 must be positive"),
        ((3, 3), {"offset_clamp": -1.5}, "offset_clamp=-1.5 must be positive"),
        ((3, 3), {"offset_axes": "xy"}, r"offset_axes='xy' must be 'auto', 'all' or ascending axes out of \(0, 1\)"),
        ((3, 3, 3), {"offset_axes": ()}, r"offset_axes=\(\) must be .* out of \(0, 1, 2\)"),
        ((3, 3, 3), {"offset_axes": (2, 1)}, r"offset_axes=\(2, 1\) must be"),
        ((3, 3, 3), {"offset_axes": (1, 1)}, r"offset_axes=\(1, 1\) must be"),
        ((3, 3), {"offset_axes": (1, 2)}, r"offset_axes=\(1, 2\) must be .* out of \(0, 1\)"),
        ((3, 3, 3), {"offset_axes": (-1,)}, r"offset_axes=\(-1,\) must be"),
    ],
    ids=str,
)
def test_bad_options_are_named(kernel_size: tuple[int, ...], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        layer_of(kernel_size, **options)
