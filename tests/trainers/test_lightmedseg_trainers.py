"""LightMedSeg's trainers on a tiny dataset: what they build, their recipes, and the paper's loss."""

import numpy as np
import pytest
import torch
from stock_prediction import assert_the_networks_logits, predictor_of

from nnunet_deform.networks import LightMedSeg
from nnunet_deform.trainers import nnUNetTrainerLightMedSeg, nnUNetTrainerLightMedSeg_paper
from nnunet_deform.trainers.recipes import AdamWRecipe
from nnunet_deform.trainers.variants import find_trainer

FIVE_LEVELS = ((1, 1, 1), *[(2, 2, 2)] * 4)
LABELS = {"background": 0, "bright": 1, "dark": 2}
REGIONS = {"labels": {"background": 0, "both": [1, 2], "dark": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {**LABELS, "ignore": 3}}
REGIONS_IGNORE = {"labels": {**REGIONS["labels"], "ignore": 3}, "regions_class_order": [1, 2]}


def network(make_trainer, name: str) -> LightMedSeg:
    trainer = make_trainer(find_trainer(name), (16, 16, 16), FIVE_LEVELS)
    trainer.initialize()
    return trainer.network


def test_options_of_the_ablations(make_trainer) -> None:
    def count(name: str) -> int:
        built = network(make_trainer, name)
        total = sum(p.numel() for p in built.parameters())
        return total - sum(p.numel() for head in built.decoder.seg_layers[:-1] for p in head.parameters())

    # One input channel costs 3 * 27 * (4 + 8) less than the paper's four in the stem and the detector.
    full = 477_493 - 3 * 27 * 12
    assert count("nnUNetTrainerLightMedSeg") == count("nnUNetTrainerLightMedSeg_paper") == full
    assert count("nnUNetTrainerLightMedSegStandard") - full == 658_609 - 477_493 - 3 * 27 * 4
    assert count("nnUNetTrainerLightMedSeg_anchors16") - full == 487_309 - 477_493
    assert count("nnUNetTrainerLightMedSeg_anchors32") - full == 506_941 - 477_493
    assert full - count("nnUNetTrainerLightMedSeg_noLSPM") == 11_662
    assert full - count("nnUNetTrainerLightMedSeg_noAnchors") == 8_616 - 3 * 27 * 8 + 2 * 25 * 120 + 9 * 120
    assert full - count("nnUNetTrainerLightMedSeg_noRouter") == 47_592 - (32 * 64 + 64) - (16 * 32 + 32)
    assert count("nnUNetTrainerLightMedSeg_w2") == 1_849_581 - 3 * 27 * 24
    assert count("nnUNetTrainerLightMedSeg_w4") == 7_278_245 - 3 * 27 * 48
    assert count("nnUNetTrainerLightMedSeg_opOff") == pytest.approx(full, rel=0.02)
    twin = network(make_trainer, "nnUNetTrainerLightMedSeg_opOff")
    assert twin.decoder.router.controllers is None


def test_recipe_is_the_shared_one_at_its_own_rate(make_trainer) -> None:
    assert nnUNetTrainerLightMedSeg.configure_optimizers is AdamWRecipe.configure_optimizers
    for name, rate in (
        ("nnUNetTrainerLightMedSeg", 5e-3),
        ("nnUNetTrainerLightMedSeg_5epochs", 5e-3),
        ("nnUNetTrainerLightMedSeg_AdamW", 1e-3),
        ("nnUNetTrainerLightMedSeg_opOff_AdamW_4epochs_seed1", 1e-3),
        ("nnUNetTrainer_AdamW", 1e-3),
    ):
        trainer = make_trainer(find_trainer(name))
        assert (trainer.initial_lr, trainer.weight_decay) == (rate, 1e-4), name
        trainer.initialize()
        assert trainer.lr_scheduler.max_lr == rate, name
    trainer = make_trainer(nnUNetTrainerLightMedSeg)
    assert (trainer.warmup_epochs, trainer.num_epochs) == (10, 1000)


def test_paper_recipe(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerLightMedSeg_paper)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (300, 250)
    assert not trainer.enable_deep_supervision
    assert trainer.loss.scale_weights is None
    assert trainer.loss.boundary_kernel == (3, 3, 3)
    assert make_trainer(find_trainer("nnUNetTrainerLightMedSeg_paper_4epochs2iters")).num_epochs == 4


def test_the_band_is_flat_where_the_plan_is(make_trainer) -> None:
    kernels = ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    trainer = make_trainer(nnUNetTrainerLightMedSeg_paper, (8, 16, 16), strides, kernels)
    assert trainer._build_loss().boundary_kernel == (1, 3, 3)


def test_deep_supervision_covers_the_networks_outputs(make_trainer) -> None:
    # The plan has six levels, the network keeps five, so four outputs.
    trainer = make_trainer(nnUNetTrainerLightMedSeg, (32, 32, 32), ((1, 1, 1), *[(2, 2, 2)] * 5))
    assert trainer._get_deep_supervision_scales() == [[1 / 2**level] * 3 for level in range(4)]


@pytest.mark.parametrize("deep_supervision", [False, True], ids=["", "deep-supervision"])
@pytest.mark.parametrize(
    ("dataset", "heads"),
    [({"labels": LABELS}, 3), (REGIONS, 2), (IGNORE, 3), (REGIONS_IGNORE, 2)],
    ids=["labels", "regions", "ignore", "regions-ignore"],
)
def test_papers_loss_trains_and_validates(make_trainer, dataset, heads, deep_supervision) -> None:
    trainer = make_trainer(nnUNetTrainerLightMedSeg_paper, dataset=dataset)
    trainer.enable_deep_supervision = deep_supervision
    trainer.initialize()
    assert trainer.loss.regions == ("regions_class_order" in dataset)
    assert trainer.loss.ignore_label == trainer.label_manager.ignore_label
    if deep_supervision:
        # Two outputs, of which nnU-Net leaves the coarser out.
        assert list(trainer.loss.scale_weights) == [1, 0]
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    if trainer.label_manager.ignore_label is not None:
        target = batch["target"][0] if deep_supervision else batch["target"]
        ignored = target[:, -1] if trainer.loss.regions else target[:, 0] == 3
        assert ignored.any()
    loss = trainer.train_step(batch)["loss"]
    assert np.isfinite(loss)
    assert loss > 0.5
    trainer.network.eval()
    with torch.no_grad():
        validation = trainer.validation_step(next(trainer.dataloader_val))
    assert np.isfinite(validation["loss"])
    assert trainer.network.decoder.seg_layers[-1].out_channels == heads


def test_a_few_steps_lower_the_papers_loss(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_paper_1epochs8iters_seed0"))
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    batch = next(trainer.dataloader_train)
    trainer.network.train()
    losses = []
    for _ in range(8):
        trainer._iteration = 0
        losses.append(float(trainer.train_step(batch)["loss"]))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "plan",
    [
        {"patch_size": (24, 40), "strides": ((1, 1), *[(2, 2)] * 3)},
        {
            "patch_size": (6, 24, 16),
            "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
            "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        },
        {"patch_size": (8, 8, 8), "strides": ((1, 1, 1), (2, 2, 2))},
    ],
    ids=["2d", "anisotropic", "two-levels"],
)
def test_stock_prediction_gives_the_networks_logits(make_trainer, plan) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_1epochs1iters"), **plan)
    trainer.run_training()
    predictor = predictor_of(trainer.output_folder_base, mirroring=False)
    patch = plan["patch_size"]
    image = torch.randn(1, *([1] if len(patch) == 2 else []), *patch)
    predicted = predictor.predict_logits_from_preprocessed_data(image)
    assert_the_networks_logits(predicted, trainer, image if len(patch) == 2 else image[None])
