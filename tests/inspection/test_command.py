"""The whole of it on small models: what is written, that it fits the scan, and what bad input leads to."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_models import EARLIER, REGIONS, stock_model, write_case, write_labels
from typer.testing import CliRunner

from nnunet_deform import cli
from nnunet_deform.inspection.command import inspect_cases
from nnunet_deform.inspection.examination import MISSED, examine
from nnunet_deform.inspection.model import InspectionError, load_model, read_case
from nnunet_deform.inspection.pictures import Album, Picture
from nnunet_deform.inspection.windows import Stitched, to_case_grid, windows
from nnunet_deform.layers import DeformConv
from nnunet_deform.plans import deformux

SIZE = (9, 22, 26)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(deformux, "BASE_FEATURES", 4)  # of the models of earlier versions
    monkeypatch.setattr("nnunet_deform.inspection.pictures._PNG_DPI", 30)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(Album, "add", lambda self, name, caption, draw: Picture(name, "", caption))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_case(tmp_path / "images", "a", SIZE, 2)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return stock_model(tmp_path / "models")


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def test_a_stock_model_gets_the_general_sections_and_maps_that_overlay_the_scan(model, images, tmp_path) -> None:
    loaded = load_model(model)
    (page,) = inspect_cases([loaded], images / "a_0000.nii.gz", tmp_path / "out")
    scan = sitk.ReadImage(images / "a_0000.nii.gz")
    maps = {path.name.removesuffix(".nii.gz"): sitk.ReadImage(path) for path in (page.parent / "maps").iterdir()}
    assert {"prediction", "receptive_field"} < maps.keys()
    for image in maps.values():
        assert image.GetSize() == scan.GetSize()
        for part in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(image, part)(), getattr(scan, part)(), rtol=1e-5, atol=1e-5)

    # nnU-Net's own prediction of the same file
    reader = loaded.predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(images / f"a_000{channel}.nii.gz") for channel in (0, 1)])
    expected = loaded.predictor.predict_single_npy_array(array, properties)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(maps["prediction"]), expected)

    text = page.read_text()
    assert re.findall(r"<h2 id[^>]*>([^<]*)", text) == [
        "Prediction",
        "Class activation maps",
        "Effective receptive field",
    ]
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)  # nothing is fetched
    assert len(text) < 8e6
    assert sorted(path.name for path in (page.parent / "png").iterdir()) == [
        "activation.png",
        "prediction.png",
        "receptive_field.png",
    ]
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    assert numbers["receptive_field"]["trained"]["radius_of_half_mm"] > 0
    assert sum(numbers["receptive_field"]["trained"]["channel_shares"]) == pytest.approx(1)
    # The weights are those that training starts from, but for their random numbers.
    assert left_in(tmp_path / "out")[0] == "a"
    assert not any(".partial" in name for name in left_in(tmp_path / "out"))


@pytest.mark.usefixtures("without_pictures")
def test_a_field_lies_where_its_voxel_is_in_the_scan(model, images, tmp_path) -> None:
    (page,) = inspect_cases([load_model(model)], images, tmp_path / "out", classes=["back"])
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    scan = sitk.ReadImage(images / "a_0000.nii.gz")
    for voxel in numbers["voxels"]:
        expected = scan.TransformContinuousIndexToPhysicalPoint(voxel["index_zyx"][::-1])
        np.testing.assert_allclose(voxel["position_mm_xyz"], expected, atol=1e-4)
    field = sitk.GetArrayFromImage(sitk.ReadImage(page.parent / "maps" / "receptive_field.nii.gz"))
    # InstanceNorm lets a logit depend on everything, but most on what is near.
    centre = np.array(numbers["voxels"][0]["index_zyx"])
    assert np.abs(np.argwhere(field > field.max() / 2) - centre).max(axis=0).tolist() <= [1.5, 4, 4]
    assert numbers["classes"] == ["back"]


def test_stitched_patches_give_the_image_back_in_the_case_s_voxels(model, images) -> None:
    loaded = load_model(model)
    case = read_case(loaded, "a", [str(images / f"a_000{channel}.nii.gz") for channel in (0, 1)])
    found = windows(loaded, case)
    assert len(found.slicers) > 1
    stitched = Stitched(found, loaded.patch_size, 2)
    for slicer in found.slicers:
        stitched.add(slicer, found.patch(slicer)[0])
    torch.testing.assert_close(stitched.result(), case.data, rtol=1e-5, atol=1e-5)
    # Positions along each axis of the preprocessed data, brought back, are those of the geometry.
    axes = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in case.data.shape[1:]), indexing="ij")
    )
    back = to_case_grid(loaded, case, axes)
    inner = (3, 10, 12)
    np.testing.assert_allclose(case.geometry.to_case(back[(slice(None), *inner)]), inner, atol=0.01)
    assert not back[:, :, 0].any()  # cropped away by nnU-Net


@pytest.mark.usefixtures("without_pictures")
def test_a_truth_gives_errors_and_dice(model, images, tmp_path) -> None:
    loaded = load_model(model)
    (page,) = inspect_cases([loaded], images, tmp_path / "first")
    image = sitk.ReadImage(page.parent / "maps" / "prediction.nii.gz")
    predicted = sitk.GetArrayFromImage(image)
    truth = predicted.copy()
    truth[4, 10, 10:12] = np.where(predicted[4, 10, 10:12] == 0, 0, 0)
    missed = np.argwhere(predicted == 0)[-1]
    truth[tuple(missed)] = 2
    write_labels(tmp_path / "labels", "a", image, truth)
    (page,) = inspect_cases([loaded], images, tmp_path / "second", labels=tmp_path / "labels")
    errors = sitk.GetArrayFromImage(sitk.ReadImage(page.parent / "maps" / "errors.nii.gz"))
    np.testing.assert_array_equal(errors != 0, predicted != truth)
    assert errors[tuple(missed)] == MISSED
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    both = (predicted == 2).sum() + (truth == 2).sum()
    assert numbers["dice"]["back"] == pytest.approx(2 * ((predicted == 2) & (truth == 2)).sum() / both)
    assert numbers["error_voxels"]["missed"] == 1


@pytest.mark.usefixtures("without_pictures")
def test_regions(images, tmp_path) -> None:
    loaded = load_model(stock_model(tmp_path, REGIONS))
    (page,) = inspect_cases([loaded], images, tmp_path / "out", classes=["whole", "back"])
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    assert numbers["classes"] == ["whole", "back"]
    assert loaded.heads == {"whole": 0, "back": 1}
    assert (page.parent / "maps" / "activation_of_whole_level_1.nii.gz").exists()


def test_two_models_side_by_side(model, images, tmp_path) -> None:
    loaded = load_model(model)
    (page,) = inspect_cases([loaded, loaded], images, tmp_path / "out")
    text = page.read_text()
    assert re.findall(r"<h2 id[^>]*>([^<]*)", text) == [
        "Prediction",
        "Class activation maps 1",
        "Class activation maps 2",
        "Effective receptive field",
    ]
    first, second = json.loads((page.parent / "numbers.json").read_text())
    assert {**first, "seconds": None} == {**second, "seconds": None}
    case = read_case(loaded, "a", [str(images / f"a_000{channel}.nii.gz") for channel in (0, 1)])
    first = examine(loaded, case, ["back"])
    assert examine(loaded, case, ["front"], voxels=first.voxels).voxels == first.voxels
    names = {path.name for path in (page.parent / "maps").iterdir()}
    assert {"1_prediction.nii.gz", "2_prediction.nii.gz"} <= names


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    write_case(tmp_path / "slices", "b", (3, 30, 60), 1)
    return tmp_path / "slices"


def earlier(name: str) -> Path:
    return EARLIER / f"nnUNetTrainer{name}__nnUNetPlans__2d"


@pytest.mark.usefixtures("without_pictures")
def test_offsets_set_by_hand_are_in_the_maps_in_mm(slices, tmp_path) -> None:
    loaded = load_model(earlier("DeformUX"), mirroring=False)
    for layer in loaded.network.modules():
        if isinstance(layer, DeformConv):
            layer.offset.weight.zero_()
            # Along the second axis only, x, by a voxel and a half.
            layer.offset.bias.copy_(torch.tensor([0.0, 1.5]).repeat(layer.taps))
    (page,) = inspect_cases([loaded], slices, tmp_path / "out")
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    assert {layer["level"] for layer in numbers["offsets"].values()} == {1, 2}
    # 60 voxels of 0.5 mm become 30, each 1 mm.
    for name, layer in numbers["offsets"].items():
        stride = 2 ** layer["level"]
        assert layer["mean_mm"] == pytest.approx(1.5 * stride, rel=1e-5)
        image = sitk.ReadImage(page.parent / "maps" / f"offset_of_{name}.nii.gz")
        values = sitk.GetArrayFromImage(image)[:, 2:]
        np.testing.assert_allclose(values, 1.5 * stride, rtol=1e-4)
        for voxel in layer["sampling"].values():
            moved = np.array(voxel["moved_zyx"]) - np.array(voxel["regular_zyx"])
            np.testing.assert_allclose(moved, np.tile([0, 0, 1.5 * stride * 2], (9, 1)), atol=1e-4)
    assert "Where deformable convolutions read" in page.read_text()


def test_anchors_are_the_detector_s_and_at_their_voxel(slices, tmp_path) -> None:
    loaded = load_model(earlier("LightMedSeg"), mirroring=False)
    detector = loaded.network.anchor_detector.coordinates[-1]
    detector.weight.zero_()
    anchors = torch.rand(8, 2)
    detector.bias.copy_(torch.logit(anchors).flatten())
    (page,) = inspect_cases([loaded], slices, tmp_path / "out")
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    (found,) = numbers["anchors"].values()
    corners = np.array(numbers["patch_corners"])
    np.testing.assert_allclose(found["in_patch"], np.tile(anchors.numpy(), (len(corners), 1, 1)), atol=1e-5)
    assert found["movement_mm"] == pytest.approx(0, abs=1e-4)
    places = np.array(found["index_zyx"])
    np.testing.assert_allclose(places[..., 0], np.tile(corners[:, :1], (1, 8)))
    preprocessed = anchors.numpy() * 32 - 0.5 + corners[:, None, 1:]
    np.testing.assert_allclose(places[..., 2], (preprocessed[..., 1] + 0.5) * 2 - 0.5, atol=1e-3)
    names = {path.name for path in (page.parent / "maps").iterdir()}
    assert {"texture.nii.gz", "gate.nii.gz", "experts_1.nii.gz", "branches_level_0_3.nii.gz"} <= names
    assert {"Anchors", "Maps inside the network"} <= set(re.findall(r"<h2 id[^>]*>([^<]*)", page.read_text()))


@pytest.mark.usefixtures("without_pictures")
def test_mixing_weights_are_the_network_s(slices, tmp_path) -> None:
    loaded = load_model(earlier("MAGIC"), mirroring=False)
    (page,) = inspect_cases([loaded], slices, tmp_path / "out")
    (numbers,) = json.loads((page.parent / "numbers.json").read_text())
    case = read_case(loaded, "b", [str(slices / "b_0000.nii.gz")])
    found = windows(loaded, case)
    for number, slicer in enumerate(found.slicers):
        for name, weights in loaded.network.mixing_weights(found.patch(slicer)).items():
            shares = numbers["mixing"][name]["shares"][number]
            np.testing.assert_allclose(shares, (weights / weights.sum())[0], atol=1e-5)
    assert "Mixing of kernels" in page.read_text()


@pytest.mark.usefixtures("without_pictures")
def test_several_cases_are_compared(slices, tmp_path) -> None:
    write_case(slices, "c", (2, 30, 60), 1)
    loaded = load_model(earlier("LightMedSeg"), mirroring=False)
    pages = inspect_cases([loaded], slices, tmp_path / "out")
    assert [page.parent.name for page in pages] == ["b", "c"]
    together = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert together["cases"] == ["b", "c"]
    assert together["anchors"]["anchor_detector"]["between_mm"] >= 0


def test_interrupted_nothing_of_the_case_is_left(model, images, tmp_path) -> None:
    def interrupt(case: str, done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_cases([load_model(model)], images, tmp_path / "out", on_progress=interrupt)
    assert left_in(tmp_path / "out") == []


def test_interrupted_while_writing_nothing_of_the_case_is_left(model, images, tmp_path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_deform.inspection.command.write_map", interrupt)
    with pytest.raises(KeyboardInterrupt):
        inspect_cases([load_model(model)], images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_pictures")
def test_progress_ends_at_its_total(model, images, tmp_path) -> None:
    seen: list[tuple[str, int, int]] = []
    inspect_cases([load_model(model)], images, tmp_path / "out", on_progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] <= seen[-1][2]


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


def test_bad_input_is_one_sentence_and_nothing_is_written(model, images, tmp_path) -> None:
    out = tmp_path / "out"
    good = ("-m", model, "-i", images, "-o", out, "--device", "cpu")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_channel = tmp_path / "one"
    one_channel.mkdir()
    shutil.copy(images / "a_0000.nii.gz", one_channel)
    assert "plans.json does not exist" in fails("-m", empty, *good[2:])
    assert "fold_3/checkpoint_final.pth does not exist; there is -f 0" in fails(*good, "-f", 3)
    assert "class liver is not in nnUNetTrainer__nnUNetPlans__3d_fullres; it has front, back" in fails(
        *good, "--class", "liver"
    )
    assert "has no case" in fails(*good[:2], "-i", empty, *good[4:])
    assert "has 1 channels, and the model wants 2 (CT, PET)" in fails(*good[:2], "-i", one_channel, *good[4:])
    assert "is no folder and no file" in fails(*good[:2], "-i", images / "a_0001.nii.gz", *good[4:])
    assert "has no file of these cases" in fails(*good, "--labels", empty)
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(*good[:4], "-o", tmp_path / "file", *good[6:])
    assert not out.exists()


def test_labels_that_do_not_fit(model, images, tmp_path) -> None:
    scan = sitk.ReadImage(images / "a_0000.nii.gz")
    wrong = sitk.GetArrayFromImage(scan) * 0
    wrong[4, 4, 4] = 7
    write_labels(tmp_path / "strange", "a", scan, wrong)
    with pytest.raises(InspectionError, match=r"has the labels \[7\]"):
        inspect_cases([load_model(model)], images, tmp_path / "out", labels=tmp_path / "strange")
    write_labels(tmp_path / "short", "a", scan[:, :, :-1], wrong[:-1] * 0)
    with pytest.raises(InspectionError, match=r"has \(8, 22, 26\) voxels and the image of a \(9, 22, 26\)"):
        inspect_cases([load_model(model)], images, tmp_path / "out", labels=tmp_path / "short")
    assert not (tmp_path / "out").exists()


def test_a_damaged_image(model, images, tmp_path) -> None:
    (images / "a_0001.nii.gz").write_bytes(b"no image")
    with pytest.raises(InspectionError, match="case a cannot be read"):
        inspect_cases([load_model(model)], images, tmp_path / "out")


def test_a_cascade_needs_its_first_stage(images, tmp_path) -> None:
    loaded = load_model(stock_model(tmp_path, previous="3d_lowres"))
    with pytest.raises(InspectionError, match=r"second stage of a cascade .* 3d_lowres; make it"):
        inspect_cases([loaded], images, tmp_path / "out")


def test_what_is_there_is_not_replaced(model, images, tmp_path) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    with pytest.raises(InspectionError, match="exists; give another folder"):
        inspect_cases([load_model(model)], images, tmp_path / "out")
