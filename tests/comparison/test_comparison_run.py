"""Whole runs with stand-ins for nnU-Net's commands; the slow test runs the real ones."""

from __future__ import annotations

import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trial import NAME, Trial

from nnunet_deform import activation
from nnunet_deform.comparison.collect import CollectionError
from nnunet_deform.comparison.experiment import ExperimentError
from nnunet_deform.comparison.files import fingerprint, read_json
from nnunet_deform.comparison.inspections import inspect_worst_cases
from nnunet_deform.comparison.prepare import PreparationError
from nnunet_deform.comparison.report.experiment import volume_readers
from nnunet_deform.comparison.run import Comparison, RunError, format_seconds
from nnunet_deform.comparison.splits import SplitError
from nnunet_deform.comparison.trainings import (
    Training,
    TrainingError,
    list_trainings,
    read_record,
    record_file,
    write_record,
)
from nnunet_deform.inspection.model import InspectionError
from nnunet_deform.processes.commands import Interrupts

pytestmark = pytest.mark.usefixtures("use_fakes", "undrawn")

DRIVER = """
import signal, sys
from pathlib import Path
from rich.console import Console
from nnunet_deform.processes import commands
from nnunet_deform.comparison import run
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
fakes = Path(sys.argv[1])
commands.find_command = lambda name: str(fakes / ("cost" if name == sys.executable else name))
commands._GRACE_S = 0.5
with commands.Interrupts() as interrupts:
    assert run.Comparison(Path(sys.argv[2]), Console(), interrupts).run() == []
"""


@pytest.fixture
def finished(undisturbed, tmp_path) -> Trial:
    """A complete run, moved to another folder, to break things in."""
    shutil.copytree(undisturbed.folder, tmp_path / "work")
    return Trial(tmp_path / "work")


SUFFIX = "_3epochs5iters_seed1_unmirrored"
ARMS = (
    ("stock", "nnUNetTrainer_AdamW", "nnUNetPlans_batch2"),
    ("DeformUX", "nnUNetTrainerDeformUX", "nnUNetPlans_batch2"),
    ("ResEnc", "nnUNetTrainer_AdamW", "nnUNetResEncUNetMPlans_batch2"),
)


def test_pictures_are_of_the_configurations_own_predictions(finished):
    finished.change(
        "  - {id: 7, batch_size: 2, splits: 3, patients: patients.csv, test: true}",
        "  - {id: 7, batch_size: 2, splits: 3, patients: patients.csv, test: true}\n"
        "  - {id: 7, configuration: 2d, batch_size: 2, splits: 3, patients: patients.csv}",
    )
    experiment, folders = _experiment(finished)
    case = read_json(folders.preprocessed / NAME / "splits_final.json")[1]["val"][0]
    readers = volume_readers(experiment, folders)
    assert set(readers) == {(NAME, "3d_fullres"), (NAME, "2d")}
    assert readers[NAME, "3d_fullres"]("stock", case).prediction.shape == (6, 12, 14)
    assert readers[NAME, "2d"]("stock", case) is None  # nothing was trained there


def test_pages_of_the_worst_cases_are_made_on_request_and_linked(finished, monkeypatch):
    asked = []

    def load(folder: Path, **options: object) -> str:
        asked.append((folder, options))
        if "ResEnc" in folder.name:
            raise InspectionError("this model is broken.")
        return folder.name

    def look(models: list[str], image: Path, output: Path, *, labels: Path) -> None:
        page = output / image.name.removesuffix("_0000.nii.gz") / "inspect.html"
        page.parent.mkdir(parents=True)
        page.write_text(models[0])
        assert (labels / f"{page.parent.name}.nii.gz").exists()

    monkeypatch.setattr("nnunet_deform.inspection.model.load_model", load)
    monkeypatch.setattr("nnunet_deform.inspection.command.inspect_cases", look)
    assert "Look inside" not in finished.report()
    (failure,) = inspect_worst_cases(finished.file)
    assert re.fullmatch(r"no page of ResEnc and tr_\d\d: this model is broken\.", failure)
    folder = finished.output / "report" / "inspect" / f"{NAME}-3d_fullres"
    pages = sorted(folder.rglob("inspect.html"))
    assert [page.parts[-3] for page in pages] == ["DeformUX", "stock"]
    table = finished.table()
    for page in pages:
        arm, case = page.parts[-3:-1]
        scores = table[(table["arm"] == arm) & table["case"].str.startswith("tr_")].groupby("case")["Dice"].mean()
        assert scores[case] == scores.min()
        # by the model that has not seen it
        splits = read_json(finished.folder / "preprocessed" / NAME / "splits_final.json")
        (options,) = (o for f, o in asked if f.name == page.read_text())
        assert case in splits[int(options["fold"])]["val"]
        assert options["device"] == "cpu"
    report = finished.report()
    for page in pages:
        assert f'href="{page.relative_to(finished.output / "report").as_posix()}"' in report
    # Also where predictions are deleted to save space.
    for prediction in (finished.output / "nnUNet_results").rglob("validation/*.nii.gz"):
        prediction.unlink()
    assert finished.report().count("Look inside") == report.count("Look inside")
    # What is newer than its model is kept.
    inspect_worst_cases(finished.file)
    assert len(asked) == 4
    # So is that of a model that is gone.
    for checkpoint in (finished.output / "nnUNet_results").rglob("checkpoint_final.pth"):
        checkpoint.unlink()
    inspect_worst_cases(finished.file)
    assert len(asked) == 5
    assert all(page.exists() for page in pages)


def test_a_whole_run_then_nothing_is_done_twice(undisturbed, monkeypatch):
    trial = undisturbed
    monkeypatch.setenv("FAKE_CALLS", str(trial.folder.parent / "calls.jsonl"))
    calls = trial.calls()
    assert [call["name"] for call in calls[:4]] == [
        "nnUNetv2_extract_fingerprint",
        "nnUNetv2_plan_experiment",
        "nnUNetv2_plan_experiment",
        "nnUNetv2_preprocess",
    ]
    # planning crashes without a worker; bit-equal training needs none
    assert {call["nnUNet_n_proc_DA"] for call in calls[:4]} == {"1"}
    trainings = [call for call in calls if call["name"] == "nnUNetv2_train"]
    assert {call["nnUNet_n_proc_DA"] for call in trainings} == {"0"}
    assert all(call["nnUNet_extTrainer"].endswith(activation.extension_folder()) for call in calls)
    assert trainings[0]["args"] == [
        *(NAME, "3d_fullres", "0", "-tr", f"nnUNetTrainer_AdamW{SUFFIX}"),
        *("-p", "nnUNetPlans_batch2", "-device", "cpu"),
    ]
    # 3 arms on 3 folds, and two more seeds of two arms on fold 0
    assert len(trainings) == len({tuple(call["args"]) for call in trainings}) == 13
    predicted = [call["args"] for call in calls if call["name"] == "nnUNetv2_predict"]
    measured = [call["args"] for call in calls if call["name"] == "cost"]
    for number, (arm, trainer, plans) in enumerate(ARMS):
        assert predicted[number] == [
            *("-d", NAME, "-i", str(trial.folder / "raw" / NAME / "imagesTs")),
            *("-o", str(trial.output / "test" / f"{NAME}-3d_fullres" / arm), "-c", "3d_fullres"),
            *("-tr", f"{trainer}{SUFFIX}", "-p", plans, "-f", "0", "1", "2", "-device", "cpu"),
            *("-npp", "1", "-nps", "1", "--disable_tta"),
        ]
        assert measured[number][2:] == [
            *(NAME, "3d_fullres", "0", f"{trainer}{SUFFIX}", plans, "cpu", "False"),
            str(trial.output / "costs" / f"{NAME}-3d_fullres" / f"{arm}.json"),
        ]
    assert len(predicted) == len(measured) == 3

    preprocessed = trial.folder / "preprocessed" / NAME
    assert read_json(preprocessed / "nnUNetPlans_batch2.json")["configurations"]["3d_fullres"]["batch_size"] == 2
    assert read_json(preprocessed / "nnUNetPlans_batch2.json")["plans_name"] == "nnUNetPlans_batch2"
    splits = read_json(preprocessed / "splits_final.json")
    assert len(splits) == 3
    for fold in splits:
        assert not {int(c[3:]) // 2 for c in fold["train"]} & {int(c[3:]) // 2 for c in fold["val"]}

    table, folds = trial.table(), trial.folds()
    # 13 trainings of 4 cases, and 3 arms on 2 test cases, 2 classes each
    assert len(table[table["set"] == "out of fold"]) == 13 * 4 * 2
    assert len(table[table["set"] == "test"]) == 3 * 2 * 2
    assert set(table["patient"]) >= {f"p{n}" for n in range(6)}
    summary = trial.output / "nnUNet_results" / NAME / f"nnUNetTrainerDeformUX{SUFFIX}__nnUNetPlans_batch2__3d_fullres"
    entry = read_json(summary / "fold_1" / "validation" / "summary.json")["metric_per_case"][0]
    rows = table[(table["arm"] == "DeformUX") & (table["seed"] == 1) & (table["fold"] == 1)]
    row = rows[(rows["case"] == Path(entry["prediction_file"]).name[:-7]) & (rows["label"] == "back")]
    assert row["Dice"].item() == entry["metrics"]["2"]["Dice"]

    assert trial.run() == []
    assert len(trial.calls()) == len(calls)
    assert trial.folds() == folds
    pd.testing.assert_frame_equal(trial.table(), table)
    assert not list(trial.output.rglob("*.partial"))


def test_the_report_says_what_was_found_and_where_from(finished):
    trial = finished
    page = trial.report()
    # the fakes make DeformUX far better, but six patients cannot show it
    assert page.count("undecided, 24 more patients needed (it has 6 of 30) and 4 more seeds of DeformUX and") == 2
    assert "stock, DeformUX, ResEnc have too few repeated trainings" in page
    assert "before the first training" in page
    assert "The worst case: " in page
    # verdicts; scores, classes and pairs of each metric; sizes, folds, ranking, Pareto, curves
    assert page.count("<svg") == 1 + 3 * 3 + 5
    # the worst and the median case of each arm, its own worst, and two cases of two arms for both pairs
    assert page.count("data:image/png;base64,") == 2 * 3 + 3 + 2 * 2 * 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    record = read_record(list_trainings(*_experiment(trial))[0], _experiment(trial)[1])
    assert record.splits[:12] in page
    assert record.plans[:12] in page
    assert record.commands[0] in page
    assert f"torch {record.versions['torch']}" in page
    for arm, *_ in ARMS:
        assert f"<tr><td>{arm}</td>" + "".join(f"<td>{n}</td>" for n in ("0.001", "1.00", "0.10", "0.5", "2")) in page
        # it has two cases, whose patients are not known
        assert f"<tr><td>{arm}</td><td>2</td><td>2</td>" in page.partition(">Test set</h3>")[2]
    folder = trial.output / "report"
    assert {path.name for path in folder.iterdir()} == {
        *("report.html", "cases.parquet", "cases.csv", "arms.csv", "contrasts.csv", "hypotheses.csv", "parts.csv"),
        *("arms.tex", "hypotheses.tex", "operators.csv"),
    }
    arms = pd.read_csv(folder / "arms.csv")
    table = pd.read_csv(folder / "cases.csv")
    of_fold = table[table["set"] == "out of fold"]
    for row in arms.itertuples():
        # every fold has as many cases; fold 0 is a mean over its trainings
        assert row.mean == pytest.approx(of_fold[of_fold["arm"] == row.arm].groupby("fold")[row.metric].mean().mean())
        assert row.low < row.mean < row.high
    assert r"\begin{tabular}" in (folder / "arms.tex").read_text()


def test_the_worst_case_is_shown_from_its_own_fold(finished):
    for arm, *_ in ARMS:
        file = finished.output / "scores" / f"{NAME}-3d_fullres" / f"{arm}_seed1_fold2.parquet"
        table = pd.read_parquet(file)
        case = table["case"].iloc[0]
        table.assign(Dice=table["Dice"].where(table["case"] != case, 0.0)).to_parquet(file, index=False)
    page = finished.report()
    assert f"The worst case: {case}" in page
    for arm, *_ in ARMS:
        assert re.search(
            rf'<img alt="{case}, slice \d: truth filled and {arm}&#39;s prediction outlined, Dice 0.0000"', page
        )
        assert f"<figcaption>{arm}: 0.0000</figcaption>" in page


def _experiment(trial: Trial):
    comparison = trial.comparison()
    return comparison.experiment, comparison.folders


def test_the_declared_hypotheses_are_in_numbers_too(finished):
    page = finished.report()
    rows = pd.read_csv(finished.output / "report" / "hypotheses.csv")
    pairs = pd.read_csv(finished.output / "report" / "contrasts.csv")
    pairs = pairs[(pairs["metric"] == "Dice") & (pairs["class"] == "all")].set_index(["first", "second"])
    assert len(rows) == 2
    for _, row in rows.iterrows():
        # in the order of the arms "stock" comes first, so the declared difference is turned
        first, second = row["first"], row["second"]
        sign, pair = (-1, pairs.loc[second, first]) if second == "stock" else (1, pairs.loc[first, second])
        assert row["mean difference"] == pytest.approx(sign * pair["mean difference"])
        assert row["rank-biserial"] == sign * pair["rank-biserial"] == 1
        # the hypotheses share alpha, exploratory pairs do not
        alone = sorted([sign * pair["low"], sign * pair["high"]])
        assert row["low"] < alone[0] < alone[1] < row["high"]
        assert row["low"] < row["mean difference"] < row["high"]
        assert row["p for family"] == pytest.approx(min(1, 2 * row["p"]))
        assert f"<td>{row['mean difference']:+.4f}</td>" in page
        assert f"{row['mean difference']:+.4f}" in (finished.output / "report" / "hypotheses.tex").read_text()


def test_test_sets_and_costs_that_are_missing_are_told(finished):
    assert " have no " not in finished.report()
    shutil.rmtree(finished.output / "test" / f"{NAME}-3d_fullres" / "ResEnc")
    (finished.output / "costs" / f"{NAME}-3d_fullres" / "stock.json").unlink()
    page = finished.report()
    assert f"{NAME} (3d_fullres): ResEnc has no test scores" in page
    assert f"{NAME} (3d_fullres): stock has no cost" in page


def test_test_scores_of_different_cases_are_told(finished):
    file = finished.output / "scores" / f"{NAME}-3d_fullres" / "stock_seed1_fold0_test.parquet"
    table = pd.read_parquet(file)
    table[table["case"] == table["case"].iloc[0]].to_parquet(file, index=False)
    assert "test scores are of different cases, so they cannot be compared" in finished.report()


def test_an_arm_that_hardly_learned_is_told(finished):
    for fold in range(3):
        file = finished.output / "scores" / f"{NAME}-3d_fullres" / f"ResEnc_seed1_fold{fold}.parquet"
        table = pd.read_parquet(file)
        table.assign(Dice=table["Dice"].where(table["label"] != "back", 0.05)).to_parquet(file, index=False)
    page = finished.report()
    assert f"{NAME} (3d_fullres): ResEnc reaches a mean Dice of 0.0500 (back), at most a tenth of the best" in page
    assert page.count("reaches a mean Dice") == 2  # in the cautions, and in the verdict
    assert "degrees of freedom; without ResEnc)" in page
    assert "because an arm failed or hardly learned: 1 of 2" in page.partition("Before you rely on it")[0]
    assert "DeformUX and ResEnc are not comparable: ResEnc reaches a mean Dice of 0.0500 (back)" in page


def test_a_short_budget_is_told(finished):
    assert "Trainings were of 3 epochs of 5 iterations, 6e-05 of nnU-Net" in finished.report()


def test_predictions_that_were_deleted_are_told(finished):
    for file in finished.output.glob("nnUNet_results/*/nnUNetTrainerDeformUX*_seed1_*/fold_*/validation/*.nii.gz"):
        file.unlink()
    page = finished.report()
    # of DeformUX: the worst, the median, its own worst, and two of each pair
    assert page.count("The prediction is no longer there.") == 2 + 1 + 2 * 2
    assert page.count("data:image/png;base64,") == 17 - 7


def test_a_report_of_one_complete_arm_names_no_ratio(finished):
    for arm in ("DeformUX", "ResEnc"):
        (finished.output / "scores" / f"{NAME}-3d_fullres" / f"{arm}_seed1_fold2.parquet").unlink()
    page = finished.report()
    assert "There is no other method to compare it with." in page
    assert "Ratio" not in page
    assert not re.search(
        r"\bnan\b", re.sub(r"<svg.*?</svg>|<script>.*?</script>|data:[^\"]*", "", page, flags=re.DOTALL)
    )


def test_the_commands_of_the_test_set_are_told(finished):
    page = finished.report()
    for _, trainer, plans in ARMS:
        assert (
            f"-c 3d_fullres -tr {trainer}{SUFFIX} -p {plans} -f 0 1 2 -device cpu -npp 1 -nps 1 --disable_tta" in page
        )
    assert page.count("nnUNetv2_evaluate_folder") == 3
    found = f'nnUNetv2_evaluate_folder "$nnUNet_raw"/{NAME}/labelsTs "$output"/test/{NAME}-3d_fullres/stock -np 1'
    assert found in html.unescape(page)
    assert str(finished.folder) not in page
    assert "nnUNet_n_proc_DA=0" in page


def test_a_declaration_that_is_missing_or_late_is_told(finished):
    file = finished.output / "declared.json"
    content = read_json(file)
    file.write_text(json.dumps({**content, "date": "2999-01-01T00:00:00+00:00"}))
    assert "AFTER the first training had begun" in finished.report()
    file.write_text(json.dumps(content))
    page = finished.report()
    assert f"(SHA-256 {content['sha256'][:12]}), before the first training." in page
    # edited by hand
    file.write_text(json.dumps({**content, "content": {**content["content"], "band": 0.1}}))
    assert "Nothing shows that all this was declared before the first training" in finished.report()
    file.unlink()
    assert "Nothing shows that all this was declared" in finished.report()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "  - [DeformUX, stock]\n",
            "",
            "hypotheses: DeformUX - stock, DeformUX - ResEnc was declared, it is DeformUX - Res",
        ),
        ("statistics: {draws: 1000}", "statistics: {draws: 1000, band: 0.01}", "band: 0.005 was declared, it is 0.01"),
        # these three were "declared before the first training" all the same
        ("repeats: [2, 3]", "repeats: [3]", "further seeds: 2, 3 was declared, it is 3"),
        ("folds: [0, 1, 2]", "folds: [0, 1]", "folds: 0, 1, 2 was declared, it is 0, 1"),
        ("splits: 3,", "splits: 3, tolerance: 2,", "tolerance of NSD: the smallest voxel side was declared, it is 2.0"),
    ],
)
def test_what_was_changed_after_the_first_run_is_told(finished, old, new, words):
    finished.change(old, new)
    page = html.unescape(finished.report())
    assert "before the first training, and CHANGED afterwards" in page
    assert words in page


def test_other_releases_of_what_makes_trainings_are_refused(finished):
    """batchgeneratorsv2 was not even recorded; its releases 0.3.4 and 0.3.6 changed the augmentation."""
    experiment, folders = _experiment(finished)
    first, last = (list_trainings(experiment, folders)[n] for n in (0, -1))
    record = read_record(first, folders)
    assert {"batchgeneratorsv2", "batchgenerators", "timm", "scipy", "SimpleITK"} <= set(record.versions)
    write_record(first, folders, replace(record, versions={**record.versions, "batchgeneratorsv2": "0.3.3"}))
    assert finished.run() == []  # nothing is left to train
    shutil.rmtree(last.folder(folders.results))
    record_file(last, folders).unlink()
    with pytest.raises(TrainingError, match=r"mixed versions: .* was made with batchgeneratorsv2 0\.3\.3, not "):
        finished.run()
    with pytest.raises(TrainingError, match="--accept-versions"):
        finished.comparison().train(last)
    Comparison(finished.file, finished.console, Interrupts(), accept_versions=True).train(last)
    assert read_record(last, folders).finished


def test_a_refused_experiment_has_declared_nothing(trial):
    trial.change("plans: nnUNetResEncUNetMPlans", "plans: nnUNetResEncUNetXPlans")
    with pytest.raises(ExperimentError):
        trial.run()
    assert not trial.output.exists()
    trial.change("plans: nnUNetResEncUNetXPlans", "plans: nnUNetResEncUNetMPlans")
    trial.change("folds: [0, 1, 2]", "folds: [0]")
    assert trial.run() == []
    assert "before the first training." in trial.report()


def test_a_crashing_arm_is_named_and_the_others_go_on(trial, monkeypatch):
    trial.change("folds: [0, 1, 2]", "folds: [0]")
    trial.change(", arms: [stock, DeformUX]", ", arms: [DeformUX]")
    monkeypatch.setenv("FAKE_BAD", "DeformUX")
    failures = trial.run()
    assert len(failures) == 3
    assert failures[0].startswith(
        f"DeformUX, seed 1, fold 0 of {NAME} (3d_fullres): nnUNetv2_train ended with exit code 1"
    )
    assert "RuntimeError: [the] training went wrong" in trial.console.export_text()
    page = trial.report()
    assert "DeformUX is left out of all but the hypotheses" in page
    assert page.count("because no training of DeformUX succeeded. DeformUX, seed 1, fold 0: failed:") == 2
    table = trial.table()
    assert set(table["arm"]) == {"stock", "ResEnc"}

    before = len(trial.trained())
    monkeypatch.delenv("FAKE_BAD")
    assert trial.run() == []
    again = trial.trained()[before:]
    assert len(again) == 3
    assert all("DeformUX" in name for name in again)
    assert "left out" not in trial.report()


def test_a_case_left_out_by_the_validation_is_a_failure(trial, monkeypatch):
    trial.change("folds: [0, 1, 2]", "folds: [0]")
    trial.change(", arms: [stock, DeformUX]", ", arms: [DeformUX]")
    monkeypatch.setenv("FAKE_SKIP", "nnUNetTrainerDeformUX")
    failures = trial.run()
    assert len(failures) == 3
    assert "not every case of the fold was predicted" in failures[0]
    failed = _records(trial)[1]
    monkeypatch.delenv("FAKE_SKIP")
    assert trial.run() == []
    record = _records(trial)[1]
    assert (record.failed, record.started) == (None, failed.started)
    assert record.seconds > failed.seconds > 0
    assert len(record.commands) == 2
    # only the validation is repeated
    assert [c["args"][-1] for c in trial.calls() if c["name"] == "nnUNetv2_train"][-3:] == ["--val"] * 3


def _tamper(file: Path) -> None:
    content = read_json(file)
    if isinstance(content, list):
        content = [*content[1:], content[0]]
    else:
        content["changed"] = 1
    file.write_text(json.dumps(content))


def test_mixed_splits_and_plans_and_changed_results_are_refused(finished):
    preprocessed = finished.folder / "preprocessed" / NAME
    (summary,) = finished.output.glob("nnUNet_results/*/nnUNetTrainerDeformUX*_seed1_*/fold_0/validation/summary.json")
    for file, words in (
        (preprocessed / "splits_final.json", "mixed splits: stock, seed 1, fold 0 of"),
        (preprocessed / "nnUNetPlans_batch2.json", "is not a copy of nnUNetPlans with batch 2"),
        (summary, "is gone or has changed since DeformUX, seed 1, fold 0"),
    ):
        before, calls = file.read_bytes(), len(finished.calls())
        _tamper(file)
        with pytest.raises(ExperimentError, match=words):
            finished.run()
        assert len(finished.calls()) == calls
        if file != preprocessed / "nnUNetPlans_batch2.json":
            with pytest.raises(TrainingError, match=words):
                finished.report()
        else:
            with pytest.raises(TrainingError, match="mixed plans: stock"):
                finished.report()
        file.write_bytes(before)
    assert finished.run() == []


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "epochs: 3,",
            "epochs: 4,",
            10,
            "begun with 3 epochs of 5 iterations, and the experiment now says 4 epochs of 5",
        ),
        (
            "mirroring: false",
            "mirroring: true",
            11,
            "begun with predictions without mirroring, and the experiment now says",
        ),
        (
            *("DeformUX, trainer: nnUNetTrainerDeformUX}", "DeformUX, trainer: nnUNetTrainerDeformUX_opOff}"),
            *(6, "begun with nnUNetTrainerDeformUX, and the experiment now says nnUNetTrainerDeformUX_opOff"),
        ),
        (
            "batch_size: 2",
            "batch_size: 3",
            3,
            "begun with nnUNetPlans_batch2, and the experiment now says nnUNetPlans_batch3",
        ),
    ],
)
def test_settings_that_changed_after_trainings_are_told_as_such(finished, old, new, line, words):
    """These were "summary.json is gone or has changed"."""
    finished.change(old, new)
    before = finished.folds()
    with pytest.raises(ExperimentError) as caught:
        finished.run()
    (fault,) = str(caught.value).splitlines()
    assert fault.startswith(f"{finished.file}:{line}: ")
    assert words in fault
    if "batch" not in old:  # there are no such plans yet
        with pytest.raises(TrainingError, match="begun with"):
            finished.report()
    assert (finished.folds(), finished.calls()) == (before, [])


def test_another_hands_training_is_refused(finished):
    (finished.output / "records" / f"{NAME}-3d_fullres" / "stock_seed1_fold0.json").unlink()
    with pytest.raises(ExperimentError, match="fold_0 was not trained by this experiment"):
        finished.run()


def test_contradicting_scores_are_refused_by_name(finished):
    file = finished.output / "scores" / f"{NAME}-3d_fullres" / "DeformUX_seed1_fold0.parquet"
    table = pd.read_parquet(file)
    case = table["case"].iloc[0]

    def refusal(**columns) -> str:
        """What the report says when these columns of the table are others."""
        table.assign(**columns).dropna(subset=["case"]).to_parquet(file, index=False)
        with pytest.raises(CollectionError) as caught:
            finished.report()
        return str(caught.value)

    start = f"DeformUX, seed 1, fold 0 of {NAME} (3d_fullres): "
    assert refusal(case=table["case"].where(table["case"] != case)) == f"{start}no scores of ['{case}']."
    assert "Dice of front in" in refusal(Dice=np.nan)
    assert "HD95 of front in" in refusal(HD95=np.inf)
    assert f"the case '{case}' is scored twice (front)" in refusal(label="front")
    other = table["label"].replace("front", "other")
    assert "scores of the classes ['back', 'other']; the dataset has ['back', 'front']" in refusal(label=other)
    assert "scores of ['stranger']" in refusal(case=table["case"].replace(case, "stranger"))
    assert "Dice of front in" in refusal(voxels_truth=0, voxels_prediction=0)


def test_a_training_without_scores_is_told(finished):
    (finished.output / "scores" / f"{NAME}-3d_fullres" / "DeformUX_seed1_fold0.parquet").unlink()
    page = finished.report()
    why = "trained, not scored with the experiment&#39;s tolerances (compare run scores it)."
    assert f"No scores of DeformUX, seed 1, fold 0 of {NAME} (3d_fullres): {why}" in page
    # with two more seeds on that fold the arm is complete, but not as declared
    assert page.count("undecided, trainings are missing: DeformUX, seed 1, fold 0: trained, not scored") == 2


def test_where_a_training_goes_on(tmp_path):
    training = Training("Dataset001_X", "2d", "arm", "nnUNetTrainer", "nnUNetPlans", 1, 0)
    start = ["nnUNetv2_train", "Dataset001_X", "2d", "0", "-tr", "nnUNetTrainer", "-p", "nnUNetPlans", "-device", "cpu"]
    assert training.command(tmp_path, "cpu") == start
    training.folder(tmp_path).mkdir(parents=True)
    for checkpoint, last in (("latest", "--c"), ("best", "--c"), ("final", "--val")):
        (training.folder(tmp_path) / f"checkpoint_{checkpoint}.pth").touch()
        assert training.command(tmp_path, "cpu") == [*start, last]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("id: 7", "id: 8", r"has no dataset Dataset008_\*"),
        ("nnUNetResEncUNetMPlans", "myPlans", "myPlans.json does not exist; make these plans first"),
        ("batch_size: 2", "configuration: 2e", "make no configuration '2e'; they make 3d_fullres"),
        ("splits: 3", "splits: 2", "has 2 folds|there is no fold 2"),
        ("patients.csv", "nobody.csv", "cannot read .*nobody.csv"),
        ("raw: raw", "raw: nowhere", "nowhere does not exist"),
        ("folds: [0, 1, 2]", "folds: all", "fold 'all'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_command(trial, old, new, words):
    trial.change(old, new)
    with pytest.raises(ExperimentError, match=words):
        trial.run()
    assert trial.calls() == []


def test_an_existing_split_that_mixes_patients_is_refused_and_kept(trial):
    file = trial.folder / "preprocessed" / NAME / "splits_final.json"
    file.parent.mkdir(parents=True)
    cases = [f"tr_{number:02d}" for number in range(12)]
    folds = [{"train": [c for c in cases if c not in cases[i::3]], "val": cases[i::3]} for i in range(3)]
    file.write_text(json.dumps(folds))
    with pytest.raises(ExperimentError, match="in training and in validation"):
        trial.run()
    assert read_json(file) == folds
    assert trial.calls() == []


def test_cases_that_are_not_preprocessed_are_refused_after_trainings(finished):
    """nnU-Net would preprocess all of them anew."""
    case = finished.folder / "preprocessed" / NAME / "nnUNetPlans_3d_fullres" / "tr_03.pkl"
    case.unlink()
    with pytest.raises(ExperimentError, match=r"lacks cases that the dataset has, but .*fold_0 was already trained"):
        finished.run()
    assert finished.calls() == []


def test_preprocessing_that_leaves_cases_out_is_refused(trial, monkeypatch):
    monkeypatch.setenv("FAKE_SKIP", "preprocess")
    with pytest.raises(PreparationError, match=r"nnUNetv2_preprocess has left cases out of .*nnUNetPlans_3d_fullres"):
        trial.run()
    assert trial.trained() == []


def test_intervals_of_the_test_set_count_patients(finished):
    patients = finished.folder / "patients.csv"
    known = patients.read_text()
    patients.write_text(f"{known}\nts_00,p9\nts_01,p9\n")
    table = finished.table()
    assert set(table[table["set"] == "test"]["patient"]) == {"p9"}
    page = finished.report()
    # one patient gives no interval
    rows = re.findall(r"<tr><td>\w+</td><td>2</td><td>1</td><td>0\.\d+ \[(.*?), (.*?)\]</td>", page)
    assert rows == [("-", "-")] * 3
    patients.write_text(f"{known}\nts_00,p9\nts_01,p0\n")
    with pytest.raises(ExperimentError, match="patients of the test cases 'ts_01' among the training cases"):
        finished.run()
    assert finished.calls() == []


def test_a_test_set_without_labels_is_refused(trial):
    shutil.rmtree(trial.folder / "raw" / NAME / "labelsTs")
    with pytest.raises(ExperimentError, match="labelsTs does not exist; set test: false"):
        trial.run()
    assert trial.calls() == []


def test_a_failing_test_prediction_leaves_a_report(finished, monkeypatch):
    shutil.rmtree(finished.output / "test")
    monkeypatch.setenv("FAKE_BAD_TEST", "1")
    failures = finished.run()
    starts = [
        f"test set with {NAME}-3d_fullres/{arm}: nnUNetv2_predict ended" for arm in ("stock", "DeformUX", "ResEnc")
    ]
    assert [failure[: len(start)] for failure, start in zip(failures, starts, strict=True)] == starts
    assert "Declared hypotheses" in finished.report()


def test_tolerances_must_name_every_class(trial):
    trial.change("test: true", "tolerance: {front: 1.0}")
    with pytest.raises(ExperimentError, match=r"are for \['front'\]; it has the classes \['back', 'front'\]"):
        trial.run()
    assert trial.calls() == []


def test_folds_that_cannot_be_made_are_refused_before_anything_is_planned(trial):
    trial.change("splits: 3", "splits: 2")
    with pytest.raises(ExperimentError, match="has 2 folds, so there is no fold 2"):
        trial.run()
    assert trial.calls() == []
    assert not (trial.folder / "preprocessed" / NAME / "splits_final.json").exists()


def test_a_dataset_listed_by_number_and_by_name_is_refused(trial):
    trial.change("datasets:\n", "datasets:\n  - {id: Dataset007_Boxes}\n")
    with pytest.raises(ExperimentError, match="Dataset007_Boxes is listed twice"):
        trial.comparison()


def test_a_report_refuses_patients_that_were_named_after_the_training(finished):
    file = finished.folder / "patients.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *(f"{line.split(',')[0]},p0" for line in lines[1:])]))
    with pytest.raises(SplitError, match="has patient 'p0' in training and in validation"):
        finished.report()


def test_a_tolerance_of_a_class_counts(trial):
    trial.change("folds: [0, 1, 2]", "folds: [0]")
    trial.change("seeds: {first: 1, repeats: [2, 3], folds: [0], arms: [stock, DeformUX]}\n", "")
    trial.change("test: true", "tolerance: {front: 0.1, back: 50}")
    trial.run()
    table = trial.table()
    assert (table.loc[table["label"] == "back", "NSD"] == 1).all()
    assert (table.loc[table["label"] == "front", "NSD"] < 1).all()


def test_other_tolerances_and_folds_afterwards_count(trial):
    trial.change("folds: [0, 1, 2]", "folds: [0]")
    trial.change("seeds: {first: 1, repeats: [2, 3], folds: [0], arms: [stock, DeformUX]}\n", "")
    trial.run()
    trained = trial.trained()
    predicted = [call for call in trial.calls() if call["name"] == "nnUNetv2_predict"]
    assert (trial.table()["NSD"] < 1).any()

    trial.change("test: true", "test: true, tolerance: 50")
    assert "not scored with the experiment" in trial.report()
    trial.run()
    assert (trial.table()["NSD"] == 1).all()
    assert trial.trained() == trained

    trial.change("folds: [0]", "folds: [0, 1]")
    assert -1 not in set(trial.table()["fold"])
    trial.run()
    again = [call for call in trial.calls() if call["name"] == "nnUNetv2_predict"][len(predicted) :]
    assert [call["args"][call["args"].index("-f") + 1 :][:2] for call in again] == [["0", "1"]] * 3


def test_only_one_run_at_a_time(trial):
    with trial.comparison().locked(), pytest.raises(RunError, match=r"\.lock is held by a run"):
        trial.comparison().locked().__enter__()
    with trial.comparison().locked():
        pass


def _start(trial: Trial, fakes: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, fakes, trial.file], stdout=subprocess.DEVNULL, start_new_session=True
    )


def _children(trial: Trial) -> list[int]:
    """Fake commands that still run for this trial."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                environment = (process / "environ").read_bytes()
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            mine = f"nnUNet_raw={trial.folder / 'raw'}".encode() in environment
            if mine and state != "Z" and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks processes up in /proc")
def test_killed_twice_at_random_points_it_ends_as_an_undisturbed_run(trial, undisturbed, fakes, monkeypatch):
    monkeypatch.setenv("FAKE_SLOW", "0.15")
    rng = random.Random(4)
    finished: dict[str, str] = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = len(trial.trained())
        process = _start(trial, fakes)
        while len(trial.trained()) < before + 3:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.2))
        process.send_signal(number)
        process.wait(timeout=30)
        if number == signal.SIGTERM:
            assert _children(trial) == []
        else:
            # its command still runs, and keeps the lock
            with pytest.raises(RunError, match=r"\.lock is held"):
                trial.comparison().locked().__enter__()
            for pid in _children(trial):
                os.kill(pid, signal.SIGKILL)
            while _children(trial):
                time.sleep(0.05)
        done = [t for t in trial.comparison().trainings if trial.comparison().is_done(t)]
        assert done
        results = trial.output / "nnUNet_results"
        for training in done:
            for file in sorted(training.folder(results).rglob("*")):
                if file.is_file():
                    finished.setdefault(str(file), fingerprint(file))
    monkeypatch.setenv("FAKE_SLOW", "0")
    assert trial.run() == []
    assert {file: fingerprint(Path(file)) for file in finished} == finished
    pd.testing.assert_frame_equal(trial.table(), undisturbed.table())
    # no training was started twice from the beginning after it had a checkpoint: the fakes assert that themselves
    assert all(record.failed is None for record in _records(trial))


def _records(trial: Trial):
    experiment, folders = _experiment(trial)
    return [read_record(training, folders) for training in list_trainings(experiment, folders)]


def test_a_run_that_ended_between_validation_and_record_trains_nothing_again(finished):
    (file,) = finished.output.glob("records/*/DeformUX_seed1_fold0.json")
    content = read_json(file)
    file.write_text(json.dumps({**content, "finished": None, "summary": None, "checkpoint": None}))
    before = len(finished.trained())
    assert finished.run() == []
    assert len(finished.trained()) == before
    assert read_json(file)["summary"] == content["summary"]


def test_a_truncated_summary_is_validated_again(finished):
    (file,) = finished.output.glob("records/*/DeformUX_seed1_fold0.json")
    content = read_json(file)
    (summary,) = finished.output.glob("nnUNet_results/*/nnUNetTrainerDeformUX*_seed1_*/fold_0/validation/summary.json")
    whole = summary.read_bytes()
    metrics = [entry["metrics"] for entry in json.loads(whole)["metric_per_case"]]
    file.write_text(json.dumps({**content, "finished": None, "summary": None, "checkpoint": None}))
    summary.write_bytes(whole[:100])
    assert finished.run() == []
    assert finished.calls()[-1]["args"][-1] == "--val"
    assert [entry["metrics"] for entry in read_json(summary)["metric_per_case"]] == metrics


def test_progress_and_remaining_time(undisturbed):
    shown = undisturbed.console.export_text(clear=False)
    assert "13 trainings, 0 of them done." in shown
    assert re.search(r"13 of 13: DeformUX, seed 3, fold 0 of .*, \d+ s; about 0 s left", shown)


def test_remaining_time_is_by_arm_and_counts_what_is_done(trial):
    comparison = trial.comparison()
    todo = comparison.trainings[:4]
    with comparison._showing(todo) as clock:
        assert clock.remaining(0.0) == 0
        clock._known = {"stock": [10.0, 20.0], "DeformUX": [100.0]}
        # stock 15, DeformUX 100, ResEnc unknown: the mean of all three known, stock 15
        assert clock.remaining(0.0) == pytest.approx(15 + 100 + 130 / 3 + 15)
        assert clock.remaining(0.5) == pytest.approx(7.5 + 100 + 130 / 3 + 15)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (8000, "2 h 13 min")]
)
def test_times_in_words(seconds, words):
    assert format_seconds(seconds) == words
