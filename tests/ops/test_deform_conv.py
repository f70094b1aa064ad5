"""Values and every gradient of the deformable convolution against scalar loops, in every registered backend."""

import itertools

import pytest
import torch
from deform_conv_cases import CASES, NAMES, Case, Problem, assert_close, conv, draw, leaves, one_case, problem

from nnunet_deform.ops import BACKEND_VARIABLE, backends_for
from nnunet_deform.ops.backends import torch_

DTYPES = [
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16"),
    pytest.param(torch.float16, torch.float32, id="float16"),
]
HALF_OFFSETS = [
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16-offset"),
    pytest.param(torch.float16, torch.float16, id="float16-offset"),
]


@pytest.mark.parametrize(("dtype", "offset_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_scalar_loop(backend: str, device: str, case: Case, dtype: torch.dtype, offset_dtype: torch.dtype):
    truth = problem(case, coarse_values=dtype.itemsize == 2)
    check_against(truth, case, device, dtype, offset_dtype)


# A quarter of these coordinates are integers, among them -1 and the size, where values have a kink.
@pytest.mark.parametrize(("dtype", "offset_dtype"), DTYPES[:2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_scalar_loop_at_integers(
    backend: str, device: str, case: Case, dtype: torch.dtype, offset_dtype: torch.dtype
):
    check_against(problem(case, offset_grid=0.25), case, device, dtype, offset_dtype)


@pytest.mark.parametrize(("dtype", "offset_dtype"), HALF_OFFSETS)
@pytest.mark.parametrize("case", [one_case("2d-grouped"), one_case("3d-depthwise"), one_case("3d-dense")], ids=str)
def test_offset_may_be_half_too(backend: str, device: str, case: Case, dtype: torch.dtype, offset_dtype: torch.dtype):
    truth = problem(case, coarse_values=True, offset_grid=1 / 32)
    check_against(truth, case, device, dtype, offset_dtype)


def check_against(truth: Problem, case: Case, device: str, dtype: torch.dtype, offset_dtype: torch.dtype) -> None:
    arguments = leaves(truth.arguments, device, dtype, offset_dtype)
    output = conv(*arguments, **case.spatial)
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output, arguments, truth.grad_output.to(device, dtype))
    assert_close("output", output, truth.output)
    for name, argument, gradient, expected in zip(NAMES, arguments, gradients, truth.gradients, strict=True):
        assert gradient.dtype == argument.dtype, name
        assert_close(f"gradient of {name}", gradient, expected)


def test_the_backends_that_must_always_run_do():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        reasons = backends_for(*(torch.zeros(1, n, 1, 1, dtype=dtype) for n in (1, 2, 1)))
        assert reasons["reference"] is None
        assert reasons["torch"] is None


CHECKED = [
    Case("2d-multiplier", (3, 4), (2, 2), (2, 4), groups=2, padding=(1, 0), stride=(1, 2)),
    Case("2d-dense", (4, 3), (1, 3), (2, 1), offset_groups=2, padding=(0, 2), dilation=(1, 2)),
    Case("3d-grouped", (1, 3, 2), (1, 2, 2), (4, 2), groups=2, offset_groups=2),
    Case("3d-depthwise", (3, 3, 2), (2, 1, 2), (2, 2), groups=2, stride=(1, 2, 1), dilation=(2, 1, 1)),
]


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_gradcheck(backend: str, device: str, case: Case):
    input, offset, weight, bias = draw(case, device)
    fraction = torch.rand(offset.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Away from the kinks at integers, where finite differences mean nothing.
    offset = (offset.detach().floor() + (0.2 + 0.6 * fraction).to(device)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *arguments: conv(*arguments, **case.spatial), (input, offset, weight, bias), nondet_tol=1e-12
    )


def test_taps_in_chunks(monkeypatch: pytest.MonkeyPatch, device: str):
    """The torch backend takes as many taps at a time as fit a budget; 27 taps in runs of 4 leave a rest of 3."""
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    case = one_case("3d-depthwise")
    truth = problem(case)
    points_times_channels = truth.output.numel()
    for length in (1, 4):
        monkeypatch.setattr(torch_, "_CHUNK_ELEMENTS", length * points_times_channels)
        check_against(truth, case, device, torch.float64, torch.float64)


@pytest.mark.parametrize("asked", list(itertools.product((False, True), repeat=4))[1:])
def test_gradients_of_every_subset(backend: str, device: str, asked: tuple[bool, ...]):
    case = one_case("2d-grouped")
    truth = problem(case)
    arguments = [
        t.detach().requires_grad_(ask)
        for t, ask in zip(leaves(truth.arguments, device, torch.float64), asked, strict=True)
    ]
    conv(*arguments, **case.spatial).backward(truth.grad_output.to(device))
    for name, argument, ask, expected in zip(NAMES, arguments, asked, truth.gradients, strict=True):
        if ask:
            assert_close(f"gradient of {name}", argument.grad, expected)
        else:
            assert argument.grad is None, name


def test_gradients_without_a_bias(backend: str, device: str):
    case = one_case("3d-grouped")
    truth = problem(case)
    arguments = leaves(truth.arguments[:3], device, torch.float64)
    output = conv(*arguments, **case.spatial)
    assert_close("output", output, truth.output - truth.arguments[3].view(1, -1, 1, 1, 1))
    gradients = torch.autograd.grad(output, arguments, truth.grad_output.to(device))
    for name, gradient, expected in zip(NAMES, gradients, truth.gradients, strict=False):
        assert_close(f"gradient of {name}", gradient, expected)


def test_no_graph_without_leaves(backend: str, device: str):
    case = one_case("2d-kernel1")
    truth = problem(case)
    arguments = leaves(truth.arguments, device, torch.float64)
    with torch.no_grad():
        output = conv(*arguments, **case.spatial)
    assert not output.requires_grad
    assert_close("output", output, truth.output)


@pytest.mark.parametrize("id", ["2d-grouped", "3d-depthwise"])
def test_an_empty_batch_has_zero_gradients(backend: str, device: str, id: str):
    case = one_case(id)
    input, offset, weight, bias = leaves(problem(case).arguments, device, torch.float32)
    input, offset = (t.detach()[:0].requires_grad_() for t in (input, offset))
    output = conv(input, offset, weight, bias, **case.spatial)
    assert tuple(output.shape) == (0, case.channels[1], *case.out_size)
    output.sum().backward()
    for name, tensor in zip(NAMES, (input, offset, weight, bias), strict=True):
        assert tensor.grad.shape == tensor.shape, name
        assert tensor.grad.count_nonzero() == 0, name


def test_a_second_derivative_is_refused(backend: str, device: str):
    case = one_case("2d-depthwise")
    input, offset, weight, bias = leaves(problem(case).arguments, device, torch.float64)
    output = conv(input, offset, weight, bias, **case.spatial)
    (gradient,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="deform_conv has no second derivative; call backward without"):
        gradient.sum().backward()


def test_gradients_accumulate_over_calls(backend: str, device: str):
    case = one_case("3d-kernel1")
    truth = problem(case)
    arguments = leaves(truth.arguments, device, torch.float64)
    for _ in range(2):
        conv(*arguments, **case.spatial).backward(truth.grad_output.to(device))
    for name, argument, expected in zip(NAMES, arguments, truth.gradients, strict=True):
        assert_close(f"gradient of {name}", argument.grad, 2 * expected)
