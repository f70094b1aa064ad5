"""Damaged or wrong input ends in a clear error, and nothing of the user's is overwritten."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from phantoms import SCENARIOS
from typer.testing import CliRunner

from nnunet_deform import __version__, cli
from nnunet_deform.diagnosis.images import incomplete_images
from nnunet_deform.trainers import checkpoints
from nnunet_deform.trainers.variants import find_trainer

DATASET = "Dataset999_Phantom"
CPU = torch.device("cpu")
SHORT = "nnUNetTrainerLightMedSeg_2epochs1iters_seed0"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change) -> None:
    image = sitk.ReadImage(str(path))
    path.unlink()
    sitk.WriteImage(change(image), str(path))


def strange_label(image: sitk.Image) -> sitk.Image:
    values = sitk.GetArrayFromImage(image)
    values[0, 0, 0] = 7
    changed = sitk.GetImageFromArray(values)
    changed.CopyInformation(image)
    return changed


def other_spacing(image: sitk.Image) -> sitk.Image:
    image.SetSpacing([2.0, 1.0, 1.0])
    return image


def smaller(image: sitk.Image) -> sitk.Image:
    return image[1:]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("labelsTr/case_1.nii.gz", strange_label, "Unexpected labels"),
        ("imagesTr/case_1_0000.nii.gz", other_spacing, "Spacing mismatch"),
        ("labelsTr/case_1.nii.gz", smaller, "Shape mismatch"),
    ],
    ids=["label-value", "spacing", "shape"],
)
def test_a_dataset_that_does_not_fit_together(workplace, capsys, file, change, said) -> None:
    root = workplace(SCENARIOS["isotropic"])
    edit(root / "raw" / DATASET / file, change)
    before = contents(root)
    with pytest.raises(RuntimeError, match="Please check text output above to see which one"):
        verify_dataset_integrity(str(root / "raw" / DATASET), 1)
    assert said in capsys.readouterr().out
    assert contents(root) == before


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_truncated_image(tmp_path, suffix) -> None:
    """ITK reads most of them without an error, so there is a command that does not."""
    values = np.random.default_rng(0).normal(size=(5, 20, 33)).astype(np.float32)
    path = tmp_path / f"scan_0000{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    complete = path.read_bytes()
    command = ["check-images", str(tmp_path)]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    for length in (len(complete) - 1, len(complete) // 2, 500, 100, 0):
        path.write_bytes(complete[:length])
        result = CliRunner().invoke(cli.app, command, env={"COLUMNS": "300"})
        assert result.exit_code == 1
        assert f"{path} is damaged: " in result.output
        assert path.read_bytes() == complete[:length]
    path.write_bytes(complete)
    assert list(incomplete_images(tmp_path)) == []
    # As ITK reads it, half of the voxels are others.
    path.write_bytes(complete[: len(complete) // 2])
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) != values).mean() > 0.4


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [(70, 7, "data code 7 not recognized"), (110, 0, "vox offset 128 too low"), (111, 255, "NaN")],
)
def test_a_damaged_header(tmp_path, offset, value, said) -> None:
    path = tmp_path / "scan_0000.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 20, 33), np.float32)), str(path))
    content = bytearray(path.read_bytes())
    content[offset] = value
    path.write_bytes(content)
    (tmp_path / "theirs_0000.nii").write_bytes(b"")
    one, other = incomplete_images(tmp_path)
    assert f"{path} is damaged: its header is invalid (" in one
    assert said in one
    assert "theirs_0000.nii is damaged" in other


def test_a_damaged_checkpoint_is_not_continued_from(make_trainer) -> None:
    seeded = find_trainer("nnUNetTrainerLightMedSeg_4epochs1iters_seed0")
    trainer = make_trainer(seeded)
    trainer.initialize()
    path = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(path))
    complete = path.read_bytes()
    flipped = bytearray(complete)
    flipped[len(complete) // 2] ^= 255
    for damaged in (complete[: len(complete) // 2], complete[:-1], b"", bytes(flipped)):
        path.write_bytes(damaged)
        again = make_trainer(seeded)
        with pytest.raises(RuntimeError, match=r"checkpoint_latest\.pth is damaged .* Move it away and run the same"):
            maybe_load_checkpoint(again, True, False)
        assert path.read_bytes() == damaged
    path.write_bytes(complete)
    maybe_load_checkpoint(make_trainer(seeded), True, False)


def test_a_checkpoint_of_another_version_is_continued_with_a_warning(make_trainer, monkeypatch) -> None:
    seeded = find_trainer("nnUNetTrainerLightMedSeg_4epochs1iters_seed0")
    trainer = make_trainer(seeded)
    trainer.initialize()
    path = str(Path(trainer.output_folder, "checkpoint_latest.pth"))
    for version, warns in ((__version__, False), ("0.0.1", True)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "__version__", version)
            trainer.save_checkpoint(path)
        assert checkpoints.checkpoint_versions(path)["nnunet-deform"] == version
        again = make_trainer(seeded)
        again.load_checkpoint(path)
        for name in ("checkpoint", "filename_or_checkpoint"):  # nnU-Net's master, 2.8.1
            again.load_checkpoint(**{name: path})
        log = Path(again.log_file).read_text()
        assert ("was written by nnunet-deform 0.0.1, this is" in log) == warns
        one, other = trainer.network.state_dict(), again.network.state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda text: text[: len(text) // 2], ValueError, "line"),
        (lambda text: text.replace('"3d_fullres"', '"3d_full"'), RuntimeError, "configuration 3d_fullres not found"),
        (lambda text: text.replace('"strides"', '"stride"'), ValueError, "has no strides"),
    ],
    ids=["truncated", "no-configuration", "no-strides"],
)
def test_a_damaged_plan(workplace, change, error, said) -> None:
    root = workplace(SCENARIOS["isotropic"])
    path = root / "preprocessed" / DATASET / "nnUNetPlans.json"
    path.write_text(change(json.dumps(json.loads(path.read_text()))))
    before = contents(root)
    with pytest.raises(error, match=said):
        get_trainer_from_args("999", "3d_fullres", 0, SHORT, device=CPU)
    assert contents(root) == before
    assert not (root / "results").exists()


def test_a_full_disk(workplace, monkeypatch, tmp_path) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        workplace(SCENARIOS["isotropic"])
        monkeypatch.setenv("nnUNet_results", str(disk))
        theirs = disk / "theirs.txt"
        theirs.write_text("keep")
        trainer = get_trainer_from_args("999", "3d_fullres", 0, SHORT, device=CPU)
        trainer.initialize()
        path = Path(trainer.output_folder, "checkpoint_latest.pth")
        trainer.save_checkpoint(str(path))
        complete = path.read_bytes()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filling").write_bytes(bytes(free - len(complete) // 2))
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*is the disk full\? .* earlier checkpoints"):
            trainer.save_checkpoint(str(path))
        assert path.read_bytes() == complete
        assert theirs.read_text() == "keep"
        assert [p.name for p in path.parent.glob("checkpoint*")] == ["checkpoint_latest.pth"]
        (disk / "filling").unlink()
        trainer.save_checkpoint(str(path))
        assert path.read_bytes() == complete
    finally:
        subprocess.run(["umount", str(disk)], check=True)
