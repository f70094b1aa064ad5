"""Surface metrics against what a ball and a box must give, and against DeepMind's surface-distance."""

import math

import numpy as np
import pytest
import surface_distance

from nnunet_deform.comparison.metrics import METRICS, Structure


def surface_scores(truth, prediction, spacing, tolerance) -> tuple[float, float]:
    structure = Structure(truth, prediction, spacing, tolerance)
    return METRICS["NSD"].of(structure), METRICS["HD95"].of(structure)


def _box(shape, low, high) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def _ball(radius: float, spacing, margin: int = 3, shift=(0, 0, 0)) -> np.ndarray:
    half = [math.ceil(radius / s) + margin for s in spacing]
    grid = np.ogrid[tuple(slice(-h, h + 1) for h in half)]
    return sum((g * s - c) ** 2 for g, s, c in zip(grid, spacing, shift, strict=True)) <= radius**2


SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.8, 0.8), (0.5, 1.0, 2.0)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_box(spacing, axis):
    # Shifted by two voxels: the faces across the axis are 2 steps off, and the surfaces elsewhere agree.
    shape, low, high = (54, 56, 58), [6, 7, 8], [44, 47, 50]
    truth = _box(shape, low, high)
    moved_low, moved_high = list(low), list(high)
    moved_low[axis] += 2
    moved_high[axis] += 2
    moved = _box(shape, moved_low, moved_high)
    nsd, hd95 = surface_scores(truth, moved, spacing, tolerance=2.001 * spacing[axis])
    assert nsd == pytest.approx(1, abs=1e-6)
    assert hd95 == pytest.approx(2 * spacing[axis], abs=1e-5)
    nsd, _ = surface_scores(truth, moved, spacing, tolerance=1e-3)
    sides = [b - a for a, b in zip(low, high, strict=True)]
    lengths = [n * s for n, s in zip(sides, spacing, strict=True)]
    across = 2 * math.prod(lengths) / lengths[axis]
    around = 2 * sum(math.prod(lengths) / lengths[other] for other in range(3) if other != axis)
    # The two faces and two steps of the sides differ, in area: counted in voxels, spacing would not matter. Edges and
    # corners of the sub-voxel surface are cut off.
    expected = 1 - (across + around * 2 / sides[axis]) / (across + around)
    assert nsd == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_ball_in_a_larger_ball(spacing):
    # Concentric, 3 mm apart: every surface point is 3 mm from the other, give or take half a voxel's diagonal.
    small, large = (_ball(radius, spacing, margin) for radius, margin in ((12, 3), (15, 3)))
    pad = [(b - a) // 2 for a, b in zip(small.shape, large.shape, strict=True)]
    small = np.pad(small, [(p, p) for p in pad])
    diagonal = math.hypot(*spacing)
    _, hd95 = surface_scores(small, large, spacing, tolerance=1.0)
    assert hd95 == pytest.approx(3, abs=0.75 * diagonal)
    assert surface_scores(small, large, spacing, tolerance=3 + diagonal / 2)[0] > 0.95
    assert surface_scores(small, large, spacing, tolerance=max(0.1, 2.5 - diagonal / 2))[0] < 0.25


def _random_masks(seed: int):
    rng = np.random.default_rng(seed)
    spacing = SPACINGS[seed % 3]
    truth = _ball(rng.uniform(6, 9), spacing, margin=6)
    prediction = np.roll(truth, rng.integers(-2, 3, 3), axis=(0, 1, 2))
    corner = tuple(rng.integers(n // 3, n // 2) for n in truth.shape)
    prediction[tuple(slice(c, c + 3) for c in corner)] = False
    return truth, prediction, spacing


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0])
def test_agrees_with_the_second_library(seed, tolerance):
    truth, prediction, spacing = _random_masks(seed)
    nsd, hd95 = surface_scores(truth, prediction, spacing, tolerance)
    distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
    assert nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance), abs=2e-3)
    # It weighs by area and takes distances between corners of voxels, so HD95 agrees to a voxel only.
    theirs = surface_distance.compute_robust_hausdorff(distances, 95)
    assert hd95 == pytest.approx(theirs, abs=max(spacing))


def test_in_two_dimensions():
    truth, moved = _box((1, 80, 80), (0, 5, 5), (1, 45, 45)), _box((1, 80, 80), (0, 8, 5), (1, 48, 45))
    nsd, hd95 = surface_scores(truth, moved, (999.0, 2.0, 1.0), tolerance=6.01)
    assert (nsd, hd95) == (pytest.approx(1, abs=1e-6), pytest.approx(6))
    # two sides of 40 mm differ, and 6 mm of each 80 mm side; corners are cut off
    assert surface_scores(truth, moved, (999.0, 2.0, 1.0), 1e-3)[0] == pytest.approx(1 - 92 / 240, abs=0.015)


def test_at_the_image_border_and_of_a_single_voxel():
    whole = np.ones((4, 4, 4), dtype=bool)
    assert surface_scores(whole, whole, (1, 1, 1), 0.1) == (1, 0)
    one, other = _box((9, 9, 9), (0, 0, 0), (1, 1, 1)), _box((9, 9, 9), (8, 0, 0), (9, 1, 1))
    nsd, hd95 = surface_scores(one, other, (2.0, 1.0, 1.0), 1.0)
    assert (nsd, hd95) == (0, 16)


def test_empty_structures():
    empty, full = np.zeros((3, 4, 5), dtype=bool), np.ones((3, 4, 5), dtype=bool)
    assert np.isnan(surface_scores(empty, empty, (1, 1, 1), 1)).all()
    diagonal = math.sqrt(6**2 + 4**2 + 2.5**2)
    assert np.isnan(METRICS["Dice"].of(Structure(empty, empty, (1, 1, 1), 1)))
    for pair in ((empty, full), (full, empty)):
        assert surface_scores(*pair, (2, 1, 0.5), 1) == (0, pytest.approx(diagonal))
        assert METRICS["Dice"].of(Structure(*pair, (2, 1, 0.5), 1)) == 0


def test_the_worst_distance_in_two_dimensions_leaves_the_third_out():
    empty, full = np.zeros((1, 3, 4), dtype=bool), np.ones((1, 3, 4), dtype=bool)
    assert surface_scores(full, empty, (999.0, 1.0, 1.0), 1) == (0, 5)


def test_the_registry():
    entries = {m.name: (m.higher_is_better, m.perfect, m.unit, m.band) for m in METRICS.values()}
    assert entries == {"Dice": (True, 1, "", 0.005), "NSD": (True, 1, "", 0.005), "HD95": (False, 0, "mm", 0.1)}
    assert list(METRICS) == list(entries)
    for name, metric in METRICS.items():
        assert metric.about.startswith(f"{name}: ")
