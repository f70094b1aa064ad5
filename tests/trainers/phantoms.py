"""Small datasets on disk, planned and preprocessed by nnU-Net itself, and what to train on them."""

import functools
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnunetv2.ensembling.ensemble
import nnunetv2.evaluation.evaluate_predictions
import nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor
import nnunetv2.experiment_planning.verify_dataset_integrity
import nnunetv2.inference.predict_from_raw_data
import nnunetv2.postprocessing.remove_connected_components
import nnunetv2.preprocessing.preprocessors.default_preprocessor
import nnunetv2.run.run_training
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer
import nnunetv2.utilities.utils
import numpy as np
import pytest
import SimpleITK as sitk
from dynamic_network_architectures.architectures import primus
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiments,
    preprocess_dataset,
)
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_deform.networks.without_values import without_values
from nnunet_deform.plans import baselines, rivals

CASES = 4
FOLDS = [
    {"train": ["case_1", "case_2", "case_3"], "val": ["case_0"]},
    {"train": ["case_0"], "val": ["case_1", "case_2", "case_3"]},
]
LABELS = {"background": 0, "bright": 1, "dark": 2}
REGIONS = {"background": 0, "both": [1, 2], "dark": 2}

# Every place where nnU-Net starts worker processes; each of them would import torch for seconds.
_POOLS = (
    nnunetv2.ensembling.ensemble,
    nnunetv2.evaluation.evaluate_predictions,
    nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor,
    nnunetv2.experiment_planning.verify_dataset_integrity,
    nnunetv2.postprocessing.remove_connected_components,
    nnunetv2.preprocessing.preprocessors.default_preprocessor,
    nnunetv2.training.nnUNetTrainer.nnUNetTrainer,
)


class _FewerSamples(DatasetFingerprintExtractor):
    """nnU-Net draws 100 million voxels, whatever the size of the images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 10_000


@dataclass(frozen=True)
class Scenario:
    """A dataset and a plan for it.

    Args:
        id: name of the scenario.
        configurations: trained one after the other.
        size: of the training images in voxels, (z, y, x).
        patch: of the plan.
        strides, kernel_sizes: of each level of the plan.
        spacing: in mm, (z, y, x).
        channels: of an image.
        labels: as in dataset.json.
        ignore: whether a part of each image is not labelled.
        batch_size: of the plan.
    """

    id: str
    size: tuple[int, int, int]
    patch: tuple[int, ...]
    strides: Sequence[Sequence[int]]
    kernel_sizes: Sequence[Sequence[int]]
    configurations: tuple[str, ...] = ("3d_fullres",)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: int = 1
    labels: Mapping[str, Any] = field(default_factory=lambda: LABELS)
    ignore: bool = False
    batch_size: int = 2

    def __str__(self) -> str:
        return self.id

    @property
    def regions(self) -> bool:
        return any(isinstance(value, list) for value in self.labels.values())

    @property
    def dataset_json(self) -> dict[str, Any]:
        return {
            "channel_names": {str(channel): "noise" for channel in range(self.channels)},
            "labels": {**self.labels, **({"ignore": 3} if self.ignore else {})},
            **({"regions_class_order": [1, 2]} if self.regions else {}),
            "numTraining": CASES,
            "file_ending": ".nii.gz",
        }


def _levels(strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Strides, and the kernels that nnU-Net gives along with them: 1 along an axis until it is first pooled."""
    kernels = []
    for level in range(len(strides)):
        following = strides[: level + 2]
        kernels.append([3 if any(s[axis] > 1 for s in following) else 1 for axis in range(len(strides[0]))])
    return {"strides": strides, "kernel_sizes": kernels}


ISOTROPIC = _levels([[1, 1, 1], [2, 2, 2], [2, 2, 2]])
SCENARIOS = {
    scenario.id: scenario
    for scenario in (
        Scenario("isotropic", (32, 32, 32), (32, 32, 32), **ISOTROPIC),
        Scenario("odd", (24, 40, 56), (24, 40, 56), **ISOTROPIC, channels=2, batch_size=1),
        Scenario(
            "anisotropic",
            (20, 80, 64),
            (20, 80, 64),
            **_levels([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]),
            spacing=(4.0, 1.0, 1.0),
        ),
        Scenario("2d", (8, 48, 40), (48, 40), **_levels([[1, 1], [2, 2], [2, 2]]), configurations=("2d",)),
        Scenario(
            "cascade", (24, 24, 24), (24, 24, 24), **ISOTROPIC, configurations=("3d_lowres", "3d_cascade_fullres")
        ),
        Scenario("regions", (24, 24, 24), (24, 24, 24), **ISOTROPIC, labels=REGIONS),
        Scenario("ignore", (24, 24, 24), (24, 24, 24), **ISOTROPIC, ignore=True),
        Scenario("regions-ignore", (24, 24, 24), (24, 24, 24), **ISOTROPIC, labels=REGIONS, ignore=True),
    )
}

# Of the baselines, for two cores; MedNeXt's widths are fixed in MONAI.
_NARROW = {
    "SwinUNETR": {"feature_size": 12},
    "UNETR": {"feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2},
    "SegResNet": {"init_filters": 8},
    "UNetPlusPlus": {"features": [4, 4, 8, 8, 8, 4]},
}
_NARROW_RIVALS = {
    "NnFormer": {"width": 16, "head_width": 8},
    "NnFormer_96": {"width": 16, "head_width": 8},
    "UNETRPlusPlus": {"widths": [8, 8, 16, 16]},
    "SegFormer3D": {"widths": [8, 8, 16, 16], "heads": [1, 2, 2, 4], "decoder_width": 16},
    "UNesT_B": {"token_widths": [16, 32, 64], "heads": [2, 2, 4], "depths": [1, 1, 2]},
    "UNesT_L": {"token_widths": [16, 32, 64], "heads": [2, 2, 4], "depths": [1, 1, 2]},
    "TransBTS": {"base_width": 8, "token_width": 32, "heads": 2, "mlp_width": 32, "layers": 1},
    "CoTr": {"widths": [8, 12, 24], "heads": 2, "layers": 1},
}


class _TinyPrimus(primus_trainers.Primus):
    """Of the stock trainer's arguments, those that make it large are replaced."""

    def __init__(self, channels, embed_dim, tokens, classes, depth, heads, *arguments, **options) -> None:
        super().__init__(channels, 24, tokens, classes, 1, 2, *arguments, **options)


class _NarrowEmbeddingV2(primus.PatchEmbed_deeper):
    def __init__(self, *, base_features: int, **options: Any) -> None:
        super().__init__(base_features=8, **options)


class _NarrowEmbeddingV3(primus.PatchEmbedDeeperControlled):
    def __init__(self, *, ch_per_level: tuple[int, ...], **options: Any) -> None:
        super().__init__(ch_per_level=(8,) * len(ch_per_level), **options)


def narrow_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's networks, Primus and the rivals with widths that two cores can train."""
    for network, options in _NARROW.items():
        monkeypatch.setitem(baselines._OPTIONS, network, options)
    for network, options in _NARROW_RIVALS.items():
        monkeypatch.setitem(rivals._OPTIONS, network, options)
    monkeypatch.setattr(primus_trainers, "Primus", _TinyPrimus)
    monkeypatch.setattr(primus, "PatchEmbed_deeper", _NarrowEmbeddingV2)
    monkeypatch.setattr(primus, "PatchEmbedDeeperControlled", _NarrowEmbeddingV3)
    monkeypatch.setitem(primus._PRIMUS_CONFIGS, "S", {"embed_dim": 24, "eva_depth": 1, "eva_numheads": 2})


def unet_architecture(strides: Sequence[Sequence[int]], kernel_sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A plan's architecture entry for nnU-Net's own U-Net, as its planner writes it (but narrower)."""
    ndim = len(strides[0])
    levels = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": [8 * 2**level for level in range(levels)],
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [list(k) for k in kernel_sizes],
            "strides": [list(s) for s in strides],
            "n_conv_per_stage": [1] * levels,
            "n_conv_per_stage_decoder": [1] * (levels - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def write_case(raw: Path, images: str, name: str, scenario: Scenario, size: Sequence[int], seed: int) -> None:
    """A bright and a dark box on noise, in every channel, and their labels."""
    rng = np.random.default_rng(seed)
    segmentation = np.zeros(size, dtype=np.uint8)
    for label in (1, 2):
        corner = [rng.integers(0, s // 2 + 1) for s in size]
        segmentation[tuple(slice(c, c + s // 2) for c, s in zip(corner, size, strict=True))] = label
    for channel in range(scenario.channels):
        values = rng.normal(0, 0.3, size) + (segmentation == 1) * 2.0 - (segmentation == 2) * 2.0
        _write(raw / images / f"{name}_{channel:04d}.nii.gz", values.astype(np.float32), scenario.spacing)
    if scenario.ignore:
        segmentation[..., : size[-1] // 4] = 3
    _write(raw / images.replace("images", "labels") / f"{name}.nii.gz", segmentation, scenario.spacing)


def _write(path: Path, values: np.ndarray, spacing: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point nnU-Net to the folders in ``folder``."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(folder / name))


def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out nnU-Net's plots, half a second after each epoch. Its own commands, in test_interruptions, make them."""
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: Path(folder, "progress.png").touch())


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what costs seconds in each run of nnU-Net and has tests of its own: plots, and repeated look-ups."""
    without_plots(monkeypatch)
    for module in (nnunetv2.run.run_training, nnunetv2.inference.predict_from_raw_data):
        monkeypatch.setattr(module, "recursive_find_trainer_class_by_name", _find_trainer)


_find_trainer = functools.cache(recursive_find_trainer_class_by_name)


def threads_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net's pools be threads of this process."""
    pools = SimpleNamespace(
        get_context=lambda method: SimpleNamespace(Pool=ThreadPool), TimeoutError=multiprocessing.TimeoutError
    )
    for module in _POOLS:
        monkeypatch.setattr(module, "multiprocessing", pools)
    # Each prediction lists its images with twelve forks of this process, whose page tables alone take seconds to copy.
    monkeypatch.setattr(nnunetv2.utilities.utils, "Pool", ThreadPool)


def prepare(folder: Path, scenario: Scenario, name: str = "Dataset999_Phantom") -> None:
    """Write the dataset into the folders that nnU-Net is pointed to, plan and preprocess it.

    The fingerprint, the spacing and the normalisation are nnU-Net's own; patch, batch and U-Net are the scenario's.
    """
    raw = folder / "raw" / name
    for case in range(CASES):
        write_case(raw, "imagesTr", f"case_{case}", scenario, scenario.size, seed=case)
    # Shorter than the patch along some axes and longer along others.
    write_case(raw, "imagesTs", "test_0", scenario, [9, 17, 33], seed=100)
    (raw / "dataset.json").write_text(json.dumps(scenario.dataset_json))
    number = int(name[7:10])
    with redirect_stdout(StringIO()):
        extract_fingerprint_dataset(number, _FewerSamples, 1, check_dataset_integrity=True, show_progress_bar=False)
        # The planner builds networks to count their feature maps.
        with without_values():
            plan_experiments([number])
    preprocessed = folder / "preprocessed" / name
    path = preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    path.write_text(json.dumps(_with_scenario(plans, scenario)))
    (preprocessed / "splits_final.json").write_text(json.dumps(FOLDS))
    configurations = ["3d_fullres" if c == "3d_cascade_fullres" else c for c in scenario.configurations]
    with redirect_stdout(StringIO()):
        preprocess_dataset(number, "nnUNetPlans", configurations, num_processes=[1], show_progress_bar=False)


def _with_scenario(plans: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    narrow = {
        "patch_size": list(scenario.patch),
        "batch_size": scenario.batch_size,
        "architecture": unet_architecture(scenario.strides, scenario.kernel_sizes),
    }
    configurations = plans["configurations"]
    base = "2d" if scenario.configurations == ("2d",) else "3d_fullres"
    configurations[base] |= narrow
    if "3d_lowres" in scenario.configurations:
        configurations["3d_lowres"] = {
            "inherits_from": "3d_fullres",
            "data_identifier": "nnUNetPlans_3d_lowres",
            "patch_size": [s // 2 for s in scenario.patch],
            "spacing": [2 * s for s in scenario.spacing],
            "median_image_size_in_voxels": [s / 2 for s in scenario.size],
            "next_stage": "3d_cascade_fullres",
        }
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return plans
