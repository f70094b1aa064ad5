"""Surface metrics against what a ball and a box must give, and against DeepMind's surface-distance."""

import math

import numpy as np
import pytest
import surface_distance
from scipy import ndimage

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


THICK = (5.0, 0.8, 0.8)


def _voxel_hd95(truth, prediction, spacing) -> float:
    """By its definition: border voxels touch the outside with a face, distances are between centres."""
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    to_border = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    return max(np.percentile(to_border[1][borders[0]], 95), np.percentile(to_border[0][borders[1]], 95))


@pytest.mark.parametrize("seed", range(4))
def test_thick_slices_agree_with_the_second_library_and_the_definition(seed):
    rng = np.random.default_rng(seed)
    truth = _ball(rng.uniform(12, 18), THICK, margin=6)
    prediction = np.roll(truth, (rng.integers(-1, 2), *rng.integers(-4, 5, 2)), axis=(0, 1, 2))
    corner = [n // 2 for n in truth.shape]
    prediction[corner[0], corner[1] : corner[1] + 25, corner[2] : corner[2] + 25] = False
    nsd, hd95 = surface_scores(truth, prediction, THICK, 2.0)
    distances = surface_distance.compute_surface_distances(truth, prediction, THICK)
    assert nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(distances, 2.0), abs=1e-3)
    assert hd95 == pytest.approx(_voxel_hd95(truth, prediction, THICK), abs=1e-4)


def _solids(spacing):
    """Pairs whose distance is known; none of their planes and axes goes through a voxel's centre."""
    z, y, x = np.ogrid[tuple(slice(-int(n / s), int(n / s) + 1) for n, s in zip((35, 30, 30), spacing, strict=True))]
    z, y, x = ((axis + 0.37) * step for axis, step in zip((z, y, x), spacing, strict=True))
    radius = np.sqrt(y**2 + x**2)
    angle = np.degrees(np.arctan2(y, x))
    cylinder = (abs(z) <= 15) & (radius <= 20)
    bumps = {
        part: cylinder | ((abs(z) <= 15) & (radius <= 24) & (angle >= 0) & (angle <= 360 / part)) for part in (6, 12)
    }
    ball, larger = (z**2 + y**2 + x**2 <= r**2 for r in (20, 23))
    return {"larger ball": (ball, larger), "a sixth": (cylinder, bumps[6]), "a twelfth": (cylinder, bumps[12])}


# What docs/comparison.md says. The true HD95 of the balls is 3 mm; of the cylinders it is 4 mm, by which 11 % and 5.6 %
# of the larger one's surface lies further out. The true NSD of the balls is 0 at a tolerance of 2 mm.
DOCUMENTED = {
    (0.8, 0.8, 0.8): {"larger ball": 3.30, "a sixth": 4.00, "a twelfth": 3.58},
    THICK: {"larger ball": 5.00, "a sixth": 2.53, "a twelfth": 0.00},
}


@pytest.mark.parametrize("spacing", DOCUMENTED)
def test_how_far_distances_on_thick_slices_are_from_the_truth(spacing):
    solids = _solids(spacing)
    found = {name: surface_scores(*pair, spacing, 2.0) for name, pair in solids.items()}
    assert {name: round(hd95, 2) for name, (_, hd95) in found.items()} == DOCUMENTED[spacing]
    assert found["larger ball"][0] == pytest.approx(0.459 if spacing == THICK else 0.028, abs=1e-3)
    if spacing == THICK:
        measured = {name: surface_distance.compute_surface_distances(*pair, spacing) for name, pair in solids.items()}
        by_area = {name: surface_distance.compute_robust_hausdorff(each, 95) for name, each in measured.items()}
        assert by_area == pytest.approx({"larger ball": 5.00, "a sixth": 4.00, "a twelfth": 3.30}, abs=0.005)


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
