"""The part of the self-test for GPUs, as far as Triton's interpreter can go.

Run by test_selftest.py in a process of its own, because Triton is interpreted only if TRITON_INTERPRET is 1 before it
is imported.
"""

import pytest

from nnunet_deform import selftest
from nnunet_deform.ops.backends import triton_
from nnunet_deform.selftest.deformable import CASES, check_case

# By mode, dtype and being depthwise.
IMPOSSIBLE = {
    "float64, 3D",
    "bfloat16, 3D",
    "dense",
    "autocast to bfloat16",
    "autocast to float16",
    "torch.compile",
    "another stream",
    "a second GPU",
    "more than 2^31 elements apart",
}


def test_triton_has_a_column_and_a_preflight():
    checks = selftest.checks_for("cpu")
    assert {check.name for check in checks if check.column == "triton" and check.group == selftest.DEFORMABLE} == {
        case.title for case in CASES
    }
    trials = [check.name for check in checks if check.group == selftest.PREFLIGHT]
    assert trials == ["float32, 3D, 8 channels at a time", "float32, 2D, 8 channels at a time"]
    assert not [check for check in checks if check.group == selftest.SPEED]


@pytest.mark.parametrize("title", [case.title for case in CASES])
def test_the_kernels_pass(title: str):
    result = check_case("cpu", "triton", title)
    assert set(result) == ({"skipped"} if title in IMPOSSIBLE else set()), result


@pytest.mark.parametrize("kernel", ["forward_kernel", "offset_weight_gradient_kernel", "scatter_input_gradient_kernel"])
def test_kernels_that_are_wrong_do_not(kernel: str, monkeypatch: pytest.MonkeyPatch):
    class Wrong:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(**arguments):
                self.kernel[grid](**arguments)
                for name in ("output", "grad_offset", "grad_input"):
                    if arguments.get(name) is not None:
                        arguments[name] *= 1.001

            return launch

    monkeypatch.setattr(triton_, "wrap_triton", lambda one: Wrong(one) if one.fn.__name__ == kernel else one)
    fault = check_case("cpu", "triton", "float16, 2D")["fault"]
    assert fault.endswith("is off by 1.0e-03 of its norm, where 2.0e-06 is allowed") or "where 5.0e-04" in fault
