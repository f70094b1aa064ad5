"""Archives of whole runs with stand-ins for nnU-Net's commands: what they keep, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
from trial import NAME, Trial

from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.archive import ArchiveError, read_archive, write_archive
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
from nnunet_deform.comparison.files import read_json
from nnunet_deform.comparison.findings import Findings, gather
from nnunet_deform.comparison.report import build_archive_report, build_report
from nnunet_deform.comparison.run import Comparison
from nnunet_deform.comparison.trainings import TrainingError
from nnunet_deform.processes.commands import Interrupts

pytestmark = pytest.mark.usefixtures("use_fakes", "undrawn")


@pytest.fixture
def archive(undisturbed, tmp_path):
    folder = tmp_path / "archive"
    write_archive(findings_of(undisturbed), folder)
    return folder


def findings_of(trial: Trial) -> Findings:
    source = load_experiment(trial.file)
    return gather(source, find_folders(source))


def run_with(trial: Trial, archive) -> list[str]:
    return Comparison(trial.file, trial.console, Interrupts(), archive=archive).run()


def test_what_was_found_comes_back_to_the_bit(undisturbed, archive):
    here, back = findings_of(undisturbed), read_archive(archive)
    pd.testing.assert_frame_equal(back.collected.cases, here.collected.cases, check_exact=True)
    tests = [found.collected.test.sort_values(["arm", "case", "label"], ignore_index=True) for found in (here, back)]
    pd.testing.assert_frame_equal(*tests, check_exact=True)
    assert len(here.collected.test) == 3 * 2 * 2
    assert back.collected.missing == here.collected.missing == {}
    assert (back.trainings, back.records, back.costs) == (here.trainings, here.records, here.costs)
    assert (back.facts, back.declared, back.declaration) == (here.facts, here.declared, here.declaration)
    assert (back.source, back.test_commands, back.histories) == (here.source, here.test_commands, here.histories)
    design = design_of(here.experiment)
    # as text, because what is not known is not equal to itself
    verdicts = [repr(analyse(design, found.collected.cases, {}).hypotheses) for found in (here, back)]
    assert verdicts[0] == verdicts[1]


def test_the_report_of_an_archive_says_the_same_without_pictures(undisturbed, archive, tmp_path):
    page = build_archive_report(archive, tmp_path / "report").read_text()
    original = build_report(undisturbed.file).read_text()

    def tables(text: str) -> list[str]:
        return re.findall(r"<table>.*?</table>", text, re.DOTALL)

    assert "data:image/png" in original
    assert "data:image/png" not in page
    assert len(tables(page)) > 5
    assert set(tables(page)) <= set(tables(original))
    (tables_of_scores,) = (tmp_path / "report").glob("cases.csv")
    assert len(pd.read_csv(tables_of_scores)) == 13 * 4 * 2 + 3 * 2 * 2


def test_files_are_small_and_name_no_folder_of_this_machine(undisturbed, archive):
    texts = {file: file.read_text() for file in archive.rglob("*") if file.is_file()}
    assert all(len(text) < 20_000 for text in texts.values())
    assert not [file for file, text in texts.items() if str(undisturbed.folder) in text]


def test_another_machine_goes_on_from_what_is_archived(undisturbed, tmp_path, monkeypatch):
    first, second, archive = Trial(tmp_path / "first"), Trial(tmp_path / "second"), tmp_path / "archive"
    for trial in (first, second):
        trial.write()
        trial.change("test: true", "test: trainings")
    monkeypatch.setenv("FAKE_BAD", "DeformUX")
    assert len(run_with(first, archive)) == 5
    folder = archive / "trainings" / f"{NAME}-3d_fullres"
    assert len(list(folder.glob("*_fold?.csv"))) == len(list(folder.glob("*_test.csv"))) == 8
    failed = read_json(folder / "DeformUX_seed1_fold0.json")["record"]["failed"]
    assert "nnUNetv2_train" in failed
    here = findings_of(first)
    assert read_archive(archive).collected.missing[here.trainings[1]] == f"failed: {failed}"
    before = len(first.trained())
    shutil.rmtree(first.output)

    monkeypatch.setenv("FAKE_BAD", "no trainer")
    assert run_with(second, archive) == []
    trained = second.trained()[before:]
    assert len(trained) == 5
    assert all("DeformUX" in call for call in trained)
    predicted = [call["args"] for call in second.calls() if call["name"] == "nnUNetv2_predict"]
    assert len(predicted) == 13
    assert [args[args.index("-f") + 1 : args.index("-device")] for args in predicted[:4]] == [
        ["0"],
        ["0"],
        ["1"],
        ["1"],
    ]
    found = read_archive(archive)
    assert found.collected.missing == {}
    pd.testing.assert_frame_equal(found.collected.cases, findings_of(undisturbed).collected.cases, check_exact=True)
    assert found.declared[0] == here.declared[0]  # once, before the first training

    # An arm of five trainings has five predictions of each of the two cases, whatever fold they are of.
    test = found.collected.test
    predictions = test.groupby(["arm", "seed", "fold"]).size()
    assert (predictions == 2 * 2).all()
    assert set(predictions.index) == {(t.arm, t.seed, t.fold) for t in found.trainings}
    page = build_archive_report(archive, tmp_path / "report").read_text()
    assert "predicted by each training" in page
    mean = test[test["arm"] == "stock"].groupby(["seed", "fold"])["Dice"].mean().mean()
    assert f"<td>stock</td><td>2</td><td>2</td><td>{mean:.4f}" in page
    calls = second.calls()
    assert run_with(second, archive) == []
    assert second.calls() == calls


def test_what_is_archived_is_of_the_same_settings_folds_and_plans(undisturbed, archive, tmp_path):
    other = Trial(tmp_path / "other")
    other.write()
    other.change("epochs: 3", "epochs: 4")
    with pytest.raises(TrainingError, match="was begun with 3 epochs of 5 iterations, and the experiment now says 4"):
        run_with(other, archive)


def test_another_result_of_a_training_is_refused(undisturbed, archive):
    here = findings_of(undisturbed)
    training = here.trainings[0]
    file = archive / "trainings" / f"{training.key}.json"
    content = read_json(file)
    content["record"]["summary"] = "0" * 64
    file.write_text(json.dumps(content))
    before = {f: f.read_bytes() for f in archive.rglob("*") if f.is_file()}
    with pytest.raises(ArchiveError, match=r"another result of stock, seed 1, fold 0 of Dataset007_Boxes"):
        write_archive(here, archive)
    assert {f: f.read_bytes() for f in archive.rglob("*") if f.is_file()} == before


def test_an_archive_takes_no_other_experiment(undisturbed, archive, tmp_path):
    content = read_json(archive / "archive.json")
    (archive / "archive.json").write_text(json.dumps({**content, "name": "another"}))
    with pytest.raises(ArchiveError, match="is an archive of the experiment 'another', not of 'trial'"):
        write_archive(findings_of(undisturbed), archive)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(ArchiveError, match="is neither empty nor an archive"):
        write_archive(findings_of(undisturbed), full)
    assert [file.name for file in full.iterdir()] == ["notes.txt"]


def _drop_a_case(archive):
    file = archive / "trainings" / f"{NAME}-3d_fullres" / "stock_seed1_fold0.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:1] + lines[3:]))


def _other_record(archive, key, value):
    file = archive / "trainings" / f"{NAME}-3d_fullres" / "ResEnc_seed1_fold1.json"
    content = read_json(file)
    content["record"][key] = value
    file.write_text(json.dumps(content))


def _edit(name, old, new):
    def edit(archive):
        file = archive / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return edit


FAULTS = {
    "no archive": (shutil.rmtree, r"is no archive of an experiment: there is no archive\.json"),
    "format": (
        _edit("archive.json", '"format": 1', '"format": 7'),
        r"archive\.json has format 7; this version reads 1",
    ),
    "no JSON": (_edit("archive.json", "{", "["), r"archive\.json is damaged: it is not JSON"),
    "a case is gone": (
        _drop_a_case,
        r"stock, seed 1, fold 0 of Dataset007_Boxes \(3d_fullres\): no scores of \['tr_\d\d'\]",
    ),
    "other folds": (lambda a: _other_record(a, "splits", "0" * 64), "were trained with different folds"),
    "other plans": (lambda a: _other_record(a, "plans", "0" * 64), "were trained with different plans"),
    "no number": (_edit(f"test/{NAME}-3d_fullres/stock.csv", "Dice", "Dize"), "lacks the columns Dice"),
    "a cost": (_edit(f"costs/{NAME}-3d_fullres/stock.json", "macs", "max"), "is not JSON with the figures of a cost"),
    "another dataset": (_edit("archive.json", NAME, "Dataset008_Balls"), "its datasets are not those of experiment"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_one_sentence(archive, fault):
    damage, words = FAULTS[fault]
    damage(archive)
    with pytest.raises(ArchiveError, match=words):
        read_archive(archive)
