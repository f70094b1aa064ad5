"""The size the comparison is made for, from files to the page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from synthetic import DATASET, make_scores

from nnunet_deform.comparison.collect import _made_from, scores_file, tolerances
from nnunet_deform.comparison.experiment import Experiment, Folders
from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
from nnunet_deform.comparison.files import write_json, write_table
from nnunet_deform.comparison.prepare import find_dataset
from nnunet_deform.comparison.trainings import begin, finish, list_trainings

LABELS = tuple("abcde")
ARMS = tuple(f"A{number}" for number in range(8))
CASES = tuple(f"c{number:04d}_0" for number in range(2500))

REPORT = """
import sys, time
from pathlib import Path
from nnunet_deform.comparison.report import build_report
from nnunet_deform.processes.memory import most_resident
file = Path(sys.argv[1])
page = build_report(file)
assert "2500 cases of 2500 patients" in page.read_text()
assert page.stat().st_size < 4e6
print(time.process_time(), most_resident() / 2**30)
"""


def _write_dataset(folder: Path) -> None:
    raw, preprocessed = folder / "raw" / DATASET, folder / "preprocessed" / DATASET
    label = np.zeros((10, 40, 40), np.uint8)
    label[2:5, 5:20, 5:20], label[5:8, 20:35, 20:35] = 1, 2
    sitk.WriteImage(sitk.GetImageFromArray(label), folder / "label.nii.gz")
    for part, ending in (("labelsTr", ".nii.gz"), ("imagesTr", "_0000.nii.gz")):
        (raw / part).mkdir(parents=True)
        for case in CASES:
            (raw / part / f"{case}{ending}").symlink_to(folder / "label.nii.gz")
    labels = {"background": 0, **{name: number + 1 for number, name in enumerate(LABELS)}}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(CASES), "file_ending": ".nii.gz"}
    plans = {"plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO", "configurations": {"3d_fullres": {}}}
    for file in (raw / "dataset.json", preprocessed / "dataset.json"):
        write_json(file, description)
    write_json(preprocessed / "nnUNetPlans.json", {**plans, "original_median_spacing_after_transp": [1.0, 1.0, 1.0]})
    # as in make_scores
    held_out = [[case for case in CASES if int(case[1:5]) % 5 == fold] for fold in range(5)]
    splits = [{"train": sorted(set(CASES) - set(val)), "val": val} for val in held_out]
    write_json(preprocessed / "splits_final.json", splits)


def _write_results(experiment: Experiment, folders: Folders) -> None:
    found = find_dataset(experiment.datasets[0], folders)
    table = make_scores(experiment, {"A0": 0.01}, patients=len(CASES), per_patient=1, labels=LABELS)
    scores = dict(list(table.groupby(["arm", "seed", "fold"])))
    for training in list_trainings(experiment, folders):
        mine = scores[training.arm, training.seed, training.fold]
        validation = training.summary(folders.results).parent
        counts = dict.fromkeys(("IoU", "FP", "FN", "TP", "TN", "n_ref", "n_pred"), 100)
        entries = [
            {
                "reference_file": str(found.raw / "labelsTr" / f"{case}.nii.gz"),
                "prediction_file": str(validation / f"{case}.nii.gz"),
                "metrics": {str(number + 1): {"Dice": dice, **counts} for number, dice in enumerate(rows)},
            }
            for case, rows in mine.groupby("case")["Dice"].apply(list).items()
        ]
        write_json(validation / "summary.json", {"metric_per_case": entries, "mean": {}})
        (validation.parent / "checkpoint_final.pth").touch()
        record = begin(training, found, folders, ["nnUNetv2_train", training.trainer], "cpu")
        finish(training, folders, record, 1.0)
        columns = ["case", "label", "Dice", "NSD", "HD95", "voxels_truth", "voxels_prediction"]
        of_cases = mine[columns].reset_index(drop=True)
        tolerance = tolerances(experiment, training, found)
        of_cases.attrs = _made_from(training.summary(folders.results), tolerance)
        write_table(scores_file(training, folders), of_cases)


@pytest.mark.slow
def test_collecting_testing_and_reporting_fit_in_a_minute_and_two_gigabytes(tmp_path):
    """8 arms x 5 folds x 500 cases x 5 classes, with three seeds; 10,000 draws."""
    _write_dataset(tmp_path)
    file = tmp_path / "large.yaml"
    content = {
        "name": "large",
        "datasets": [{"id": 501}],
        "arms": [{"name": arm, "trainer": f"nnUNetTrainer{arm}"} for arm in ARMS],
        "seeds": {"first": 1, "repeats": [2, 3]},
        "hypotheses": [["A0", arm] for arm in ARMS[1:7]],
        "device": "cpu",
        "raw": "raw",
        "preprocessed": "preprocessed",
    }
    file.write_text(json.dumps(content))  # which is YAML, too
    source = load_experiment(file)
    _write_results(source.experiment, find_folders(source))
    command = [sys.executable, "-c", REPORT, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, result.stdout.split())
    assert seconds < 60
    assert gigabytes < 2
