"""Arguments that do not go together are refused with one sentence that prints the offending value."""

import re

import pytest
import torch
from torch import Tensor

from nnunet_deform.ops import deform_conv2d, deform_conv3d
from nnunet_deform.ops.checks import convolved_size, spatial_argument


def arguments(**changes) -> dict:
    """A valid call in 3D, output [2, 4, 3, 5, 4], with some arguments replaced."""
    valid = {
        "input": torch.zeros(2, 4, 3, 5, 4),
        "offset": torch.zeros(2, 54, 3, 5, 4),  # 3 axes x (2 x 3 x 3) taps
        "weight": torch.zeros(4, 2, 2, 3, 3),
        "bias": torch.zeros(4),
        "stride": (1, 1, 1),
        "padding": (1, 1, 1),
        "dilation": (2, 1, 1),
    }
    return valid | changes


def test_the_call_that_the_others_change_is_valid():
    assert deform_conv3d(**arguments()).shape == (2, 4, 3, 5, 4)


REFUSED = {
    "offset channels, no multiple": (
        {"offset": torch.zeros(2, 53, 3, 5, 4)},
        ValueError,
        "offset has 53 channels; a kernel of 2x3x3 needs 54 (3 for each tap) for each deformable group.",
    ),
    "offset channels, two axes": (
        {"offset": torch.zeros(2, 36, 3, 5, 4)},
        ValueError,
        "offset has 36 channels; a kernel of 2x3x3 needs 54",
    ),
    "offset channels, none": ({"offset": torch.zeros(2, 0, 3, 5, 4)}, ValueError, "offset has 0 channels"),
    "deformable groups": (
        {"offset": torch.zeros(2, 162, 3, 5, 4)},
        ValueError,
        "offset has 162 channels, that is 3 deformable groups, which do not divide the input's 4 channels.",
    ),
    "offset size": (
        {"offset": torch.zeros(2, 54, 3, 5, 5)},
        ValueError,
        "offset has spatial size (3, 5, 5), but the output has (3, 5, 4); they must agree.",
    ),
    # The released DeformUX-Net pads its 1x1x1 offset convolution, and its operator does not notice.
    "offset size, padded": (
        {"offset": torch.zeros(2, 54, 5, 7, 6)},
        ValueError,
        "offset has spatial size (5, 7, 6), but the output has (3, 5, 4)",
    ),
    "offset size, stride": ({"stride": 2}, ValueError, "(3, 5, 4), but the output has (2, 3, 2)"),
    "offset batch": (
        {"offset": torch.zeros(3, 54, 3, 5, 4)},
        ValueError,
        "offset has batch size 3, but input has 2.",
    ),
    "offset batch, one for all": ({"offset": torch.zeros(1, 54, 3, 5, 4)}, ValueError, "offset has batch size 1"),
    "input dimensions": (
        {"input": torch.zeros(4, 3, 5, 4)},
        ValueError,
        "input has shape (4, 3, 5, 4); a 3D deformable convolution needs 5 dimensions.",
    ),
    "offset dimensions": (
        {"offset": torch.zeros(54, 3, 5, 4)},
        ValueError,
        "offset has shape (54, 3, 5, 4); a 3D deformable convolution needs 5 dimensions.",
    ),
    "weight dimensions": (
        {"weight": torch.zeros(4, 2, 3, 3)},
        ValueError,
        "weight has shape (4, 2, 3, 3); a 3D deformable convolution needs 5 dimensions.",
    ),
    "groups, channels": (
        {"weight": torch.zeros(4, 3, 2, 3, 3)},
        ValueError,
        "weight has 3 channels per group (shape (4, 3, 2, 3, 3)), which does not divide the input's 4 channels.",
    ),
    "groups, more channels than the input": (
        {"weight": torch.zeros(4, 8, 2, 3, 3)},
        ValueError,
        "weight has 8 channels per group",
    ),
    "groups, output": (
        {"weight": torch.zeros(5, 2, 2, 3, 3), "bias": torch.zeros(5)},
        ValueError,
        "weight has 5 output channels, which the 2 groups (input channels 4 / 2 per group) do not divide.",
    ),
    "weight, no channels": (
        {"weight": torch.zeros(4, 0, 2, 3, 3)},
        ValueError,
        "weight has shape (4, 0, 2, 3, 3); no axis of it may be empty.",
    ),
    "weight, no outputs": (
        {"weight": torch.zeros(0, 2, 2, 3, 3), "bias": torch.zeros(0)},
        ValueError,
        "weight has shape (0, 2, 2, 3, 3)",
    ),
    "weight, no taps": (
        {"weight": torch.zeros(4, 2, 2, 0, 3)},
        ValueError,
        "weight has shape (4, 2, 2, 0, 3); no axis of it may be empty.",
    ),
    "input, no channels": ({"input": torch.zeros(2, 0, 3, 5, 4)}, ValueError, "the input's 0 channels"),
    "input, no voxels": (
        {"input": torch.zeros(2, 4, 3, 0, 4)},
        ValueError,
        "input has spatial size (3, 0, 4); no axis may be empty.",
    ),
    "bias length": (
        {"bias": torch.zeros(3)},
        ValueError,
        "bias has shape (3,); expected (4,), one per output channel.",
    ),
    "bias dimensions": ({"bias": torch.zeros(4, 1)}, ValueError, "bias has shape (4, 1); expected (4,)"),
    "kernel does not fit": (
        {"dilation": (4, 1, 1), "padding": (0, 1, 1)},
        ValueError,
        "the output would have depth -1: the kernel (2, 3, 3) with dilation (4, 1, 1) does not fit into the input "
        "(3, 5, 4) with padding (0, 1, 1).",
    ),
    "kernel does not fit, by one voxel": (
        {"dilation": (2, 1, 2), "padding": (1, 1, 0)},
        ValueError,
        "the output would have width 0",
    ),
    "integer input": (
        {"input": torch.zeros(2, 4, 3, 5, 4, dtype=torch.int64)},
        TypeError,
        "input is torch.int64; a deformable convolution needs a floating dtype.",
    ),
    "complex input": (
        {"input": torch.zeros(2, 4, 3, 5, 4, dtype=torch.complex64)},
        TypeError,
        "input is torch.complex64; a deformable convolution needs a floating dtype.",
    ),
    "weight dtype": (
        {"weight": torch.zeros(4, 2, 2, 3, 3, dtype=torch.float64)},
        TypeError,
        "weight is torch.float64, but input is torch.float32; convert one of them.",
    ),
    "bias dtype": (
        {"bias": torch.zeros(4, dtype=torch.float16)},
        TypeError,
        "bias is torch.float16, but input is torch.float32; convert one of them.",
    ),
    "offset dtype, wider": (
        {"offset": torch.zeros(2, 54, 3, 5, 4, dtype=torch.float64)},
        TypeError,
        "offset is torch.float64, but input is torch.float32; they must agree",
    ),
    "offset dtype, narrower": (
        {"offset": torch.zeros(2, 54, 3, 5, 4, dtype=torch.bfloat16)},
        TypeError,
        "offset is torch.bfloat16, but input is torch.float32; they must agree",
    ),
    "offset dtype, integer": (
        {"offset": torch.zeros(2, 54, 3, 5, 4, dtype=torch.int32)},
        TypeError,
        "offset is torch.int32, but input is torch.float32; they must agree",
    ),
    "stride 0": ({"stride": 0}, ValueError, "stride=0 must be at least 1 on every axis."),
    "stride 0 on one axis": ({"stride": (1, 0, 1)}, ValueError, "stride=(1, 0, 1) must be at least 1 on every axis."),
    "stride None": ({"stride": None}, TypeError, "stride=None must be an integer, or a tuple of 3."),
    "padding 1.5": ({"padding": (1, 1.5, 1)}, TypeError, "padding=(1, 1.5, 1) must be an integer, or a tuple of 3."),
    "stride length": (
        {"stride": (1, 1)},
        ValueError,
        "stride=(1, 1) has 2 values, but there are 3 axes; give one or 3.",
    ),
    "padding below 0": ({"padding": (1, -1, 1)}, ValueError, "padding=(1, -1, 1) must be at least 0 on every axis."),
    "padding length": ({"padding": [1, 1, 1, 1]}, ValueError, "padding=[1, 1, 1, 1] has 4 values"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation=0 must be at least 1 on every axis."),
    "dilation length": ({"dilation": (1,)}, ValueError, "dilation=(1,) has 1 values, but there are 3 axes"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        deform_conv3d(**arguments(**changes))


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias"])
def test_devices_must_agree(name: str):
    elsewhere = arguments()[name].to("meta")
    with pytest.raises(RuntimeError, match="the tensors are on different devices") as refusal:
        deform_conv3d(**arguments(**{name: elsewhere}))
    for tensor in ("input", "offset", "weight", "bias"):
        assert f"{tensor} on {'meta' if tensor == name else 'cpu'}" in str(refusal.value)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_values_take_half_or_float32_offsets(half: torch.dtype):
    call = {name: value.to(half) if isinstance(value, Tensor) else value for name, value in arguments().items()}
    assert deform_conv3d(**call).dtype == half
    assert deform_conv3d(**call | {"offset": call["offset"].float()}).dtype == half
    other = torch.float16 if half == torch.bfloat16 else torch.bfloat16
    for wrong in (other, torch.float64, torch.int32):
        with pytest.raises(
            TypeError, match=f"offset is {wrong}, but input is {half}; .*or the offset be torch.float32"
        ):
            deform_conv3d(**call | {"offset": call["offset"].to(wrong)})


def test_the_2d_operator_counts_two_axes():
    input, offset, weight = torch.zeros(1, 2, 4, 5), torch.zeros(1, 18, 4, 5), torch.zeros(2, 1, 3, 3)
    assert deform_conv2d(input, offset, weight, padding=1).shape == (1, 2, 4, 5)
    with pytest.raises(ValueError, match="a 2D deformable convolution needs 4 dimensions"):
        deform_conv2d(input.unsqueeze(2), offset, weight, padding=1)
    with pytest.raises(ValueError, match=r"offset has 27 channels; a kernel of 3x3 needs 18 \(2 for each tap\)"):
        deform_conv2d(input, torch.zeros(1, 27, 4, 5), weight, padding=1)
    with pytest.raises(ValueError, match="the output would have width 0"):
        deform_conv2d(input[..., :2], offset, weight, padding=(1, 0))
    with pytest.raises(ValueError, match=r"stride=\(1, 1, 1\) has 3 values, but there are 2 axes; give one or 2"):
        deform_conv2d(input, offset, weight, stride=(1, 1, 1))


def test_checks_hold_under_autocast():
    """The casts come first, so that layers of different dtypes go together; the shapes are checked all the same."""
    with torch.autocast("cpu", torch.bfloat16):
        assert deform_conv3d(**arguments(input=torch.zeros(2, 4, 3, 5, 4, dtype=torch.float16))).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="offset has 53 channels"):
            deform_conv3d(**arguments(offset=torch.zeros(2, 53, 3, 5, 4)))


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias"])
def test_autocast_does_not_make_values_of_integers(name: str):
    """As for torch's convolutions, whose autocast touches floating tensors only."""
    integers = arguments()[name].long()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=rf"{name} is torch\.int64"):
        deform_conv3d(**arguments(**{name: integers}))


def test_an_empty_batch_is_checked_too():
    empty = {"input": torch.zeros(0, 4, 3, 5, 4), "offset": torch.zeros(0, 54, 3, 5, 4)}
    assert deform_conv3d(**arguments(**empty)).shape == (0, 4, 3, 5, 4)
    with pytest.raises(ValueError, match="offset has 53 channels"):
        deform_conv3d(**arguments(**empty | {"offset": torch.zeros(0, 53, 3, 5, 4)}))


def test_spatial_argument():
    assert spatial_argument("stride", 2, 3, 1) == [2, 2, 2]
    assert spatial_argument("padding", (0, 1), 2, 0) == [0, 1]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((5, 6, 7), (3, 2, 1), (1, 2, 3), (1, 0, 2), (2, 3, 1)),
        ((9, 4, 1), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
        ((4, 4, 4), (4, 1, 2), (5, 4, 3), (0, 3, 1), (1, 7, 2)),
    ],
)
def test_convolved_size_is_that_of_a_convolution(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
):
    expected = torch.nn.functional.conv3d(
        torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel), stride=stride, padding=padding, dilation=dilation
    )
    assert convolved_size(size, kernel, stride, padding, dilation) == list(expected.shape[2:])
