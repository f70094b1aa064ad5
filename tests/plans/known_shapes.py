"""Datasets of which only the shapes are known: planning needs no images."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Median shape and spacing, and the patches that nnU-Net plans for them.
PHANTOMS = {
    "Dataset501_Prostate": ((20, 320, 320), (3.6, 0.6125, 0.6125)),  # 20 x 320 x 256
    "Dataset502_Heart": ((10, 256, 216), (10.0, 1.56, 1.56)),  # 10 x 256 x 224
    "Dataset503_Body": ((300, 300, 300), (1.0, 1.0, 1.0)),  # 128 x 128 x 128, with 3d_lowres and cascade
    "Dataset504_Slide": ((1, 512, 512), (999.0, 1.0, 1.0)),  # 2D only
    "Dataset505_Hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0)),  # 40 x 56 x 40
}
CASES = ("case_1", "case_2", "case_3")


def write_phantom(root: Path, name: str, shape: Sequence[int], spacing: Sequence[float]) -> None:
    """A dataset.json and a fingerprint, as nnU-Net would have found them in 100 images of this shape."""
    raw, preprocessed = root / "raw" / name, root / "preprocessed" / name
    raw.mkdir(parents=True)
    preprocessed.mkdir(parents=True)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": 100,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": {case: {"images": [f"{case}_0000.nii.gz"], "label": f"{case}.nii.gz"} for case in CASES},
    }
    intensities = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    fingerprint = {
        "spacings": [list(spacing)] * 3,
        "shapes_after_crop": [list(shape)] * 3,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


MakePhantom = Callable[..., Path]


def plan_file(folder: Path, name: str = "nnUNetPlans") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())
