"""A tiny preprocessed dataset, as nnU-Net's planning and preprocessing would have left it."""

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import (
    Scenario,
    narrow_baselines,
    prepare,
    threads_for_processes,
    unet_architecture,
    use,
    without_plots,
    without_waiting,
)

from nnunet_deform import activation
from nnunet_deform.plans import deformux, dynamic

MakeTrainer = Callable[..., nnUNetTrainer]

DATASET = "Dataset999_Tiny"


def _plans(patch_size: Sequence[int], architecture: dict[str, Any]) -> dict[str, Any]:
    configuration = "2d" if len(patch_size) == 2 else "3d_fullres"
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [16, 16, 16],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            configuration: {
                "data_identifier": f"nnUNetPlans_{configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch_size),
                "median_image_size_in_voxels": [float(s) for s in patch_size],
                "spacing": [1.0] * len(patch_size),
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampling,
                "architecture": architecture,
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"max": 3.0, "mean": 1.0, "median": 1.0, "min": -3.0, "std": 1.0}
            | {"percentile_00_5": -2.0, "percentile_99_5": 2.0}
        },
    }


def _write_case(folder: Path, name: str, patch_size: Sequence[int], seed: int, ignore: int | None) -> None:
    """A bright and a dark box on noise, and a margin with the ignore label where there is one."""
    rng = np.random.default_rng(seed)
    size = [1, 6, *patch_size] if len(patch_size) == 2 else [1, *patch_size]
    segmentation = np.zeros(size, dtype=np.int8)
    for label in (1, 2):
        corner = [rng.integers(0, s // 2 + 1) for s in size[1:]]
        segmentation[(0, *(slice(c, c + max(1, s // 2)) for c, s in zip(corner, size[1:], strict=True)))] = label
    data = (rng.normal(0, 0.3, size) + (segmentation == 1) * 2.0 - (segmentation == 2) * 2.0).astype(np.float32)
    class_locations: dict[Any, np.ndarray] = {label: np.argwhere(segmentation == label) for label in (1, 2)}
    if ignore is not None:
        segmentation[..., : patch_size[-1] // 4] = ignore
        # nnU-Net's key for voxels that count.
        class_locations[(-1, 0, 1, 2)] = np.argwhere(segmentation != ignore)
    properties = {
        "class_locations": class_locations,
        "shape_before_cropping": size[1:],
        "shape_after_cropping_and_before_resampling": size[1:],
        "bbox_used_for_cropping": [[0, s] for s in size[1:]],
        "spacing": [1.0, 1.0, 1.0],
    }
    nnUNetDatasetBlosc2.save_case(
        data, segmentation, properties, str(folder / name), chunks=tuple(size), blocks=tuple(size)
    )


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixth of DeformUX-Net's widths, and few of MAGIC's residual blocks, where they do not matter."""
    monkeypatch.setattr(deformux, "BASE_FEATURES", 8)
    monkeypatch.setattr(dynamic, "RESIDUAL_BLOCKS", (1, 2))


@pytest.fixture(scope="session")
def six_cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...], int | None], Path]:
    """Returns six_cases(patch_size, ignore): a folder with six cases of that size, written once."""

    @functools.cache
    def folder_of(patch_size: tuple[int, ...], ignore: int | None) -> Path:
        folder = tmp_path_factory.mktemp("cases")
        for case in range(6):
            _write_case(folder, f"case_{case}", patch_size, seed=case, ignore=ignore)
        return folder

    return folder_of


@pytest.fixture
def make_trainer(
    six_cases: Callable[[tuple[int, ...], int | None], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeTrainer:
    """Returns make(trainer_class, patch_size, strides, kernel_sizes, results="results"): a trainer on a CPU for a fresh
    dataset of six cases of that size; calls with other ``results`` share the data but not the output folder.
    ``dataset`` replaces entries of dataset.json, such as the labels."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv(activation.VARIABLE, activation.extension_folder())
    without_plots(monkeypatch)

    def make(
        trainer_class: type[nnUNetTrainer],
        patch_size: Sequence[int] = (16, 16, 16),
        strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        results: str = "results",
        architecture: dict[str, Any] | None = None,
        dataset: dict[str, Any] | None = None,
    ) -> nnUNetTrainer:
        monkeypatch.setenv("nnUNet_results", str(tmp_path / results))
        if architecture is None:
            architecture = unet_architecture(strides, kernel_sizes or [[3] * len(patch_size)] * len(strides))
        plans = _plans(patch_size, architecture)
        (configuration,) = plans["configurations"]
        dataset_json = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "bright": 1, "dark": 2},
            "numTraining": 6,
            "file_ending": ".nii.gz",
            **(dataset or {}),
        }
        base = tmp_path / "preprocessed" / DATASET
        folder = base / plans["configurations"][configuration]["data_identifier"]
        if not folder.exists():
            shutil.copytree(six_cases(tuple(patch_size), dataset_json["labels"].get("ignore")), folder)
            (base / "dataset_fingerprint.json").write_text("{}")
            (base / "dataset.json").write_text(json.dumps(dataset_json))
        return trainer_class(plans | {"continue_training": False}, configuration, 0, dataset_json, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scenario], Path]:
    """Returns prepared(scenario): a folder with its raw and preprocessed data, made once."""
    folders: dict[str, Path] = {}

    def folder_of(scenario: Scenario) -> Path:
        if scenario.id not in folders:
            folder = tmp_path_factory.mktemp(scenario.id)
            with pytest.MonkeyPatch.context() as patch:
                use(folder, patch)
                threads_for_processes(patch)
                patch.setenv("nnUNet_n_proc_DA", "1")  # planning takes it for a number of threads
                prepare(folder, scenario)
            folders[scenario.id] = folder
        return folders[scenario.id]

    return folder_of


@pytest.fixture
def workplace(prepared: Callable[[Scenario], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: None):
    """Returns workplace(scenario): nnU-Net's folders with a prepared dataset and no results yet.

    The trainers have their own names and widths that two cores can train.
    """
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv(activation.VARIABLE, activation.extension_folder())
    narrow_baselines(monkeypatch)
    threads_for_processes(monkeypatch)
    without_waiting(monkeypatch)

    def make(scenario: Scenario) -> Path:
        source = prepared(scenario)
        for name in ("raw", "preprocessed"):
            shutil.copytree(source / name, tmp_path / name)
        use(tmp_path, monkeypatch)
        return tmp_path

    return make
