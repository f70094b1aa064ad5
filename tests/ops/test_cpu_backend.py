"""The C++ backend against the float64 reference, in every instruction set this processor has."""

import functools
import itertools

import pytest
import torch

from nnunet_deform.ops import deform_conv2d, deform_conv3d
from nnunet_deform.ops.backends import backends_for, choose_backend, cpu, reference
from nnunet_deform.ops.checks import convolved_size

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="the C++ kernel was not built")

NAMES = ("input", "offset", "weight", "bias")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request, monkeypatch):
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor or this build has no {request.param}")
    monkeypatch.setattr(cpu._library(), "instruction_set", request.param)
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(batch, channels, size, kernel, stride=1, padding=0, dilation=1, groups=1, spread=1.5):
    """Tensors of one convolution and its arguments; ``spread`` None gives integer offsets."""
    generator = torch.Generator().manual_seed(0)
    axes = len(size)
    arguments = tuple([a] * axes if isinstance(a, int) else list(a) for a in (stride, padding, dilation))
    out_size = convolved_size(size, kernel, *arguments)
    offset_shape = (batch, groups * torch.Size(kernel).numel() * axes, *out_size)
    tensors = {
        "input": torch.randn(batch, channels, *size, generator=generator),
        "offset": torch.randint(-3, 4, offset_shape, generator=generator).float()
        if spread is None
        else torch.randn(offset_shape, generator=generator) * spread,
        "weight": torch.randn(channels, 1, *kernel, generator=generator),
        "bias": torch.randn(channels, generator=generator),
    }
    return tensors, arguments, torch.randn(batch, channels, *out_size, generator=generator)


def run(backend, tensors, arguments, grad_output, needs=(True,) * 4):
    output = backend.forward(*tensors.values(), *arguments)
    return output, backend.backward(grad_output, *list(tensors.values())[:3], *arguments, needs)


def truth(tensors, arguments, grad_output):
    return run(reference, {k: t.double() for k, t in tensors.items()}, arguments, grad_output.double())


@functools.cache
def problem(**case):
    """One convolution, not to be changed, and what is true of it, whatever computes it in how many threads."""
    made = make(**case)
    return made, truth(*made)


def assert_agree(actual, expected, tolerance=2e-6):
    output, gradients = actual
    expected_output, expected_gradients = expected
    for name, a, e in zip(
        ("output", *NAMES), (output, *gradients), (expected_output, *expected_gradients), strict=True
    ):
        assert a.shape == e.shape, name
        assert a.isfinite().all(), name
        error = (a.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


CASES = [
    pytest.param(dict(batch=2, channels=52, size=(5, 6, 7), kernel=(3, 3, 3), padding=1), id="C52"),
    pytest.param(dict(batch=1, channels=48, size=(9, 9, 9), kernel=(3, 3, 3), padding=1), id="C48-one_item"),
    pytest.param(dict(batch=1, channels=100, size=(4, 5, 6), kernel=(3, 3, 3), padding=1), id="C100-many_blocks"),
    pytest.param(
        dict(batch=3, channels=6, size=(9, 4, 17), kernel=(3, 1, 2), stride=(2, 1, 3), padding=(2, 0, 1), groups=2),
        id="stride_padding_groups",
    ),
    pytest.param(
        dict(batch=2, channels=21, size=(11, 8, 9), kernel=(3, 3, 3), padding=(3, 2, 1), dilation=(3, 2, 1), groups=3),
        id="dilation_groups",
    ),
    pytest.param(dict(batch=1, channels=16, size=(1, 8, 1), kernel=(3, 3, 3), padding=1, groups=4), id="axes_of_1"),
    pytest.param(dict(batch=1, channels=1, size=(1, 1, 1), kernel=(1, 1, 1)), id="one_voxel"),
    pytest.param(dict(batch=2, channels=19, size=(3, 40, 33), kernel=(1, 3, 3), padding=(0, 1, 1)), id="flat_kernel"),
    pytest.param(dict(batch=3, channels=13, size=(7, 11), kernel=(3, 3), stride=(1, 2), padding=1), id="2d"),
    pytest.param(dict(batch=1, channels=130, size=(20, 9), kernel=(5, 5), padding=2, groups=2), id="2d-5x5-groups"),
    pytest.param(dict(batch=2, channels=8, size=(1, 6), kernel=(1, 3), padding=(0, 1), dilation=(1, 2)), id="2d-row"),
    pytest.param(dict(batch=2, channels=7, size=(6, 5, 8), kernel=(3, 3, 3), padding=1, spread=8.0), id="far_offsets"),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, threads, instruction_set, set_threads):
    set_threads(threads)
    made, expected = problem(**case)
    assert_agree(run(cpu, *made), expected)


@pytest.mark.parametrize("size", [(5, 6, 7), (1, 9, 2), (6, 8)])
def test_integers_and_borders_follow_the_convention(size, instruction_set):
    """At integers, -1 and the size the gradients are exactly as defined, so an error would be of order one."""
    made = make(2, 20, size, (3,) * len(size), padding=2, spread=None)
    assert_agree(run(cpu, *made), truth(*made))
    tensors, arguments, grad_output = made
    tensors["offset"].zero_()
    assert_agree(run(cpu, tensors, arguments, grad_output), truth(tensors, arguments, grad_output))


def test_a_position_a_hair_below_an_integer_is_in_the_lower_cell(instruction_set):
    """float32 has no number between 40 - 1e-9 and 40; the cell must not depend on that."""
    made = make(1, 16, (3, 50), (1, 1), spread=0)
    made[0]["offset"].fill_(-1e-9)
    assert_agree(run(cpu, *made), truth(*made))


def test_far_from_the_origin_positions_are_as_exact_as_near_it(instruction_set):
    made = make(1, 4, (2, 3000), (1, 3), padding=(0, 1), spread=0.3)
    assert_agree(run(cpu, *made), truth(*made), tolerance=1e-6)


@functools.cache
def problem_of_far_samples(value):
    """As :func:`problem`, with offsets of ``value``."""
    tensors, arguments, grad_output = make(2, 20, (5, 6, 7), (3, 3, 3), padding=1)
    tensors["offset"][:, 4:7, 1:3] = value
    tensors["offset"][0] = value
    return (tensors, arguments, grad_output), truth(tensors, arguments, grad_output)


@pytest.mark.parametrize("value", [1e30, -1e30, 3e9, -3e9, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("threads", [1, 2])
def test_offsets_that_lead_nowhere_sample_zero(value, threads, instruction_set, set_threads):
    set_threads(threads)
    made, expected = problem_of_far_samples(value)
    output, gradients = run(cpu, *made)
    assert_agree((output, gradients), expected)
    tensors, _, _ = made
    assert torch.equal(output[0], tensors["bias"].view(-1, 1, 1, 1).expand_as(output[0]))
    assert not gradients[1][0].any()
    assert not gradients[1][:, 4:7, 1:3].any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4)))
def test_any_subset_of_gradients_is_the_same(needs, threads, instruction_set, set_threads):
    set_threads(threads)
    made = make(2, 20, (5, 6, 7), (3, 3, 3), padding=1)
    _, everything = run(cpu, *made)
    _, some = run(cpu, *made, needs=needs)
    for need, a, e in zip(needs, some, everything, strict=True):
        if need:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        else:
            assert a is None


@pytest.mark.parametrize("threads", [1, 3])
def test_runs_repeat_bit_for_bit(threads, instruction_set, set_threads):
    made = make(2, 40, (12, 13, 11), (3, 3, 3), padding=1, spread=3.0)
    set_threads(threads)
    first_output, first = run(cpu, *made)
    for _ in range(3):
        output, gradients = run(cpu, *made)
        assert torch.equal(output, first_output)
        for name, a, b in zip(NAMES, gradients, first, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("spread", [0.3, 8.0], ids=["in_turns", "by_rows"])
@pytest.mark.parametrize("batch", [1, 2])
def test_threads_share_the_work(batch, spread, instruction_set, set_threads):
    """Short offsets let the threads work in two turns, long ones divide the rows: both ways add up to the same."""
    made, expected = problem(batch=batch, channels=40, size=(24, 7, 9), kernel=(3, 3, 3), padding=1, spread=spread)
    set_threads(1)
    output, gradients = run(cpu, *made)
    for threads in (2, 4, 5):
        set_threads(threads)
        other_output, other_gradients = run(cpu, *made)
        assert_agree((other_output, other_gradients), expected)
        assert torch.equal(output, other_output)
        assert torch.equal(gradients[1], other_gradients[1])
        for _ in range(2):
            _, again = run(cpu, *made)
            assert all(torch.equal(*pair) for pair in zip(other_gradients, again, strict=True))


@pytest.mark.parametrize("axes", [2, 3])
def test_layouts(axes, instruction_set):
    """Contiguous, channels last, and strided tensors give the same; channels last is neither copied nor left."""
    tensors, arguments, grad_output = make(2, 20, (6, 5, 7)[:axes], (3,) * axes, padding=1)
    expected = run(cpu, tensors, arguments, grad_output)
    last = CHANNELS_LAST[axes + 2]
    in_last = {k: t.contiguous(memory_format=last) if t.ndim > 2 else t for k, t in tensors.items()}
    strided = {k: torch.stack((t, t), -1)[..., 0] for k, t in tensors.items()}
    for made in (
        (in_last, arguments, grad_output.contiguous(memory_format=last)),
        (strided, arguments, torch.stack((grad_output, grad_output), 1)[:, 1]),
        ({**tensors, "offset": in_last["offset"]}, arguments, grad_output),
    ):
        output, gradients = run(cpu, *made)
        assert output.is_contiguous(memory_format=last)
        assert torch.equal(output, expected[0])
        for name, a, b in zip(NAMES, gradients, expected[1], strict=True):
            assert torch.equal(a, b), name


def test_expanded_gradient(instruction_set):
    tensors, arguments, grad_output = make(2, 20, (6, 5, 7), (3, 3, 3), padding=1)
    grad_output = grad_output[:1, :1, :1, :1, :1].expand_as(grad_output)
    assert_agree(run(cpu, tensors, arguments, grad_output), truth(tensors, arguments, grad_output))


@pytest.mark.parametrize(("axes", "function"), [(2, deform_conv2d), (3, deform_conv3d)])
def test_the_registered_operator_uses_it(axes, function, monkeypatch):
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)
    tensors, arguments, _ = make(2, 20, (6, 5, 7)[:axes], (3,) * axes, padding=1)
    assert choose_backend(tensors["input"], tensors["offset"], tensors["weight"])[0] == "cpu"
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    doubles = [t.double().requires_grad_() for t in tensors.values()]
    output, expected = function(*leaves, *arguments), function(*doubles, *arguments)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    assert_agree((output, [t.grad for t in leaves]), (expected.detach(), [t.grad for t in doubles]))


def test_an_empty_batch_passes_through():
    tensors, arguments, _ = make(0, 20, (6, 5, 7), (3, 3, 3), padding=1)
    leaves = [t.requires_grad_() for t in tensors.values()]
    output = deform_conv3d(*leaves, *arguments)
    output.sum().backward()
    assert output.shape == (0, 20, 6, 5, 7)
    assert not leaves[2].grad.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {k: v.double() for k, v in t.items()}, "float64"),
        (lambda t: t | {"weight": torch.randn(20, 20, 3, 3, 3)}, "depthwise"),
        (lambda t: t | {"weight": torch.randn(40, 1, 3, 3, 3)}, "depthwise"),
        (lambda t: {k: v.to("meta") for k, v in t.items()}, "meta"),
    ],
)
def test_what_it_cannot_do_has_a_reason(change, reason):
    tensors, _, _ = make(1, 20, (6, 5, 7), (3, 3, 3), padding=1)
    tensors = change(tensors)
    assert reason in backends_for(tensors["input"], tensors["offset"], tensors["weight"])["cpu"]


def test_a_missing_library_has_a_reason(monkeypatch, tmp_path):
    tensors, _, _ = make(1, 20, (6, 5, 7), (3, 3, 3), padding=1)
    arguments = [tensors[name] for name in ("input", "offset", "weight")]
    broken = tmp_path / "broken.so"
    broken.write_text("this is no library")
    for path, reason in ((tmp_path / "absent.so", "no compiler at installation"), (broken, "does not load")):
        monkeypatch.setattr(cpu, "LIBRARY", path)
        cpu._library.cache_clear()
        assert reason in cpu.unable(*arguments)
        assert choose_backend(*arguments)[0] == "torch"
    monkeypatch.undo()
    cpu._library.cache_clear()
    assert cpu.unable(*arguments) is None
