import json

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_deform.comparison.splits import SplitError, check_splits, ensure_splits, load_patients, make_splits

CASES = [f"hip_{n:03d}" for n in range(1, 41)]
PATIENTS = {case: str((int(case[-3:]) + 1) // 2) for case in CASES}


def test_without_patients_the_folds_are_nnunets():
    assert make_splits(CASES, None, 5) == [
        {side: [str(case) for case in cases] for side, cases in fold.items()}
        for fold in generate_crossval_split(CASES, seed=12345, n_splits=5)
    ]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_patients_stay_together(folds):
    splits = make_splits(CASES, PATIENTS, folds)
    assert len(splits) == folds
    assert sorted(case for fold in splits for case in fold["val"]) == CASES
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == CASES
        assert not {PATIENTS[c] for c in fold["train"]} & {PATIENTS[c] for c in fold["val"]}
    check_splits(splits, CASES, PATIENTS, range(folds), "splits_final.json")


def test_nnunets_own_folds_separate_patients_and_are_refused():
    with pytest.raises(SplitError, match=r"fold 0 of f has patient .* in training and in validation"):
        check_splits(make_splits(CASES, None, 5), CASES, PATIENTS, range(5), "f")


def test_too_few_patients():
    with pytest.raises(SplitError, match="2 patients cannot be split into 3 folds"):
        make_splits(CASES[:4], PATIENTS, 3)


@pytest.mark.parametrize(
    ("change", "folds", "words"),
    [
        (lambda s: s, [0, 5], "has 5 folds, so there is no fold 5; nnU-Net would draw its own"),
        (lambda s: s[1]["val"].append("hip_999"), [0, 1], "fold 1 of f names 'hip_999'"),
        (lambda s: s[1]["train"].append(s[1]["val"][0]), [1], "fold 1 of f trains on 'hip_0"),
        (lambda s: s.__setitem__(1, s[0]), [0, 1], "twice, in folds 0 and 1"),
    ],
)
def test_folds_that_make_scores_wrong_are_refused(change, folds, words):
    splits = make_splits(CASES, None, 5)
    change(splits)
    with pytest.raises(SplitError, match=words):
        check_splits(splits, CASES, None, folds, "f")


def test_written_once_and_never_replaced(tmp_path):
    file = tmp_path / "new" / "splits_final.json"
    written = ensure_splits(file, CASES, PATIENTS, 3, [0, 1, 2])
    assert json.loads(file.read_text()) == written == make_splits(CASES, PATIENTS, 3)
    file.write_text(json.dumps(written))  # the same folds in another layout
    before = file.read_bytes()
    # another wish does not change it, as long as it is usable
    assert ensure_splits(file, CASES, PATIENTS, 5, [0]) == written
    with pytest.raises(SplitError, match="no fold 4"):
        ensure_splits(file, CASES, PATIENTS, 5, [4])
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_an_unusable_existing_one_is_refused_and_kept(tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(make_splits(CASES, None, 5)))
    before = file.read_bytes()
    with pytest.raises(SplitError, match="in training and in validation; move the file away"):
        ensure_splits(file, CASES, PATIENTS, 5, range(5))
    assert file.read_bytes() == before


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_patients_are_read(tmp_path, kind):
    file = tmp_path / f"patients.{kind}"
    lines = "\n".join(f"{case},{patient}" for case, patient in PATIENTS.items())
    file.write_text(json.dumps(PATIENTS) if kind == "json" else f"case,patient\n{lines}\n")
    assert load_patients(file, CASES) == PATIENTS
    with pytest.raises(SplitError, match="gives no patient for 'a', 'b', 'c' and 1 more"):
        load_patients(file, [*CASES, "a", "b", "c", "d"])


def test_patients_that_do_not_fit(tmp_path):
    file = tmp_path / "patients.csv"
    with pytest.raises(SplitError, match=r"cannot read .*patients.csv \(No such file"):
        load_patients(file, CASES)
    file.write_text("hip_001,1\n")
    with pytest.raises(SplitError, match="needs a first line 'case,patient'"):
        load_patients(file, CASES)
    file.write_text("case,patient\na,1\na,2\n")
    with pytest.raises(SplitError, match="names the case 'a' twice"):
        load_patients(file, ["a"])
    file.write_text("case,patient\na,1\nb\n")
    with pytest.raises(SplitError, match="gives no patient for 'b'"):
        load_patients(file, ["a", "b"])


def test_patients_of_test_cases(tmp_path):
    file = tmp_path / "patients.csv"
    file.write_text("case,patient\na,1\nb,2\n")
    assert load_patients(file, ["a"]) == {"a": "1"}
    assert load_patients(file, ["a"], ["b"]) == {"a": "1", "b": "2"}
    assert load_patients(file, ["a", "b"], ["c"]) == {"a": "1", "b": "2"}
    with pytest.raises(SplitError, match="gives no patient for 'c'"):
        load_patients(file, ["a"], ["b", "c"])
    file.write_text("case,patient\na,1\nb,2\nc,1\n")
    with pytest.raises(SplitError, match="has the patients of the test cases 'c' among the training cases, too"):
        load_patients(file, ["a"], ["b", "c"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": "1", "a": "2"}', "names the case 'a' twice"),
        ('{"a": null}', "gives no patient for 'a'"),
        ('["a"]', "is not JSON of the form"),
        ("7", "is not JSON of the form"),
        ('{"a": ', "is not JSON of the form"),
    ],
)
def test_json_that_does_not_fit(tmp_path, text, words):
    file = tmp_path / "patients.json"
    file.write_text(text)
    with pytest.raises(SplitError, match=words):
        load_patients(file, ["a"])


def test_spaces_and_excels_mark_make_no_other_patient(tmp_path):
    file = tmp_path / "patients.csv"
    file.write_text("case,patient\na, 7\nb,7 \n", encoding="utf-8-sig")
    assert load_patients(file, ["a", "b"]) == {"a": "7", "b": "7"}


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"train": []}', '[{"train": ["a"]}]'])
def test_a_broken_splits_file_is_refused_and_kept(tmp_path, text):
    file = tmp_path / "splits_final.json"
    file.write_text(text)
    with pytest.raises(SplitError, match=r"splits_final\.json is no list of folds with train and val"):
        ensure_splits(file, CASES, PATIENTS, 5, [0])
    assert file.read_text() == text
