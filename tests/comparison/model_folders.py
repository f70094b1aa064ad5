"""nnU-Net's folders with finished trainings, made without training: boxes, some of their voxels missed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

NAME = "Dataset007_Boxes"
SPACING = (3.0, 0.8, 1.0)  # z, y, x
CASES = tuple(f"case_{number:02d}" for number in range(8))
FOLDS = {0: CASES[::2], 1: CASES[1::2]}
DESCRIPTION = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "front": 1, "back": 2},
    "numTraining": len(CASES),
    "file_ending": ".nii.gz",
}
LOG = """\
2026-01-01 00:00:00: Epoch {epoch}
2026-01-01 00:00:00: train_loss {loss:.4f}
2026-01-01 00:00:00: val_loss {loss:.4f}
"""


def write_image(file: Path, array: np.ndarray, spacing: Sequence[float] = SPACING) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, file)


def truth_of(case: str) -> np.ndarray:
    shift = CASES.index(case) % 3
    label = np.zeros((6, 12, 14), dtype=np.uint8)
    label[1:4, 2 + shift : 8 + shift, 2:8], label[2:5, 5:11, 8:13] = 1, 2
    return label


def predict(case: str, missed: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, CASES.index(case)])
    truth = truth_of(case)
    return np.where(rng.uniform(size=truth.shape) < missed, 0, truth).astype(np.uint8)


class Nnunet:
    """nnU-Net's three folders."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.raw = base / "raw" / NAME
        self.results = base / "results" / NAME
        for case in CASES:
            write_image(self.raw / "labelsTr" / f"{case}.nii.gz", truth_of(case))
            write_image(self.raw / "imagesTr" / f"{case}_0000.nii.gz", truth_of(case).astype(np.float32))
        (self.raw / "dataset.json").write_text(json.dumps(DESCRIPTION))

    def environment(self) -> dict[str, str]:
        return {f"nnUNet_{part}": str(self.base / part) for part in ("raw", "preprocessed", "results")}

    def train(
        self,
        trainer: str,
        missed: float,
        *,
        plans: str = "nnUNetPlans",
        folds: Mapping[int, Sequence[str]] = FOLDS,
        epochs: int = 2,
        seed: int = 0,
    ) -> Path:
        """A model folder whose predictions miss this share of voxels."""
        model = self.results / f"{trainer}__{plans}__3d_fullres"
        model.mkdir(parents=True)
        (model / "dataset.json").write_text(json.dumps(DESCRIPTION))
        content = {"dataset_name": NAME, "plans_name": plans, "original_median_spacing_after_transp": SPACING}
        (model / "plans.json").write_text(json.dumps(content))
        for fold, cases in folds.items():
            validation = model / f"fold_{fold}" / "validation"
            log = "".join(LOG.format(epoch=epoch, loss=1 / (1 + epoch)) for epoch in range(epochs))
            for case in cases:
                write_image(validation / f"{case}.nii.gz", predict(case, missed, seed))
            (validation.parent / "training_log_2026_1_1_00_00_00.txt").write_text(log)
            (validation.parent / "debug.json").write_text(json.dumps({"torch_version": "2.15.0", "device": "cpu"}))
            self.summarise(validation)
        return model

    def summarise(self, validation: Path) -> None:
        entries = [
            compute_metrics(str(self.raw / "labelsTr" / file.name), str(file), SimpleITKIO(), [1, 2])
            for file in sorted(validation.glob("*.nii.gz"))
        ]
        for entry in entries:
            for scores in entry["metrics"].values():
                scores.update({key: value.item() for key, value in scores.items() if hasattr(value, "item")})
        save_summary_json({"metric_per_case": entries, "mean": {}}, str(validation / "summary.json"))


def everything_in(folder: Path) -> set[str]:
    return {os.fspath(path.relative_to(folder)) for path in folder.rglob("*")}
