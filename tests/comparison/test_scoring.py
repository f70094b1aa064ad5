"""Scores of files against nnU-Net's own evaluation, and a new metric from the registry to the report."""

import json
import math
import re
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from model_folders import CASES, DESCRIPTION, everything_in, predict, truth_of, write_image
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from typer.testing import CliRunner

from nnunet_deform import cli
from nnunet_deform.comparison.metrics import METRICS, Metric, Structure
from nnunet_deform.comparison.scoring import Classes, score_files, summarised_files


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
        classes=Classes({"front": 1, "both": (1, 2)}, ignore_label=9),
        tolerances={"front": 1.0, "both": 2.0},
    )
    assert list(table["case"]) == ["a_1", "a_1", "a_2", "a_2"]
    assert list(table["label"]) == ["front", "both"] * 2
    entries = json.loads((moved / "summary.json").read_text())["metric_per_case"]
    dice = {Path(e["prediction_file"]).name: {k: m["Dice"] for k, m in e["metrics"].items()} for e in entries}
    for row in table.itertuples():
        truth, predicted = arrays[row.case]
        key, labels, tolerance = ("1", [1], 1.0) if row.label == "front" else ("(1, 2)", [1, 2], 2.0)
        assert row.Dice == dice[f"{row.case}.nii.gz"][key]
        masks = [np.isin(array, labels) & (truth != 9) for array in (truth, predicted)]
        structure = Structure(*masks, (3.0, 1.0, 0.5), tolerance)
        assert (METRICS["NSD"].of(structure), METRICS["HD95"].of(structure)) == (row.NSD, row.HD95)
        assert (row.voxels_truth, row.voxels_prediction) == tuple(mask.sum() for mask in masks)


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Predictions and labels, the predictions of one case missing, one class of another missed and one drawn."""
    monkeypatch.setenv("COLUMNS", "200")
    labels, predictions = tmp_path / "labels", tmp_path / "predictions"
    for case in CASES[:4]:
        truth, predicted = truth_of(case), predict(case, 0.2, seed=3)
        if case == CASES[1]:
            predicted[predicted == 2] = 0
        if case == CASES[2]:
            truth[truth == 2] = 0
            predicted[predicted == 2] = 0
        write_image(labels / f"{case}.nii.gz", truth)
        if case != CASES[3]:
            write_image(predictions / f"{case}.nii.gz", predicted)
    return predictions, labels


def _score(tmp_path, *arguments):
    command = ["score", *map(str, arguments), "-o", str(tmp_path / "scores.csv"), "-np", "1"]
    result = CliRunner().invoke(cli.app, command)
    file = tmp_path / "scores.csv"
    return result, (pd.read_csv(file) if file.exists() else None)


@pytest.mark.parametrize("described", [True, False])
def test_score_agrees_with_nnunets_evaluation(folders, tmp_path, described):
    predictions, labels = folders
    names = ["front", "back"] if described else ["1", "2"]
    if described:
        (tmp_path / "dataset.json").write_text(json.dumps(DESCRIPTION))  # found above the labels, as in nnUNet_raw
    result, table = _score(tmp_path, *folders)
    assert result.exit_code == 0, result.output
    assert list(table) == ["case", "label", "Dice", "NSD", "HD95", "voxels_truth", "voxels_prediction"]
    assert [(str(row.case), str(row.label)) for row in table.itertuples()] == [(c, n) for c in CASES[:3] for n in names]
    for case, rows in table.groupby("case"):
        files = (str(folder / f"{case}.nii.gz") for folder in (labels, predictions))
        theirs = compute_metrics(*files, SimpleITKIO(), [1, 2])["metrics"]
        np.testing.assert_array_equal(rows["Dice"], [theirs[label]["Dice"] for label in (1, 2)])
        assert list(rows["voxels_prediction"]) == [theirs[label]["n_pred"] for label in (1, 2)]
    table = table.set_index(["case", table["label"].astype(str)])
    diagonal = math.hypot(6 * 3, 12 * 0.8, 14)
    assert tuple(table.loc[(CASES[1], names[1])][["Dice", "NSD", "HD95"]]) == (0, 0, pytest.approx(diagonal))
    assert table.loc[(CASES[2], names[1])][["Dice", "NSD", "HD95"]].isna().all()
    for words in ("0.8", "1 structures are in neither", f"left out: {CASES[3]}.", "scores.csv: 3 cases."):
        assert words in result.output
    # in the means that are shown the absent structure is perfect, the missed one worst
    shown = re.search(rf"│ {names[1]} *│ *([\d.]+)", result.output)[1]
    assert float(shown) == pytest.approx((table.loc[(CASES[0], names[1])]["Dice"] + 0 + 1) / 3, abs=1e-4)


def test_score_with_regions_and_tolerances(folders, tmp_path):
    predictions, _ = folders
    labels = {"background": 0, "all": [1, 2], "back": 2, "ignore": 7}
    (predictions / "dataset.json").write_text(json.dumps(DESCRIPTION | {"labels": labels}))
    _, strict = _score(tmp_path, *folders, "--tolerance", "0.1")
    result, table = _score(tmp_path, *folders, "--tolerance", "all=9", "--tolerance", "back=0.1")
    assert result.exit_code == 0, result.output
    assert list(table["label"].unique()) == ["all", "back"]
    whole, part = (table[table["label"] == name].reset_index(drop=True) for name in ("all", "back"))
    assert (whole["NSD"] > strict[strict["label"] == "all"]["NSD"].to_numpy()).all()
    pd.testing.assert_series_equal(part["NSD"], strict[strict["label"] == "back"]["NSD"].reset_index(drop=True))
    # nnU-Net's plans, which predictions bring along, know the training cases' spacing
    (predictions / "plans.json").write_text(json.dumps({"original_median_spacing_after_transp": [0.1, 7.0, 8.0]}))
    _, default = _score(tmp_path, *folders)
    pd.testing.assert_frame_equal(default, strict)


SCORE_FAULTS = [
    (lambda p, _: shutil.rmtree(p), "there is no folder"),
    (lambda p, _: [f.unlink() for f in p.iterdir()], "have no images of the same sort."),
    (
        lambda _, la: (la / f"{CASES[0]}.nii.gz").unlink(),
        f"has no labels of {CASES[0]}, of which there are predictions.",
    ),
    (lambda p, _: write_image(p / f"{CASES[0]}.nii.gz", truth_of(CASES[0])[1:]), "has 5 x 12 x 14 voxels and"),
    (lambda p, _: (p / f"{CASES[1]}.nii.gz").write_bytes(b"no image"), "which is no image or a damaged one."),
    (lambda p, _: (p / "dataset.json").write_text("[]"), "is no dataset.json of nnU-Net"),
    (lambda _, la: [write_image(f, truth_of(CASES[0]) * 0) for f in la.iterdir()], "are all 0; give --dataset-json"),
]


@pytest.mark.parametrize(("spoil", "words"), SCORE_FAULTS, ids=[words for _, words in SCORE_FAULTS])
def test_what_cannot_be_scored_is_refused_and_nothing_is_left(folders, tmp_path, spoil, words):
    spoil(*folders)
    before = everything_in(tmp_path)
    result, _ = _score(tmp_path, *folders)
    assert result.exit_code == 1
    assert words in re.sub(r"\s+", " ", result.stderr)
    assert everything_in(tmp_path) == before


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
    for words in ("VE: pairs and classes", "VE (%)", "VE: the volume&#39;s relative error.", "+-0.25"):
        assert words in page
    # the stand-ins' primary contrast is that of the new metric, and its own band is declared
    hypotheses = pd.read_csv(folder / "hypotheses.csv")
    np.testing.assert_allclose(hypotheses["mean difference"][0], means["DeformUX"] - means["stock"], atol=1.0)
    assert json.loads((trial.output / "declared.json").read_text())["content"]["band"] == 0.25
