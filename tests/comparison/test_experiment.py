from pathlib import Path

import pytest

from nnunet_deform.comparison.experiment import ExperimentError
from nnunet_deform.comparison.experiment_file import default_experiment, find_folders, load_experiment, parse_experiment

GOOD = """\
name: small
datasets:
  - id: 501
    batch_size: 2
arms:
  - name: stock
    trainer: nnUNetTrainer_AdamW
  - name: new
    trainer: nnUNetTrainerLightMedSeg
    plans: other
folds: [0, 1]
seeds:
  first: 1
  repeats: [2, 3]
  folds: [0]
  arms: [new]
budget: {epochs: 8, iterations: 20}
mirroring: false
hypotheses:
  - [new, stock]
device: cpu
"""


@pytest.fixture
def load(tmp_path):
    def of_text(text: str):
        file = tmp_path / "experiment.yaml"
        file.write_text(text)
        return load_experiment(file).experiment

    return of_text


def test_a_good_file(load):
    experiment = load(GOOD)
    assert [arm.name for arm in experiment.arms] == ["stock", "new"]
    assert experiment.statistics.draws == 10_000
    assert experiment.trainer_name(experiment.arm("stock"), 3) == "nnUNetTrainer_AdamW_8epochs20iters_seed3_unmirrored"
    assert [(arm.name, seed, fold) for _, arm, seed, fold in experiment.trainings()] == [
        ("stock", 1, 0),
        ("new", 1, 0),
        ("stock", 1, 1),
        ("new", 1, 1),
        ("new", 2, 0),
        ("new", 3, 0),
    ]


def test_without_a_budget_the_trainers_own_length_counts(load):
    experiment = load(GOOD.replace("budget: {epochs: 8, iterations: 20}\nmirroring: false\n", ""))
    assert experiment.trainer_name(experiment.arm("new"), 1) == "nnUNetTrainerLightMedSeg_seed1"


def test_repeats_of_all_arms_on_all_folds(load):
    text = GOOD.replace("  folds: [0]\n", "  folds: null\n").replace("  arms: [new]\n", "")
    assert len(list(load(text).trainings())) == 12


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("batch_size: 2", "batchsize: 2", 4, "datasets[0].batchsize: is no setting here; did you mean batch_size?"),
        ("batch_size: 2", "batch_size: 0", 4, "datasets[0].batch_size: 0 must be at least 1."),
        ("name: small\n", "", 1, "name: is missing"),
        ("    trainer: nnUNetTrainer_AdamW\n", "", 6, "arms[0].trainer: is missing"),
        ("nnUNetTrainer_AdamW", "AdamW", 7, "'AdamW' is not a trainer's name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer_AdamW_lr8e/3", 7, "is not a trainer's name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer__AdamW", 7, "is not a trainer's name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer_5epochs", 7, "fixes '_5epochs' by name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer_seed1", 7, "fixes '_seed1' by name"),
        ("name: new", "name: stock", 8, "arms[1].name: two arms are named 'stock'"),
        ("name: new", "name: a__b", 8, "arms[1].name: 'a__b' is no name; use letters"),
        ("nnUNetTrainerLightMedSeg\n    plans: other", "nnUNetTrainer_AdamW", 8, "are the same trainer on the same"),
        ("folds: [0, 1]", "folds: all", 11, "folds: fold 'all' trains on every case"),
        ("folds: [0, 1]", "folds: [0, all]", 11, "folds[1]: fold 'all' trains on every case"),
        ("folds: [0, 1]", "folds: [0, 0]", 11, "names a fold twice"),
        ("folds: [0, 1]", "folds: [0, -1]", 11, "folds[1]: -1 must be at least 0."),
        ("repeats: [2, 3]", "repeats: [1, 3]", 12, "seeds: the seeds [1, 1, 3] are not all different"),
        ("  folds: [0]", "  folds: [7]", 15, "seeds.folds[0]: fold 7 is not among the folds [0, 1]"),
        ("arms: [new]", "arms: [old]", 16, "seeds.arms[0]: there is no arm 'old'"),
        ("{epochs: 8, iterations: 20}", "{iterations: 20}", 17, "budget: iterations (per epoch) need epochs"),
        ("[new, stock]", "[new, nobody]", 20, "hypotheses[0]: there is no arm 'nobody'; the arms are stock, new."),
        ("[new, stock]", "[new, new]", 20, "hypotheses[0]: 'new' is compared with itself"),
        ("[new, stock]", "[new, stock]\n  - [stock, new]", 21, "hypotheses[1]: a pair is declared twice"),
        ("  - [new, stock]", "  []", 19, "hypotheses: has 0 entries, not at least 1."),
        ("device: cpu", "device: tpu", 21, "device: 'tpu' is none of cuda, cpu, mps."),
        ("device: cpu", "checkpoint: checkpoint_best", 21, "would be chosen by the very cases it is scored on"),
        ("device: cpu", "device: cpu\ndevice: cuda", 22, "'device' is set twice"),
        ("device: cpu", "device: [cpu", 21, "a bracket is not closed"),
        ("  - id: 501\n", "  - id: 501\n  - id: 501\n", 4, "datasets[1].id: a dataset is listed twice"),
        ("  - id: 501\n", "  - id: 501\n  - id: '0501'\n", 4, "datasets[1].id: a dataset is listed twice"),
        ("id: 501", "id: Hippocampus", 3, "id: 'Hippocampus' is neither a dataset's number, from 1 to 999, nor"),
        ("id: 501", "id: Dataset501_*", 3, "id: 'Dataset501_*' is neither a dataset's number, from 1 to 999, nor"),
    ],
)
def test_faults_have_their_line(load, tmp_path, old, new, line, words):
    assert old in GOOD
    with pytest.raises(ExperimentError) as caught:
        load(GOOD.replace(old, new, 1))
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"{tmp_path / 'experiment.yaml'}:{line}: ")
    assert words in message


@pytest.mark.parametrize(("written", "read"), [("027", 27), ("004", 4), ("010", 10), ("5_01", 501), ("'027'", 27)])
def test_numbers_with_leading_zeros_are_decimal(load, written, read):
    assert load(GOOD.replace("id: 501", f"id: {written}")).datasets[0].id == read


def test_all_faults_are_told_at_once(load):
    with pytest.raises(ExperimentError) as caught:
        load(GOOD.replace("epochs: 8", "epochs: none").replace("device: cpu", "device: tpu"))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["17", "21"]


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_no_mapping(load, text):
    with pytest.raises(ExperimentError, match="an experiment is a mapping"):
        load(text)


def test_no_file(tmp_path):
    with pytest.raises(ExperimentError, match=r"cannot read .*nothing.yaml \(No such file or directory\)"):
        load_experiment(tmp_path / "nothing.yaml")


def test_the_default_is_valid(load, tmp_path):
    experiment = load(default_experiment(501, Path("experiment.yaml"), test=True, device="cpu"))
    assert experiment.datasets[0].id == 501
    assert experiment.datasets[0].test
    assert experiment.device == "cpu"
    # 4 arms on 5 folds, and two more seeds of each on three of them
    assert len(list(experiment.trainings())) == 44
    assert load(default_experiment("Dataset004_X", Path("e.yaml"))).datasets[0].id == "Dataset004_X"


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)

    def folders_of(text: str):
        return find_folders(parse_experiment(text, tmp_path / "experiment.yaml"))

    folders = folders_of(GOOD + "preprocessed: there\n")
    assert folders.raw == tmp_path
    assert folders.preprocessed == tmp_path / "there"
    assert folders.output == tmp_path / "small"
    assert folders.results == tmp_path / "small" / "nnUNet_results"
    with pytest.raises(
        ExperimentError, match="preprocessed: set it in the file, or the environment variable nnUNet_pre"
    ):
        folders_of(GOOD)
    with pytest.raises(ExperimentError, match="gone does not exist"):
        folders_of(GOOD + "preprocessed: p\nraw: gone\n")
