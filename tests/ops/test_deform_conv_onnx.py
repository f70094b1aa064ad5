"""The operator in ONNX's terms, run by ONNX Runtime, against the scalar loops."""

import io

import pytest
import torch
from deform_conv_cases import CASES, Case, assert_close, one_case, plain_conv, problem

from nnunet_deform.ops.deform_conv_onnx import translation_table

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

# Coordinates pass through GridSample's range of -1 to 1, which costs a few units in the last place of float32.
TOLERANCE = 5e-6


class Operator(torch.nn.Module):
    def __init__(self, case: Case, with_bias: bool) -> None:
        super().__init__()
        self.case = case
        self.with_bias = with_bias

    def forward(self, input, offset, weight, bias):
        return plain_conv(input, offset, weight, bias if self.with_bias else None, **self.case.spatial)


# Of each kind of groups, stride, padding, dilation and size one; exporting takes a second each.
QUICK = ("2d-dense", "2d-multiplier", "3d-depthwise", "3d-crossed-groups", "3d-anisotropic", "3d-thin", "3d-one-voxel")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.id in QUICK else pytest.mark.slow) for c in CASES], ids=str
)
def test_equals_the_scalar_loop(case: Case):
    truth = problem(case)
    assert_close("output", run(Operator(case, with_bias=True), truth.arguments), truth.output, TOLERANCE)


@pytest.mark.parametrize("case", [one_case("2d-dense"), one_case("3d-grouped")], ids=str)
def test_equals_the_scalar_loop_at_integers(case: Case):
    truth = problem(case, offset_grid=0.25)
    assert_close("output", run(Operator(case, with_bias=True), truth.arguments), truth.output, TOLERANCE)


def test_without_bias():
    case = CASES[0]
    truth = problem(case)
    expected = truth.output - truth.arguments[3].view(1, -1, 1, 1)
    assert_close("output", run(Operator(case, with_bias=False), truth.arguments), expected, TOLERANCE)


def run(operator: Operator, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The operator exported for these arguments in float32, and run."""
    arguments = tuple(argument.float() for argument in arguments)
    program = torch.onnx.export(
        operator.eval(),
        arguments,
        dynamo=True,
        opset_version=20,
        input_names=["input", "offset", "weight", "bias"],
        custom_translation_table=translation_table(),
        verbose=False,
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    used = {entry.name for entry in session.get_inputs()}
    named = dict(zip(("input", "offset", "weight", "bias"), arguments, strict=True))
    (output,) = session.run(None, {name: value.numpy() for name, value in named.items() if name in used})
    return torch.from_numpy(output)
