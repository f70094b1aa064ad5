"""What the operator does at borders, at integers, outside the volume and with offsets that are not numbers."""

import pytest
import torch
from deform_conv_cases import NAMES, Case, assert_close, conv, draw, leaves, one_case, problem, relative_error
from torch.nn import functional as F

EPS = 2.0**-16  # coordinates, values and products with it are exact in float32
LINE = (3.0, 5.0, -2.0, 7.0)
# position on an axis of four voxels with the values of LINE: value, right derivative, weight of each voxel
BORDER = {
    -1.5: (0.0, 0.0, {}),
    -1 - EPS: (0.0, 0.0, {}),
    -1.0: (0.0, 0.0, {}),
    -1 + EPS: (3 * EPS, 3.0, {0: EPS}),
    -0.5: (1.5, 3.0, {0: 0.5}),
    0.0: (3.0, 2.0, {0: 1.0}),
    0.25: (3.5, 2.0, {0: 0.75, 1: 0.25}),
    1.0: (5.0, -7.0, {1: 1.0}),
    2 - EPS: (-2 + 7 * EPS, -7.0, {1: EPS, 2: 1 - EPS}),
    2.0: (-2.0, 9.0, {2: 1.0}),
    3.0: (7.0, -7.0, {3: 1.0}),
    3.5: (3.5, -7.0, {3: 0.5}),
    4 - EPS: (7 * EPS, -7.0, {3: EPS}),
    4.0: (0.0, 0.0, {}),
    4 + EPS: (0.0, 0.0, {}),
    4.5: (0.0, 0.0, {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("ndim", "axis"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_convention_at_borders_and_integers(backend: str, device: str, ndim: int, axis: int, dtype: torch.dtype):
    """One sample at each position along one axis; on the others at 0.5 between a line and twice that line."""
    # Side by side along the last other axis, two voxels for each position: a batch item for each costs Triton's
    # interpreter a program for each.
    others = [a for a in range(ndim) if a != axis]
    row, count = others[-1], len(BORDER)
    size = [2] * ndim
    size[axis] = 4
    line = torch.tensor(LINE, dtype=dtype).view([-1 if a == axis else 1 for a in range(ndim)])
    volume = line.expand(size).clone()
    for other in others:
        volume.select(other, 1).mul_(2)
    middle = 1.5 ** len(others)

    positions = torch.tensor(list(BORDER), dtype=dtype)
    along_row = [1] * ndim
    along_row[row] = count
    offset = torch.full((1, ndim, *along_row), 0.5, dtype=dtype)
    offset[0, axis] = positions.view(along_row)
    input = volume.repeat(along_row)[None, None].to(device).requires_grad_()
    offset = offset.to(device).requires_grad_()
    weight = torch.ones(1, 1, *[1] * ndim, dtype=dtype, device=device, requires_grad=True)
    # One output voxel on the other axes, whose regular position is 0.
    output = conv(input, offset, weight, stride=[2 if a == row else 4 for a in range(ndim)])
    assert output.numel() == count
    grad_input, grad_offset, grad_weight = torch.autograd.grad(output.sum(), (input, offset, weight))

    along = [1] * ndim
    along[axis] = -1
    of_position = grad_input[0, 0].cpu().unflatten(row, (count, 2)).movedim(row, 0)
    for i, (position, (value, slope, weights)) in enumerate(BORDER.items()):
        assert output.flatten()[i].item() == value * middle, position
        assert grad_offset[0, axis].flatten()[i].item() == slope * middle, position
        for other in others:
            assert grad_offset[0, other].flatten()[i].item() == value * middle / 1.5, position
        expected = torch.tensor([weights.get(p, 0.0) for p in range(4)], dtype=dtype).view(along)
        assert torch.equal(of_position[i], expected.expand(size) * 0.5 ** len(others)), position
    assert grad_weight.item() == pytest.approx(output.double().sum().item(), rel=1e-6)


def test_zero_offsets_take_the_right_derivative(backend: str, device: str):
    """Where training starts: every coordinate is an integer, and the taps at -1 and at the size pass no gradient."""
    values = torch.tensor([3.0, 5.0, -2.0, 7.0])
    input = values.view(1, 1, 1, 4).to(device)
    offset = torch.zeros(1, 6, 1, 4, device=device, requires_grad=True)
    weight = torch.tensor([10.0, 100.0, 1000.0], device=device).view(1, 1, 1, 3)
    output = conv(input, offset, weight, padding=(0, 1))
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    right = torch.tensor([0.0, 2.0, -7.0, 9.0, -7.0, 0.0])  # at -1, 0, 1, 2, 3, 4
    below = torch.tensor([0.0, -3.0, -5.0, 2.0, -7.0, 0.0])  # the next row is outside the image
    for tap, scale in enumerate((10.0, 100.0, 1000.0)):
        assert torch.equal(gradient[0, 2 * tap + 1, 0].cpu(), scale * right[tap : tap + 4])
        assert torch.equal(gradient[0, 2 * tap, 0].cpu(), scale * below[tap : tap + 4])


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, -1, 0), (0, 0, 2), (-2, 1, -1), (3, 0, -5)])
def test_integer_offsets_shift_the_volume(backend: str, device: str, shift: tuple[int, int, int]):
    case = Case("shift", (4, 5, 6), (1, 1, 1), (2, 2), groups=2)
    input, offset, weight, _ = draw(case, device, torch.float32)
    offset = torch.tensor(shift, device=device).view(1, 3, 1, 1, 1).expand_as(offset).float()
    output = conv(input, offset, torch.ones_like(weight))
    shifted = F.pad(input, [pad for s in reversed(shift) for pad in (-s, s)])
    assert torch.equal(output, shifted)


@pytest.mark.parametrize("far", [-40.0, 40.0])
def test_everything_outside_gives_the_bias(backend: str, device: str, far: float):
    case = Case("outside", (3, 4, 5), (3, 3, 3), (2, 4), batch=2, padding=(1, 1, 1))
    input, offset, weight, bias = draw(case, device, torch.float32)
    offset = (offset.detach() + far).requires_grad_()
    output = conv(input, offset, weight, bias, **case.spatial)
    assert torch.equal(output, bias.view(1, -1, 1, 1, 1).expand_as(output))
    *zeros, grad_bias = torch.autograd.grad(output.sum(), (input, offset, weight, bias))
    for name, gradient in zip(NAMES, zeros, strict=False):
        assert gradient.count_nonzero() == 0, name
    assert torch.equal(grad_bias, torch.full_like(bias, 2 * 3 * 4 * 5))


@pytest.mark.parametrize("size", [(6, 7), (4, 5, 6)], ids=["2d", "3d"])
def test_linear_ramps_are_reproduced(backend: str, device: str, size: tuple[int, ...]):
    case = Case("ramp", size, (1,) * len(size), (1, 1), batch=2)
    slopes = torch.tensor([0.5, -2.0, 3.0][: len(size)], dtype=torch.float64, device=device)
    voxel = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in size), indexing="ij")).to(device)
    over_axes = (-1, *[1] * len(size))
    ramp = (voxel * slopes.view(over_axes)).sum(0) + 1.25
    _, offset, weight, _ = draw(case, device)
    last = torch.tensor(size, device=device).view(over_axes) - 1
    position = torch.maximum(torch.minimum(voxel + offset, last), torch.zeros_like(last)).detach()
    offset = (position - voxel).requires_grad_()

    output = conv(ramp.expand(2, 1, *size), offset, torch.ones_like(weight))
    expected = (position * slopes.view(over_axes)).sum(1, keepdim=True) + 1.25
    assert_close("output", output, expected)
    (grad_offset,) = torch.autograd.grad(output.sum(), offset)
    # At the last voxel the right derivative looks beyond the ramp.
    inner = (position < last).all(1, keepdim=True)
    assert inner.sum() > 10
    assert_close("gradient of offset", grad_offset * inner, slopes.view(over_axes).expand_as(offset) * inner)


WILD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, 3e38, 1e9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wild", WILD)
def test_wild_offsets_sample_zero(backend: str, device: str, wild: float, dtype: torch.dtype):
    """One tap of one voxel: it alone samples zero, and every gradient is the one of moving it far outside."""
    case = one_case("3d-depthwise")
    tap, axis, voxel = 13, 1, (1, 2, 2)
    offset_dtype = dtype if dtype == torch.float64 else torch.float32
    results = {}
    for moved_to in (-50.0, wild):
        arguments = leaves(problem(case, coarse_values=True).arguments, device, dtype, offset_dtype)
        with torch.no_grad():
            arguments[1][(0, 3 * tap + axis, *voxel)] = moved_to
        output = conv(*arguments, **case.spatial)
        output.backward(problem(case, coarse_values=True).grad_output.to(device, dtype))
        results[moved_to] = [output, *(a.grad for a in arguments)]
    for name, result, expected in zip(("output", *NAMES), results[wild], results[-50.0], strict=True):
        assert result.isfinite().all(), name
        assert_close(name, result, expected)
    grad_offset = results[wild][2]
    assert grad_offset[(0, slice(3 * tap, 3 * tap + 3), *voxel)].count_nonzero() == 0
    assert grad_offset.count_nonzero() > grad_offset.numel() / 4


@pytest.mark.parametrize("wild", WILD)
def test_everything_wild_gives_the_bias(backend: str, device: str, wild: float):
    case = one_case("2d-multiplier")
    input, offset, weight, bias = leaves(problem(case).arguments, device, torch.float32)
    offset = torch.full_like(offset, wild, requires_grad=True)
    output = conv(input, offset, weight, bias, **case.spatial)
    assert torch.equal(output, bias.view(1, -1, 1, 1).expand_as(output))
    for gradient in torch.autograd.grad(output.sum(), (input, offset, weight)):
        assert gradient.count_nonzero() == 0


def test_wild_half_offsets(backend: str, device: str):
    case = one_case("2d-depthwise")
    input, offset, weight, bias = leaves(
        problem(case, coarse_values=True, offset_grid=1 / 32).arguments, device, torch.float16
    )
    offset = offset.detach().clone()
    offset[0, ::2], offset[1, ::3] = float("nan"), 65504.0
    output = conv(input, offset.requires_grad_(), weight, bias, **case.spatial)
    assert output.isfinite().all()
    assert torch.equal(output[0], bias.view(-1, 1, 1).expand_as(output[0]))
    for gradient in torch.autograd.grad(output.sum(), (input, offset, weight, bias)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_voxel_spoils_only_its_neighbours(backend: str, device: str, bad: float):
    """Corners outside the volume are zero whatever the volume holds elsewhere."""
    case = Case("bad-voxel", (4, 4, 4), (3, 3, 3), (2, 2), groups=2, padding=(1, 1, 1))
    input, offset, weight, bias = draw(case, device, torch.float32)
    with torch.no_grad():
        offset.zero_()
        expected = conv(input, offset, weight, bias, **case.spatial)
        input[0, 0, 0, 0, 0] = bad
        output = conv(input, offset, weight, bias, **case.spatial)
    spoilt = torch.zeros_like(output, dtype=torch.bool)
    spoilt[0, 0, :2, :2, :2] = True
    assert torch.equal(output[~spoilt], expected[~spoilt])


def test_coordinates_keep_their_precision_on_long_axes(backend: str, device: str):
    """Half-precision values with float32 offsets: at 150.3 a bfloat16 coordinate would be an integer."""
    length = 200
    sign = torch.ones(length, dtype=torch.bfloat16)
    sign[1::2] = -1
    input = sign.view(1, 1, 1, length).to(device)
    offset = torch.zeros(1, 2, 1, length, device=device)
    offset[:, 1] = 0.3
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device=device)
    output = conv(input, offset, weight)
    assert relative_error(output[..., :-1], 0.4 * input[..., :-1].double()) < 2**-8
