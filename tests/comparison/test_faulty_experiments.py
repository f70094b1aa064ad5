"""Experiment files with a fault: one sentence with its line for each, and nothing is left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from trial import NAME, Trial
from typer.testing import CliRunner

from nnunet_deform import cli

# What pydantic, PyYAML and Python say by themselves.
FOREIGN = re.compile(
    r"Input should|valid (tuple|list|string|integer|number|dictionary)|after validation|Value error|pydantic|"
    r"while (scanning|parsing|constructing)|could not determine|codec can't|Traceback|NoneType|<class|Error:.*Error:"
)


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def _refusal(trial: Trial, command: str = "check", file: Path | None = None) -> list[str]:
    """The faults that a command tells, one line each."""
    before = _snapshot(trial.folder)
    result = CliRunner().invoke(cli.app, ["compare", command, str(file or trial.file)])
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert _snapshot(trial.folder) == before
    assert trial.calls() == []
    assert result.stdout == ""
    assert not FOREIGN.search(result.stderr), result.stderr
    return result.stderr.removeprefix("Error: ").splitlines()


# In the file of tests/comparison/trial.py: what is put in the place of what, and the line and words of the one fault.
FAULTS = {
    "misspelt trainer": ("nnUNetTrainerDeformUX}", "nnUNetTrainerDeformUx}", 6, "did you mean nnUNetTrainerDeformUX?"),
    "misspelt stock trainer": (
        *("DeformUX, trainer: nnUNetTrainerDeformUX}", "DeformUX, trainer: nnUNetTrainerNoMiroring}"),
        *(6, "did you mean nnUNetTrainerNoMirroring?"),
    ),
    "suffixes in another order": ("nnUNetTrainerDeformUX}", "nnUNetTrainerDeformUX_lr1e-3_AdamW}", 6, "another order"),
    "learning rate that is none": (
        "nnUNetTrainerDeformUX}",
        "nnUNetTrainerDeformUX_lrfast}",
        6,
        "not a positive number",
    ),
    "length in the name": ("nnUNetTrainerDeformUX}", "nnUNetTrainerDeformUX_5epochs}", 6, "fixes '_5epochs' by name"),
    "trainer of another family": ("nnUNetTrainerDeformUX}", "DeformUX}", 6, "'DeformUX' is not a trainer's name"),
    "misspelt key": ("mirroring:", "miroring:", 11, "miroring: is no setting here; did you mean mirroring?"),
    "unknown inner key": ("{epochs: 3,", "{hours: 3, epochs: 3,", 10, "budget.hours: is no setting here; there are"),
    "key twice": ("device: cpu", "device: cpu\ndevice: cpu", 17, "'device' is set twice."),
    "list as a key": ("device: cpu", "[a, b]: cpu", 16, "a list or mapping cannot be the name of a setting."),
    "mapping as a key": ("device: cpu", "{a: b}: cpu", 16, "a list or mapping cannot be the name of a setting."),
    "tab": ("arms:\n  - {name: stock", "arms:\n\t- {name: stock", 5, "a tab stands here; indent with spaces."),
    "control character": ("device: cpu", "device: cpu\x07", 16, "U+0007 cannot stand in YAML"),
    "escaped control character": ("device: cpu", 'device: cpu\noutput: "a\\0b"', 17, "has a control character"),
    "bracket left open": (
        "folds: [0, 1, 2]",
        "folds: [0, 1, 2",
        8,
        "a bracket is not closed, or a comma is missing in it.",
    ),
    "quote left open": ("name: trial", 'name: "trial', 1, "a quotation mark is not closed"),
    "colon in a text": ("name: trial", "name: trial: one", 1, "a ':' too many"),
    "colon missing": ("device: cpu", "device cpu", 17, "a ':' is missing, here or in the line before."),
    "wrong indentation": ("device: cpu", "device: cpu\n  raw2: x", 17, "a ':' too many, or the indentation"),
    "second document": ("device: cpu", "device: cpu\n---\na: b", 17, "'---' begins a second document"),
    "alias without an anchor": ("device: cpu", "device: *cpu", 16, "the alias 'cpu' has no anchor before it."),
    "alias of itself": ("folds: [0, 1, 2]", "folds: &all [0, *all]", 8, "an alias stands inside of what it stands for"),
    "merge of a number": ("budget: {epochs: 3,", "budget: {<<: 3, epochs: 3,", 10, "'<<' takes a mapping"),
    "tag": ("device: cpu", "device: !!python/name:os.system cpu", 16, "is a tag, which no setting has; delete it."),
    "set": ("folds: [0, 1, 2]", "folds: !!set {0, 1, 2}", 8, "is a tag, which no setting has; delete it."),
    "no dataset": ("id: 7", "id: 8", 3, "has no dataset Dataset008_*"),
    "number out of range": ("id: 7", "id: 12345678", 3, "12345678 is neither a dataset's number, from 1 to 999"),
    "yes as a number": ("id: 7", "id: yes", 3, "True is neither a dataset's number"),
    "unknown configuration": ("batch_size: 2", "configuration: 3d_fulres", 3, "make no configuration '3d_fulres'"),
    "unknown plans": ("nnUNetResEncUNetMPlans", "nnUNetPlanz", 7, "nnUNetPlanz.json does not exist; make these plans"),
    "class without a name": ("test: true", "tolerance: {front: 1, rear: 1}", 3, "it has the classes ['back', 'front']"),
    "misspelt test": ("test: true", "test: training", 3, "datasets[0].test: 'training' is none of false, true"),
    "number as test": ("test: true", "test: 3", 3, "datasets[0].test: 3 is none of false, true"),
    "list as test": ("test: true", "test: [trainings]", 3, "datasets[0].test: this is none of false, true"),
    "tolerance below zero": ("test: true", "tolerance: -1", 3, "-1 is no tolerance; give millimetres"),
    "tolerance of words": (
        "test: true",
        "tolerance: {front: wide, back: 1}",
        3,
        "tolerance.front: 'wide' is no tolerance",
    ),
    "patients file missing": ("patients.csv", "nobody.csv", 3, "cannot read"),
    "patients are a number": ("patients.csv", "7", 3, "patients: 7 is a number in YAML; put it into quotes"),
    "fewer folds than asked": ("splits: 3", "splits: 2", 3, "has 2 folds, so there is no fold 2"),
    "more folds than patients": ("splits: 3", "splits: 9", 3, "6 patients cannot be split into 9 folds."),
    "fold all": ("folds: [0, 1, 2]", "folds: all", 8, "fold 'all' trains on every case"),
    "fold below zero": ("folds: [0, 1, 2]", "folds: [0, -1]", 8, "folds[1]: -1 must be at least 0."),
    "fold and a half": ("folds: [0, 1, 2]", "folds: [0, 1.5]", 8, "folds[1]: 1.5 is not a whole number"),
    "folds are a mapping": ("folds: [0, 1, 2]", "folds: {0: 1}", 8, "folds: a mapping is not a list"),
    "folds without a value": ("folds: [0, 1, 2]", "folds:", 8, "folds: has no value; give it one, or delete the line."),
    "fold twice": ("folds: [0, 1, 2]", "folds: [0, 1, 2, 1]", 8, "names a fold twice."),
    "seed below zero": ("{first: 1,", "{first: -1,", 9, "seeds.first: -1 must be at least 0."),
    "seed too large": ("{first: 1,", "{first: 99999999999999999999,", 9, "is no number that any setting can have."),
    "seed as a text": ("{first: 1,", "{first: '1',", 9, "seeds.first: '1' is not a whole number"),
    "seeds alike": ("repeats: [2, 3]", "repeats: [2, 1]", 9, "the seeds [1, 2, 1] are not all different."),
    "repeated fold that is none": ("folds: [0], arms", "folds: [5], arms", 9, "fold 5 is not among the folds"),
    "true as a number": ("{epochs: 3,", "{epochs: true,", 10, "budget.epochs: true is not a whole number"),
    "no epochs": ("{epochs: 3,", "{epochs: 0,", 10, "budget.epochs: 0 must be at least 1."),
    "too many epochs": ("{epochs: 3,", "{epochs: 1_000_000_000,", 10, "must be at most 1e+06."),
    "number as a flag": ("mirroring: false", "mirroring: 0", 11, "mirroring: 0 is not true or false"),
    "alpha that is not a number": (
        "{draws: 1000}",
        "{alpha: .nan}",
        15,
        ".nan' is no number that any setting can have.",
    ),
    "alpha without an end": ("{draws: 1000}", "{alpha: .inf}", 15, ".inf' is no number that any setting can have."),
    "alpha too large": ("{draws: 1000}", "{alpha: 5}", 15, "statistics.alpha: 5 must be below 0.5."),
    "hypothesis of an unknown arm": ("[DeformUX, stock]", "[DeformUX, stack]", 13, "there is no arm 'stack'"),
    "arm against itself": ("[DeformUX, stock]", "[stock, stock]", 13, "'stock' is compared with itself."),
    "hypothesis of three": ("[DeformUX, stock]", "[DeformUX, stock, ResEnc]", 13, "a hypothesis is a pair of arms"),
    "hypothesis that is a word": ("[DeformUX, stock]", "DeformUX", 13, "a hypothesis is a pair of arms"),
    "hypothesis twice": ("[DeformUX, ResEnc]", "[stock, DeformUX]", 14, "a pair is declared twice."),
    "two arms alike": ("{name: ResEnc,", "{name: stock,", 7, "two arms are named 'stock'."),
    "arm named no": (
        "{name: ResEnc,",
        "{name: no,",
        7,
        "arms[2].name: no is true or false in YAML; put it into quotes",
    ),
    "arm with a slash": ("{name: ResEnc,", "{name: a/b,", 7, "'a/b' is no name"),
    "unknown metric": (
        "mirroring: false",
        "primary: dice",
        11,
        "there is no metric 'dice'; choose one of Dice, NSD, HD95",
    ),
    "best checkpoint": ("mirroring: false", "checkpoint: checkpoint_best", 11, "chosen by the very cases it is scored"),
    "unknown device": ("device: cpu", "device: gpu", 16, "'gpu' is none of cuda, cpu, mps."),
    "device that is missing": ("device: cpu", "device: mps", 16, "this machine has no mps device"),
    "no raw folder": ("raw: raw", "raw: nowhere", 18, "nowhere does not exist."),
    "output is a file": ("raw: raw", "output: patients.csv\nraw: raw", 18, "patients.csv is a file, and no folder."),
    "home of nobody": ("raw: raw", "raw: ~nobody-at-all/raw", 18, "the home of a user that there is not."),
    "nested too deeply": ("folds: [0, 1, 2]", "folds: " + "[" * 3000, 1, "nested too deeply"),
}


@pytest.mark.parametrize(("old", "new", "line", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_sentence_with_its_line(trial, old, new, line, words):
    trial.change(old, new)
    (fault,) = _refusal(trial)
    assert fault.startswith(f"{trial.file}:{line}: "), fault
    assert words in fault
    assert fault.endswith((".", "?")) or "see the table" in fault


def _write_splits(trial: Trial, content: object) -> None:
    file = trial.folder / "preprocessed" / NAME / "splits_final.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


CASES = [f"tr_{number:02d}" for number in range(12)]
MIXED = [{"train": [c for c in CASES if c not in CASES[i::3]], "val": CASES[i::3]} for i in range(3)]


@pytest.mark.parametrize(
    ("break_something", "line", "words"),
    [
        (lambda t: t.file.write_bytes(t.file.read_bytes() + "# é\n".encode("latin-1")), 20, "this is no UTF-8; save"),
        (lambda t: t.file.write_text(""), 1, "an experiment is a mapping with name, datasets, arms"),
        (lambda t: t.file.write_text("- a\n"), 1, "an experiment is a mapping with name, datasets, arms"),
        (lambda t: t.file.write_text("&a [" + "*a, " * 3 + "]"), 1, "an alias stands inside"),
        (lambda t: (t.folder / "patients.csv").write_text("case,patient\ntr_00,p0\n"), 3, "gives no patient for"),
        (
            lambda t: (t.folder / "patients.csv").write_text("id;who\ntr_00;p0\n"),
            3,
            "needs a first line 'case,patient'",
        ),
        (lambda t: (t.folder / "patients.csv").write_bytes(b"case,patient\ntr_00,p\xe9\n"), 3, "is no UTF-8; save"),
        (lambda t: (t.folder / "raw" / NAME / "dataset.json").write_text("{"), 3, "dataset.json is damaged"),
        (lambda t: (t.folder / "raw" / NAME / "dataset.json").unlink(), 3, "has no dataset.json"),
        (lambda t: _write_splits(t, MIXED), 3, "in training and in validation"),
        (lambda t: _write_splits(t, [{"train": ["other"], "val": ["tr_00"]}] * 3), 3, "names 'other'"),
        (lambda t: _write_splits(t, {"train": []}), 3, "is no list of folds with train and val"),
        (lambda t: _write_splits(t, [{"train": CASES, "val": []}] * 3), 3, "has no cases to validate on."),
    ],
)
def test_files_that_do_not_fit_are_one_sentence_too(trial, break_something: Callable[[Trial], object], line, words):
    break_something(trial)
    (fault,) = _refusal(trial)
    assert fault.startswith(f"{trial.file}:{line}: "), fault
    assert words in fault


def test_aliases_that_multiply_are_refused_quickly(trial):
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    trial.file.write_text(f"a0: &a0 [{', '.join('x' * 10)}]\n{levels}\n")
    (fault,) = _refusal(trial)
    assert "aliases multiply to more than 100,000 values." in fault


def test_a_folder_or_nothing_in_the_place_of_the_file(trial):
    assert "it is a folder" in _refusal(trial, file=trial.folder)[0]
    assert "(No such file or directory)" in _refusal(trial, file=trial.folder / "none.yaml")[0]


def test_every_fault_has_its_line_and_none_causes_another(trial):
    trial.change("nnUNetTrainerDeformUX}", "nnUNetTrainerDeformUx}")
    trial.change("patients.csv", "nobody.csv")
    trial.change("nnUNetResEncUNetMPlans", "nnUNetPlanz")
    faults = _refusal(trial)
    assert [fault.split(":")[1] for fault in faults] == ["6", "7", "3"]
    trial.change("{epochs: 3,", "{epochs: many,")
    trial.change("[DeformUX, stock]", "[DeformUX]")
    assert [fault.split(":")[1] for fault in _refusal(trial)] == ["10", "13"]


@pytest.mark.parametrize("command", ["run", "prepare", "workflow"])
def test_all_that_would_write_check_first(trial, command):
    trial.change("nnUNetTrainerDeformUX}", "nnUNetTrainerDeformUx}")
    (fault,) = _refusal(trial, command)
    assert fault.startswith(f"{trial.file}:6: arms[1].trainer: nnUNetTrainerDeformUx is neither")


def test_a_training_before_the_preparation_is_refused(trial):
    before = _snapshot(trial.folder)
    result = CliRunner().invoke(cli.app, ["compare", "train", str(trial.file), "--job", "0"])
    assert result.exit_code == 1
    assert "there are no folds of Dataset007_Boxes yet; run compare prepare" in result.stderr
    assert _snapshot(trial.folder) == before


def test_anchors_merges_and_marks_that_are_right_are_read(trial):
    trial.change("  - {name: stock,", "  - &one {name: stock,")
    trial.change("{name: ResEnc, trainer: nnUNetTrainer_AdamW,", "{<<: *one, name: ResEnc,")
    trial.change("{draws: 1000}", "{draws: 1000, band: 1e-3}")
    trial.file.write_text("\ufeff" + trial.file.read_text(), encoding="utf-8")
    experiment = trial.comparison().experiment
    assert experiment.arm("ResEnc").trainer == "nnUNetTrainer_AdamW"
    assert experiment.statistics.band == 0.001
