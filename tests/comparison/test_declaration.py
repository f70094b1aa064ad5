import json

import pytest
from synthetic import make_experiment

from nnunet_deform.comparison.declaration import declaration, declare, differences, digest, read_declaration

ARMS = ("New", "Old", "Third")


@pytest.fixture
def content(tmp_path):
    return declaration(make_experiment(ARMS), tmp_path / "experiment.yaml")


def test_the_first_declaration_stays(tmp_path, content):
    declare(tmp_path, content, "2026-01-01")
    declare(tmp_path, {**content, "band": 0.5}, "2026-01-02")
    assert read_declaration(tmp_path) == ("2026-01-01", digest(content), content)


def test_a_declaration_that_was_edited_is_none(tmp_path, content):
    assert read_declaration(tmp_path) is None
    declare(tmp_path, content, "2026-01-01")
    file = tmp_path / "declared.json"
    stored = json.loads(file.read_text())
    stored["content"]["alpha"] = 0.1
    file.write_text(json.dumps(stored))
    assert read_declaration(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"folds": [0, 1, 2]}, "folds: 0, 1, 2, 3, 4 was declared, it is 0, 1, 2"),
        ({"seeds": {"first": 5, "repeats": [2, 3]}}, "first seed: 1 was declared, it is 5"),
        (
            {"seeds": {"repeats": [2, 3], "arms": ["New"]}},
            "arms with further seeds: New, Old, Third was declared, it is New",
        ),
        ({"statistics": {"band": 0.02}}, "band: 0.005 was declared, it is 0.02"),
        ({"budget": {"epochs": 5}}, "epochs: each trainer's own was declared, it is 5"),
        ({"primary": "NSD"}, "primary metric: Dice was declared, it is NSD"),
        ({"mirroring": False}, "mirrored predictions: yes was declared, it is no"),
        (
            {"datasets": [{"id": 501, "tolerance": {"a": 1.5}}]},
            "datasets, 501 (3d_fullres), tolerance of NSD: the smallest voxel side was declared, it is a 1.5",
        ),
        (
            {"datasets": [{"id": 501, "batch_size": 2}]},
            "datasets, 501 (3d_fullres), batch: the plan's was declared, it is 2",
        ),
    ],
)
def test_each_change_is_told_in_words(tmp_path, content, changes, phrase):
    now = declaration(make_experiment(ARMS, **changes), tmp_path / "experiment.yaml")
    assert differences(content, now)[0] == phrase
    assert digest(now) != digest(content)


def test_arms_that_come_and_go_are_told(tmp_path, content):
    now = declaration(make_experiment(("New", "Old", "Fourth")), tmp_path / "experiment.yaml")
    found = differences(content, now)
    assert "arms, Third: nnUNetTrainerThird with nnUNetPlans was declared and is gone" in found
    assert "arms, Fourth: nnUNetTrainerFourth with nnUNetPlans was not declared" in found


def test_patients_are_declared_by_what_the_file_says(tmp_path):
    (tmp_path / "patients.csv").write_text("case,patient\na,1\n")
    experiment = make_experiment(ARMS, datasets=[{"id": 501, "patients": "patients.csv"}])
    before = declaration(experiment, tmp_path / "experiment.yaml")
    assert differences(before, declaration(experiment, tmp_path / "experiment.yaml")) == []
    (tmp_path / "patients.csv").write_text("case,patient\na,2\n")
    (phrase,) = differences(before, declaration(experiment, tmp_path / "experiment.yaml"))
    assert phrase.startswith("datasets, 501 (3d_fullres), patients: ")
