"""Results trained elsewhere, from model folders that look like nnU-Net's."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from model_folders import CASES, FOLDS, NAME, Nnunet, everything_in, predict, truth_of, write_image
from typer.testing import CliRunner

from nnunet_deform import cli
from nnunet_deform.comparison.results import find_results
from nnunet_deform.comparison.verdicts import REQUIRED_TRAINING_FREEDOM
from nnunet_deform.networks.observation import EPOCHS_FILE, write_epoch

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Nnunet:
    nnunet = Nnunet(tmp_path_factory.mktemp("made"))
    nnunet.train("nnUNetTrainer", 0.4)
    nnunet.train("nnUNetTrainerNoMirroring", 0.1, epochs=3, seed=1)
    return nnunet


@pytest.fixture
def nnunet(made, tmp_path, monkeypatch) -> Nnunet:
    """A copy that a test may change, with nnU-Net's variables pointing to it."""
    shutil.copytree(made.base, tmp_path / "nnunet")
    copy = object.__new__(Nnunet)
    copy.base = tmp_path / "nnunet"
    copy.raw, copy.results = copy.base / "raw" / NAME, copy.base / "results" / NAME
    for variable, folder in copy.environment().items():
        monkeypatch.setenv(variable, folder)
    monkeypatch.setenv("COLUMNS", "300")
    return copy


@pytest.fixture
def models(nnunet) -> list[Path]:
    trainers = ("nnUNetTrainer", "nnUNetTrainerNoMirroring")
    return [nnunet.results / f"{trainer}__nnUNetPlans__3d_fullres" for trainer in trainers]


def _invoke(*arguments):
    return CliRunner().invoke(cli.app, ["compare", "results", *map(str, arguments), "-np", "1"])


def _refusal(tmp_path: Path, *arguments) -> str:
    """The one sentence; nothing may be left."""
    before = everything_in(tmp_path)
    result = _invoke(*arguments, "-o", tmp_path / "report")
    assert result.exit_code == 1, result.output
    assert everything_in(tmp_path) == before
    words = re.sub(r"\s+", " ", result.stderr).strip()
    assert words.startswith("Error: ")
    assert words.endswith(".")
    return words


def test_two_model_folders(nnunet, models, tmp_path):
    result = _invoke(*models, "-o", tmp_path / "report")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "report"
    cases = pd.read_csv(folder / "cases.csv")
    assert len(cases) == 2 * len(CASES) * 2
    assert set(cases["fold"]) == {0, 1}
    # Dice is nnU-Net's own, to the bit
    for arm, model in zip(("nnUNetTrainer", "nnUNetTrainerNoMirroring"), models, strict=True):
        for fold in FOLDS:
            summary = json.loads((model / f"fold_{fold}" / "validation" / "summary.json").read_text())
            for entry in summary["metric_per_case"]:
                case = Path(entry["prediction_file"]).name.removesuffix(".nii.gz")
                mine = cases[(cases["arm"] == arm) & (cases["case"] == case)].set_index("label")["Dice"]
                assert mine["front"] == entry["metrics"]["1"]["Dice"]
                assert mine["back"] == entry["metrics"]["2"]["Dice"]
    (row,) = pd.read_csv(folder / "hypotheses.csv").to_dict("records")
    assert (row["first"], row["second"]) == ("nnUNetTrainerNoMirroring", "nnUNetTrainer")
    assert (row["verdict"], row["reason"]) == ("undecided", "too few")
    means = cases.groupby("arm")["Dice"].mean()
    assert row["mean difference"] == pytest.approx(means["nnUNetTrainerNoMirroring"] - means["nnUNetTrainer"])
    assert row["mean difference"] > 0.1
    page = (folder / "report.html").read_text()
    assert "one training each" in page
    assert "Nothing shows that what is compared was chosen before its results were seen" in page
    assert "epochs of the trainings differ (nnUNetTrainer 2, nnUNetTrainerNoMirroring 3)" in page
    assert "is not that of nnU-Net" not in page
    assert "torch 2.15.0; cpu" in page
    # the worst and the median case with both arms, the worst of each, and where they differ most, both ways
    assert page.count("data:image/png") == 2 * 2 + 2 + 2 * 2
    assert not (nnunet.base / "preprocessed").exists()


def test_a_model_may_be_given_by_name_and_needs_no_variables_with_labels(nnunet, models, tmp_path, monkeypatch):
    names = [model.name for model in models]
    assert "there is no folder nnUNetTrainer__" in _refusal(tmp_path, *names)
    (by_name,) = {find_results([Path(name) for name in names], dataset=d).labels for d in ("7", NAME)}
    assert by_name == nnunet.raw / "labelsTr"
    # what nnU-Net itself evaluates on comes first
    truths = nnunet.base / "preprocessed" / NAME / "gt_segmentations"
    shutil.copytree(nnunet.raw / "labelsTr", truths)
    assert find_results(models).labels == truths
    for variable in nnunet.environment():
        monkeypatch.delenv(variable)
    assert "there are no labels of Dataset007_Boxes" in _refusal(tmp_path, *models)
    results = find_results(models, labels=truths)
    assert results.labels == truths
    assert results.tolerances == {"front": 0.8, "back": 0.8}


def test_seeds_by_name_are_trainings_of_one_arm(nnunet, tmp_path):
    folders = [
        nnunet.train(f"nnUNetTrainerX{network}_seed{seed}", missed, seed=seed)
        for network, missed in (("", 0.3), ("_opOff", 0.2))
        for seed in (1, 2, 3)
    ]
    for folder in folders:
        write_epoch(folder / "fold_0" / EPOCHS_FILE, 0, {"offset_mean_level1": 0.05})
    results = find_results(folders)
    assert results.design.arms == ("nnUNetTrainerX", "nnUNetTrainerX_opOff")
    assert results.design.seeds == (1, 2, 3)
    assert results.design.starts_alike(*results.design.arms)
    result = _invoke(*folders, "-o", tmp_path / "report")
    assert result.exit_code == 0, result.output
    (row,) = pd.read_csv(tmp_path / "report" / "hypotheses.csv").to_dict("records")
    assert row["of trainings"] == 4 < REQUIRED_TRAINING_FREEDOM
    assert bool(row["paired starts"])
    assert "one training each" not in row["sentence"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Caution: nnUNetTrainerX&#39;s operator does not act, mean |offset|" in page
    assert "in 3 of 3 trainings" in page
    # stock trainers start anywhere
    stock = [nnunet.results / f"{t}__nnUNetPlans__3d_fullres" for t in ("nnUNetTrainer", "nnUNetTrainerNoMirroring")]
    assert not find_results([*stock, *folders]).design.paired_starts - results.design.paired_starts
    # one name for several folders does the same
    named = find_results(folders, names=["a"] * 3 + ["b"] * 3).design
    assert (named.arms, named.seeds, named.hypotheses) == (("a", "b"), (1, 2, 3), (("b", "a"),))


def test_only_the_folds_that_every_arm_has(nnunet, models, tmp_path):
    shutil.rmtree(models[1] / "fold_1")
    results = find_results(models)
    assert results.design.folds == (0,)
    assert results.cautions == ("Left out, because not every arm has it: fold 1 of nnUNetTrainer.",)
    # an unfinished fold is chosen away
    (models[0] / "fold_0" / "validation" / "summary.json").unlink()
    assert "is not validated to its end" in _refusal(tmp_path, *models)
    other = nnunet.train("nnUNetTrainerDA5", 0.2)
    assert find_results([models[0], other], folds=[1]).design.folds == (1,)
    assert "has no fold_1; its folds are 0." in _refusal(tmp_path, models[1], other, "-f", 1)


def test_arms_are_named_by_what_tells_them_apart(nnunet, models):
    other = nnunet.train("nnUNetTrainer", 0.2, plans="nnUNetResEncUNetMPlans")
    assert find_results([models[0], other]).design.arms == (
        "nnUNetTrainer-nnUNetPlans",
        "nnUNetTrainer-nnUNetResEncUNetMPlans",
    )


def test_predictions_with_labels(nnunet, tmp_path):
    for name, missed in (("ours", 0.1), ("theirs", 0.3)):
        for case in CASES:
            write_image(tmp_path / name / f"{case}.nii.gz", predict(case, missed, 5))
    folders, labels = [tmp_path / "theirs", tmp_path / "ours"], ["--labels", nnunet.raw / "labelsTr"]
    result = _invoke(*folders, *labels, "--tolerance", "front=1", "--tolerance", "back=2", "-o", tmp_path / "report")
    assert result.exit_code == 0, result.output
    (row,) = pd.read_csv(tmp_path / "report" / "hypotheses.csv").to_dict("records")
    assert (row["first"], row["second"], row["dataset"]) == ("ours", "theirs", NAME)
    assert (row["verdict"], row["cases"]) == ("undecided", len(CASES))
    assert row["mean difference"] > 0.05
    assert "is of Dataset007_Boxes" not in result.output
    shutil.rmtree(tmp_path / "report")
    # patients are counted where they are known
    (tmp_path / "patients.csv").write_text(
        "\n".join(["case,patient", *(f"{c},p{i // 2}" for i, c in enumerate(CASES))])
    )
    results = find_results(folders, labels=nnunet.raw / "labelsTr", patients=tmp_path / "patients.csv")
    assert len(set(results.patients.values())) == 4
    assert results.tolerances == pytest.approx({"front": 0.8, "back": 0.8})  # of the labels' spacing
    (tmp_path / "ours" / "case_03.nii.gz").unlink()
    words = _refusal(tmp_path, *folders, *labels)
    assert "theirs and ours have other cases: ours lacks case_03." in words


def test_labels_that_have_changed_are_told(nnunet, models, tmp_path):
    truth = truth_of("case_02")
    truth[2, 6, 4] = 0
    write_image(nnunet.raw / "labelsTr" / "case_02.nii.gz", truth)
    result = _invoke(*models, "-o", tmp_path / "report")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("Dice of 1 cases, case_02 among them, is not that of nnU-Net&#39;s summary.json") == 2


def _drop_case(nnunet, models):
    (models[1] / "fold_0" / "validation" / "case_04.nii.gz").unlink()
    nnunet.summarise(models[1] / "fold_0" / "validation")


def _change(file: Path, **content) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def _write(models, array, **options) -> None:
    write_image(models[1] / "fold_1" / "validation" / "case_03.nii.gz", array, **options)


FAULTS = {
    "a case is missing": (_drop_case, "in fold 0: nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres lacks case_04."),
    "a prediction was deleted": (
        lambda _, models: (models[0] / "fold_0" / "validation" / "case_00.nii.gz").unlink(),
        "no longer has the predictions of case_00.",
    ),
    "another dataset": (
        lambda _, models: _change(models[1] / "plans.json", dataset_name="Dataset008_Balls"),
        "is of Dataset007_Boxes and",
    ),
    "other classes": (
        lambda _, models: _change(models[1] / "dataset.json", labels={"background": 0, "front": 2, "back": 1}),
        "has another classes than that of",
    ),
    "no dataset.json": (lambda _, models: (models[1] / "dataset.json").unlink(), "has no dataset.json"),
    "a broken dataset.json": (
        lambda _, models: (models[1] / "dataset.json").write_text("{"),
        "is no dataset.json of nnU-Net (JSONDecodeError",
    ),
    "no folds": (
        lambda _, models: [shutil.rmtree(models[1] / f"fold_{fold}") for fold in FOLDS],
        "is not a model folder of nnU-Net: it has no fold_0",
    ),
    "no common fold": (
        lambda _, models: [shutil.rmtree(models[fold] / f"fold_{fold}") for fold in FOLDS],
        "there is no fold that every arm has: nnUNetTrainer has 1; nnUNetTrainerNoMirroring has 0.",
    ),
    "only fold_all": (
        lambda _, models: [
            (models[1] / "fold_0").rename(models[1] / "fold_all"),
            shutil.rmtree(models[1] / "fold_1"),
        ],
        "has only fold_all",
    ),
    "no validation": (
        lambda _, models: shutil.rmtree(models[1] / "fold_1" / "validation"),
        "is not validated to its end",
    ),
    "a broken summary": (
        lambda _, models: (models[1] / "fold_1" / "validation" / "summary.json").write_text("[]"),
        "is no summary of nnU-Net",
    ),
    "two folds with a case": (
        lambda _, models: shutil.copytree(models[1] / "fold_1", models[1] / "fold_2"),
        "validates case_01 in fold 1 and in fold 2.",
    ),
    "no such label": (
        lambda _, models: _write(models, truth_of("case_03") * 3),
        "has the value 3, which is not a label; those of dataset.json are 0, 1, 2.",
    ),
    "another size": (
        lambda _, models: _write(models, truth_of("case_03")[:, :, 1:]),
        "has 6 x 12 x 13 voxels and",
    ),
    "another spacing": (
        lambda _, models: _write(models, truth_of("case_03"), spacing=(1.0, 1.0, 1.0)),
        "has voxels of 1 x 1 x 1 mm and",
    ),
    "no image": (
        lambda _, models: (models[1] / "fold_1" / "validation" / "case_03.nii.gz").write_text("no image"),
        "which is no image or a damaged one.",
    ),
    "no label file": (
        lambda nnunet, _: (nnunet.raw / "labelsTr" / "case_05.nii.gz").unlink(),
        "has no labels of case_05, of which there are predictions.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_left(nnunet, models, tmp_path, fault):
    spoil, words = FAULTS[fault]
    spoil(nnunet, models)
    assert words in _refusal(tmp_path, *models)


ARGUMENTS = [
    (["--name", "one"], "1 times --name for 2 folders"),
    (["--name", "one", "--name", "one"], "all folders are trainings of one arm, one;"),
    (["-f", "7"], "has no fold_7; its folds are 0, 1."),
    (["-d", "8"], "no dataset Dataset008_*."),
    (["--primary", "IoU"], "there is no metric IoU; choose one of Dice, NSD, HD95."),
    (["--band", "-1"], "the band -1 is not a positive number."),
    (["--tolerance", "front=1"], "is neither one number of mm nor front=MM back=MM."),
    (["--tolerance", "0"], "is neither one number of mm nor"),
    (["--labels", "nowhere"], "there is no folder nowhere."),
    (["--patients", "nobody.csv"], "cannot read nobody.csv"),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS, ids=[" ".join(a) for a, _ in ARGUMENTS])
def test_options_that_do_not_fit(nnunet, models, tmp_path, arguments, words):
    assert words in _refusal(tmp_path, *models, *arguments)


def test_folders_that_do_not_fit(nnunet, models, tmp_path):
    assert "give two folders or more" in _refusal(tmp_path, models[0])
    assert "is given twice." in _refusal(tmp_path, models[0], models[0])
    (models[1]).rename(nnunet.results / "renamed")
    assert "is not named <trainer>__<plans>__<configuration>" in _refusal(
        tmp_path, models[0], nnunet.results / "renamed"
    )
    predictions = models[0] / "fold_0" / "validation"
    words = _refusal(tmp_path, models[0], predictions, "--labels", nnunet.raw / "labelsTr")
    assert "give only one kind." in words


def test_an_existing_folder_is_not_touched(models, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    assert "exists; give another folder with -o." in _refusal(tmp_path, *models)
    assert (tmp_path / "report" / "mine.txt").read_text() == "mine"


def test_a_report_that_fails_leaves_nothing(models, tmp_path, monkeypatch):
    from nnunet_deform.comparison.report import build

    def full(folder, content, parts):
        (folder / "deep").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_tables", full)
    assert "interrupted; nothing was written." in _refusal(tmp_path, *models)
