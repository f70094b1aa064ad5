"""The operator where something else gives the answer: torch's convolutions, torchvision, its own symmetries."""

import math

import pytest
import torch
from deform_conv_cases import NAMES, Case, assert_close, conv, draw, leaves
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

PLAIN = [
    Case("2d-depthwise", (9, 7), (3, 3), (4, 4), groups=4, batch=2, padding=(1, 1)),
    Case("2d-dense", (8, 9), (3, 5), (3, 5), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    Case("3d-depthwise", (5, 6, 7), (3, 3, 3), (4, 4), groups=4, batch=2, padding=(1, 1, 1)),
    Case("3d-dense", (7, 6, 8), (3, 3, 3), (3, 4), stride=(1, 2, 3), padding=(2, 1, 0), dilation=(2, 1, 3)),
    Case("3d-grouped", (4, 6, 5), (1, 3, 3), (4, 6), groups=2, stride=(1, 2, 1), padding=(0, 1, 1)),
]


VISION = [
    Case("depthwise", (7, 6), (3, 3), (4, 4), groups=4, batch=2, padding=(1, 1)),
    Case("dense", (8, 7), (3, 2), (3, 5), batch=2, stride=(2, 1), padding=(2, 1), dilation=(1, 3)),
    Case("offset-groups", (6, 6), (3, 3), (6, 4), offset_groups=3, padding=(1, 2)),
    Case("weight-and-offset-groups", (6, 5), (2, 3), (8, 4), groups=4, offset_groups=2, batch=3, padding=(1, 1)),
    Case("crossed-groups", (5, 6), (3, 3), (6, 3), groups=3, offset_groups=2, padding=(1, 1)),
]


def plain_convolution(case: Case, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    plain = F.conv2d if input.ndim == 4 else F.conv3d
    return plain(input, weight, bias, **case.spatial, groups=case.groups)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_zero_offsets_are_an_ordinary_convolution(backend: str, device: str, case: Case, dtype: torch.dtype):
    input, offset, weight, bias = draw(case, device, dtype)
    offset = torch.zeros_like(offset, requires_grad=True)
    output = conv(input, offset, weight, bias, **case.spatial)
    # On a GPU a float32 convolution may use TF32, so the truth is float64.
    wide = leaves((input, torch.zeros(0), weight, bias), device, torch.float64)
    expected = plain_convolution(case, wide[0], wide[2], wide[3])
    assert_close("output", output, expected)

    grad_output = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, (input, weight, bias), grad_output.to(dtype))
    wanted = torch.autograd.grad(expected, (wide[0], wide[2], wide[3]), grad_output.to(dtype).double())
    for name, gradient, want in zip(("input", "weight", "bias"), gradients, wanted, strict=True):
        assert_close(f"gradient of {name}", gradient, want)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_integer_offsets_are_a_convolution_of_the_shifted_volume(backend: str, device: str, case: Case):
    input, offset, weight, bias = draw(case, device)
    shift = (-1, 2, 1)[-len(case.size) :]
    per_tap = torch.tensor(shift, dtype=torch.float64, device=device).repeat(math.prod(case.kernel))
    offset = per_tap.view(1, -1, *[1] * len(shift)).expand_as(offset)
    # Padding by p - s before and p + s after moves the volume and keeps zeros outside it.
    pads = [(p - s, p + s) for p, s in zip(case.spatial["padding"], shift, strict=True)]
    moved = F.pad(input, [pad for pair in reversed(pads) for pad in pair])
    plain = F.conv2d if input.ndim == 4 else F.conv3d
    steps = {name: value for name, value in case.spatial.items() if name != "padding"}
    expected = plain(moved, weight, bias, **steps, groups=case.groups)
    assert_close("output", conv(input, offset, weight, bias, **case.spatial), expected)


@pytest.mark.parametrize("case", VISION, ids=str)
def test_equals_torchvision(backend: str, device: str, case: Case):
    ours = draw(case, device)
    theirs = leaves(ours, device, torch.float64)
    output = conv(*ours, **case.spatial)
    expected = torchvision_deform_conv2d(*theirs, **case.spatial)
    assert_close("output", output, expected)
    grad_output = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, ours, grad_output)
    wanted = torch.autograd.grad(expected, theirs, grad_output)
    for name, gradient, want in zip(NAMES, gradients, wanted, strict=True):
        assert_close(f"gradient of {name}", gradient, want)


@pytest.mark.parametrize("grid", [1.0, 0.5])
def test_values_equal_torchvision_at_integers(backend: str, device: str, grid: float):
    case = VISION[0]
    input, offset, weight, bias = draw(case, device)
    offset = (offset / grid).round() * grid
    expected = torchvision_deform_conv2d(input, offset, weight, bias, **case.spatial)
    assert_close("output", conv(input, offset, weight, bias, **case.spatial), expected)


def test_offset_gradients_differ_from_torchvision_at_minus_one_only(backend: str, device: str):
    case = Case("integers", (4, 5), (1, 1), (3, 2), batch=3, padding=(1, 1))
    ours = draw(case, device)
    with torch.no_grad():
        ours[1].round_()
    theirs = leaves(ours, device, torch.float64)
    (gradient,) = torch.autograd.grad(conv(*ours, **case.spatial).sum(), ours[1])
    (vision,) = torch.autograd.grad(torchvision_deform_conv2d(*theirs, **case.spatial).sum(), theirs[1])
    voxel = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")).to(device) - 1
    at_minus_one = (voxel + ours[1] == -1).any(1, keepdim=True)
    assert at_minus_one.sum() > 10
    assert gradient.masked_select(at_minus_one).count_nonzero() == 0
    assert vision.masked_select(at_minus_one).count_nonzero() > 0
    assert_close("gradient", gradient * ~at_minus_one, vision * ~at_minus_one)


def test_one_slice_in_3d_is_2d(backend: str, device: str):
    flat = Case("flat", (5, 6), (3, 3), (4, 4), groups=2, offset_groups=2, batch=2, padding=(1, 0), stride=(1, 2))
    input, offset, weight, bias = draw(flat, device)
    output = conv(input, offset, weight, bias, **flat.spatial)
    grad_output = torch.randn_like(output)
    wanted = torch.autograd.grad(output, (input, offset, weight, bias), grad_output)

    in_plane = offset.detach().unflatten(1, (-1, 2))
    zero_depth = torch.zeros_like(in_plane[:, :, :1])
    thick_offset = torch.cat([zero_depth, in_plane], 2).flatten(1, 2).unsqueeze(2).requires_grad_()
    thick = [input.detach().unsqueeze(2).requires_grad_(), thick_offset, weight.detach().unsqueeze(2).requires_grad_()]
    volume = conv(*thick, bias, stride=(1, 1, 2), padding=(0, 1, 0))
    assert_close("output", volume.squeeze(2), output)
    gradients = torch.autograd.grad(volume, (*thick, bias), grad_output.unsqueeze(2))
    assert_close("gradient of input", gradients[0].squeeze(2), wanted[0])
    assert_close("gradient of offset", gradients[1].squeeze(2).unflatten(1, (-1, 3))[:, :, 1:].flatten(1, 2), wanted[1])
    assert_close("gradient of weight", gradients[2].squeeze(2), wanted[2])
    assert_close("gradient of bias", gradients[3], wanted[3])


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_permuted_axes_permute_the_result(backend: str, device: str, order: tuple[int, int, int]):
    case = Case("permuted", (3, 4, 6), (2, 1, 3), (3, 3), groups=3, batch=2, padding=(1, 0, 2), stride=(1, 2, 1))
    input, offset, weight, bias = draw(case, device)
    output = conv(input, offset, weight, bias, **case.spatial)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 1, *(2 + axis for axis in order))

    by_tap = offset.unflatten(1, (*case.kernel, 3))  # [B, kD, kH, kW, axis, D', H', W']
    places = [1 + axis for axis in order]
    by_tap = by_tap.permute(0, *places, 4, *(4 + place for place in places))[:, :, :, :, list(order)]
    spatial = {name: [values[axis] for axis in order] for name, values in case.spatial.items()}
    permuted = conv(turned(input), by_tap.flatten(1, 4), turned(weight), bias, **spatial)
    assert_close("output", permuted, turned(output))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_volume_gives_the_mirrored_result(backend: str, device: str, axis: int):
    case = Case("mirrored", (4, 3, 5), (3, 3, 2), (2, 2), padding=(1, 1, 1), dilation=(1, 2, 1))
    input, offset, weight, bias = draw(case, device)
    output = conv(input, offset, weight, bias, **case.spatial)
    grad_output = torch.randn_like(output)
    grad_input, grad_weight = torch.autograd.grad(output, (input, weight), grad_output)

    sign = torch.ones(3, dtype=torch.float64, device=device)
    sign[axis] = -1
    by_tap = offset.unflatten(1, (*case.kernel, 3)).flip(1 + axis, 5 + axis) * sign.view(3, 1, 1, 1)
    flipped = [t.detach().flip(2 + axis).requires_grad_() for t in (input, weight)]
    mirrored = conv(flipped[0], by_tap.flatten(1, 4), flipped[1], bias, **case.spatial)
    assert_close("output", mirrored, output.flip(2 + axis))
    gradients = torch.autograd.grad(mirrored, flipped, grad_output.flip(2 + axis))
    assert_close("gradient of input", gradients[0], grad_input.flip(2 + axis))
    assert_close("gradient of weight", gradients[1], grad_weight.flip(2 + axis))
