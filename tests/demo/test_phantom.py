"""The phantom holds what its description promises: numbers on ten seeds, and nnU-Net's own check of the files."""

from __future__ import annotations

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunet_deform.demo.phantom import (
    DATASET_NAME,
    HOUNSFIELD,
    LABELS,
    LARGEST_ORGANS,
    NOISE_HU,
    PhantomCase,
    make_case,
    write_phantom_dataset,
)


@pytest.fixture(scope="module")
def cases() -> list[PhantomCase]:
    return [make_case(np.random.default_rng(seed)) for seed in range(10)]


def _read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


def test_every_class_is_in_every_case_and_the_two_named_organs_are_the_largest(cases):
    for case in cases:
        values, counts = np.unique(case.label, return_counts=True)
        assert values.tolist() == list(range(6))
        by_size = sorted(LABELS, key=lambda name: -counts[LABELS[name]])
        assert tuple(by_size[:3]) == ("background", *LARGEST_ORGANS)


def test_sizes_are_about_24x40x40_and_vary(cases):
    shapes = np.array([case.image.shape for case in cases])
    assert (shapes >= (20, 32, 32)).all()
    assert (shapes <= (28, 46, 46)).all()
    assert (np.ptp(shapes, axis=0) >= 2).all()
    assert all(case.label.shape == case.image.shape for case in cases)


def test_spacing_is_anisotropic_and_varies(cases):
    spacing = np.array([case.spacing for case in cases])
    ratio = spacing[:, 0] / spacing[:, 1]
    assert (ratio > 1.5).all()
    # Below 2 in the median nnU-Net pools all axes at once; above, the network's first level has twice the voxels.
    assert np.median(spacing[:, 0]) / np.median(spacing[:, 1]) < 1.95
    assert np.array_equal(spacing[:, 1], spacing[:, 2])
    assert len(np.unique(spacing[:, 0])) == len(np.unique(spacing[:, 1])) == len(cases)


@pytest.mark.parametrize("organ", ["liver", "spleen", "kidney"])
def test_density_and_noise_inside_an_organ(cases, organ):
    # medians, because a vessel thinner than half a voxel brightens liver voxels without being labelled
    inside = np.concatenate(
        [case.image[ndimage.binary_erosion(case.label == LABELS[organ], np.ones((3, 3, 3)))] for case in cases]
    ).astype(float)
    assert len(inside) > 200
    assert np.median(inside) == pytest.approx(HOUNSFIELD[organ], abs=5 * NOISE_HU / np.sqrt(len(inside)) + 0.5)
    spread = 1.4826 * np.median(np.abs(inside - np.median(inside)))
    assert spread == pytest.approx(NOISE_HU, rel=0.15)


def test_small_structures_have_their_own_density_more_than_the_livers(cases):
    for case in cases:
        for name in ("vessels", "lesions"):
            mean = case.image[case.label == LABELS[name]].mean()
            assert abs(mean - HOUNSFIELD[name]) < abs(mean - HOUNSFIELD["liver"])


def test_lesions_are_small_and_inside_the_liver(cases):
    for case in cases:
        lesions = case.label == LABELS["lesions"]
        around = ndimage.binary_dilation(lesions, np.ones((1, 3, 3))) & ~lesions
        assert np.isin(case.label[around], [LABELS["liver"], LABELS["vessels"]]).mean() > 0.75
        assert lesions.sum() < 0.1 * (case.label == LABELS["liver"]).sum()


def test_vessels_form_a_connected_tree_that_is_no_blob(cases):
    for case in cases:
        vessels = case.label == LABELS["vessels"]
        pieces, _ = ndimage.label(vessels, np.ones((3, 3, 3)))
        assert np.bincount(pieces.ravel())[1:].max() > 0.7 * vessels.sum()
        box = ndimage.find_objects(vessels.astype(int))[0]
        assert vessels[box].mean() < 0.2


def test_partial_volume_at_the_skin(cases):
    # Air and fat are 900 HU apart: 8 standard deviations from either, only an average of both remains.
    for case in cases:
        low, high = HOUNSFIELD["air"] + 8 * NOISE_HU, HOUNSFIELD["fat"] - 8 * NOISE_HU
        mixed = (case.image > low) & (case.image < high)
        skin_pixels_per_slice = mixed.sum() / len(case.image)
        assert 30 < skin_pixels_per_slice < 120
        # an average takes all values in between: no quarter of the range is empty
        assert (np.histogram(case.image[mixed], bins=4, range=(low, high))[0] > 0).all()


def test_labels_follow_the_majority_of_the_partial_volume(cases):
    # Where only kidney and muscle meet, a voxel is kidney from half the way between their densities on. The noise blurs
    # the border between the two, so the band around it is left out.
    middle = (HOUNSFIELD["kidney"] + HOUNSFIELD["muscle"]) / 2
    for case in cases:
        kidney = case.label == LABELS["kidney"]
        near = ndimage.binary_dilation(kidney, np.ones((1, 3, 3)))
        clear = near & np.isin(case.label, [0, LABELS["kidney"]]) & (np.abs(case.image - middle) > 4 * NOISE_HU)
        clear &= case.image < HOUNSFIELD["kidney"] + 4 * NOISE_HU  # not the spine
        assert (kidney[clear] == (case.image[clear] > middle)).mean() > 0.97


def test_the_same_seed_gives_the_same_files_and_another_seed_does_not(tmp_path):
    folders = {}
    for name, count, seed in (("a", 2, 3), ("b", 3, 3), ("c", 2, 4)):
        (tmp_path / name).mkdir()
        folders[name] = write_phantom_dataset(tmp_path / name, num_train=count, num_test=1, seed=seed)
    files = sorted(path.relative_to(folders["a"]) for path in folders["a"].rglob("*.nii.gz"))
    assert len(files) == 6
    for file in files:
        first, second = (sitk.ReadImage(folders[name] / file) for name in "ab")  # b has one more case
        assert sitk.GetArrayFromImage(first).tobytes() == sitk.GetArrayFromImage(second).tobytes()
        assert first.GetSpacing() == second.GetSpacing()
        assert _read(folders["a"] / file).tobytes() != _read(folders["c"] / file).tobytes()


def test_test_cases_are_not_training_cases(tmp_path):
    folder = write_phantom_dataset(tmp_path, num_train=1, num_test=1)
    train, test = (_read(next((folder / name).iterdir())) for name in ("labelsTr", "labelsTs"))
    assert train.tobytes() != test.tobytes()


def test_nnunet_accepts_the_dataset(tmp_path, capfd, monkeypatch):
    from nnunetv2.experiment_planning import verify_dataset_integrity as nnunets

    # Its process would import torch for seconds.
    threads = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(nnunets, "multiprocessing", threads)
    folder = write_phantom_dataset(tmp_path, num_train=3, num_test=1)
    assert folder == tmp_path / DATASET_NAME
    nnunets.verify_dataset_integrity(str(folder), num_processes=1)
    output = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in output
    assert "error:" not in output.lower()
    assert "warning" not in output.lower()
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["channel_names"] == {"0": "CT"}
    assert description["numTraining"] == 3
    assert list(description["labels"].values()) == [0, 1, 2, 3, 4, 5]
    image = sitk.ReadImage(folder / "imagesTr" / "phantom_tr00_0000.nii.gz")
    assert image.GetPixelID() == sitk.sitkInt16
    assert image.GetSpacing()[2] > 1.5 * image.GetSpacing()[0]  # x, y, z


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    (tmp_path / DATASET_NAME).mkdir()
    with pytest.raises(FileExistsError):
        write_phantom_dataset(tmp_path, num_train=1, num_test=1)
