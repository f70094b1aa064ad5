from pathlib import Path

import pytest

from nnunet_deform.comparison.experiment import (
    ExperimentError,
    default_experiment,
    find_folders,
    load_experiment,
)

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
        return load_experiment(file)

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
        ("batch_size: 2", "batchsize: 2", 4, "datasets[0].batchsize: is no setting here"),
        ("batch_size: 2", "batch_size: 0", 4, "datasets[0].batch_size: Input should be greater than or equal to 1"),
        ("name: small\n", "", 1, "name: is missing"),
        ("    trainer: nnUNetTrainer_AdamW\n", "", 6, "arms[0].trainer: is missing"),
        ("nnUNetTrainer_AdamW", "AdamW", 7, "'AdamW' is no trainer's name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer_AdamW_lr8e/3", 7, "is no trainer's name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer__AdamW", 7, "is no trainer's name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer_5epochs", 7, "fixes '_5epochs' by name"),
        ("nnUNetTrainer_AdamW", "nnUNetTrainer_seed1", 7, "fixes '_seed1' by name"),
        ("name: new", "name: stock", 5, "two arms are named 'stock'"),
        ("name: new", "name: a__b", 8, "arms[1].name: String should match pattern"),
        ("nnUNetTrainerLightMedSeg\n    plans: other", "nnUNetTrainer_AdamW", 5, "are the same trainer on the same"),
        ("folds: [0, 1]", "folds: all", 11, "folds: fold 'all' trains on every case"),
        ("folds: [0, 1]", "folds: [0, all]", 11, "folds: fold 'all' trains on every case"),
        ("folds: [0, 1]", "folds: [0, 0]", 11, "names a fold twice"),
        ("folds: [0, 1]", "folds: [0, -1]", 11, "folds[1]: Input should be greater than or equal to 0"),
        ("repeats: [2, 3]", "repeats: [1, 3]", 12, "seeds: the seeds [1, 1, 3] are not all different"),
        ("  folds: [0]", "  folds: [7]", 15, "seeds.folds: fold 7 is not among the folds [0, 1]"),
        ("arms: [new]", "arms: [old]", 16, "seeds.arms: there is no arm 'old'"),
        ("{epochs: 8, iterations: 20}", "{iterations: 20}", 17, "budget: iterations (per epoch) need epochs"),
        ("[new, stock]", "[new, nobody]", 19, "hypotheses: there is no arm 'nobody'; the arms are ['new', 'stock']"),
        ("[new, stock]", "[new, new]", 19, "hypotheses: 'new' is compared with itself"),
        ("[new, stock]", "[new, stock]\n  - [stock, new]", 19, "a pair is declared twice"),
        ("  - [new, stock]", "  []", 19, "hypotheses: Tuple should have at least 1 item"),
        ("device: cpu", "device: tpu", 21, "device: Input should be 'cuda', 'cpu' or 'mps'"),
        ("device: cpu", "checkpoint: checkpoint_best", 21, "would be chosen by the very cases it is scored on"),
        ("device: cpu", "device: cpu\ndevice: cuda", 22, "'device' is set twice"),
        ("device: cpu", "device: [cpu", 22, "expected ',' or ']'"),
        ("  - id: 501\n", "  - id: 501\n  - id: 501\n", 2, "datasets: a dataset is listed twice"),
        ("  - id: 501\n", "  - id: 501\n  - id: '0501'\n", 2, "datasets: a dataset is listed twice"),
        ("id: 501", "id: Hippocampus", 3, "id: 'Hippocampus' is neither a dataset's number nor its full name"),
        ("id: 501", "id: Dataset501_*", 3, "id: 'Dataset501_*' is neither a dataset's number nor its full name"),
    ],
)
def test_faults_have_their_line(load, tmp_path, old, new, line, words):
    assert old in GOOD
    with pytest.raises(ExperimentError) as caught:
        load(GOOD.replace(old, new, 1))
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"{tmp_path / 'experiment.yaml'}:{line}: ")
    assert words in message


@pytest.mark.parametrize(("written", "read"), [("027", 27), ("004", 4), ("010", 10), ("1_000", 1000), ("'027'", 27)])
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


def test_folders(load, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    file = tmp_path / "experiment.yaml"
    folders = find_folders(load(GOOD + "preprocessed: there\n"), file)
    assert folders.raw == tmp_path
    assert folders.preprocessed == tmp_path / "there"
    assert folders.output == tmp_path / "small"
    assert folders.results == tmp_path / "small" / "nnUNet_results"
    with pytest.raises(ExperimentError, match="set preprocessed: in the file, or the environment variable nnUNet_pre"):
        find_folders(load(GOOD), file)
    with pytest.raises(ExperimentError, match="gone does not exist"):
        find_folders(load(GOOD + "preprocessed: p\nraw: gone\n"), file)
