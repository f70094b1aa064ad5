"""The rivals as trainers: on isotropic, anisotropic and 2D plans, narrow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from phantoms import REGIONS, narrow_baselines
from stock_prediction import assert_the_networks_logits, predictor_of
from torch import Tensor

from nnunet_deform.trainers import RIVALS
from nnunet_deform.trainers.variants import find_trainer

# The others differ in numbers.
RUN = [name for name in RIVALS if name not in ("nnUNetTrainerNnFormer_96", "nnUNetTrainerUNesT_L")]
PLANS = {
    "isotropic": {"patch_size": (12, 20, 16), "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))},
    "anisotropic": {
        "patch_size": (5, 16, 24),
        "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)),
        "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    },
    "2d": {"patch_size": (24, 40), "strides": ((1, 1), (2, 2), (2, 2), (2, 2))},
}
# CoTr pools four times.
DEEP = {
    "isotropic": {"patch_size": (16, 32, 16), "strides": ((1, 1, 1), *((2, 2, 2),) * 4)},
    "anisotropic": {
        "patch_size": (6, 16, 40),
        "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2)),
        "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    },
    "2d": {"patch_size": (24, 40), "strides": ((1, 1), *((2, 2),) * 4)},
}


def plan_of(name: str, plan: str) -> dict:
    return (DEEP if "CoTr" in name else PLANS)[plan]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_baselines(monkeypatch)


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize(
    ("name", "plan"),
    # In three dimensions the default run looks at the harder plan.
    [pytest.param(name, plan, marks=pytest.mark.slow if plan == "isotropic" else ()) for name in RUN for plan in PLANS],
)
def test_a_step_a_validation_and_a_prediction(make_trainer, name, plan) -> None:
    trainer = make_trainer(find_trainer(f"{name}_1epochs1iters_seed0"), **plan_of(name, plan))
    trainer.initialize()
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text()
    patch = list(trainer.configuration_manager.patch_size)
    assert f"For the patch {patch} the network's maps have sizes " in log
    assert ("windows of" in log) == ("NnFormer" in name)
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    outputs = as_list(trainer.network(batch["data"]))
    # Logits and targets of equal number and size, so that the loss compares voxel with voxel.
    assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in as_list(batch["target"])]
    assert trainer.enable_deep_supervision == (len(outputs) > 1) == hasattr(trainer.network, "heads")
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(batch)["loss"])
    # nnU-Net gives the coarsest output weight zero.
    without = {key for key, p in trainer.network.named_parameters() if p.grad is None}
    coarsest = f"heads.{len(outputs) - 1}.seg_layers.0"
    assert without == ({f"{coarsest}.weight", f"{coarsest}.bias"} if len(outputs) > 1 else set())
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])

    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    predictor = predictor_of(trainer.output_folder_base, mirroring=False)
    image = batch["data"][0]
    predicted = predictor.predict_logits_from_preprocessed_data(image if image.ndim == 4 else image[:, None])
    assert_the_networks_logits(predicted, trainer, image[None])


@pytest.mark.parametrize("name", RUN)
def test_pretrained_weights_go_over_to_other_labels_and_a_cascades_channels(make_trainer, tmp_path, name) -> None:
    trainer = make_trainer(find_trainer(name), **plan_of(name, "2d"))
    plan = (trainer.plans_manager, trainer.configuration_manager)
    # Of an image and, as in a cascade, of the labels of the stage before.
    pretrained, network = (trainer.build_network_architecture(*plan, 5, classes) for classes in (3, 14))
    torch.save({"network_weights": pretrained.state_dict()}, tmp_path / "checkpoint_final.pth")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    source = pretrained.state_dict()
    heads = {key for key in before if ".seg_layers." in key}
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key] if key in heads else source[key])
    assert len(heads) == 2 * len(as_list(network(torch.randn(2, 5, 24, 40))))


@pytest.mark.parametrize("labels", [REGIONS, {"background": 0, "bright": 1, "dark": 2, "ignore": 3}], ids=["r", "i"])
def test_regions_and_an_ignore_label(make_trainer, labels) -> None:
    dataset = {"labels": labels, **({"regions_class_order": [1, 2]} if labels is REGIONS else {})}
    trainer = make_trainer(find_trainer("nnUNetTrainerUNETRPP"), **PLANS["2d"], dataset=dataset)
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    assert trainer.network.heads[0].seg_layers[0].out_channels == (2 if labels is REGIONS else 3)


@pytest.mark.parametrize("name", RIVALS)
def test_refused_before_anything_is_written(make_trainer, tmp_path, name) -> None:
    with pytest.raises(NotImplementedError, match=r"poolings, and the plan has 1 \(strides .* than \[16, 16, 16\]"):
        make_trainer(find_trainer(name), patch_size=(16,) * 3, strides=((1, 1, 1), (2, 2, 2)))
    with pytest.raises(NotImplementedError, match=r"takes strides of 1 and 2, and the plan has .* patch \[32, 32\]"):
        make_trainer(find_trainer(name), patch_size=(32, 32), strides=((1, 1), (4, 4), (2, 2), (2, 2), (2, 2)))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("nnUNetTrainerNnFormer", "5x4x6, 3x2x3, 2x2x2, 2x2x2, windows of 3x3x3, 3x2x3, 2x2x2, 2x2x2."),
        ("nnUNetTrainerTransBTS", "5x16x24, 5x8x12, 5x4x6, 3x2x3."),
    ],
)
def test_the_log_says_how_the_patch_is_divided(make_trainer, name, maps) -> None:
    trainer = make_trainer(find_trainer(name), **PLANS["anisotropic"])
    trainer._report_memory()
    assert f"the network's maps have sizes {maps}" in Path(trainer.log_file).read_text()
