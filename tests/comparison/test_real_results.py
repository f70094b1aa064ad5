"""Models trained and images predicted by nnU-Net's own commands with its own trainers, then compared and scored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import phantoms

NAME, FOLD = "Dataset999_Phantom", 1
TRAINERS = ("nnUNetTrainer_1epoch", "nnUNetTrainer_5epochs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as monkeypatch:
        phantoms.use(folder, monkeypatch)
        phantoms.prepare(folder, phantoms.SCENARIOS["2d"], NAME)
    for trainer in TRAINERS:
        _run(folder, "nnUNetv2_train", "999", "2d", str(FOLD), "-tr", trainer, "-device", "cpu")
        arguments = [
            "-d",
            "999",
            "-c",
            "2d",
            "-tr",
            trainer,
            "-f",
            str(FOLD),
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
        ]
        images = folder / "raw" / NAME / "imagesTr"
        _run(folder, "nnUNetv2_predict", "-i", str(images), "-o", str(folder / trainer), *arguments)
    return folder


def _run(folder: Path, command: str, *arguments: str) -> str:
    variables = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"} | variables
    program = str(Path(sys.executable).with_name(command))
    result = subprocess.run(
        [program, *arguments], env=environment | {"nnUNet_n_proc_DA": "0"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _dice(summary: Path) -> dict[tuple[str, str], float]:
    names = {"1": "bright", "2": "dark"}
    return {
        (Path(entry["prediction_file"]).name.removesuffix(".nii.gz"), names[label]): scores["Dice"]
        for entry in json.loads(summary.read_text())["metric_per_case"]
        for label, scores in entry["metrics"].items()
    }


@pytest.mark.slow
def test_stock_models_are_compared(folder, tmp_path):
    models = [f"{trainer}__nnUNetPlans__2d" for trainer in TRAINERS]
    _run(folder, "nnunet-deform", "compare", "results", *models, "-d", "999", "-o", str(tmp_path / "report"))
    cases = pd.read_csv(tmp_path / "report" / "cases.csv")
    assert set(cases["case"]) == set(phantoms.FOLDS[FOLD]["val"])
    for trainer, model in zip(TRAINERS, models, strict=True):
        summary = folder / "results" / NAME / model / f"fold_{FOLD}" / "validation" / "summary.json"
        mine = cases[cases["arm"] == trainer].set_index(["case", "label"])["Dice"].dropna()
        theirs = {key: value for key, value in _dice(summary).items() if value == value}
        assert mine.to_dict() == theirs
    (row,) = pd.read_csv(tmp_path / "report" / "hypotheses.csv").to_dict("records")
    assert (row["first"], row["second"], row["verdict"]) == (*TRAINERS[::-1], "undecided")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "one training each" in page
    assert "epochs of the trainings differ (nnUNetTrainer_1epoch 1, nnUNetTrainer_5epochs 5)" in page
    assert "is not that of nnU-Net&#39;s summary.json" not in page
    assert page.count("data:image/png") == 4


@pytest.mark.slow
def test_stock_predictions_are_scored_as_by_nnunet_and_compared(folder, tmp_path):
    labels = folder / "raw" / NAME / "labelsTr"
    predictions = [folder / trainer for trainer in TRAINERS]
    scores = []
    for trainer, predicted in zip(TRAINERS, predictions, strict=True):
        output = tmp_path / f"{trainer}.csv"
        _run(folder, "nnunet-deform", "score", str(predicted), str(labels), "-o", str(output))
        files = ["-djfile", str(predicted / "dataset.json"), "-pfile", str(predicted / "plans.json")]
        summary = tmp_path / f"{trainer}.json"
        _run(folder, "nnUNetv2_evaluate_folder", str(labels), str(predicted), *files, "-o", str(summary), "-np", "1")
        table = pd.read_csv(output)
        scores.append(table)
        theirs = {key: value for key, value in _dice(summary).items() if value == value}
        assert table.set_index(["case", "label"])["Dice"].dropna().to_dict() == theirs
        assert len(table) == 2 * phantoms.CASES
    report = tmp_path / "report"
    options = ["--labels", str(labels), "-o", str(report)]
    _run(folder, "nnunet-deform", "compare", "results", *map(str, predictions), *options)
    cases = pd.read_csv(report / "cases.csv")
    for trainer, table in zip(TRAINERS, scores, strict=True):
        mine = cases[cases["arm"] == trainer][list(table)].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, table)
    (row,) = pd.read_csv(report / "hypotheses.csv").to_dict("records")
    assert (row["dataset"], row["configuration"], row["verdict"]) == (NAME, "predictions", "undecided")
