"""What status finds, and what it says is to be done."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from nnunet_deform import __version__, activation, trainers
from nnunet_deform.diagnosis import backends, lookup
from nnunet_deform.ops.backends import preflight, triton_

OURS = activation.extension_folder()


# Of each kind: nnU-Net walks through its own folder for each name.
SOME = ["nnUNetTrainerDeformUX", "nnUNetTrainerMAGIC", "nnUNetTrainerSwinUNETR", "nnUNetTrainerCoTr"]


@pytest.mark.parametrize("names", [SOME, pytest.param(trainers.__all__, marks=pytest.mark.slow)], ids=["some", "all"])
def test_status_when_all_is_well(run, pth, monkeypatch, names):
    monkeypatch.setattr(trainers, "__all__", names)
    monkeypatch.setenv(activation.VARIABLE, OURS)
    result = run("status")
    assert result.exit_code == 0, result.output
    assert "All is well" in result.output
    for name in names:
        assert any(name in line and "found" in line for line in result.output.splitlines())
    assert any("cpu" in line and "used" in line for line in result.output.splitlines())


@pytest.mark.parametrize("fault", [None, "was wrong (the output is not finite)"], ids=["passed", "failed"])
def test_status_says_what_the_preflight_remembers(run, pth, monkeypatch, tmp_path, fault):
    """And tries nothing itself."""
    monkeypatch.setenv(activation.VARIABLE, OURS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)
    monkeypatch.setattr(triton_, "unable", lambda *tensors: None)
    monkeypatch.setattr(preflight, "_verdicts", {})
    monkeypatch.setattr(preflight, "_try", lambda trial: pytest.fail("tried"))
    monkeypatch.setattr(lookup, "lookup", lambda name: getattr(trainers, name))  # takes long, and is not the point
    machine = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2.14", "triton": "3.8", "nnunet-deform": "0.1"}
    monkeypatch.setattr(preflight, "machine", lambda device: machine)
    output = run("status").output
    assert "used, if it passes its preflight" in output
    assert "NVIDIA H200" not in output

    trial = preflight.Trial("cpu", "float32", 3, 8, False)
    preflight._remember(preflight._file(trial), trial, fault)
    output = run("status").output
    assert any("NVIDIA H200" in line and (fault or "passed") in line for line in output.splitlines())
    assert "if it passes its preflight" not in output
    assert ("cannot run: it was wrong" in output) == (fault is not None)


def test_status_when_not_active(run, pth, monkeypatch):
    monkeypatch.setattr(trainers, "__all__", SOME)
    result = run("status")
    assert result.exit_code == 1
    assert f"does not name our folder {OURS}" in result.output
    assert "nnunet-deform enable" in result.output
    assert "not found" in result.output


def test_status_when_a_path_points_nowhere(run, pth, monkeypatch):
    monkeypatch.setattr(trainers, "__all__", ["nnUNetTrainerDeformUX", "nnUNetTrainerMAGIC"])
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join(["/nowhere/at [all]", OURS]))
    result = run("status")
    assert result.exit_code == 1
    assert "'/nowhere/at [all]', which is not a folder" in result.output


def test_status_when_another_copy_shadows_ours(run, pth, monkeypatch, tmp_path):
    monkeypatch.setattr(trainers, "__all__", ["nnUNetTrainerDeformUX", "nnUNetTrainerMAGIC"])
    copy = tmp_path / "copied_trainers.py"
    copy.write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerDeformUX(nnUNetTrainer): pass\n"
    )
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join([str(tmp_path), OURS]))
    result = run("status")
    assert result.exit_code == 1
    assert "another class named nnUNetTrainerDeformUX, in copied_trainers" in result.output
    assert result.output.count("Problem:") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import not_there", "broken.py (ModuleNotFoundError: No module named 'not_there'); it imports"),
        ("def f(:", "(SyntaxError: invalid syntax (broken.py, line 1)); it imports"),
        ("raise RuntimeError('stop')", "broken.py (RuntimeError: stop); it imports"),
        ("class nnUNetTrainerDeformUX: pass", "a class named nnUNetTrainerDeformUX in a folder of"),
    ],
)
def test_status_when_a_module_of_the_users_breaks_the_lookup(run, pth, monkeypatch, tmp_path, content, said):
    (tmp_path / "broken.py").write_text(content)
    monkeypatch.setattr(trainers, "__all__", ["nnUNetTrainerDeformUX"])
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join([str(tmp_path), OURS]))
    result = run("status", "nnUNetTrainerDeformUX")
    assert said in only_problem(result)
    assert "look-up fails" in result.output


def test_status_when_the_requested_backend_does_not_exist(active, monkeypatch):
    monkeypatch.setenv("NNUNET_DEFORM_BACKEND", "abacus")
    result = active("status")
    assert result.exit_code == 1
    assert "Problem: On cpu: NNUNET_DEFORM_BACKEND='abacus' names no backend" in result.output


def only_problem(result) -> str:
    assert result.exit_code == 1, result.output
    (problem,) = [line for line in result.output.splitlines() if line.startswith("Problem:")]
    return problem


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("nnUNetTrainerDeformUX_4epochs_AdamW", "its name is nnUNetTrainerDeformUX_AdamW_4epochs."),
        ("nnUNetTrainer_seed1_2epochs3iters", "its name is nnUNetTrainer_2epochs3iters_seed1."),
        ("nnUNetTrainer_unmirrored_seed1_AdamW", "its name is nnUNetTrainer_AdamW_seed1_unmirrored."),
        ("nnUNetTrainer_lr8e-3_AdamW_seed1", "its name is nnUNetTrainer_AdamW_lr8e-3_seed1."),
        ("nnUNetTrainer_AdamW_4epochs_lr1.6e-2", "its name is nnUNetTrainer_AdamW_lr1.6e-2_4epochs."),
        ("nnUNetTrainer_AdamW_lrfast_4epochs", "the learning rate 'fast' after _lr is not a positive number; write"),
        ("nnUNetTrainer_4epochs_lr-1e-3", "the learning rate '-1e-3' after _lr is not a positive number; write"),
        (
            "nnUNetTrainerOfMine_lrfinder",
            "neither a trainer of nnunet-deform or nnU-Net nor a variant of one; if it is",
        ),
        ("nnUNetTrainerDeformUx_AdamW", "(did you mean nnUNetTrainerDeformUX?)"),
        (
            "nnUNetTrainerOfMine",
            "neither a trainer of nnunet-deform or nnU-Net nor a variant of one; if it is",
        ),
    ],
)
def test_status_explains_a_missing_trainer(active, name, answer):
    problem = only_problem(active("status", name))
    assert name in problem
    assert answer in problem
    assert active("status", "nnUNetTrainerDeformUX_AdamW_4epochs").exit_code == 0


def test_status_with_another_copys_folder(active, monkeypatch, tmp_path):
    other = tmp_path / "old" / "nnunet_deform" / "_ext"
    other.mkdir(parents=True)
    (other / "nnunet_deform_ext_trainers.py").touch()
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join([str(other), OURS]))
    assert f"names '{other}', the folder of another copy of nnunet-deform" in only_problem(active("status"))


def test_status_with_an_activation_of_another_version(active, pth):
    pth.write_text("import old_nnunet_deform")
    assert f"{pth} was written by another version of nnunet-deform; run nnunet-deform enable again" in only_problem(
        active("status")
    )
    active("enable")
    assert active("status").exit_code == 0


@pytest.mark.parametrize(
    ("package", "installed", "answer"),
    [
        ("torch", "2.9.1", "torch 2.9.1 is installed, but nnunet-deform"),
        ("torch", "2.9.1", "(everything runs, but nnU-Net excludes it for its slow 3D convolutions); run: pip install"),
        ("torch", "2.5.1", "(its operators are computed without Triton, and torch.compile and the rest were not tried"),
        ("dynamic-network-architectures", "0.3", "run: pip install 'dynamic-network-architectures<0.5,>=0.4.4'"),
        ("nnunet-deform", "0.0.1", f"was installed as 0.0.1, but its files are of {__version__}"),
        ("rich", None, "rich is not installed; run: pip install 'rich>=13'"),
    ],
)
def test_status_with_mismatched_versions(active, monkeypatch, package, installed, answer):
    versions = importlib.metadata.version

    def version(name):
        if name == package and installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed if name == package else versions(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert answer in only_problem(active("status"))


def test_status_with_another_environments_nnunet(active, monkeypatch, tmp_path):
    command = tmp_path / "nnUNetv2_train"
    command.write_text("#!/bin/sh")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert f"nnUNetv2_train on your PATH is {command}" in only_problem(active("status"))


def test_status_with_a_command_that_does_not_find_our_trainers(active, monkeypatch, tmp_path):
    assert "nnUNetv2_train_pretrained" not in active("status").output
    command = tmp_path / "nnUNetv2_train_pretrained"
    command.write_text("#!/bin/sh")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + str(tmp_path))
    result = active("status")
    assert result.exit_code == 0
    assert "Note: nnUNetv2_train_pretrained looks for trainers in nnU-Net's own folder only" in result.output


def test_a_gpu_without_triton_is_told_what_works():
    reasons = {"triton": None, "torch": None}
    assert backends.gpu_note("triton", reasons) is None
    note = backends.gpu_note("torch", reasons | {"triton": "Triton is not installed"})
    assert note.startswith("The triton backend cannot run on cuda: Triton is not installed. The torch backend computes")


def test_status_without_the_compiled_kernel(active, monkeypatch):
    from nnunet_deform.ops.backends import cpu

    reason = "it was not built [no compiler]"
    monkeypatch.setattr(cpu, "_library", lambda: reason)
    result = active("status")
    assert result.exit_code == 0
    assert any("cpu" in line and f"cannot run: {reason}" in line for line in result.output.splitlines())
    assert any("torch" in line and "used" in line for line in result.output.splitlines())


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_status_with_plans_that_cannot_be_used(active, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path / "Dataset001_A"
    folder /= "" if variable == "nnUNet_preprocessed" else "nnUNetTrainer__Plans__2d"
    folder.mkdir(parents=True)
    path = folder / "plans.json"
    plan = {"configurations": {"2d": {"architecture": {"network_class_name": "nnunet_deform.networks.DeformUXNet"}}}}
    path.write_text(json.dumps(plan))
    assert active("status").exit_code == 0
    path.write_text(json.dumps(plan).replace("DeformUXNet", "DeformUXNet3000"))
    problem = only_problem(active("status"))
    assert f"{path} asks for the network nnunet_deform.networks.DeformUXNet3000, which cannot be imported" in problem
    path.write_text(json.dumps(plan)[:20])
    assert f"{path} cannot be read" in only_problem(active("status"))
    for configurations in (None, ["2d"], {"2d": 1}, {"2d": {"architecture": {}}}, {"2d": {"architecture": None}}):
        path.write_text(json.dumps({"configurations": configurations}))
        assert f"{path} is damaged: its configurations" in only_problem(active("status"))
    path.write_text(json.dumps({"configurations": {"2d": {"UNet_class_name": "PlainConvUNet"}}}))
    assert active("status").exit_code == 0


def test_status_with_models_that_cannot_be_used(active, monkeypatch, tmp_path):
    import torch

    from nnunet_deform.trainers import checkpoints

    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    def save(trainer: str, of_version: str) -> Path:
        path = tmp_path / "Dataset001_A" / f"{trainer}__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth"
        path.parent.mkdir(parents=True)
        torch.save({"weight": torch.ones(3)}, path)
        monkeypatch.setattr(checkpoints, "__version__", of_version)
        checkpoints._record_versions(str(path))
        return path

    ours = save("nnUNetTrainerDeformUX", __version__)
    assert torch.load(ours)["weight"].sum() == 3
    result = active("status")
    assert result.exit_code == 0
    assert "Note:" not in result.output
    old = save("nnUNetTrainerMAGIC", "0.0.1")
    result = active("status")
    assert result.exit_code == 0
    assert f"Note: {old.parents[1]} was trained with nnunet-deform 0.0.1, {__version__} is installed" in result.output
    gone = save("nnUNetTrainerOfMine", __version__)
    problem = only_problem(active("status"))
    assert f"{gone.parents[1]} cannot be used for prediction here: nnUNetTrainerOfMine is neither" in problem
    gone.unlink()
    ours.write_bytes(ours.read_bytes()[:-100])
    assert f"the checkpoint {ours} is damaged" in only_problem(active("status"))
