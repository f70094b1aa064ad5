"""What the compiler makes of the Triton kernels, and how it is read."""

import importlib
import importlib.util
import math
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("triton_code")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("triton_compiler")


@pytest.fixture
def launches(code) -> Callable:
    if (reason := code.unable_to_record()) is not None:
        pytest.skip(reason)
    return code.launches


@pytest.fixture
def rows(code, launches, tmp_path) -> Callable:
    """Compiles some cases anew."""
    import triton

    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm").exists():
        pytest.skip(f"Triton {triton.__version__} comes without nvdisasm")
    return lambda cases: {(row["capability"], row["kernel"]): row for row in code.table(cases, None, tmp_path)}


def test_few_kernels_without_spills_and_with_wide_accesses(code, rows):
    """Few channels in half precision on an old architecture, which spilled once, and many in float32 on a new one."""
    found = rows([code.Case(86, "float16", 20), code.Case(90, "float32", 48)])
    assert not code.failures(found.values())
    assert {kernel for _, kernel in found} == set(code.NAMES)
    for (capability, kernel), row in found.items():
        assert row["registers"] <= 255
        assert row["occupancy"] >= 0.125, row
        if kernel in ("forward", "offset_weight_gradient"):
            # Four channels of 2 bytes, or 4 of 4.
            assert row["load_bytes"] == {86: 8, 90: 16}[capability], row
    added = {capability: row["added_at_once"] for (capability, kernel), row in found.items() if "scatter" in kernel}
    assert added == {86: 1, 90: 4}


@pytest.mark.slow
def test_all_kernels_without_spills(code, rows):
    found = code.table(code.whole(), None, code.CACHE)
    assert len(found) == 6 * 3 * 3 * 2 * 2 * len(code.NAMES)
    assert not code.failures(found)


def test_both_backward_passes_are_recorded_for_each_generation(code, launches):
    for capability, lane, brick in ((80, 1, 1), (90, 4, 2)):
        found = launches(code.Case(capability, "bfloat16", 48), side=12)
        by_name = {launch.kernel: launch for launch in found}
        assert set(by_name) == {f"{name}_kernel" for name in code.NAMES}
        assert [launch.kernel for launch in found].count("gather_input_gradient_kernel") == 8
        scatter = by_name["scatter_input_gradient_kernel"]
        assert scatter.arguments["LANE_C"] == lane
        assert scatter.grid == (math.ceil(12 / brick) * 6 * 2, 2, 27)
        assert (scatter.arguments["grad_output"], scatter.arguments["grad_input"]) == ("bfloat16", "float32")
    # Positions are computed once for 48 channels; with 384 for 16 at a time, so that a small map has enough programs.
    for channels, runs in ((20, 1), (48, 1), (96, 2), (384, 24)):
        forward, *_ = launches(code.Case(90, "float32", channels), side=12)
        assert forward.grid == (6 * 6 * 2, 2, runs)


def test_wide_indices_are_a_variant(code, launches):
    wide = {launch.kernel: launch.arguments for launch in launches(code.Case(90, "float32", 20, 2, True), 8)}
    assert wide["forward_kernel"]["WIDE"] is True
    assert wide["forward_kernel"]["AXES"] == 2


@pytest.mark.parametrize(
    ("capability", "registers", "warps", "expected"),
    [
        (90, 128, 1, 16 / 64),
        (90, 129, 1, 15 / 64),
        (90, 32, 1, 32 / 64),  # as many programs as there may be
        (86, 24, 1, 16 / 48),
        (86, 24, 4, 48 / 48),
        (120, 255, 4, 8 / 48),
    ],
)
def test_occupancy(code, capability, registers, warps, expected):
    assert code.ARCHITECTURES[capability].occupancy(registers, warps) == pytest.approx(expected)


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/               @P1 STL [R1], R0 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   RED.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2) ;
"""


def cubin(registers: int, frame: int) -> bytes:
    """An ELF file with the one section that is read."""
    info = struct.pack("<BBHII", 4, 0x2F, 8, 1, registers) + struct.pack("<BBH", 3, 0x1B, 255)
    info += struct.pack("<BBHII", 4, 0x11, 8, 1, frame)
    names = b"\0.nv.info\0.names\0"
    header = bytearray(64)
    at_names, at_info = 64, 64 + len(names)
    table = at_info + len(info)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    entries = ((0, 0, 0), (1, at_info, len(info)), (10, at_names, len(names)))
    sections = b"".join(struct.pack("<I20xQQ24x", *entry) for entry in entries)
    return bytes(header) + names + info + sections


def test_machine_code_is_counted_by_loop(compiler):
    counted = compiler.count(cubin(118, 24), CODE)
    assert (counted["registers"], counted["stack"], counted["spills"]) == (118, 24, 1)
    outside, outer, inner = counted["instructions"]
    # A branch to itself, at the end of every kernel, is no loop.
    assert outside == {"MOV": 1, "RED.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 1, "BRA": 1}
    assert outer == {"LDG.E": 1, "BRA": 1}
    assert inner == {"LDG.E.128": 1, "FFMA": 1, "STL": 1, "BRA": 1}


def test_a_prediction_counts_every_trip(code):
    launch = code.Launch("scatter_input_gradient_kernel", (10, 2, 27), {"group_channels": 48, "BLOCK_C": 8}, 1, 4300)
    result = {"registers": 128, "instructions": [{"MOV": 100, "LDG.E": 3}, {"FMUL": 40, "RED.E.ADD.F32x4": 16}]}
    prediction = code._predict([launch], result, 48, code.GPUS["H200"])
    programs, per_second = 10 * 2 * 27, 132 * 1.85e9
    assert prediction.instructions == pytest.approx(programs * (103 + 6 * 56) / 1e9)
    assert prediction.memory == pytest.approx(1e-3)
    assert prediction.l1 == pytest.approx(programs * (3 + 6 * 16 * 4) / per_second * 1e6)
    # Each addition of 4 channels by 32 threads is to 16 voxels, a sector of 8 channels each.
    assert prediction.l2 == pytest.approx(programs * 6 * 16 * 16 / (1.3e12 / 8) * 1e6)
    assert prediction.arithmetic == pytest.approx(programs * 6 * 40 / 4 / per_second * 1e6)
    assert prediction.issue == pytest.approx(programs * (103 + 6 * 56) / 4 / per_second * 1e6)
    # All 540 programs are there at once: each takes its own time.
    assert prediction.warps == pytest.approx((103 + 6 * 56) * 4 / 1.85e9 * 1e6)
    assert prediction.bound == "L2"
    assert prediction.longest == prediction.l2


def test_what_is_sorted_a_few_taps_at_a_time_runs_as_often(code):
    arguments = {"group_channels": 48, "BLOCK_C": 16, "SAMPLES": 32}
    launch = code.Launch("gather_input_gradient_kernel", (10, 2), arguments, 1, 0)
    chunks, blocks = code._trips([launch] * 8, 48)
    assert (chunks, blocks) == (pytest.approx(code._rounds(27 * 48**3 / 49**3, 32)), 3)
    chunks, blocks = code._trips([launch] * 32, 48)
    assert (chunks, blocks) == (pytest.approx(code._rounds(27 / 4 * 48**3 / 49**3, 32)), 3)
    assert chunks < 1


def test_the_roofline_is_the_specifications(code):
    bounds = code.roofline((2, 48, 48), "float32", code.GPUS["H200"])
    assert bounds["forward"] == pytest.approx(294, abs=1)
    assert bounds["backward"] == pytest.approx(294, abs=60)
    assert code.roofline((2, 48, 48), "bfloat16", code.GPUS["H200"])["forward"] == pytest.approx(147, abs=1)
    assert 100 < code.counting_sort((2, 48, 48), code.GPUS["H200"]) < 150
    assert code._rounds(0.001, 32) == pytest.approx(0.001, rel=1e-3)
    assert code._rounds(64, 1) == pytest.approx(64)


def test_spills_and_refusals_are_failures(code):
    case = {"capability": 80, "dtype": "float16", "channels": 20, "axes": 2, "wide": True}
    good = {**case, "triton": "3.8.0", "kernel": "forward", "spills": 0}
    refused = {**case, "triton": "3.2.0", "kernel": "cell", "error": "RuntimeError: no"}
    assert code.failures([good, {**good, "spills": 7}, refused]) == [
        "Triton 3.8.0 spills in forward, sm_80, float16, 20 channels, 2D, 64-bit indices: 7 accesses",
        "Triton 3.2.0 refuses cell, sm_80, float16, 20 channels, 2D, 64-bit indices: RuntimeError: no",
    ]


def test_what_the_compiler_refuses_is_said(code, launches, tmp_path):
    launch = launches(code.Case(90, "float32", 8), 8)[0]
    job = code.job(code.Case(90, "float32", 8), launch)
    job["arguments"] = {**job["arguments"], "BRICK_W": 3}  # no power of two
    (result,) = code.compile_jobs([job], None, tmp_path)
    assert "error" in result
    assert code.compile_jobs([job], None, tmp_path) == [result]


def test_a_folder_without_triton_is_named(code, tmp_path):
    with pytest.raises(SystemExit, match="has no Triton: pip install --no-deps --target"):
        code.version_in(tmp_path)
