"""Stopped at any time, the same command again finishes, as if nothing had been."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import SCENARIOS
from stock_prediction import predictor_of

DATASET = "Dataset999_Phantom"
TRAINER = "nnUNetTrainerLightMedSeg_4epochs2iters_seed0"
MODEL = f"{DATASET}/{TRAINER}__nnUNetPlans__3d_fullres"
TRAIN = ("999", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu", "--c")


class Command:
    """One of nnU-Net's commands in a process of its own."""

    def __init__(self, module: str, entry: str, *arguments: str) -> None:
        code = f"from nnunetv2.{module} import {entry}; {entry}()"
        # Spawned workers import the main module again, which must not start the command once more.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"if __name__ == '__main__':\n import torch\n {code}", *arguments],
            env={**os.environ, "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kill_when(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not happened():
            assert self.process.poll() is None, self.process.stdout.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL
        # The workers it leaves behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, output[-3000:]
        return output


def train() -> Command:
    return Command("run.run_training", "run_training_entry", *TRAIN)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(fold: Path) -> dict[str, torch.Tensor]:
    return torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]


@pytest.fixture
def all_threads():
    """As many as nnU-Net's command uses: sums in another order would not be bit-equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)


class Stopped(BaseException):
    """No error that anybody handles."""


@contextlib.contextmanager
def stopped_at(owner: Any, method: str, happened: Callable[..., bool]) -> Iterator[None]:
    """Leaves what calls the method when its arguments are such, instead of the call."""
    original = getattr(owner, method)

    def stop(*arguments: Any, **options: Any) -> Any:
        if happened(*arguments):
            raise Stopped
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, stop)
        try:
            yield
        except Stopped:
            return
    raise AssertionError(f"{method} was not stopped")


@pytest.mark.parametrize(
    "trainer", [TRAINER, pytest.param(TRAINER.replace("_4epochs", "_recompute_4epochs"), marks=pytest.mark.slow)]
)
def test_stopped_in_training_validation_and_prediction(workplace, monkeypatch, tmp_path, trainer) -> None:
    of_model = MODEL.replace(TRAINER, trainer)
    root = workplace(SCENARIOS["ignore"])
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "undisturbed"))
    run_training("999", "3d_fullres", 0, trainer, device=torch.device("cpu"))
    undisturbed = tmp_path / "undisturbed" / of_model
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    model = tmp_path / "results" / of_model
    fold = model / "fold_0"

    def go_on() -> None:
        run_training("999", "3d_fullres", 0, trainer, device=torch.device("cpu"), continue_training=True)

    with stopped_at(nnUNetTrainer, "train_step", lambda trainer, batch: trainer.current_epoch == 2):
        go_on()
    assert (fold / "checkpoint_latest.pth").is_file()
    assert not (fold / "checkpoint_final.pth").exists()
    seen = set(fold.glob("training_log_*.txt"))
    time.sleep(1)  # logs are named by the second
    with stopped_at(nnUNetPredictor, "predict_sliding_window_return_logits", lambda *_: True):
        go_on()
    (second_log,) = set(fold.glob("training_log_*.txt")) - seen
    # The epoch that was stopped is the first to run again: nothing before it is lost.
    assert re.findall(r"Epoch (\d+) *\n", second_log.read_text()) == ["2", "3"]
    assert not (fold / "validation" / "summary.json").exists()
    go_on()
    check_equal(model, undisturbed)

    output = tmp_path / "predicted"
    images = root / "raw" / DATASET / "imagesTr"

    def predict() -> None:
        predictor_of(model, mirroring=True).predict_from_files_sequential(str(images), str(output))

    output.mkdir()
    before = contents(fold)
    with stopped_at(predict_from_raw_data, "export_prediction_from_logits", lambda *_: any(output.glob("case_*.gz"))):
        predict()
    assert len(list(output.glob("case_*.nii.gz"))) == 1
    predict()
    assert contents(fold) == before
    check_predictions(output, fold)


def check_equal(model: Path, undisturbed: Path) -> None:
    """Weights, and what validation wrote."""
    one, other = weights(model / "fold_0"), weights(undisturbed / "fold_0")
    assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("case_0.nii.gz", "summary.json"):
        written, expected = ((f / "fold_0" / "validation" / name).read_text("latin-1") for f in (model, undisturbed))
        assert written.replace(str(model), str(undisturbed)) == expected
    assert not list((model / "fold_0").glob("*.partial"))
    assert (model / "fold_0" / "progress.png").exists()


def check_predictions(output: Path, fold: Path) -> None:
    """Of all cases; validation and prediction of one case are one and the same."""
    predicted = {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in output.glob("case_*.nii.gz")}
    assert sorted(predicted) == [f"case_{case}.nii.gz" for case in range(4)]
    validated = sitk.GetArrayFromImage(sitk.ReadImage(str(fold / "validation" / "case_0.nii.gz")))
    assert np.array_equal(predicted["case_0.nii.gz"], validated)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_killed_in_training_validation_and_prediction(workplace, monkeypatch, tmp_path, all_threads) -> None:
    root = workplace(SCENARIOS["ignore"])
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "undisturbed"))
    run_training("999", "3d_fullres", 0, TRAINER, device=torch.device("cpu"))
    undisturbed = tmp_path / "undisturbed" / MODEL
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    run_training("999", "3d_fullres", 1, TRAINER, device=torch.device("cpu"))
    model = tmp_path / "results" / MODEL
    fold = model / "fold_0"
    finished_fold = contents(model / "fold_1")

    def logged(text: str) -> bool:
        return any(re.search(text, log.read_text()) for log in fold.glob("training_log_*.txt"))

    train().kill_when(lambda: logged(r"Epoch 2 *\n"))
    assert (fold / "checkpoint_latest.pth").is_file()
    assert not (fold / "checkpoint_final.pth").exists()
    seen = set(fold.glob("training_log_*.txt"))
    train().kill_when(lambda: logged("predicting case_0"))
    (second_log,) = set(fold.glob("training_log_*.txt")) - seen
    # The epoch that was killed is the first to run again: nothing before it is lost.
    assert re.findall(r"Epoch (\d+) *\n", second_log.read_text()) == ["2", "3"]
    assert not (fold / "validation" / "summary.json").exists()
    train().finish()

    check_equal(model, undisturbed)
    assert (fold / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert contents(model / "fold_1") == finished_fold

    output = tmp_path / "predicted"
    images = root / "raw" / DATASET / "imagesTr"
    arguments = ("-d", "999", "-i", str(images), "-o", str(output), "-c", "3d_fullres", "-tr", TRAINER, "-f", "0")
    predict = ("inference.predict_from_raw_data", "predict_entry_point", *arguments, "-device", "cpu", "-npp", "1")
    Command(*predict, "-nps", "1").kill_when(lambda: any(output.glob("case_*.nii.gz")))
    before = contents(fold)
    Command(*predict, "-nps", "1").finish()
    assert contents(fold) == before
    check_predictions(output, fold)
