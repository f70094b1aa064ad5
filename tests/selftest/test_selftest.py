"""The self-test; selftest_forked.py has what it finds, and selftest_interpreted.py its part for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_deform.ops.backends import triton_
from nnunet_deform.selftest import deformable, speed

needs_triton = pytest.mark.skipif(triton_.triton is None, reason="Triton is not installed")


def numpy_and_triton_get_along() -> bool:
    import numpy

    triton = tuple(map(int, triton_.triton.__version__.split(".")[:2])) if triton_.triton else (0, 0)
    return triton >= (3, 7) or tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)


needs_interpreter = pytest.mark.skipif(
    not numpy_and_triton_get_along(),
    reason="Triton's interpreter takes arrays of one element for numbers up to 3.6, which NumPy refuses from 2.4 on",
)


def run_alone(name: str) -> int:
    """Runs the tests of a file beside this one in a process of their own; returns how many passed."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return int(re.search(r"(\d+) passed", ended.stdout)[1])


def test_it_passes_here_and_finds_what_is_wrong():
    assert run_alone("selftest_forked.py") == 11


def test_times_are_beside_those_of_others(monkeypatch):
    monkeypatch.setattr(speed, "can_measure_memory", lambda: False)
    rows = speed.measure("cpu", (1, 4, 5), "float32", 1)["rows"]
    assert next(iter(rows)) == "composition of grid_sample"
    assert list(rows)[-1] == "depthwise convolution, not deformable"
    assert "torch" in rows
    assert all(0 < row["forward_ms"] < 1e4 and row["extra_memory"] is None for row in rows.values())


@needs_triton
@needs_interpreter
@pytest.mark.slow
def test_the_part_for_gpus_in_tritons_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run_alone("selftest_interpreted.py") == 1 + len(deformable.CASES) + 3
