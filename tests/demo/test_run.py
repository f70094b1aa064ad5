"""The demo's run: fakes stand in for nnU-Net's commands, except in the slow test, which runs the whole thing."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from nnunet_deform import activation
from nnunet_deform.demo import DemoError, run, run_demo
from nnunet_deform.demo.phantom import DATASET_NAME, LABELS
from nnunet_deform.processes import commands

# One program plays all four commands. FAKE_MODE says what the training does, FAKE_DICE what the evaluation finds;
# a training that hangs or fails leaves a process behind, as nnU-Net's workers would, and writes both process ids.
FAKE = """
import json, os, pathlib, re, shutil, subprocess, sys, time

name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
nnunet = {key: value for key, value in os.environ.items() if key.startswith("nnUNet_")}
with open("calls.jsonl", "a") as stream:
    stream.write(json.dumps({"name": name, "args": args, "environment": nnunet}) + "\\n")
raw = pathlib.Path(os.environ["nnUNet_raw"], "Dataset501_Phantom")
if name == "nnUNetv2_plan_and_preprocess":
    folder = pathlib.Path(os.environ["nnUNet_preprocessed"], raw.name)
    folder.mkdir(parents=True)
    plan = {"patch_size": [24, 40, 40], "batch_size": 2}
    (folder / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"3d_fullres": plan}}))
elif name == "nnUNetv2_train":
    mode = os.environ["FAKE_MODE"]
    if mode != "good":
        # the worker is deaf to SIGTERM, as a hanging one may be
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        worker.stdout.readline()
        pathlib.Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {worker.pid}")
    if mode == "slow":
        time.sleep(600)
    for epoch in range(int(re.search("_([0-9]+)epochs", args[args.index("-tr") + 1])[1])):
        print(f"2026-01-01 00:00:00: Epoch {epoch}")
        print(f"2026-01-01 00:00:00: train_loss {1 - epoch / 10:.4f}")
    if mode == "bad":
        sys.exit("RuntimeError: the training [went] wrong")
    if mode == "killed":
        os.kill(os.getpid(), 9)
elif name == "nnUNetv2_predict":
    shutil.copytree(raw / "labelsTs", args[args.index("-o") + 1])
elif name == "nnunet-deform":
    page = pathlib.Path(args[args.index("-o") + 1], "case", "inspect.html")
    page.parent.mkdir(parents=True)
    page.write_text("the page")
elif name == "nnUNetv2_evaluate_folder":
    dice = json.loads(os.environ["FAKE_DICE"])
    cases = [{"metrics": {str(v): {"Dice": d + shift} for v, d in enumerate(dice, 1)}} for shift in (-0.05, 0.05)]
    pathlib.Path("summary.json").write_text(json.dumps({"metric_per_case": cases}))
"""

# A shell starts background jobs with SIGINT ignored, and children inherit that; the demo rightly leaves it so.
DRIVER = """
import signal, sys
from pathlib import Path
from nnunet_deform.processes import commands
from nnunet_deform.demo import run
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
commands.find_command = lambda name: str(Path(sys.argv[1], name))
run.find_command = commands.find_command
commands._GRACE_S = 0.5
commands._POLL_S = 0.005
run._NUM_TRAIN, run._NUM_TEST = 2, 1
run.run_demo(Path(sys.argv[2]))
"""


@pytest.fixture
def fakes(tmp_path_factory, monkeypatch) -> Path:
    """Folder of the fake commands, with ``pids`` written into it; the demo of this process uses them."""
    folder = tmp_path_factory.mktemp("scripts")
    names = [f"nnUNetv2_{name}" for name in ("plan_and_preprocess", "train", "predict", "evaluate_folder")]
    for name in (*names, "nnunet-deform"):
        script = folder / name
        script.write_text(f"#!{sys.executable}\n{FAKE}")
        script.chmod(0o755)
    for module in (commands, run):
        monkeypatch.setattr(module, "find_command", lambda name: str(folder / name))
    monkeypatch.setattr(run, "_NUM_TRAIN", 2)
    monkeypatch.setattr(run, "_NUM_TEST", 1)
    monkeypatch.setattr(commands, "_GRACE_S", 0.5)
    monkeypatch.setattr(commands, "_POLL_S", 0.005)
    monkeypatch.setenv("FAKE_MODE", "good")
    monkeypatch.setenv("FAKE_DICE", "[0.9, 0.8, 0.7, 0.2, 0.1]")
    monkeypatch.setenv("FAKE_PIDS", str(folder / "pids"))
    return folder


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


def _running(pid: int) -> bool:
    """Whether the process exists and is no zombie that nobody has reaped yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _running_fakes(fakes: Path) -> list[int]:
    """Which of the fake training and its worker still run."""
    training, worker = (int(pid) for pid in (fakes / "pids").read_text().split())
    return [pid for pid in (training, worker) if _running(pid)]


def test_a_run_leaves_the_complete_folder_and_nothing_else(fakes, console, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/the/users/own")
    monkeypatch.setenv("nnUNet_extTrainer", "/the/users/trainers")
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    result = run_demo(tmp_path / "out", console=console)

    assert list(tmp_path.iterdir()) == [tmp_path / "out"] == [result.folder]
    assert result.dice == pytest.approx({"liver": 0.9, "spleen": 0.8, "kidney": 0.7, "vessels": 0.2, "lesions": 0.1})
    assert result.figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (result.folder / "logs" / "nnUNetv2_train.log").read_text().count("Epoch") == run._EPOCHS

    calls = [json.loads(line) for line in (result.folder / "calls.jsonl").read_text().splitlines()]
    assert [call["name"] for call in calls] == [
        "nnUNetv2_plan_and_preprocess",
        "nnUNetv2_train",
        "nnUNetv2_predict",
        "nnUNetv2_evaluate_folder",
        "nnunet-deform",
    ]
    for call in calls:
        folders = {f"nnUNet_{name}": f"nnUNet_{name}" for name in ("raw", "preprocessed", "results")}
        assert folders.items() <= call["environment"].items()
        assert call["environment"]["nnUNet_extTrainer"] == activation.extension_folder()
        assert "nnUNet_wandb_enabled" not in call["environment"]
    # 0 workers make planning crash in nnU-Net, and training bit-reproducible
    assert [call["environment"]["nnUNet_n_proc_DA"] for call in calls] == ["1", "0", "1", "1", "1"]

    shown = console.export_text()
    arguments = f"501 3d_fullres 0 -tr {run._TRAINER} -device cpu"
    assert " ".join(calls[1]["args"]) == arguments
    assert f"$ nnUNetv2_train {arguments}\n" in shown
    assert "patch 24x40x40, batch 2" in shown
    assert "epoch 6 of 6: training loss 0.5000" in shown
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["spleen"]] == ["0.800", "0.750", "0.850", "0.60"]
    assert [cell.strip() for cell in rows["lesions"]] == ["0.100", "0.050", "0.150", "-"]
    assert str(result.folder) in shown
    assert result.page.read_text() == "the page"
    arguments = calls[4]["args"]
    assert arguments[:3] == [
        "inspect",
        "-m",
        f"{Path(calls[1]['environment']['nnUNet_results'], DATASET_NAME)}/{run._TRAINER}__nnUNetPlans__3d_fullres",
    ]
    assert f"Inside the network: {result.page}" in shown


def test_the_training_is_the_short_recipe_of_at_least_60_steps():
    assert re.fullmatch(r"nnUNetTrainerDeformUX_AdamW_(\d+)epochs(\d+)iters_seed0_unmirrored", run._TRAINER)
    assert run._EPOCHS * run._ITERATIONS >= 60


def test_without_a_folder_a_temporary_one_is_kept_and_named(fakes, console, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run_demo(console=console)
    assert list(tmp_path.iterdir()) == [result.folder]
    assert str(result.folder) in console.export_text()


def test_an_existing_empty_folder_is_filled_not_replaced(fakes, console, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    inode = folder.stat().st_ino
    run_demo(folder, console=console)
    assert folder.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "demo.png").is_file()
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def test_a_relative_folder_lies_in_the_working_directory(fakes, console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_demo(Path("out"), console=console).folder == tmp_path / "out"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        pytest.param("full", r"full is not empty; give one that is empty or does not exist\.$", id="not-empty"),
        pytest.param("full/file", r"file is a file; give a folder", id="file"),
        pytest.param("missing/out", r"missing does not exist; create it first", id="no-parent"),
        pytest.param("full/file/out", r"full/file.* does not exist|Cannot look into", id="parent-is-a-file"),
    ],
)
def test_an_unsuitable_folder_is_refused_in_one_sentence(fakes, console, tmp_path, target, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(DemoError, match=message) as caught:
        run_demo(tmp_path / target, console=console)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "full", tmp_path / "full" / "file"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_refused_in_one_sentence(fakes, console, tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DemoError, match=r"Cannot write in .*Permission denied"):
            run_demo(tmp_path / "out", console=console)
    finally:
        tmp_path.chmod(0o755)


def test_a_work_folder_that_cannot_be_made_is_one_sentence(fakes, console, tmp_path, monkeypatch):
    def refuse(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DemoError, match=r"Cannot write in .*Permission denied"):
        run_demo(tmp_path / "out", console=console)


def test_a_missing_command_is_one_sentence(console, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path / "no scripts here"))
    with pytest.raises(DemoError, match=r"nnUNetv2_plan_and_preprocess is not in .*; install nnunetv2"):
        run_demo(tmp_path / "out", console=console)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mode", "how"), [("bad", "with exit code 1"), ("killed", "by signal 9")])
def test_a_failing_command_shows_its_end_and_leaves_nothing(fakes, console, tmp_path, monkeypatch, mode, how):
    monkeypatch.setenv("FAKE_MODE", mode)
    with pytest.raises(DemoError, match=f"^nnUNetv2_train ended {how}"):
        run_demo(tmp_path / "out", console=console)
    assert list(tmp_path.iterdir()) == []
    assert _running_fakes(fakes) == []
    shown = console.export_text()
    assert "train_loss 0.5000" in shown
    assert ("RuntimeError: the training [went] wrong" in shown) == (mode == "bad")


@pytest.mark.parametrize("bad", [0.55, float("nan")])
def test_a_missed_bar_is_an_error_that_keeps_the_folder(fakes, console, tmp_path, monkeypatch, bad):
    monkeypatch.setenv("FAKE_DICE", json.dumps([0.9, bad, 0.1, 0.1, 0.1]))
    with pytest.raises(DemoError, match=rf"missed the required Dice of 0\.6: spleen {bad:.3f}\.$"):
        run_demo(tmp_path / "out", console=console)
    assert (tmp_path / "out" / "demo.png").is_file()
    assert (tmp_path / "out" / "summary.json").is_file()


@pytest.mark.skipif(os.name != "posix", reason="process groups and signals are POSIX")
@pytest.mark.parametrize(
    ("number", "code", "existed"),
    [
        pytest.param(signal.SIGINT, -signal.SIGINT, False, id="SIGINT-new-folder"),
        pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, True, id="SIGTERM-empty-folder"),
    ],
)
def test_an_interrupted_run_leaves_no_file_and_no_process(fakes, tmp_path, monkeypatch, number, code, existed):
    monkeypatch.setenv("FAKE_MODE", "slow")
    target = tmp_path / "out"
    if existed:
        target.mkdir()
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, fakes, target], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (fakes / "pids").exists() or len((fakes / "pids").read_text().split()) < 2:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        hidden = list((target if existed else tmp_path).glob(".out.unfinished-*"))
        assert len(hidden) == 1
        driver.send_signal(number)
        assert driver.wait(timeout=30) == code
    finally:
        driver.kill()
        driver.wait()
        left_behind = _running_fakes(fakes)
        for pid in left_behind:
            os.kill(pid, signal.SIGKILL)
    assert list(tmp_path.rglob("*")) == ([target] if existed else [])
    assert left_behind == []


@pytest.fixture
def default_signals():
    """Python's own handlers, whatever this process has inherited."""
    previous = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    }
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
def test_signals_wait_for_the_end_of_a_held_block():
    reached = []

    def terminate_while_held() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            reached.append("end of the block")

    with commands.Interrupts() as interrupts:
        with pytest.raises(SystemExit, match="143"):
            terminate_while_held()
        assert reached == ["end of the block"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with commands.Interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_it_runs_outside_the_main_thread(fakes, console, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_demo(tmp_path / "out", console=console)))
    thread.start()
    thread.join()
    assert results[0].dice["liver"] == pytest.approx(0.9)


@pytest.mark.slow
def test_the_whole_demo_reaches_the_bar_in_time(console, tmp_path):
    result = run_demo(tmp_path / "out", console=console)
    assert list(result.dice) == [name for name in LABELS if name != "background"]
    assert result.dice["liver"] >= 0.6
    assert result.dice["spleen"] >= 0.6
    assert result.seconds < 360
    assert "Where deformable convolutions read" in result.page.read_text()
    log = (result.folder / "logs" / "nnUNetv2_train.log").read_text()
    assert len(re.findall(r"\btrain_loss \S+", log)) == run._EPOCHS
    trained = result.folder / "nnUNet_results" / DATASET_NAME
    assert len(list(trained.glob("nnUNetTrainerDeformUX_AdamW_*/fold_0/checkpoint_final.pth"))) == 1
    # nothing nnU-Net wrote names the work folder, which is gone
    assert ".unfinished-" not in (result.folder / "summary.json").read_text()
