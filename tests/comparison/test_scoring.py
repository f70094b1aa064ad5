"""Scores of files against nnU-Net's own evaluation, and a new metric from the registry to the report."""

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import SimpleITK as sitk
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_deform.comparison.metrics import METRICS, Metric, Structure
from nnunet_deform.comparison.scoring import score_files, summarised_files


def test_a_folder_with_regions_and_ignore_label(tmp_path, monkeypatch):
    # nnU-Net's process would import torch for seconds.
    threads = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(evaluate_predictions, "multiprocessing", threads)
    rng = np.random.default_rng(0)
    for name in ("truth", "predicted"):
        (tmp_path / name).mkdir()
    arrays = {}
    for case in ("a_1", "a_2"):
        truth = rng.integers(0, 3, (6, 8, 10)).astype(np.uint8)
        truth[:, :, :2] = 9
        predicted = np.where(rng.uniform(size=truth.shape) < 0.8, np.where(truth == 9, 1, truth), 0).astype(np.uint8)
        arrays[case] = truth, predicted
        for folder, array in (("truth", truth), ("predicted", predicted)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.5, 1.0, 3.0))
            sitk.WriteImage(image, tmp_path / folder / f"{case}.nii.gz")
    summary = tmp_path / "predicted" / "summary.json"
    regions = [1, (1, 2)]
    arguments = (tmp_path / "truth", tmp_path / "predicted", summary, SimpleITKIO(), ".nii.gz", regions, 9, 1)
    compute_metrics_on_folder(*(str(a) if hasattr(a, "parent") else a for a in arguments))
    moved = tmp_path / "moved"
    (tmp_path / "predicted").rename(moved)
    table = score_files(
        summarised_files(moved / "summary.json", ".nii.gz"),
        reader=SimpleITKIO(),
        tolerances={1: 1.0, (1, 2): 2.0},
        ignore_label=9,
    )
    assert list(table["case"]) == ["a_1", "a_1", "a_2", "a_2"]
    assert sorted(map(str, table["label"])) == ["(1, 2)", "(1, 2)", "1", "1"]
    entries = json.loads((moved / "summary.json").read_text())["metric_per_case"]
    dice = {Path(e["prediction_file"]).name: {k: m["Dice"] for k, m in e["metrics"].items()} for e in entries}
    for row in table.itertuples():
        truth, predicted = arrays[row.case]
        assert row.Dice == dice[f"{row.case}.nii.gz"][str(row.label)]
        labels, tolerance = ([1], 1.0) if row.label == 1 else ([1, 2], 2.0)
        masks = [np.isin(array, labels) & (truth != 9) for array in (truth, predicted)]
        structure = Structure(*masks, (3.0, 1.0, 0.5), tolerance)
        assert (METRICS["NSD"].of(structure), METRICS["HD95"].of(structure)) == (row.NSD, row.HD95)
        assert (row.voxels_truth, row.voxels_prediction) == tuple(mask.sum() for mask in masks)


def _volume_error(structure: Structure) -> float:
    truth, prediction = np.count_nonzero(structure.truth), np.count_nonzero(structure.prediction)
    return 100 * abs(prediction - truth) / truth


VOLUME = Metric(
    name="VE",
    compute=_volume_error,
    worst=lambda _: 100.0,
    higher_is_better=False,
    perfect=0.0,
    unit="%",
    decimals=1,
    band=0.25,
    about="VE: the volume's relative error.",
)


def test_a_metric_is_its_entry_in_the_registry(trial, monkeypatch):
    monkeypatch.setitem(METRICS, "VE", VOLUME)
    trial.change("hypotheses:", "primary: VE\nhypotheses:")
    for needless in (
        "  - {name: ResEnc, trainer: nnUNetTrainer_AdamW, plans: nnUNetResEncUNetMPlans}\n",
        "  - [DeformUX, ResEnc]\n",
        ", repeats: [2, 3], folds: [0], arms: [stock, DeformUX]",
        ", 1, 2",
    ):
        trial.change(needless, "")
    assert trial.run() == []
    page = trial.report()
    folder = trial.output / "report"
    cases = pd.read_csv(folder / "cases.csv")
    errors = 100 * (cases["voxels_prediction"] - cases["voxels_truth"]).abs() / cases["voxels_truth"]
    np.testing.assert_allclose(cases["VE"], errors, rtol=1e-12)
    arms = pd.read_csv(folder / "arms.csv")
    assert list(arms["metric"].unique()) == [*METRICS] == ["Dice", "NSD", "HD95", "VE"]
    means = arms[arms["metric"] == "VE"].set_index("arm")["mean"]
    assert means["DeformUX"] < means["stock"]  # the stand-in's errors, see fake_nnunet.py
    assert set(pd.read_csv(folder / "contrasts.csv")["metric"]) == {*METRICS}
    assert " VE " in (folder / "arms.tex").read_text()
    for words in ("<h3>VE</h3>", "VE (%)", "VE: the volume&#39;s relative error.", "+-0.25"):
        assert words in page
    # the stand-ins' primary contrast is that of the new metric, and its own band is declared
    hypotheses = pd.read_csv(folder / "hypotheses.csv")
    np.testing.assert_allclose(hypotheses["mean difference"][0], means["DeformUX"] - means["stock"], atol=1.0)
    assert json.loads((trial.output / "declared.json").read_text())["content"]["band"] == 0.25
