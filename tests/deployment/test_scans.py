"""Whole scans through ONNX Runtime, beside nnU-Net's own prediction; and what is said of bad input."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from exported_models import LABELS, REGIONS, dataset_json, plans, write_model, write_scan
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from typer.testing import CliRunner

from nnunet_deform import cli

pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
import onnx

from nnunet_deform.deployment.export import export_onnx
from nnunet_deform.deployment.exported import read_exported


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["predict-onnx", *map(str, arguments)])


def exported(folder: Path, folds: int = 1) -> list[Path]:
    files = [folder.parent / f"{folder.name}_{fold}.onnx" for fold in range(folds)]
    for fold, file in enumerate(files):
        export_onnx(folder, file, fold=str(fold))
    return files


def predicted_by_nnunet(folder: Path, scans: list[list[Path]], output: Path, folds: int, **options: Any) -> None:
    output.mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(str(folder), tuple(range(folds)), "checkpoint_final.pth")
    names = [str(output / files[0].name.removesuffix("_0000.nii.gz")) for files in scans]
    predictor.predict_from_files_sequential([[*map(str, files)] for files in scans], names, save_probabilities=True)


@pytest.mark.parametrize(
    ("patch_size", "labels", "channels", "folds"),
    [((16, 16), LABELS, 1, 2), ((8, 16, 16), REGIONS, 2, 1)],
    ids=["2d, two folds", "3d, regions, ignore label, two channels"],
)
def test_a_scan_is_predicted_as_nnunet_predicts_it(tmp_path, patch_size, labels, channels, folds):
    folder = write_model(tmp_path / "model", plans(patch_size, channels), dataset_json(labels, channels), folds)
    for seed, name in enumerate(("first", "second_0001")):
        write_scan(tmp_path / "scans", name, channels, seed=seed)
    names = ("first", "second_0001")
    scans = [[tmp_path / "scans" / f"{name}_{c:04d}.nii.gz" for c in range(channels)] for name in names]
    predicted_by_nnunet(folder, scans, tmp_path / "theirs", folds)
    models = exported(folder, folds)
    # The file alone suffices.
    folder.rename(tmp_path / "elsewhere")
    output = tmp_path / "deep" / "ours"
    result = run("-i", tmp_path / "scans", "-o", output, *models, "--save_probabilities", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert f"Wrote 2 segmentations into {output}." in result.output.replace("\n", "")
    per_case = {f"{name}{ending}" for name in names for ending in (".nii.gz", ".npz", ".pkl")}
    assert {path.name for path in output.iterdir()} == {*per_case, "dataset.json", "plans.json", "predict_onnx.json"}
    for name in names:
        ours, theirs = (sitk.ReadImage(str(f / f"{name}.nii.gz")) for f in (output, tmp_path / "theirs"))
        for of in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelIDTypeAsString"):
            assert getattr(ours, of)() == getattr(theirs, of)()
        expected = np.load(tmp_path / "theirs" / f"{name}.npz")["probabilities"].astype(np.float32)
        np.testing.assert_allclose(np.load(output / f"{name}.npz")["probabilities"], expected, atol=4e-3)
        differ = sitk.GetArrayFromImage(ours) != sitk.GetArrayFromImage(theirs)
        assert differ.mean() < 1e-3
        margin = abs(expected - 0.5).min(0) if labels is REGIONS else np.diff(np.sort(expected, axis=0), axis=0)[-1]
        assert (margin[differ] < 4e-3).all()
        assert set(np.unique(sitk.GetArrayFromImage(ours))) == {0, 1, 2}
        with (output / f"{name}.pkl").open("rb") as file:
            assert (
                pickle.load(file)["shape_before_cropping"]
                == pickle.loads((tmp_path / "theirs" / f"{name}.pkl").read_bytes())["shape_before_cropping"]
            )
    for name in ("plans.json", "dataset.json"):
        assert json.loads((output / name).read_text()) == json.loads((tmp_path / "elsewhere" / name).read_text())
    about = json.loads((output / "predict_onnx.json").read_text())
    assert [model["fold"] for model in about["models"]] == [str(fold) for fold in range(folds)]
    assert about["mirror_axes"] == [0, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    return exported(write_model(folder, plans((16, 16)), dataset_json()))[0]


@pytest.fixture
def scans(tmp_path) -> Path:
    write_scan(tmp_path / "scans", "first")
    return tmp_path / "scans"


def changed(model: Path, path: Path, **metadata: Any) -> Path:
    """The file with other metadata; None takes one away."""
    loaded = onnx.load(model)
    values = {entry.key: entry.value for entry in loaded.metadata_props}
    values |= {key: None if value is None else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(loaded, {key: value for key, value in values.items() if value is not None})
    onnx.save(loaded, path)
    return path


def refused(tmp_path: Path, *arguments: object, output: Path | None = None) -> str:
    """The one sentence; nothing was written."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run("-o", tmp_path / "out" if output is None else output, *arguments)
    assert result.exit_code == 1, result.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert result.stdout == ""
    assert result.stderr.count("Error:") == 1
    return result.stderr


def test_options_are_nnunets(tmp_path, model, scans):
    folder = model.parent / "model"
    predicted_by_nnunet(
        *(folder, [[scans / "first_0000.nii.gz"]], tmp_path / "theirs", 1), use_mirroring=False, tile_step_size=1.0
    )
    result = run(
        *("-i", scans, "-o", tmp_path / "ours", model, "--disable_tta", "-step_size", 1, "--save_probabilities")
    )
    assert result.exit_code == 0, result.output
    ours, theirs = (np.load(tmp_path / name / "first.npz")["probabilities"] for name in ("ours", "theirs"))
    np.testing.assert_allclose(ours, theirs, atol=4e-3)
    # And these options matter.
    assert run("-i", scans, "-o", tmp_path / "mirrored", model, "--save_probabilities").exit_code == 0
    assert abs(np.load(tmp_path / "mirrored" / "first.npz")["probabilities"] - ours).max() > 0.02


def test_a_prediction_goes_on(tmp_path, model, scans):
    assert run("-i", scans, "-o", tmp_path / "out", model, "--disable_tta").exit_code == 0
    written = (tmp_path / "out" / "first.nii.gz").stat().st_mtime_ns
    write_scan(scans, "second")
    result = run("-i", scans, "-o", tmp_path / "out", model, "--disable_tta", "--continue_prediction")
    assert result.exit_code == 0, result.output
    assert "Wrote 1 segmentations" in result.output
    assert "1 were there" in result.output
    assert (tmp_path / "out" / "first.nii.gz").stat().st_mtime_ns == written
    assert (tmp_path / "out" / "second.nii.gz").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"plans.json": None}, "does not hold plans.json: it was not written by nnunet-deform export, or by a version"),
        ({"fold": None, "trainer": None}, "does not hold trainer, fold: it was not written by nnunet-deform export"),
    ],
)
def test_a_foreign_model_is_refused(tmp_path, model, scans, metadata, message):
    assert message in refused(tmp_path, "-i", scans, changed(model, tmp_path / "foreign.onnx", **metadata))


def test_what_other_programs_added_to_the_file_does_not_matter(tmp_path, model):
    loaded = onnx.load(model)
    loaded.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    onnx.save(loaded, tmp_path / "quantized.onnx")
    assert read_exported(tmp_path / "quantized.onnx", threads=1).plans == read_exported(model, threads=1).plans


def test_a_file_that_is_no_model_is_refused(tmp_path, scans):
    (tmp_path / "text.onnx").write_text("no model")
    assert f"ONNX Runtime cannot read {tmp_path}/text.onnx" in refused(tmp_path, "-i", scans, tmp_path / "text.onnx")
    assert "none.onnx does not exist" in refused(tmp_path, "-i", scans, tmp_path / "none.onnx")


def test_models_that_do_not_go_together_are_refused(tmp_path, model, scans):
    same = changed(model, tmp_path / "same.onnx")
    assert "are both fold 0; give each fold once" in refused(tmp_path, "-i", scans, model, same)
    other = changed(model, tmp_path / "other.onnx", fold="1", trainer="nnUNetTrainerMAGIC")
    message = refused(tmp_path, "-i", scans, model, other)
    assert "have different trainers (nnUNetTrainer and nnUNetTrainerMAGIC)" in message
    assert "nnUNetv2_ensemble" in message


def test_the_second_stage_of_a_cascade_is_refused(tmp_path, model, scans):
    cascade = plans((16, 16))
    cascade["configurations"]["2d"]["previous_stage"] = "3d_lowres"
    message = refused(tmp_path, "-i", scans, changed(model, tmp_path / "cascade.onnx", **{"plans.json": cascade}))
    assert "is 2d, the second stage of a cascade: besides the image it takes the segmentation of 3d_lowres" in message


def test_a_preprocessor_that_is_not_here_is_named(tmp_path, model, scans):
    own = plans((16, 16))
    own["configurations"]["2d"]["preprocessor_name"] = "OurPreprocessor"
    message = refused(tmp_path, "-i", scans, changed(model, tmp_path / "own.onnx", **{"plans.json": own}))
    assert "was trained on data of the preprocessor OurPreprocessor, which this nnU-Net does not have" in message


def test_scans_that_do_not_fit_are_refused(tmp_path, model, scans):
    (tmp_path / "empty").mkdir()
    wanted = "the model wants _0000.nii.gz (T1) of each case"
    assert f"empty holds no scans; {wanted}" in refused(tmp_path, "-i", tmp_path / "empty", model)
    assert "nowhere is not a folder" in refused(tmp_path, "-i", tmp_path / "nowhere", model)
    write_scan(scans, "first", channels=2)
    assert f"first in {scans} has _0000, _0001, but {wanted}" in refused(tmp_path, "-i", scans, model)
    (scans / "first_0001.nii.gz").rename(scans / "first.nii.gz")
    assert f"first.nii.gz does not end with a channel; {wanted}" in refused(tmp_path, "-i", scans, model)


def test_a_damaged_scan_is_refused_before_anything_is_predicted(tmp_path, model, scans):
    write_scan(scans, "second")
    damaged = scans / "second_0000.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    message = refused(tmp_path, "-i", scans, model)
    assert f"{damaged} is damaged: it ends early or cannot be read" in message


def test_a_scan_that_its_reader_refuses_ends_the_prediction_after_whole_cases(tmp_path, model, scans):
    nrrd = changed(model, tmp_path / "nrrd.onnx", **{"dataset.json": dataset_json(ending=".nrrd")})
    (scans / "a_0000.nrrd").write_text("no image")
    message = refused(tmp_path, "-i", scans, nrrd)
    assert "nnU-Net cannot read a (" in message
    assert "check the files a_0000.nrrd" in message
    (scans / "a_0000.nrrd").rename(scans / "z_0000.nrrd")
    write_scan(scans, "b", ending=".nrrd")
    result = run("-i", scans, "-o", tmp_path / "out", nrrd, "--disable_tta")
    assert result.exit_code == 1
    assert "nnU-Net cannot read z (" in result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("b.nrrd", "dataset.json", "plans.json", "predict_onnx.json")
    ]


def test_an_output_that_would_spoil_something_is_refused(tmp_path, model, scans):
    (tmp_path / "link").symlink_to(scans)
    for output in (scans, tmp_path / "link"):
        assert "is the folder of the scans; name another folder" in refused(tmp_path, "-i", scans, model, output=output)
    (tmp_path / "file").touch()
    assert "file is a file; name a folder" in refused(tmp_path, "-i", scans, model, output=tmp_path / "file")


def test_a_step_beyond_the_patch_is_refused(tmp_path, model, scans):
    message = refused(tmp_path, "-i", scans, model, "-step_size", 1.5)
    assert "-step_size 1.5 must be more than 0 and at most 1" in message
