import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnunet_deform import cli
from nnunet_deform.cli.plan import Arch, Preset
from nnunet_deform.plans.planners import PLANNERS, PRESETS


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """The preprocessed folder of a dataset of one case that nnU-Net's planner has planned."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        (tmp_path / variable / "Dataset501_Small").mkdir(parents=True)
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 20,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": {"case": {"images": ["case_0000.nii.gz"], "label": "case.nii.gz"}},
    }
    fingerprint = {
        "spacings": [[1, 1, 1]],
        "shapes_after_crop": [[40, 56, 40]],
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
    }
    (tmp_path / "nnUNet_raw" / "Dataset501_Small" / "dataset.json").write_text(json.dumps(description))
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset501_Small"
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    ExperimentPlanner(501).plan_experiment()
    return folder


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(cli.app, ["plan", *arguments])


def test_the_choices_are_the_planners():
    assert [arch.value for arch in Arch] == list(PLANNERS)
    assert [preset.value for preset in Preset] == list(PRESETS)


def test_it_says_what_it_chose_and_what_is_missing(run, dataset: Path):
    (dataset / "nnUNetPlans_3d_fullres").mkdir()
    (dataset / "nnUNetPlans_3d_fullres" / "case.pkl").touch()
    result = run("-d", "501", "--arch", "deformux")
    assert result.exit_code == 0, result.output
    rows = [line.replace("│", " ").split() for line in result.output.splitlines()]
    # 59.6 M counted elements of 560 M at batch 2, 2.10 bytes each and not 3.95; the U-Net counts 19.2 M.
    assert ["3d_fullres", "nnUNetDeformUXPlans", "40", "x", "56", "x", "40", "2", "4", "0.5"] in rows
    assert ["nnUNetPlans", "40", "x", "56", "x", "40", "2", "4", "0.3"] in rows
    assert "Patch and batch: those of nnUNetPlans, so that only the network differs" in result.output
    assert f"Wrote {dataset / 'nnUNetDeformUXPlans.json'}" in result.output
    assert "nnUNetPlans_3d_fullres (3d_fullres): preprocessed already" in result.output
    assert "nnUNetPlans_2d (2d): 0 of 1 cases are there" in result.output
    last = result.output.strip().splitlines()[-1]
    assert last == "To preprocess what is missing: nnUNetv2_preprocess -d 501 -plans_name nnUNetPlans -c 2d"


def test_presets_and_vram(run, dataset: Path):
    result = run("-d", "501", "--arch", "lightmedseg", "--preset", "L")
    assert result.exit_code == 0, result.output
    assert "Patch and batch: as large as 24 GB allow, by nnU-Net's search." in result.output
    large = json.loads((dataset / "nnUNetLightMedSegLPlans.json").read_text())
    assert large["plans_name"] == "nnUNetLightMedSegLPlans"
    result = run("-d", "Dataset501_Small", "--arch", "lightmedseg", "--vram", "1")
    assert result.exit_code == 0, result.output
    small = json.loads((dataset / "nnUNetLightMedSegPlans.json").read_text())
    batches = [plans["configurations"]["3d_fullres"]["batch_size"] for plans in (small, large)]
    # 140 M elements, at (10.6 M * 2.53 + 89.6 k voxels * 8 channels * 26.25) / 5.13 for a sample; and the whole
    # dataset, 20 images of this size.
    assert batches == [15, 20]


def test_recomputed_blocks_are_said_with_what_they_cost(run, dataset: Path):
    line = (
        '3d_fullres: blocks at full resolution are computed again in the backward pass (recompute="blocks"), because '
        "{}; a training step takes about " + f"{PLANNERS['deformux'].blocks_step_time:.2f} times as long."
    )
    for options, because in (
        (("--vram", "0.4"), "the patch would be 40 x 56 x 32 without it"),
        (("--recompute", "blocks"), "it was asked for"),
    ):
        result = run("-d", "501", "--arch", "deformux", "--overwrite", *options)
        assert result.exit_code == 0, result.output
        assert line.format(because) in result.output.splitlines()
    result = run("-d", "501", "--arch", "deformux", "--overwrite", "--recompute", "cheap", "--vram", "0.4")
    assert "computed again" not in result.output


def test_two_levels_come_with_a_warning(run, dataset: Path):
    base = json.loads((dataset / "nnUNetPlans.json").read_text())
    network = base["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["n_stages"] = 2
    for key in ("strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage"):
        network[key] = network[key][:2]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][:1]
    (dataset / "nnUNetPlans.json").write_text(json.dumps(base))
    result = run("-d", "501", "--arch", "deformux")
    assert result.exit_code == 0, result.output
    assert "3d_fullres: with 2 levels nnU-Net's deep supervision gives NaN" in result.output
    assert "2d: with" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-d", "502", "--arch", "magic"), "there is no dataset with number 502"),
        (("-d", "501", "--arch", "magic", "--base", "nnUNetNoPlans"), "there is no base plan"),
        (("-d", "501", "--arch", "magic", "--preset", "M", "--vram", "8"), "--preset M and --vram 8 are two memory"),
        (("-d", "501", "--arch", "magic", "--vram", "0"), "a memory target of 0.0 GB is not positive"),
        (("-d", "501", "--arch", "magic", "--vram", "0.001"), "0.001 GB are too few for MAGIC"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(run, dataset: Path, arguments, message):
    before = sorted(dataset.iterdir())
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout.strip() == ""
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(dataset.iterdir()) == before


def test_an_existing_plan_needs_overwrite(run, dataset: Path):
    target = dataset / "nnUNetMAGICPlans.json"
    target.write_text("mine")
    result = run("-d", "501", "--arch", "magic")
    assert result.exit_code == 1
    assert "already exists; --overwrite" in result.stderr
    assert target.read_text() == "mine"
    assert run("-d", "501", "--arch", "magic", "--overwrite").exit_code == 0
    assert json.loads(target.read_text())["plans_name"] == "nnUNetMAGICPlans"
