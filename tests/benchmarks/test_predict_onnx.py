"""The table of a scan's times."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("predict_onnx")


def row(network: str, threads: int, torch_s: float, onnx_s: float) -> dict:
    agreement = {"differing_voxels": 1, "voxels": 100, "largest_margin": 0.0004, "lowest_dice": 0.9995}
    return {"network": network, "threads": threads, "torch_s": torch_s, "onnx_s": onnx_s, **agreement}


def test_ratios_are_to_its_own_torch_and_to_the_stock_networks_on_as_many_threads(benchmark):
    rows = [row("stock", 1, 6.0, 8.0), row("stock", 2, 3.0, 4.0), row("LightMedSeg", 2, 0.9, 0.3)]
    heads, _, first, _, last = benchmark.table(rows).splitlines()
    assert len(heads.split("|")) == len(last.split("|"))
    assert first == "| stock | 1 | 6.00 s | 8.00 s | 0.8 | 0.8 | 1 of 100 | 0.0004 | 0.99950 |"
    assert last == "| LightMedSeg | 2 | 0.90 s | 0.30 s | 3.0 | 10.0 | 1 of 100 | 0.0004 | 0.99950 |"


def test_dice_of_two_empty_structures_is_perfect(benchmark):
    empty, half = np.zeros(4, dtype=bool), np.array([True, True, False, False])
    assert benchmark._dice(empty, empty) == 1
    assert benchmark._dice(half, np.array([False, True, True, False])) == 0.5
