"""The whole life of a model in nnU-Net, in eight scenarios: the main trainers, and with ``-m slow`` all others."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import SCENARIOS, Scenario, use
from stock_prediction import predictor_of

from nnunet_deform import activation, trainers
from nnunet_deform.plans.planners import PLANNERS

MAIN = ("nnUNetTrainerDeformUX", "nnUNetTrainerLightMedSeg", "nnUNetTrainerMAGIC", "nnUNetTrainerMAGICResEnc")
CPU = torch.device("cpu")
DATASET = "Dataset999_Phantom"

# They differ from another in numbers.
LARGER = [
    *(f"nnUNetTrainer{network}_{size}" for network in ("MedNeXt", "Primus", "PrimusV2", "PrimusV3") for size in "BML"),
    "nnUNetTrainerNnFormer_96",
    "nnUNetTrainerUNesT_L",
]


def quick(name: str, scenario: str) -> bool:
    """The fastest network in every scenario, and each network in the fastest of two and of three axes: what labels and
    a cascade ask of a network are its numbers of channels."""
    return name == "nnUNetTrainerMAGIC" or (name in MAIN and scenario in ("2d", "ignore"))


all_lives = pytest.mark.parametrize(
    ("scenario", "name"),
    [
        pytest.param(
            scenario, name, id=f"{scenario.id}-{name}", marks=() if quick(name, scenario.id) else pytest.mark.slow
        )
        for scenario in SCENARIOS.values()
        for name in trainers.__all__
        if name not in LARGER
    ],
)
# The first three have options that choose among three axes.
ONLY_3D = (
    "nnUNetTrainerDeformUX_xy",
    "nnUNetTrainerDeformUX_xz",
    "nnUNetTrainerDeformUX_yz",
    "nnUNetTrainerPrimus_S",
    "nnUNetTrainerPrimusV2_S",
    "nnUNetTrainerPrimusV3_S",
)
# Patches of as many voxels or fewer are refused.
TOO_SMALL = {"nnUNetTrainerSwinUNETR": 32, "nnUNetTrainerUNetPlusPlus": 16, "nnUNetTrainerMedNeXt_S": 16}


def train(name: str, configuration: str, fold: int, **options: bool) -> None:
    run_training("999", configuration, fold, name, device=CPU, **options)


def model_folder(root: Path, name: str, configuration: str) -> Path:
    return root / "results" / DATASET / f"{name}__nnUNetPlans__{configuration}"


def predict(root: Path, folder: Path, output: Path, previous: Path | None = None) -> np.ndarray:
    """The segmentation of the test image, whose geometry has been compared with the image's."""
    output.mkdir()
    raw = root / "raw" / DATASET
    predictor_of(folder, mirroring=False).predict_from_files_sequential(
        str(raw / "imagesTs"), str(output), folder_with_segs_from_prev_stage=None if previous is None else str(previous)
    )
    segmentation = sitk.ReadImage(str(output / "test_0.nii.gz"))
    image = sitk.ReadImage(str(raw / "imagesTs" / "test_0_0000.nii.gz"))
    assert segmentation.GetSize() == image.GetSize()
    assert segmentation.GetSpacing() == pytest.approx(image.GetSpacing())
    return sitk.GetArrayFromImage(segmentation)


def check_validation(folder: Path, scenario: Scenario, fold: int, cases: Sequence[str]) -> None:
    """What nnU-Net's validation wrote: scores, and probabilities that are some."""
    validation = folder / f"fold_{fold}" / "validation"
    summary = json.loads((validation / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(cases)
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    for case in cases:
        probabilities = np.load(validation / f"{case}.npz")["probabilities"].astype(np.float64)
        heads = 2 if scenario.regions else 3
        assert probabilities.shape == (heads, *scenario.size)
        assert probabilities.min() >= 0
        assert probabilities.max() <= 1
        total = probabilities.sum(axis=0)
        # Softmax sums to one; the sigmoids of overlapping regions do not.
        assert np.allclose(total, 1, atol=2e-3) != scenario.regions
        segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(validation / f"{case}.nii.gz")))
        if scenario.regions:
            expected = np.where(probabilities[1] > 0.5, 2, np.where(probabilities[0] > 0.5, 1, 0))
        else:
            expected = probabilities.argmax(axis=0)
        # Probabilities are stored in half precision, so ties may break otherwise.
        assert (segmentation == expected).mean() > 0.999


@all_lives
def test_train_validate_continue_predict_share(workplace, monkeypatch, tmp_path, name, scenario) -> None:
    root = workplace(scenario)
    # Validation with mirroring is eight times the work; the mean over all mirrorings has a test of its own below.
    trainer = f"{name}_1epochs1iters_seed0" + ("" if scenario.id == "isotropic" else "_unmirrored")
    if scenario.id == "2d" and name in ONLY_3D:
        with pytest.raises(NotImplementedError, match="use a 3D configuration"):
            train(trainer, "2d", 0)
        return
    if name == "nnUNetTrainerCoTr":
        with pytest.raises(NotImplementedError, match="CoTr needs at least 4 poolings"):
            train(trainer, scenario.configurations[0], 0)
        assert not (root / "results").exists()
        return
    if scenario.id != "2d" and name.endswith("_BN"):
        with pytest.raises(NotImplementedError, match="use the 2d configuration"):
            train(trainer, scenario.configurations[0], 0)
        assert not (root / "results").exists()
        return
    # The first stage of a cascade has half the patch.
    if max(scenario.patch) // len(scenario.configurations) <= TOO_SMALL.get(name, 0):
        with pytest.raises(NotImplementedError, match=f"plan with a patch of more than {TOO_SMALL[name]} voxels"):
            train(trainer, scenario.configurations[0], 0)
        assert not (root / "results").exists()
        return
    # In the cascade, the first stage predicts what the second one trains on: every fold's validation cases.
    folds = {0: ["case_0"], 1: ["case_1", "case_2", "case_3"]} if len(scenario.configurations) > 1 else {0: ["case_0"]}
    previous = None
    for configuration in scenario.configurations:
        folder = model_folder(root, trainer, configuration)
        for fold, cases in folds.items():
            train(trainer, configuration, fold, export_validation_probabilities=True)
            check_validation(folder, scenario, fold, cases)
        unchanged = {
            path: path.read_bytes() for path in (folder / "fold_0").rglob("*") if path.suffix in (".pth", ".gz")
        }
        assert len(unchanged) == 3
        # Validation alone, and a finished training continued.
        train(trainer, configuration, 0, only_run_validation=True)
        train(trainer, configuration, 0, continue_training=True)
        for path, content in unchanged.items():
            assert path.read_bytes() == content, path
        output = tmp_path / f"predicted_{configuration}"
        segmentation = predict(root, folder, output, previous)
        assert set(np.unique(segmentation)) <= {0, 1, 2}
        previous = output

    if len(folds) > 1:
        models = [{"plans": "nnUNetPlans", "configuration": c, "trainer": trainer} for c in scenario.configurations]
        best = find_best_configuration("999", models, num_processes=1, folds=tuple(folds))
        assert sum(key.startswith("ensemble___") for key in best["all_results"]) == 1
        assert len(best["all_results"]) == 3
        assert all(0 <= dice <= 1 for dice in best["all_results"].values())
    else:
        export_pretrained_model("999", str(tmp_path / "model.zip"), scenario.configurations, trainer, folds=(0,))
        use(tmp_path / "elsewhere", monkeypatch)
        install_model_from_zip_file(str(tmp_path / "model.zip"))
        installed = model_folder(tmp_path / "elsewhere", trainer, configuration)
        assert np.array_equal(predict(root, installed, tmp_path / "predicted_elsewhere"), segmentation)


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_nnunets_own_trainer_and_prediction_take_our_plans_without_activation(
    workplace, monkeypatch, tmp_path, planner
) -> None:
    root = workplace(SCENARIOS["2d"])
    monkeypatch.delenv(activation.VARIABLE)
    plan = planner(999)
    plan.plan_experiment()
    trainer = get_trainer_from_args("999", "2d", 0, "nnUNetTrainer", plan.plans_identifier, device=CPU)
    assert type(trainer) is nnUNetTrainer
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    trainer.perform_actual_validation()
    folder = root / "results" / DATASET / f"nnUNetTrainer__{plan.plans_identifier}__2d"
    summary = json.loads((folder / "fold_0" / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    network = predictor_of(folder).network
    assert type(network).__module__.startswith("nnunet_deform.networks.")
    weights = trainer.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert set(np.unique(predict(root, folder, tmp_path / "predicted"))) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("scenario", "name"),
    [
        pytest.param(SCENARIOS[scenario], name, id=f"{scenario}-{name}", marks=() if fast else pytest.mark.slow)
        for scenario in ("2d", "odd")
        for name in MAIN
        for fast in [scenario == "2d" or name == "nnUNetTrainerMAGIC"]
    ],
)
def test_mirrored_prediction_is_the_mean_over_all_mirrorings(workplace, name, scenario) -> None:
    root = workplace(scenario)
    (configuration,) = scenario.configurations
    trainer = get_trainer_from_args("999", configuration, 0, f"{name}_1epochs1iters_seed0", device=CPU)
    trainer.run_training()
    image = torch.randn(scenario.channels, *([1] if len(scenario.patch) == 2 else []), *scenario.patch)
    predictor = predictor_of(model_folder(root, f"{name}_1epochs1iters_seed0", configuration))
    predicted = predictor.predict_logits_from_preprocessed_data(image)

    trainer.set_deep_supervision_enabled(False)
    network = trainer.network.eval()
    patch = image[None] if len(scenario.patch) == 3 else image.transpose(0, 1)
    axes = [axis + 2 for axis in trainer.inference_allowed_mirroring_axes]
    assert len(axes) == len(scenario.patch)
    with torch.no_grad():
        mirrored = [
            network(patch.flip(chosen)).flip(chosen)
            for count in range(len(axes) + 1)
            for chosen in itertools.combinations(axes, count)
        ]
    expected = torch.stack(mirrored).mean(dim=0)[0]
    # The sliding window accumulates logits in half precision.
    torch.testing.assert_close(predicted.float().view_as(expected), expected, atol=5e-3, rtol=2e-3)
