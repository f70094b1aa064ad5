"""Models trained and images predicted by nnU-Net's own commands with its own trainer, then compared and scored."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import phantoms

NAME, FOLD, TRAINER = "Dataset999_Phantom", 1, "nnUNetTrainer_1epoch"
PLANS = ("nnUNetPlans", "nnUNetNarrowPlans")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as monkeypatch:
        phantoms.use(folder, monkeypatch)
        phantoms.threads_for_processes(monkeypatch)
        phantoms.prepare(folder, phantoms.SCENARIOS["2d"], NAME)
    plans = json.loads((folder / "preprocessed" / NAME / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS[1]
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    (folder / "preprocessed" / NAME / f"{PLANS[1]}.json").write_text(json.dumps(plans))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: _train_and_predict(folder, name), PLANS))
    return folder


def _train_and_predict(folder: Path, plans: str) -> None:
    _run(folder, "nnUNetv2_train", "999", "2d", str(FOLD), "-tr", TRAINER, "-p", plans, "-device", "cpu")
    images = folder / "raw" / NAME / "imagesTr"
    arguments = ["-i", str(images), "-o", str(folder / plans), "-d", "999", "-c", "2d", "-tr", TRAINER, "-p", plans]
    _run(folder, "nnUNetv2_predict", *arguments, "-f", str(FOLD), "-device", "cpu", "-npp", "1", "-nps", "1")


def _run(folder: Path, command: str, *arguments: str) -> None:
    variables = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"} | variables
    program = str(Path(sys.executable).with_name(command))
    result = subprocess.run(
        [program, *arguments], env=environment | {"nnUNet_n_proc_DA": "0"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _dice(summary: Path) -> dict[tuple[str, str], float]:
    """By case and class, where nnU-Net gives one."""
    names = {"1": "bright", "2": "dark"}
    return {
        (Path(entry["prediction_file"]).name.removesuffix(".nii.gz"), names[label]): scores["Dice"]
        for entry in json.loads(summary.read_text())["metric_per_case"]
        for label, scores in entry["metrics"].items()
        if scores["Dice"] == scores["Dice"]
    }


@pytest.mark.slow
def test_stock_models_are_compared(folder, tmp_path):
    models = [f"{TRAINER}__{plans}__2d" for plans in PLANS]
    _run(folder, "nnunet-deform", "compare", "results", *models, "-d", "999", "-o", str(tmp_path / "report"))
    cases = pd.read_csv(tmp_path / "report" / "cases.csv")
    assert set(cases["case"]) == set(phantoms.FOLDS[FOLD]["val"])
    arms = [f"{TRAINER}-{plans}" for plans in PLANS]
    for arm, model in zip(arms, models, strict=True):
        summary = folder / "results" / NAME / model / f"fold_{FOLD}" / "validation" / "summary.json"
        mine = cases[cases["arm"] == arm].set_index(["case", "label"])["Dice"].dropna()
        assert mine.to_dict() == _dice(summary)
    (row,) = pd.read_csv(tmp_path / "report" / "hypotheses.csv").to_dict("records")
    assert (row["first"], row["second"], row["verdict"]) == (*arms[::-1], "undecided")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "one training each" in page
    assert "is not that of nnU-Net&#39;s summary.json" not in page
    # worst and median case by both arms, each arm's own worst, and where either is furthest below the other by both
    assert page.count("data:image/png") == 10


@pytest.mark.slow
def test_stock_predictions_are_scored_as_by_nnunet_and_compared(folder, tmp_path):
    labels = folder / "raw" / NAME / "labelsTr"
    predictions = [folder / plans for plans in PLANS]
    first = predictions[0]
    _run(folder, "nnunet-deform", "score", str(first), str(labels), "-o", str(tmp_path / "scores.csv"))
    files = ["-djfile", str(first / "dataset.json"), "-pfile", str(first / "plans.json")]
    summary = tmp_path / "summary.json"
    _run(folder, "nnUNetv2_evaluate_folder", str(labels), str(first), *files, "-o", str(summary), "-np", "1")
    table = pd.read_csv(tmp_path / "scores.csv")
    assert len(table) == 2 * phantoms.CASES
    assert table.set_index(["case", "label"])["Dice"].dropna().to_dict() == _dice(summary)
    report = tmp_path / "report"
    options = ["--labels", str(labels), "-o", str(report)]
    _run(folder, "nnunet-deform", "compare", "results", *map(str, predictions), *options)
    cases = pd.read_csv(report / "cases.csv")
    mine = cases[cases["arm"] == PLANS[0]][list(table)].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, table)
    (row,) = pd.read_csv(report / "hypotheses.csv").to_dict("records")
    assert (row["dataset"], row["configuration"], row["verdict"]) == (NAME, "predictions", "undecided")
