"""A CT phantom in nnU-Net's raw format: small enough for a CPU, awkward in the ways real CT is.

A trunk with subcutaneous fat and a spine holds a liver, a spleen and a kidney of varying pose and size; a vessel tree
branches through the liver, which also carries one to four small lesions. Volumes are drawn on a finer grid and
averaged, so borders show partial volume. Slices are almost twice as thick as pixels are wide, and both vary from case
to case.

Lengths are in millimetres, in the order z (towards the head), y (towards the back), x, as in the arrays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

DATASET_NAME = "Dataset501_Phantom"

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "vessels": 4, "lesions": 5}

LARGEST_ORGANS = ("liver", "spleen")

# Portal venous phase, contrasts somewhat wider than in patients. Liver and spleen must differ in density and not only
# in side, because nnU-Net's mirroring augmentation hides the side.
HOUNSFIELD = {
    "air": -1000.0,
    "fat": -100.0,
    "muscle": 40.0,
    "bone": 450.0,
    "liver": 110.0,
    "spleen": 160.0,
    "kidney": 220.0,
    "vessels": 300.0,
    "lesions": 30.0,
}

NOISE_HU = 12.0  # standard deviation per voxel

_TISSUES = tuple(HOUNSFIELD)
_DENSITY = np.array([HOUNSFIELD[tissue] for tissue in _TISSUES])
_TISSUE_TO_LABEL = np.array([LABELS.get(tissue, 0) for tissue in _TISSUES], dtype=np.uint8)

_SUBSAMPLES = (4, 2, 2)  # drawn points per voxel and axis: about 1 mm apart on every axis
_MIN_LESION_RADIUS = 4.0  # a sphere of this radius fills more than half of at least one voxel wherever it lies
_VESSEL_GENERATIONS = 4


@dataclass(frozen=True)
class PhantomCase:
    """One case.

    image: HU, int16 [Z, Y, X]; label: values of ``LABELS``, uint8 [Z, Y, X]; spacing: mm, (z, y, x).
    """

    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]


class _Canvas:
    """Tissue indices on the fine grid; a later shape covers an earlier one."""

    def __init__(self, shape: tuple[int, ...], spacing: np.ndarray) -> None:
        step = spacing / _SUBSAMPLES
        counts = np.array(shape) * _SUBSAMPLES
        self.axes = [(np.arange(n) + 0.5) * d - n * d / 2 for n, d in zip(counts, step, strict=True)]
        self.tissue = np.zeros(counts, dtype=np.uint8)

    def _window(self, low: np.ndarray, high: np.ndarray) -> tuple[tuple[slice, ...], list[np.ndarray]]:
        """Index window and open coordinate grid of the box from ``low`` to ``high`` (mm)."""
        window = tuple(slice(*np.searchsorted(axis, (a, b))) for axis, a, b in zip(self.axes, low, high, strict=True))
        return window, np.ix_(*(axis[cut] for axis, cut in zip(self.axes, window, strict=True)))

    def ellipsoid(self, tissue: str, centre: np.ndarray, radii: np.ndarray, rotation: np.ndarray) -> None:
        """Fill the ellipsoid with half-axes ``radii`` (mm) along the rows of ``rotation``."""
        window, grid = self._window(centre - radii.max(), centre + radii.max())
        offset = [g - c for g, c in zip(grid, centre, strict=True)]
        distance = sum(
            (sum(r * o for r, o in zip(row, offset, strict=True)) / radius) ** 2
            for row, radius in zip(rotation, radii, strict=True)
        )
        self.tissue[window][distance <= 1] = _TISSUES.index(tissue)

    def cylinder(self, tissue: str, centre_yx: tuple[float, float], radii_yx: tuple[float, float]) -> None:
        """Fill the elliptic cylinder that runs through all slices."""
        y, x = (((axis - c) / r) ** 2 for axis, c, r in zip(self.axes[1:], centre_yx, radii_yx, strict=True))
        self.tissue[:, y[:, None] + x <= 1] = _TISSUES.index(tissue)

    def tube(self, tissue: str, start: np.ndarray, end: np.ndarray, radius: float, over: tuple[str, ...]) -> None:
        """Replace the tissues ``over`` within ``radius`` (mm) of the segment from ``start`` to ``end``."""
        window, grid = self._window(np.minimum(start, end) - radius, np.maximum(start, end) + radius)
        along = end - start
        offset = [g - s for g, s in zip(grid, start, strict=True)]
        t = np.clip(sum(a * o for a, o in zip(along, offset, strict=True)) / (along @ along), 0, 1)
        distance = sum((o - t * a) ** 2 for o, a in zip(offset, along, strict=True))
        replaceable = np.isin(self.tissue[window], [_TISSUES.index(name) for name in over])
        self.tissue[window][(distance <= radius**2) & replaceable] = _TISSUES.index(tissue)

    def blocks(self) -> np.ndarray:
        """Tissue index of the drawn points of each voxel, [Z, Y, X, points]."""
        z, y, x = (n // s for n, s in zip(self.tissue.shape, _SUBSAMPLES, strict=True))
        sz, sy, sx = _SUBSAMPLES
        return self.tissue.reshape(z, sz, y, sy, x, sx).transpose(0, 2, 4, 1, 3, 5).reshape(z, y, x, sz * sy * sx)


def _rotation(rng: np.random.Generator, max_degrees: float) -> np.ndarray:
    """Orthonormal 3x3 matrix: one turn of at most ``max_degrees`` about each axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-max_degrees, max_degrees, 3))):
        i, j = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix


def _vessel_tree(
    rng: np.random.Generator, start: np.ndarray, direction: np.ndarray, length: float, radius: float, generations: int
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Segments (start, end, radius) of a tree whose every branch splits in two."""
    end = start + length * direction
    segments = [(start, end, radius)]
    if generations > 1:
        side = np.cross(direction, rng.normal(size=3))
        side /= np.linalg.norm(side)
        for sign in (-1, 1):
            child = direction + sign * rng.uniform(0.6, 1.0) * side
            child /= np.linalg.norm(child)
            # Murray's law for an even split: the cubes of the children's radii add up to the parent's
            segments += _vessel_tree(rng, end, child, 0.75 * length, radius * 0.5 ** (1 / 3), generations - 1)
    return segments


def _distance_to_segment(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = end - start
    t = np.clip(along @ (point - start) / (along @ along), 0, 1)
    return float(np.linalg.norm(point - start - t * along))


def make_case(rng: np.random.Generator) -> PhantomCase:
    """Draw one case of about 24x40x40 voxels; every label occurs in it."""
    spacing = np.array([rng.uniform(3.3, 3.9), *[rng.uniform(1.85, 2.15)] * 2])
    size = rng.uniform(0.94, 1.05)  # of the whole trunk
    field = np.array([rng.uniform(80, 88), 76 * size, 76 * size])
    shape = tuple(int(n) for n in np.round(field / spacing))
    canvas = _Canvas(shape, spacing)

    canvas.cylinder("fat", (0, 0), (29 * size, 36 * size))
    canvas.cylinder("muscle", (0, 0), (26 * size, 33 * size))
    canvas.cylinder("bone", (17 * size, rng.uniform(-1, 1)), (5.5 * size, 6.5 * size))

    def pose(centre: tuple[float, ...], radii: tuple[float, ...], shift: float) -> tuple[np.ndarray, ...]:
        return (
            size * (np.array(centre) + rng.uniform(-shift, shift, 3)),
            size * np.array(radii) * rng.uniform(0.88, 1.12, 3),
            _rotation(rng, 12),
        )

    canvas.ellipsoid("kidney", *pose((-17, 12, 16), (15, 7, 7), 2))
    canvas.ellipsoid("spleen", *pose((11, 5, 20), (19, 13, 9), 2))
    liver_centre, liver_radii, liver_rotation = pose((5, -2, -13), (29, 18, 17), 2)
    canvas.ellipsoid("liver", liver_centre, liver_radii, liver_rotation)
    # the left lobe, flat and in front, crosses the midline
    canvas.ellipsoid("liver", *pose((11, -13, 4), (13, 8, 18), 2))

    # The trunk of the tree enters from below, near the liver's hilum.
    hilum = liver_centre + size * np.array([-18, 2, 10]) + rng.uniform(-2, 2, 3)
    inwards = liver_centre - hilum
    inwards /= np.linalg.norm(inwards)
    tree = _vessel_tree(rng, hilum, inwards, rng.uniform(13, 16), rng.uniform(3.0, 3.6), _VESSEL_GENERATIONS)
    for index, (start, end, radius) in enumerate(tree):
        # only the trunk, the first segment, runs outside the liver
        canvas.tube("vessels", start, end, radius, over=("liver", "muscle") if index == 0 else ("liver",))

    for _ in range(rng.integers(1, 5)):
        radius = rng.uniform(_MIN_LESION_RADIUS, 6.0)
        directions = rng.normal(size=(8, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        # uniform in the ellipsoid that keeps the whole lesion inside the liver
        unit = directions * rng.uniform(size=(8, 1)) ** (1 / 3)
        candidates = liver_centre + (unit * (liver_radii - radius)) @ liver_rotation
        clearance = [min(_distance_to_segment(c, start, end) - r for start, end, r in tree) for c in candidates]
        canvas.ellipsoid("lesions", candidates[int(np.argmax(clearance))], np.full(3, radius), np.eye(3))

    points = canvas.blocks()
    image = _DENSITY[points].mean(axis=-1)
    image += rng.normal(scale=NOISE_HU, size=image.shape)
    share = np.stack([(_TISSUE_TO_LABEL[points] == value).mean(axis=-1) for value in LABELS.values()])
    return PhantomCase(
        image=np.rint(image).astype(np.int16),
        label=share.argmax(axis=0).astype(np.uint8),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
    )


def write_phantom_dataset(folder: Path, num_train: int, num_test: int, seed: int = 0) -> Path:
    """Write ``Dataset501_Phantom`` (images, labels and dataset.json) into ``folder``, which takes nnUNet_raw's place.

    Each case depends on ``seed``, its split and its number only: asking for more cases leaves the others as they are.

    Args:
        folder: existing folder.
        num_train: cases in imagesTr and labelsTr; nnU-Net's five folds need at least 5.
        num_test: cases in imagesTs and labelsTs.
        seed: the same seed gives byte-equal arrays.

    Returns:
        The dataset's folder.

    Raises:
        FileExistsError: the dataset is already there.
    """
    dataset = folder / DATASET_NAME
    dataset.mkdir()
    for split, (suffix, count) in enumerate((("Tr", num_train), ("Ts", num_test))):
        images, labels = dataset / f"images{suffix}", dataset / f"labels{suffix}"
        images.mkdir()
        labels.mkdir()
        for number in range(count):
            case = make_case(np.random.default_rng([seed, split, number]))
            name = f"phantom_{suffix.lower()}{number:02d}"
            for array, path in ((case.image, images / f"{name}_0000.nii.gz"), (case.label, labels / f"{name}.nii.gz")):
                volume = sitk.GetImageFromArray(array)
                volume.SetSpacing(case.spacing[::-1])  # SimpleITK's order is x, y, z
                sitk.WriteImage(volume, path)
    description = {
        "name": "Phantom",
        "description": "synthetic CT made by nnunet-deform; no patient data",
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": num_train,
        "file_ending": ".nii.gz",
    }
    (dataset / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return dataset
