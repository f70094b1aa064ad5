"""The operator among torch's own machinery: registration, compile, autocast, saved tensors, memory formats."""

import shutil

import pytest
import torch
from deform_conv_cases import BACKENDS, NAMES, Case, assert_close, conv, draw, leaves, plain_conv, skip_if_unable
from torch import Tensor

OPS = torch.ops.nnunet_deform
OPCHECKED = [
    Case("2d", (5, 6), (3, 3), (4, 4), groups=4, offset_groups=2, batch=2, padding=(1, 1)),
    Case("3d", (3, 4, 5), (3, 1, 2), (4, 2), groups=2, batch=2, stride=(1, 2, 1), padding=(1, 0, 1)),
]
DENSE = Case("dense", (3, 5, 4), (3, 3, 3), (3, 2), batch=2, padding=(1, 1, 1))


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def strided(tensor: Tensor) -> Tensor:
    """Neither contiguous nor channels last, and not starting where its storage does."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1).transpose(0, 1).contiguous().transpose(0, 1)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def laid_out(case: Case, device: str, layout, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random arguments of a case with input, offset and weight in the given layout."""
    *tensors, bias = (tensor.detach() for tensor in draw(case, device, dtype))
    return [*(layout(tensor).requires_grad_() for tensor in tensors), bias.requires_grad_()]


# How the operator is registered does not depend on the backend, which decides about the layout of its own result only.
@pytest.mark.parametrize(
    ("backend", "case", "layout"),
    [
        pytest.param(
            backend,
            case,
            layout,
            id=f"{backend}-{case}-{layout.__name__}",
            marks=() if backend == "torch" or (case is OPCHECKED[1] and layout is strided) else pytest.mark.slow,
        )
        for backend in BACKENDS
        for case in OPCHECKED
        for layout in (contiguous, channels_last, strided)
    ],
    indirect=["backend"],
)
def test_opcheck(backend: str, device: str, case: Case, layout):
    arguments = laid_out(case, device, layout)
    skip_if_unable(*arguments[:3])
    spatial = tuple(case.spatial.values())
    torch.library.opcheck(OPS.deform_conv.default, (*arguments, *spatial))

    input, offset, weight, _ = (tensor.detach() for tensor in arguments)
    grad_output = layout(torch.randn(case.batch, case.channels[1], *case.out_size, device=device))
    for needs in ([True] * 4, [True, False, False, True], [False, True, True, False]):
        # The backward operator is not meant to be differentiated, so autograd is not among its checks.
        torch.library.opcheck(OPS.deform_conv_backward.default, (grad_output, input, offset, weight, *spatial, needs))


def test_opcheck_without_bias_and_in_half_precision(backend: str, device: str):
    case = OPCHECKED[1]
    arguments = leaves(draw(case)[:3], device, torch.bfloat16, torch.float32)
    skip_if_unable(*arguments)
    torch.library.opcheck(OPS.deform_conv.default, (*arguments, None, *case.spatial.values()))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_meta_tensors_have_the_shape_of_the_result(case: Case):
    arguments = leaves(draw(case), "meta", torch.float32)
    output = plain_conv(*arguments, **case.spatial)
    assert output.device.type == "meta"
    assert tuple(output.shape) == (case.batch, case.channels[1], *case.out_size)


def gradients_of(function, case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The output and the gradient of every argument; the sine keeps the upstream gradient from being constant."""
    arguments = draw(case, device, dtype)
    skip_if_unable(*arguments[:3])
    output = function(*arguments, **case.spatial)
    return output, *torch.autograd.grad(output.sin().sum(), arguments)


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_compiles_as_one_graph(backend: str, device: str, case: Case):
    torch.compiler.reset()
    compiled = torch.compile(plain_conv, fullgraph=True, backend="aot_eager")
    results = gradients_of(compiled, case, device)
    expected = gradients_of(plain_conv, case, device)
    for name, result, want in zip(("output", *NAMES), results, expected, strict=True):
        assert_close(name, result, want)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor(device: str):
    """Between other operations, whose layouts inductor is free to choose."""
    torch.compiler.reset()

    def block(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, **spatial) -> Tensor:
        return torch.nn.functional.gelu(plain_conv(input.tanh() * 2, offset * 0.5, weight, bias, **spatial)) + input

    case = Case("same", (3, 4, 5), (3, 3, 3), (4, 4), groups=4, batch=2, padding=(1, 1, 1))
    results = gradients_of(torch.compile(block, fullgraph=True), case, device)
    expected = gradients_of(block, case, device)
    for name, result, want in zip(("output", *NAMES), results, expected, strict=True):
        assert_close(name, result, want, 1e-5)


def test_compiles_once_for_all_sizes(backend: str, device: str):
    torch.compiler.reset()
    compiled = torch.compile(plain_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    # No two sizes of the first call agree: dynamo would take them for one symbol and compile again.
    for batch, size in ((4, (5, 6, 7)), (3, (8, 4, 5)), (5, (5, 6, 9))):
        case = Case("dynamic", size, (3, 3, 3), (2, 2), groups=2, batch=batch, padding=(1, 1, 1))
        with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
            results = gradients_of(compiled, case, device)
        expected = gradients_of(plain_conv, case, device)
        for name, result, want in zip(("output", *NAMES), results, expected, strict=True):
            assert_close(f"{name} at {size}", result, want)


def test_exports(backend: str, device: str):
    class Module(torch.nn.Module):
        def forward(self, input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
            return plain_conv(input, offset, weight, padding=1)

    batch = torch.export.Dim("batch", min=2)
    same = [tensor.detach() for tensor in draw(DENSE, device, torch.float32)[:3]]
    skip_if_unable(*same)
    exported = torch.export.export(Module(), tuple(same), dynamic_shapes=({0: batch}, {0: batch}, None))
    more = [torch.cat([same[0], 2 * same[0]]), torch.cat([same[1], 1 - same[1]]), same[2]]
    assert torch.equal(exported.module()(*more), Module()(*more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_values_and_keeps_offsets(backend: str, device: str, dtype: torch.dtype):
    arguments = draw(DENSE, device, torch.float32)
    skip_if_unable(arguments[0].to(dtype), arguments[1], arguments[2].to(dtype))
    grad_output = torch.randn(DENSE.batch, DENSE.channels[1], *DENSE.out_size, device=device, dtype=dtype)
    with torch.autocast(device, dtype):
        output = conv(*arguments, **DENSE.spatial)
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output, arguments, grad_output)

    expected = conv(*arguments, **DENSE.spatial)
    wanted = torch.autograd.grad(expected, arguments, grad_output.float())
    # Two roundings to half precision, of the arguments and of the result.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1.25e-3
    assert_close("output", output, expected, tolerance)
    for name, gradient, want in zip(NAMES, gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32, name
        assert_close(f"gradient of {name}", gradient, want, tolerance)


def test_autocast_keeps_every_leaf_its_dtype(backend: str, device: str):
    """Half-precision activations and offsets beside float32 parameters, as between the layers of a network."""
    input, offset, weight, bias = draw(DENSE, device)
    values = [input.bfloat16(), offset.bfloat16(), weight.float(), bias.float()]
    arguments = [tensor.detach().requires_grad_() for tensor in values]
    with torch.autocast(device, torch.bfloat16):
        output = conv(*arguments, **DENSE.spatial)
    assert output.dtype == torch.bfloat16
    for name, argument, gradient in zip(
        NAMES, arguments, torch.autograd.grad(output.float().sum(), arguments), strict=True
    ):
        assert gradient.dtype == argument.dtype, name
        assert gradient.isfinite().all(), name
        assert gradient.count_nonzero() > 0, name


def test_autocast_leaves_float64_alone(backend: str, device: str):
    arguments = draw(DENSE, device)
    expected = conv(*arguments, **DENSE.spatial)
    with torch.autocast(device, torch.bfloat16):
        output = conv(*arguments, **DENSE.spatial)
    assert output.dtype == torch.float64
    assert torch.equal(output, expected)


@pytest.mark.parametrize("ndim", [2, 3])
def test_autocast_keeps_the_precision_of_coordinates(backend: str, device: str, ndim: int):
    """On 200 voxels of +1, -1, +1, ... in bfloat16 the coordinate 150.3 would be 150, the offset 100.3 would be 100.5.

    Either changes the sample from 0.4 in size, to 1 or to 0.
    """
    length = 200
    sign = torch.ones(length, device=device)
    sign[1::2] = -1
    input = sign.view(1, 1, *[1] * (ndim - 1), length).requires_grad_()
    offset = torch.zeros(1, ndim, *[1] * (ndim - 1), length, device=device)
    offset[:, -1, ..., :100], offset[:, -1, ..., 100:] = 100.3, 0.3
    weight = torch.ones(1, 1, *[1] * ndim, device=device)
    skip_if_unable(input.bfloat16(), offset, weight.bfloat16())
    with torch.autocast(device, torch.bfloat16):
        output = conv(input, offset.requires_grad_(), weight)
    assert output.dtype == torch.bfloat16
    expected = torch.cat([sign[100:], sign[100:]]).view_as(output) * 0.4
    # The last voxel of each half is beyond the border by 0.3.
    inner = torch.arange(length, device=device) % 100 != 99
    assert (output - expected)[..., inner].abs().max() < 0.4 * 2**-8
    (grad_offset,) = torch.autograd.grad(output.float().sum(), offset)
    slope = torch.cat([-2 * sign[100:], -2 * sign[100:]])
    assert torch.equal(grad_offset[0, -1].flatten()[inner], slope[inner])


def test_compiled_autocast(backend: str, device: str):
    torch.compiler.reset()
    compiled = torch.compile(plain_conv, fullgraph=True, backend="aot_eager")
    arguments = draw(DENSE, device, torch.float32)
    skip_if_unable(arguments[0].bfloat16(), arguments[1], arguments[2].bfloat16())
    with torch.autocast(device, torch.bfloat16):
        output = compiled(*arguments, **DENSE.spatial)
        expected = plain_conv(*arguments, **DENSE.spatial)
    assert output.dtype == torch.bfloat16
    assert_close("output", output, expected)
    gradients = torch.autograd.grad(output.float().sum(), arguments)
    wanted = torch.autograd.grad(expected.float().sum(), arguments)
    for name, gradient, want in zip(NAMES, gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32, name
        assert_close(f"gradient of {name}", gradient, want)


def test_backward_keeps_the_arguments_and_nothing_else(backend: str, device: str):
    input, offset, weight, bias = draw(DENSE, device, torch.float32)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = conv(input, offset, weight, bias, **DENSE.spatial)
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in (input, offset, weight))
    # Nor is a tensor kept beside autograd's own bookkeeping.
    assert not [name for name, value in vars(output.grad_fn).items() if isinstance(value, Tensor)]
    output.sum().backward()
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in (input, offset, weight))


def test_changing_a_kept_tensor_in_place_is_noticed(backend: str, device: str):
    input, offset, weight, bias = draw(DENSE, device, torch.float32)
    output = conv(input, offset, weight, bias, **DENSE.spatial)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("layout", [channels_last, strided])
@pytest.mark.parametrize("case", [*OPCHECKED, DENSE], ids=str)
def test_every_layout_gives_the_same_values(backend: str, device: str, case: Case, layout):
    arguments = laid_out(case, device, layout, torch.float64)
    assert not arguments[0].is_contiguous()
    expected = draw(case, device)
    grad_output = torch.randn(case.batch, case.channels[1], *case.out_size, dtype=torch.float64, device=device)
    output = conv(*arguments, **case.spatial)
    want = conv(*expected, **case.spatial)
    assert_close("output", output, want)
    gradients = torch.autograd.grad(output, arguments, layout(grad_output))
    wanted = torch.autograd.grad(want, expected, grad_output)
    for name, gradient, want in zip(NAMES, gradients, wanted, strict=True):
        assert_close(f"gradient of {name}", gradient, want)


def test_an_expanded_upstream_gradient(backend: str, device: str):
    """What ``output.sum().backward()`` passes down has stride 0."""
    arguments = draw(DENSE, device)
    output = conv(*arguments, **DENSE.spatial)
    expanded = torch.autograd.grad(output, arguments, torch.ones((), device=device).double().expand_as(output))
    output = conv(*arguments, **DENSE.spatial)
    dense = torch.autograd.grad(output, arguments, torch.ones_like(output))
    for name, gradient, want in zip(NAMES, expanded, dense, strict=True):
        assert_close(f"gradient of {name}", gradient, want)


@pytest.mark.parametrize("case", [OPCHECKED[0], DENSE], ids=str)
def test_memory_format_is_kept(backend: str, device: str, case: Case):
    memory_format = torch.channels_last if len(case.size) == 2 else torch.channels_last_3d
    for layout, expected in ((channels_last, memory_format), (contiguous, torch.contiguous_format)):
        arguments = laid_out(case, device, layout)
        output = conv(*arguments, **case.spatial)
        assert output.is_contiguous(memory_format=expected)
        gradients = torch.autograd.grad(output.square().sum(), arguments)
        assert gradients[0].is_contiguous(memory_format=expected)


def test_a_retained_graph_gives_the_same_gradients_again(backend: str, device: str):
    arguments = draw(DENSE, device)
    output = conv(*arguments, **DENSE.spatial)
    first = torch.autograd.grad(output.sum(), arguments, retain_graph=True)
    second = torch.autograd.grad(output.sum(), arguments)
    for name, one, two in zip(NAMES, first, second, strict=True):
        assert_close(f"gradient of {name}", one, two)
