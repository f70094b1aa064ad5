"""The Triton kernels' values and gradients against the float64 reference, in Triton's interpreter or on a GPU.

No test session collects this file by itself. test_triton_backend.py has it run in a process of its own, because Triton
is interpreted only if TRITON_INTERPRET is 1 before it is imported. The interpreter takes milliseconds for each
operation, so problems are as small as they can be: one brick of voxels and a few taps, unless more of them are the
point.
"""

import functools
import itertools

import pytest
import torch
from deform_conv_cases import NAMES, assert_close
from torch import Tensor

from nnunet_deform.ops import deform_conv2d, deform_conv3d
from nnunet_deform.ops.backends import reference, triton_
from nnunet_deform.ops.checks import convolved_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
WILD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), 3e38, 1e9, 2.0**30]


RESULTS = ("output", *NAMES, "input, sorted")


def make(batch, channels, size, kernel, stride=1, padding=0, dilation=1, groups=1, spread=1.5, dtype=torch.float32):
    """Arguments and upstream gradient of one problem; ``spread`` None gives integer offsets."""
    generator = torch.Generator().manual_seed(0)
    axes = len(size)
    spatial = [[s] * axes if isinstance(s, int) else list(s) for s in (stride, padding, dilation)]
    out_size = convolved_size(size, kernel, *spatial)
    offset_shape = (batch, groups * torch.Size(kernel).numel() * axes, *out_size)
    offset = torch.randn(offset_shape, generator=generator) * (1 if spread is None else spread)
    tensors = [
        torch.randn(batch, channels, *size, generator=generator).to(dtype),
        (2 * offset).round() if spread is None else offset,
        torch.randn(channels, 1, *kernel, generator=generator).to(dtype),
        torch.randn(channels, generator=generator).to(dtype),
    ]
    grad_output = torch.randn(batch, channels, *out_size, generator=generator).to(dtype)
    return [t.to(DEVICE) for t in tensors], spatial, grad_output.to(DEVICE)


def run(tensors, spatial, grad_output, needs=(True,) * 4) -> list[Tensor | None]:
    """Output and gradients, then the input gradient again by the deterministic kernel."""
    output = triton_.forward(*tensors, *spatial)
    gradients = triton_.backward(grad_output, *tensors[:3], *spatial, needs)
    torch.use_deterministic_algorithms(True)
    try:
        sorted_gradient, *_ = triton_.backward(grad_output, *tensors[:3], *spatial, (needs[0], False, False, False))
    finally:
        torch.use_deterministic_algorithms(False)
    return [output, *gradients, sorted_gradient]


def truth(tensors, spatial, grad_output) -> list[Tensor]:
    doubles = [t.double() for t in tensors]
    gradients = reference.backward(grad_output.double(), *doubles[:3], *spatial, (True,) * 4)
    return [reference.forward(*doubles, *spatial), *gradients, gradients[0]]


def check(tensors, spatial, grad_output) -> list[Tensor | None]:
    results = run(tensors, spatial, grad_output)
    for name, result, expected in zip(RESULTS, results, truth(tensors, spatial, grad_output), strict=True):
        assert result.isfinite().all(), name
        assert_close(name, result, expected)
    return results


CASES = [
    pytest.param(dict(batch=2, channels=5, size=(2, 3), kernel=(1, 2), padding=(0, 1)), id="2d-C5"),
    pytest.param(
        dict(batch=1, channels=1, size=(2, 3), kernel=(3, 2), padding=(1, 0), spread=None), id="2d-C1-integers"
    ),
    pytest.param(dict(batch=1, channels=7, size=(3, 3), kernel=(1, 2), stride=(2, 1), padding=(0, 1)), id="2d-C7"),
    pytest.param(dict(batch=1, channels=20, size=(2, 3), kernel=(2, 1), padding=1), id="2d-C20"),
    pytest.param(dict(batch=1, channels=48, size=(2, 3), kernel=(1, 2), dilation=(1, 2), padding=(0, 1)), id="2d-C48"),
    pytest.param(dict(batch=1, channels=6, size=(1, 4), kernel=(2, 1), padding=(1, 0), groups=3), id="2d-groups"),
    pytest.param(dict(batch=1, channels=3, size=(2, 2, 1), kernel=(2, 1, 1), padding=(1, 0, 0)), id="3d-C3"),
    pytest.param(
        dict(batch=2, channels=4, size=(2, 2, 2), kernel=(1, 2, 1), stride=(2, 1, 2), padding=(1, 1, 0),
             dilation=(1, 2, 1), groups=2), id="3d-stride-dilation-groups",
    ),
    pytest.param(dict(batch=1, channels=2, size=(1, 3, 1), kernel=(3, 1, 1), padding=(1, 0, 0)), id="3d-thin"),
    pytest.param(dict(batch=1, channels=40, size=(1, 1, 1), kernel=(1, 1, 1), spread=0.4), id="3d-one-voxel"),
    pytest.param(
        dict(batch=1, channels=2, size=(2, 2, 2), kernel=(1, 1, 2), padding=(0, 0, 1), spread=None), id="3d-integers"
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: dict):
    check(*make(**case))


def test_additions_of_one_channel_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """As below compute capability 9.0, in smaller bricks."""
    monkeypatch.setattr(triton_, "_added_at_once", lambda grad_input: 1)
    check(*make(1, 4, (1, 3, 2), (1, 1, 2), padding=(0, 0, 1)))


def test_every_tap_of_a_box():
    check(*make(1, 2, (1, 2, 1), (2, 3, 2), padding=1))


def test_zero_offsets():
    tensors, spatial, grad_output = make(1, 3, (2, 3), (3, 2), padding=1)
    tensors[1].zero_()
    check(tensors, spatial, grad_output)


def test_many_bricks_in_runs(monkeypatch: pytest.MonkeyPatch):
    """Several bricks along every axis, the last of them partly empty, and a last run with fewer bricks."""
    monkeypatch.setattr(triton_, "_PROGRAMS", 4)
    check(*make(1, 2, (3, 3, 9), (1, 1, 1)))


def test_taps_sorted_in_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_, "_SORT_MEMORY", 0)
    check(*make(1, 2, (3, 3), (2, 3), padding=1))


def test_more_samples_in_a_cell_than_a_program_takes_at_once():
    """All 36 voxels sample the middle of one cell."""
    tensors, spatial, grad_output = make(1, 2, (6, 6), (1, 1))
    voxels = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")).to(DEVICE)
    tensors[1] = (2.25 + 0.5 * torch.rand(voxels.shape, generator=torch.Generator().manual_seed(0))).to(DEVICE) - voxels
    tensors[1] = tensors[1][None]
    check(tensors, spatial, grad_output)


def test_wide_indices(monkeypatch: pytest.MonkeyPatch):
    """The variant for volumes that 32 bits do not index."""
    made = make(1, 3, (2, 3), (1, 2), padding=1)
    problem = triton_._Problem(*made[0][:3], *made[1])
    assert not problem.wide
    monkeypatch.setattr(triton_, "_MOST_NARROW", 0)
    assert triton_._Problem(*made[0][:3], *made[1]).wide
    check(*made)


def test_sorted_gradients_are_the_same_bit_for_bit():
    made = make(1, 3, (2, 3), (2, 1), padding=(1, 0))
    first, second = run(*made), run(*made)
    for name, a, b in zip(RESULTS, first, second, strict=True):
        if name != "input":
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    tensors, spatial, grad_output = make(1, 5, (2, 3), (1, 3), padding=(0, 1), dtype=dtype)
    results = check(tensors, spatial, grad_output)
    assert [r.dtype for r in results] == [dtype, dtype, torch.float32, dtype, dtype, dtype]


@pytest.mark.parametrize(("dtype", "far"), [(torch.bfloat16, 3e38), (torch.float16, 65504.0)])
def test_half_precision_offsets(dtype: torch.dtype, far: float):
    """And some that lead nowhere."""
    tensors, spatial, grad_output = make(1, 2, (3, 3), (1, 2), dtype=dtype)
    tensors[1] = tensors[1].to(dtype)
    tensors[1][0, 0, 0, 0], tensors[1][0, 3, 2, 1] = float("nan"), far
    grad_offset = check(tensors, spatial, grad_output)[2]
    assert grad_offset.dtype == dtype
    assert not grad_offset[0, :2, 0, 0].any()
    assert not grad_offset[0, 2:, 2, 1].any()


def test_offsets_that_lead_nowhere_sample_zero():
    """Each bad number in one voxel of its own, on one axis of one tap."""
    tensors, spatial, grad_output = make(1, 2, (2, len(WILD)), (1, 2), padding=(0, 1))
    width = len(WILD)
    tensors[1][0, 0, 0, :width] = torch.tensor(WILD)
    tensors[1][0, 3, 1, :width] = torch.tensor(WILD)
    grad_offset = check(tensors, spatial, grad_output)[2]
    assert not grad_offset[0, :2, 0, :width].any()
    assert not grad_offset[0, 2:, 1, :width].any()


def test_an_infinite_voxel_spoils_only_its_neighbours():
    """Every gradient, too: taps outside the volume read the voxel nearest to them, and must not pass it on."""
    tensors, spatial, grad_output = make(1, 2, (4, 4), (1, 2), padding=(0, 1))
    tensors[1].zero_()
    tensors[1][:, :, 0] = -20.0
    expected = run(tensors, spatial, grad_output)
    tensors[0][0, 0, 0, 0] = float("inf")
    for name, result, want in zip(RESULTS, run(tensors, spatial, grad_output), expected, strict=True):
        assert_close(name, result, want)


def test_padding_that_32_bits_do_not_hold():
    """Three voxels of padding, three of volume and three of padding again, times 2^40."""
    far = 2**40
    tensors, _, grad_output = make(1, 2, (1, 3), (1, 1), spread=0.4)
    check([*tensors[:2], *tensors[2:]], [[1, far], [0, far], [1, 1]], grad_output)


@functools.cache
def everything():
    """A problem, and all that is computed of it."""
    made = make(1, 2, (2, 2), (1, 2))
    return made, run(*made)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4)))
def test_any_subset_of_gradients_is_the_same(needs: tuple[bool, ...]):
    (tensors, spatial, grad_output), (_, *gradients, _) = everything()
    some = triton_.backward(grad_output, *tensors[:3], *spatial, needs)
    for name, need, one, all_of_it in zip(NAMES, needs, some, gradients, strict=True):
        if need:
            assert_close(name, one, all_of_it)
        else:
            assert one is None, name


def test_nothing_is_sorted_in_vain():
    made, _ = everything()
    assert run(*made, (False,) * 4)[1:] == [None] * 5


def test_layouts_give_the_same():
    tensors, spatial, grad_output = make(1, 2, (2, 3), (1, 2))
    last = torch.channels_last
    wide = torch.zeros(1, 4, 5, 8).contiguous(memory_format=last).to(DEVICE)
    cropped = wide[:, :2, 1:3, 2:5].copy_(tensors[0])
    assert cropped.stride(1) == 1
    strided = torch.stack((tensors[0], tensors[0]), -1)[..., 0]
    offset = tensors[1]
    strided_offset = torch.stack((offset, offset), -1)[..., 0]
    check([tensors[0].contiguous(memory_format=last), *tensors[1:]], spatial, grad_output)
    check([cropped, offset.contiguous(memory_format=last), *tensors[2:]], spatial, grad_output)
    check([strided, strided_offset, *tensors[2:]], spatial, grad_output[:, :1, :1, :1].expand_as(grad_output))


def test_what_would_split_a_vector_is_copied():
    """Four channels are read at once, from addresses that are multiples of four elements, or so Triton is told."""
    (_, offset, weight, _), spatial, _ = make(2, 4, (3, 3), (1, 2))
    memory = torch.arange(200.0, device=DEVICE)
    dense = (36, 1, 12, 4)
    for strides, start in ((dense, 1), ((37, 1, 12, 4), 0), ((36, 1, 14, 4), 0), ((54, 1, 18, 6), 0)):
        strided = memory.as_strided((2, 4, 3, 3), strides, start)
        problem = triton_._Problem(strided, offset, weight, *spatial)
        copied = problem.input["input"]
        assert torch.equal(copied, strided)
        assert (copied.stride(), copied.storage_offset()) == (dense, 0)
        assert problem.input["input_batch_stride"] == 36
    kept = memory.as_strided((2, 4, 3, 3), (40, 1, 12, 4), 8)
    assert triton_._Problem(kept, offset, weight, *spatial).input["input"] is kept
    assert triton_._Problem(kept, offset, weight, *spatial).aligned(memory[3:]).storage_offset() == 0


def test_channels_last_is_not_copied(monkeypatch: pytest.MonkeyPatch):
    (input, offset, weight, bias), spatial, _ = make(1, 5, (3, 4), (1, 2))
    input = input.contiguous(memory_format=torch.channels_last)
    problem = triton_._Problem(input, offset, weight, *spatial)
    assert problem.input["input"].data_ptr() == input.data_ptr()
    assert problem.offset["offset"].data_ptr() == offset.data_ptr()
    assert triton_.forward(input, offset, weight, bias, *spatial).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "function"), [((2, 3), deform_conv2d), ((2, 1, 2), deform_conv3d)])
def test_the_registered_operator_uses_it(size: tuple[int, ...], function, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NNUNET_DEFORM_BACKEND", "triton")
    tensors, spatial, grad_output = make(1, 3, size, (1,) * len(size))
    leaves = [t.requires_grad_() for t in tensors]
    output = function(*leaves, *spatial)
    gradients = torch.autograd.grad(output, leaves, grad_output)
    expected = truth([t.detach() for t in tensors], spatial, grad_output)[:5]
    for name, result, want in zip(RESULTS[:5], (output, *gradients), expected, strict=True):
        assert_close(name, result, want)
