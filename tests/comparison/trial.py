"""An experiment on boxes, for runs with stand-ins for nnU-Net's commands."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from rich.console import Console

from nnunet_deform.comparison.files import fingerprint
from nnunet_deform.comparison.report import build_report
from nnunet_deform.comparison.run import Comparison
from nnunet_deform.processes.commands import Interrupts

EXPERIMENT = """\
name: trial
datasets:
  - {id: 7, batch_size: 2, splits: 3, patients: patients.csv, test: true}
arms:
  - {name: stock, trainer: nnUNetTrainer_AdamW}
  - {name: DeformUX, trainer: nnUNetTrainerDeformUX}
  - {name: ResEnc, trainer: nnUNetTrainer_AdamW, plans: nnUNetResEncUNetMPlans}
folds: [0, 1, 2]
seeds: {first: 1, repeats: [2, 3], folds: [0], arms: [stock, DeformUX]}
budget: {epochs: 3, iterations: 5}
mirroring: false
hypotheses:
  - [DeformUX, stock]
  - [DeformUX, ResEnc]
statistics: {draws: 1000}
device: cpu
resources: {augmentation: 0}
raw: raw
preprocessed: preprocessed
"""


NAME = "Dataset007_Boxes"


def _write_dataset(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("Tr", 12), ("Ts", 2)):
        for part in ("images", "labels"):
            (folder / f"{part}{split}").mkdir(parents=True)
        for number in range(count):
            label = np.zeros((6, 12, 14), dtype=np.uint8)
            label[1:4, 2:8, 2:8], label[2:5, 5:11, 7:13] = 1, 2
            image = label * 100 + rng.normal(0, 5, label.shape)
            case = f"{split.lower()}_{number:02d}"
            for array, path in (
                (image.astype(np.float32), f"images{split}/{case}_0000"),
                (label, f"labels{split}/{case}"),
            ):
                volume = sitk.GetImageFromArray(array)
                volume.SetSpacing((1.0, 1.0, 2.0))
                sitk.WriteImage(volume, folder / f"{path}.nii.gz")
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "front": 1, "back": 2}}
    (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": 12, "file_ending": ".nii.gz"}))


class Trial:
    """An experiment in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "trial.yaml"
        self.output = folder / "trial"
        self.console = Console(record=True, width=200, file=io.StringIO())

    def write(self) -> None:
        self.folder.mkdir()
        self.file.write_text(EXPERIMENT)
        _write_dataset(self.folder / "raw" / NAME)
        lines = [f"tr_{number:02d},p{number // 2}" for number in range(12)]
        (self.folder / "patients.csv").write_text("\n".join(["case,patient", *lines]))

    def comparison(self) -> Comparison:
        return Comparison(self.file, self.console, Interrupts())

    def run(self) -> list[str]:
        return self.comparison().run()

    def report(self) -> str:
        return build_report(self.file).read_text()

    def change(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def calls(self) -> list[dict]:
        file = Path(os.environ["FAKE_CALLS"])
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def trained(self) -> list[str]:
        """Trainer and fold of each call of nnUNetv2_train."""
        return [f"{c['args'][4]} {c['args'][2]}" for c in self.calls() if c["name"] == "nnUNetv2_train"]

    def folds(self) -> dict[str, str]:
        """Fingerprint of every file that trainings wrote."""
        files = sorted((self.output / "nnUNet_results").rglob("*"))
        return {str(f.relative_to(self.output)): fingerprint(f) for f in files if f.is_file() and f.suffix != ".json"}

    def table(self) -> pd.DataFrame:
        self.report()
        return pd.read_parquet(self.output / "report" / "cases.parquet")
