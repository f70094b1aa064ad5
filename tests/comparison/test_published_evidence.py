"""What stands in docs/evidence: archives that can be read back, and an experiment that only lacks its data."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from nnunet_deform.comparison.archive import read_archive
from nnunet_deform.comparison.check import check_experiment
from nnunet_deform.comparison.experiment import ExperimentError
from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
from nnunet_deform.comparison.trainings import TRAINING_PACKAGES

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
ARCHIVES = sorted(file.parent for file in EVIDENCE.rglob("archive.json"))
GPU = EVIDENCE / "gpu.yaml"
CLASSES = {
    "Dataset002_Heart": ["left atrium"],
    "Dataset004_Hippocampus": ["Anterior", "Posterior"],
    "Dataset005_Prostate": ["PZ", "TZ"],
    "Dataset027_ACDC": ["RV", "MLV", "LVC"],
    "Dataset218_AMOS2022_postChallenge_task1": [f"organ {number}" for number in range(1, 16)],
    "Dataset220_KiTS2023": ["kidney", "masses", "tumor"],
}


def _module(name):
    spec = importlib.util.spec_from_file_location(name, EVIDENCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ARCHIVES, ids=lambda folder: folder.relative_to(EVIDENCE).as_posix())
def test_archives_of_results_read_back(folder):
    """Contributed ones, too: hashes, versions and scores of every training are there and fit together."""
    found = read_archive(folder)
    assert found.declared is not None, "declared.json is missing, or its content and SHA-256 disagree"
    assert found.records
    for training, record in found.records.items():
        for fingerprint in (record.splits, record.plans, record.dataset):
            assert re.fullmatch(r"[0-9a-f]{64}", fingerprint), training
        assert set(TRAINING_PACKAGES) | {"torch", "python"} <= set(record.versions), training
        assert record.started >= found.declared[0], f"{training} was begun before the declaration"
    finished = set(found.records) - set(found.collected.missing)
    assert finished
    facts = found.facts
    for training in finished:
        cases = facts[training.dataset, training.configuration].validation[training.fold]
        rows = found.collected.cases
        mine = rows[(rows["arm"] == training.arm) & (rows["seed"] == training.seed) & (rows["fold"] == training.fold)]
        assert set(mine["case"]) == set(cases)


def test_the_comparison_and_its_recipes_share_no_patient():
    dataset = _module("dataset")
    listed = {line.split(",")[0]: line.split(",")[1] for line in (EVIDENCE / "patients.csv").read_text().split()[1:]}
    recipes = json.loads((EVIDENCE.parent / "recipes" / "patients.json").read_text())
    chosen_by = {patient for part in recipes.values() for patient in part}
    assert len(chosen_by) == 30
    assert not chosen_by & set(listed.values())
    assert not dataset.left_out() & set(listed)
    assert len(listed) == 173
    assert len(set(listed.values())) == 113


def _stand_in(raw: Path) -> None:
    """Names and classes of the public datasets, without images."""
    for dataset, classes in CLASSES.items():
        for part in ("imagesTr", "labelsTr"):
            (raw / dataset / part).mkdir(parents=True)
        cases = [f"case_{number:03d}" for number in range(40)]
        if dataset == "Dataset004_Hippocampus":
            cases = [f"hippocampus_{number:03d}" for number in range(1, 81)]
        elif dataset == "Dataset027_ACDC":
            cases = [f"patient{number:03d}_frame{frame}" for number in range(1, 41) for frame in ("01", "12")]
        for case in cases:
            (raw / dataset / "labelsTr" / f"{case}.nii.gz").touch()
        labels = {"background": 0, **{name: value for value, name in enumerate(classes, start=1)}}
        about = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"}
        (raw / dataset / "dataset.json").write_text(json.dumps(about))


def test_the_experiment_for_gpus_lacks_nothing_but_its_data(tmp_path, monkeypatch):
    raw, preprocessed, file = tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "gpu.yaml"
    raw.mkdir()
    file.write_text(GPU.read_text())
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    source = load_experiment(file)
    with pytest.raises(ExperimentError) as refusal:
        check_experiment(source, find_folders(source), trains_here=False)
    faults = str(refusal.value).splitlines()
    assert len(faults) == len(CLASSES)
    assert all(f"has no dataset {name}" in fault for name, fault in zip(CLASSES, faults, strict=True))

    _stand_in(raw)
    written = _module("patients").write(raw, tmp_path)
    assert [path.name for path in written] == ["hippocampus_patients.csv", "acdc_patients.csv"]
    assert "patient007_frame12,patient007" in written[1].read_text().splitlines()
    assert "hippocampus_008,4" in written[0].read_text().splitlines()
    checked = check_experiment(source, find_folders(source), trains_here=False)
    assert len(checked.trainings) == 6 * 9 * 5 * 3
    assert [len(set((people or {}).values())) for people in checked.patients] == [0, 40, 0, 40, 0, 0]
    assert not preprocessed.exists()
