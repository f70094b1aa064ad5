"""The operator in ONNX's terms, run by ONNX Runtime, against the scalar loops."""

import io
from collections.abc import Sequence

import pytest
import torch
from deform_conv_cases import CASES, NAMES, Case, assert_close, one_case, plain_conv, problem

from nnunet_deform.ops.deform_conv_onnx import translation_table

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

# Coordinates pass through GridSample's range of -1 to 1, which costs a few units in the last place of float32.
TOLERANCE = 5e-6


class Operators(torch.nn.Module):
    """One for each case, side by side."""

    def __init__(self, cases: Sequence[Case], with_bias: bool) -> None:
        super().__init__()
        self.cases = cases
        self.with_bias = with_bias

    def forward(self, *tensors):
        return [
            plain_conv(input, offset, weight, bias if self.with_bias else None, **case.spatial)
            for case, (input, offset, weight, bias) in zip(self.cases, by_case(tensors), strict=True)
        ]


def by_case(tensors: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    return [tensors[first : first + len(NAMES)] for first in range(0, len(tensors), len(NAMES))]


# Of each kind of groups, stride, padding, dilation and size one; exporting takes a second however many there are.
QUICK = [
    one_case(name)
    for name in (
        "2d-dense", "2d-multiplier", "3d-depthwise", "3d-crossed-groups", "3d-anisotropic", "3d-thin", "3d-one-voxel",
    )
]  # fmt: skip
AT_INTEGERS = [one_case("2d-dense"), one_case("3d-grouped")]


@pytest.fixture(scope="module")
def outputs() -> dict[tuple[str, float | None], torch.Tensor]:
    """Of the quick cases, by name and grid of the offsets."""
    asked = [*((case, None) for case in QUICK), *((case, 0.25) for case in AT_INTEGERS)]
    found = run([case for case, _ in asked], [problem(case, offset_grid=grid).arguments for case, grid in asked])
    return {(case.id, grid): output for (case, grid), output in zip(asked, found, strict=True)}


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_equals_the_scalar_loop(outputs, case: Case):
    assert_close("output", outputs[case.id, None], problem(case).output, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_operator_equals_the_scalar_loop(case: Case):
    truth = problem(case)
    (output,) = run([case], [truth.arguments])
    assert_close("output", output, truth.output, TOLERANCE)


@pytest.mark.parametrize("case", AT_INTEGERS, ids=str)
def test_equals_the_scalar_loop_at_integers(outputs, case: Case):
    assert_close("output", outputs[case.id, 0.25], problem(case, offset_grid=0.25).output, TOLERANCE)


def test_without_bias():
    case = CASES[0]
    truth = problem(case)
    expected = truth.output - truth.arguments[3].view(1, -1, 1, 1)
    (output,) = run([case], [truth.arguments], with_bias=False)
    assert_close("output", output, expected, TOLERANCE)


def run(
    cases: Sequence[Case], arguments: Sequence[Sequence[torch.Tensor]], *, with_bias: bool = True
) -> list[torch.Tensor]:
    """The operators exported for these arguments in float32 as one model, and run."""
    tensors = tuple(argument.float() for of_case in arguments for argument in of_case)
    names = [f"{name} {number}" for number in range(len(cases)) for name in NAMES]
    program = torch.onnx.export(
        Operators(cases, with_bias).eval(),
        tensors,
        dynamo=True,
        opset_version=20,
        input_names=names,
        custom_translation_table=translation_table(),
        verbose=False,
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    used = {entry.name for entry in session.get_inputs()}
    feed = {name: value.numpy() for name, value in zip(names, tensors, strict=True) if name in used}
    return [torch.from_numpy(output) for output in session.run(None, feed)]
