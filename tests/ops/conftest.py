import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from deform_conv_cases import BACKENDS

from nnunet_deform.ops import BACKEND_VARIABLE


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each registered backend in turn, selected as a user would."""
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def _quicker_interpreter() -> Iterator[None]:
    """Spares Triton's interpreter three detours that take two thirds of its time and change nothing.

    It replaces its language by NumPy for a launch, and then once more for each function that a kernel calls; it looks
    for overflows with a dozen operations of that language; and it makes a table of all data types to look up one.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    nothing = SimpleNamespace(restore=lambda: None)

    def replace_what_is_left(function: FunctionType) -> SimpleNamespace:
        languages = [
            module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())
        ]
        return replace(function) if any(tl.core.is_builtin(language.load) for language in languages) else nothing

    numpy_type = interpreter._get_np_dtype
    remembered = functools.cache(numpy_type)

    def numpy_type_of_elements(kind: tl.dtype) -> np.dtype:
        # Pointers cannot be hashed.
        return numpy_type(kind) if isinstance(kind.scalar, tl.pointer_type) else remembered(kind.scalar)

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def refuse_overflow(semantic, lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth < 64:
            result = exact[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            in_range = (result >= kind.get_int_min_value()) & (result <= kind.get_int_max_value())
            assert in_range.all(), f"{kind} overflow in {binary_op.__name__}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_what_is_left)
        patch.setattr(interpreter, "_get_np_dtype", numpy_type_of_elements)
        # Older versions have a function in its place.
        if hasattr(tl.semantic, "TritonSemantic"):
            patch.setattr(tl.semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", refuse_overflow)
        yield


@pytest.fixture(scope="session")
def interpreted() -> Counter[str]:
    """How many tests of each file pass in Triton's interpreter, all in one process of their own.

    Triton is interpreted only if TRITON_INTERPRET is 1 before it is imported. Of the tests of every backend it is those
    that the interpreter is quick enough for, along both axes of an image and the third of a volume. It truncates to
    bfloat16 where a GPU rounds, too coarse for the test of precision on long axes.
    """
    files = ("triton_interpreted.py", "test_deform_conv_convention.py", "preflight_interpreted.py")
    selection = "interpreted or (triton and (right_derivative or (borders and (2-0 or 2-1 or 3-0))))"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", selection, *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=1500,  # for kernels that hang
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Counter(re.findall(r"^(\S+?\.py)::.* PASSED", ended.stdout, re.M))
