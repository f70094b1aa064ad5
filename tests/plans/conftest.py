"""Datasets of which only the shapes are known, planned by nnU-Net: planning needs no images."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_deform.networks.without_values import without_values

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


@pytest.fixture(scope="session")
def _planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, type], Path]:
    """Returns planned(name, planner): the folder of a phantom's raw and preprocessed data with nnU-Net's plan, made
    once."""
    made: dict[tuple[str, type], Path] = {}

    def planned(name: str, planner: type[ExperimentPlanner]) -> Path:
        if (name, planner) not in made:
            root = tmp_path_factory.mktemp("planned")
            write_phantom(root, name, *PHANTOMS[name])
            # The planner builds networks to count their feature maps.
            with pytest.MonkeyPatch.context() as patch, without_values():
                _set_paths(patch, root)
                planner(name).plan_experiment()
            made[name, planner] = root
        return made[name, planner]

    return planned


def _set_paths(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("nnUNet_raw", str(root / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(root / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(root / "results"))
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)


@pytest.fixture
def make_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _planned: Callable[[str, type], Path]) -> MakePhantom:
    """Returns make(name, res_enc=False): the preprocessed folder of a fresh phantom with nnU-Net's plan, to which
    nnU-Net's paths point."""

    def make(name: str, *, res_enc: bool = False) -> Path:
        root = _planned(name, nnUNetPlannerResEncM if res_enc else ExperimentPlanner)
        shutil.copytree(root, tmp_path, dirs_exist_ok=True)
        _set_paths(monkeypatch, tmp_path)
        return tmp_path / "preprocessed" / name

    return make


def plan_file(folder: Path, name: str = "nnUNetPlans") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())
