"""MONAI's networks and Primus as trainers: on isotropic, anisotropic and 2D plans, some of them not divisible."""

import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from phantoms import narrow_baselines, unet_architecture
from stock_prediction import assert_the_networks_logits, predictor_of
from torch import Tensor

from nnunet_deform.plans.baselines import baseline_architecture
from nnunet_deform.trainers import BASELINES
from nnunet_deform.trainers.variants import find_trainer

MONAI = [name for name in BASELINES if "Primus" not in name]
NETWORKS = {
    "nnUNetTrainerSwinUNETR": "SwinUNETR",
    "nnUNetTrainerUNETR": "UNETR",
    "nnUNetTrainerSegResNet": "SegResNet",
    "nnUNetTrainerDynUNet": "DynUNet",
    "nnUNetTrainerUNetPlusPlus": "UNetPlusPlus",
    "nnUNetTrainerMedNeXt_S": "MedNeXt",
}
# MedNeXt B, M and L differ from S in numbers of MONAI's.
PRIMUS = ("nnUNetTrainerPrimus", "nnUNetTrainerPrimusV2", "nnUNetTrainerPrimusV3")
RUN = [*NETWORKS, *(f"{name}_S" for name in PRIMUS)]
# Sizes that the plan's strides divide, as nnU-Net's planner makes them, and most networks' own do not.
PLANS = {
    "isotropic": {"patch_size": (24, 24, 40)},
    "anisotropic": {
        "patch_size": (10, 20, 36),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    },
    "2d": {"patch_size": (40, 36), "strides": ((1, 1), (2, 2), (2, 2))},
}
# The slowest, and what differs from another by its embedding; their anisotropic plans are padded, too.
SLOW = [(f"nnUNetTrainer{name}", "isotropic") for name in ("SwinUNETR", "MedNeXt_S", "PrimusV2_S", "PrimusV3_S")]
# nnU-Net gives the coarsest output weight zero.
COARSEST = {
    "DynUNet": "network.deep_supervision_heads.0",
    "UNetPlusPlus": "network.final_conv_0_1",
    "MedNeXt": "network.out_blocks.0",
}


# Parameters for one channel and 14 classes, in millions: the papers' where they state them (UNETR 92.6, Swin UNETR
# 62.2, MedNeXt 5.6, 10.5, 17.6 and 61.8).
WIDE = {
    "nnUNetTrainerSwinUNETR": 62.2,
    "nnUNetTrainerUNETR": 92.8,
    "nnUNetTrainerSegResNet": 18.8,
    "nnUNetTrainerUNetPlusPlus": 7.0,
    "nnUNetTrainerMedNeXt_S": 5.6,
    "nnUNetTrainerMedNeXt_B": 10.5,
    "nnUNetTrainerMedNeXt_M": 17.5,
    "nnUNetTrainerMedNeXt_L": 61.7,
    "nnUNetTrainerPrimus_S": 24.2,
    "nnUNetTrainerPrimus_B": 94.1,
    "nnUNetTrainerPrimus_M": 147.7,
    "nnUNetTrainerPrimus_L": 327.0,
    "nnUNetTrainerPrimusV2_S": 24.9,
    "nnUNetTrainerPrimusV2_B": 94.8,
    "nnUNetTrainerPrimusV2_M": 148.3,
    "nnUNetTrainerPrimusV2_L": 327.5,
    "nnUNetTrainerPrimusV3_S": 71.4,
    "nnUNetTrainerPrimusV3_B": 150.5,
    "nnUNetTrainerPrimusV3_M": 205.7,
    "nnUNetTrainerPrimusV3_L": 389.4,
}


@pytest.mark.parametrize(("name", "millions"), WIDE.items(), ids=WIDE)
def test_parameters(name, millions) -> None:
    """Before any of the tests' narrowing."""
    configuration = ConfigurationManager(
        {"patch_size": [96, 96, 96], "architecture": unet_architecture([[1] * 3, [2] * 3], [[3] * 3] * 2)}
    )
    # Swin UNETR reads a value of a tensor as it is built.
    with torch.device("cpu" if "Swin" in name else "meta"):
        network = find_trainer(name).build_network_architecture(None, configuration, 1, 14)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions


@pytest.fixture(autouse=True)
def _narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function is test_parameters:
        return
    narrow_baselines(monkeypatch)


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def test_the_tests_know_every_baseline() -> None:
    assert {*RUN, "nnUNetTrainerMedNeXt_B", "nnUNetTrainerMedNeXt_M", "nnUNetTrainerMedNeXt_L"} | {
        f"{name}_{size}" for name in PRIMUS for size in "BML"
    } == set(BASELINES)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(name, plan, marks=pytest.mark.slow if (name, plan) in SLOW else ())
        for name in RUN
        for plan in PLANS
    ],
)
def test_a_step_a_validation_and_a_prediction(make_trainer, name, plan) -> None:
    if plan == "2d" and "Primus" in name:
        with pytest.raises(NotImplementedError, match=r"three axes, but the patch \[40, 36\] has 2; use a 3D"):
            make_trainer(find_trainer(name), **PLANS[plan])
        return
    network = NETWORKS.get(name)
    trainer = make_trainer(find_trainer(f"{name}_1epochs1iters_seed0"), **PLANS[plan])
    trainer.initialize()
    trainer.on_train_start()
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    outputs, targets = [], []
    loss = trainer.loss

    def noted(output: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        outputs.append(output)
        targets.append(target)
        return loss(output, target)

    trainer.loss = noted
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(batch)["loss"])
    trainer.loss = loss
    # Logits and targets of equal number and size, so that the loss compares voxel with voxel.
    (output,), (target,) = outputs, targets
    assert isinstance(output, list) == (network in COARSEST)
    assert [one.shape[2:] for one in as_list(output)] == [one.shape[2:] for one in as_list(target)]
    without = {key for key, p in trainer.network.named_parameters() if p.grad is None}
    coarsest = COARSEST.get(network)
    assert without == {
        key for key, _ in trainer.network.named_parameters() if coarsest and key.startswith(f"{coarsest}.")
    }
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])

    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    predictor = predictor_of(trainer.output_folder_base, mirroring=False)
    image = batch["data"][0]
    predicted = predictor.predict_logits_from_preprocessed_data(image if image.ndim == 4 else image[:, None])
    assert_the_networks_logits(predicted, trainer, image[None])


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_load_strictly_with_deep_supervision_off_and_all_that_is_trained_gets_a_gradient(
    make_trainer, name
) -> None:
    trainer = make_trainer(find_trainer(name), **PLANS["2d"])
    # Of an image and, as in a cascade, of the labels of the stage before.
    arguments = (trainer.plans_manager, trainer.configuration_manager, 5, 2)
    supervised = trainer.build_network_architecture(*arguments, enable_deep_supervision=True).eval()
    single = trainer.build_network_architecture(*arguments, enable_deep_supervision=False).eval()
    single.load_state_dict(supervised.state_dict(), strict=True)
    image = torch.randn(2, 5, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        logits = single(image)
        assert isinstance(logits, Tensor)
        assert logits.shape == (2, 2, *trainer.configuration_manager.patch_size)
        assert torch.equal(as_list(supervised(image))[0], logits)
        assert torch.equal(pickle.loads(pickle.dumps(single))(image), logits)
    # Distributed training waits for these.
    single.train()(image).square().mean().backward()
    assert not [key for key, p in single.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", RUN)
def test_pretrained_weights_go_over_to_other_labels(make_trainer, tmp_path, name) -> None:
    trainer = make_trainer(find_trainer(name), **PLANS["2d" if name in NETWORKS else "anisotropic"])
    plan = (trainer.plans_manager, trainer.configuration_manager)
    pretrained, network = (trainer.build_network_architecture(*plan, 1, classes) for classes in (3, 14))
    torch.save({"network_weights": pretrained.state_dict()}, tmp_path / "checkpoint_final.pth")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    source = pretrained.state_dict()
    heads = {key for key in before if ".seg_layers." in key}
    assert heads
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key] if key in heads else source[key])
    # No more than the heads is left out: as many modules as there are logits.
    depth = len({key.split(".seg_layers.")[0] for key in heads})
    assert depth == len(as_list(network(torch.randn(1, 1, *trainer.configuration_manager.patch_size))))


@pytest.mark.parametrize("name", COARSEST)
def test_coarse_logits_are_where_their_image_is(name) -> None:
    """A change of the image at one end changes the coarse logits at that end most."""
    size = (40, 72)
    base = unet_architecture([[1, 1], [2, 2], [2, 2]], [[3, 3]] * 3)
    planned = baseline_architecture(base, size, network=name)
    torch.manual_seed(0)
    network = get_network_from_plans(
        planned["network_class_name"], planned["arch_kwargs"], [], 1, 2, allow_init=True, deep_supervision=True
    ).eval()
    image = torch.randn(1, 1, *size)
    changed = image.clone()
    changed[..., -4:, :4] += 3
    cumulative = np.cumprod(planned["arch_kwargs"]["output_strides"], axis=0)
    with torch.no_grad():
        pairs = list(zip(network(image), network(changed), cumulative, strict=True))
    for before, after, step in pairs:
        assert before.shape[2:] == tuple(math.ceil(s / t) for s, t in zip(size, step, strict=True))
        difference = (after - before).abs().sum(dim=(0, 1))
        row, column = divmod(int(difference.argmax()), difference.shape[1])
        assert row >= (difference.shape[0] - 1) * 0.6
        assert column <= (difference.shape[1] - 1) * 0.4


@pytest.mark.parametrize(
    ("name", "padded", "times"),
    [
        ("nnUNetTrainerMedNeXt_S", [16, 32, 48], "3.41"),
        ("nnUNetTrainerDynUNet", [10, 20, 36], "1.00"),
        ("nnUNetTrainerPrimus_S", [16, 24, 40], "2.13"),
    ],
)
def test_the_log_says_what_is_padded(make_trainer, name, padded, times) -> None:
    trainer = make_trainer(find_trainer(name), **PLANS["anisotropic"])
    trainer.initialize()
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text()
    assert f"sees the patch [10, 20, 36] as {padded}, {times} times as many voxels." in log


def test_dynunet_has_the_plans_levels_and_refuses_two() -> None:
    base = unet_architecture([[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]])
    arguments = baseline_architecture(base, (8, 16, 16), network="DynUNet")["arch_kwargs"]
    for key in ("strides", "kernel_sizes", "features_per_stage"):
        assert arguments[key] == base["arch_kwargs"][key]
    shallow = unet_architecture([[1, 1, 1], [2, 2, 2]], [[3, 3, 3]] * 2)
    with pytest.raises(NotImplementedError, match=r"at least three levels, and the plan has 2 \(strides .*\[8, 8, 8\]"):
        baseline_architecture(shallow, (8, 8, 8), network="DynUNet")


@pytest.mark.parametrize(("name", "size"), [("SwinUNETR", 32), ("UNetPlusPlus", 16), ("MedNeXt", 16)])
def test_a_patch_that_shrinks_to_one_voxel_is_refused(make_trainer, tmp_path, name, size) -> None:
    trainer_class = find_trainer(next(trainer for trainer, network in NETWORKS.items() if network == name))
    with pytest.raises(NotImplementedError, match=rf"patch \[{size}, {size}, {size}\] .* more than {size} voxels"):
        make_trainer(trainer_class, patch_size=(size,) * 3)
    assert not (tmp_path / "results").exists()
    # One more voxel on an axis is padded to two voxels at the coarsest level.
    base = unet_architecture([[1, 1], [2, 2]], [[3, 3]] * 2)
    planned = baseline_architecture(base, (4, size + 1), network=name)
    network = get_network_from_plans(planned["network_class_name"], planned["arch_kwargs"], [], 1, 2, allow_init=True)
    assert network(torch.zeros(1, 1, 4, size + 1)).isfinite().all()


@pytest.mark.parametrize("name", ["UNETR", "SegResNet"])
def test_the_others_take_a_patch_of_one_token_or_coarsest_voxel(name) -> None:
    planned = baseline_architecture(unet_architecture([[1] * 3, [2] * 3], [[3] * 3] * 2), (8, 8, 8), network=name)
    network = get_network_from_plans(planned["network_class_name"], planned["arch_kwargs"], [], 1, 2, allow_init=True)
    logits = network(torch.randn(1, 1, 8, 8, 8))
    assert logits.shape == (1, 2, 8, 8, 8)
    assert logits.std() > 0


def test_unetr_refuses_another_size_than_the_patch() -> None:
    from nnunet_deform.networks.baselines import UNETR

    planned = baseline_architecture(unet_architecture([[1, 1], [2, 2]], [[3, 3]] * 2), (40, 36), network="UNETR")
    network = UNETR(1, 2, **planned["arch_kwargs"])
    # 40 x 36 and 33 x 47 are both padded to 48 x 48.
    assert network(torch.zeros(1, 1, 33, 47)).shape == (1, 2, 33, 47)
    with pytest.raises(ValueError, match=r"size \[64, 36\], but UNETR's position embedding was made for .*\[40, 36\]"):
        network(torch.zeros(1, 1, 64, 36))


@pytest.mark.parametrize("installed", ["none", "1.4.0"])
@pytest.mark.parametrize("name", MONAI)
def test_without_monai_it_says_what_to_install_and_leaves_no_folder(
    make_trainer, monkeypatch, tmp_path, name, installed
) -> None:
    module = None if installed == "none" else SimpleNamespace(__version__=installed)
    monkeypatch.setitem(sys.modules, "monai", module)
    words = rf"MONAI 1.5 or newer, and {installed} is installed: pip install 'nnunet-deform\[baselines\]'"
    with pytest.raises(ImportError, match=words):
        make_trainer(find_trainer(name), **PLANS["isotropic"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["nnUNetTrainerPrimusV2_S", "nnUNetTrainerPrimusV3_S"])
def test_primus_with_a_normalised_embedding_refuses_a_single_token(make_trainer, tmp_path, name) -> None:
    with pytest.raises(NotImplementedError, match=r"the patch \[8, 8, 8\] is a single one; plan with .* more than 8"):
        make_trainer(find_trainer(name), patch_size=(8, 8, 8))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["nnUNetTrainerPrimus_S", "nnUNetTrainerPrimus_S_AdamW"])
def test_primus_warms_up_trains_and_continues(make_trainer, name) -> None:
    """Its own recipe has two stages; under ours it has one. Killed and continued, both end in the same weights."""
    trainer_class = find_trainer(f"{name}_3epochs1iters_seed0")
    plan = PLANS["anisotropic"]

    def run(results: str, epochs: int):
        trainer = make_trainer(trainer_class, **plan, results=results)
        start = trainer.on_train_epoch_start

        def stop_before() -> None:
            start()
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            if trainer.current_epoch == epochs:
                raise KeyboardInterrupt

        rates: list[float] = []
        trainer.on_train_epoch_start = stop_before
        return trainer, rates

    whole, rates = run("whole", 3)
    whole.run_training()
    if "AdamW" in name:
        assert isinstance(whole.optimizer, torch.optim.AdamW)
        assert {group["weight_decay"] for group in whole.optimizer.param_groups} == {1e-4, 0.0}
    else:
        assert whole.training_stage == "train"
        # Warm-up of one epoch, then nnU-Net's polynomial over the other two.
        assert rates == pytest.approx([3e-4, 3e-4, 3e-4 * 0.5**0.9])
    killed, _ = run("killed", 2)
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    continued, continued_rates = run("killed", 3)
    continued.load_checkpoint(str(Path(continued.output_folder, "checkpoint_latest.pth")))
    assert continued.current_epoch == 2
    continued.run_training()
    assert continued_rates == rates[2:]
    weights = whole.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in continued.network.state_dict().items())


def test_a_finished_training_of_primus_that_was_all_warmup_loads(make_trainer) -> None:
    trainer_class = find_trainer("nnUNetTrainerPrimus_S_1epochs1iters")
    trainer = make_trainer(trainer_class)
    trainer.initialize()
    path = f"{trainer.output_folder}/checkpoint_final.pth"
    trainer.save_checkpoint(path)
    again = make_trainer(trainer_class)
    again.load_checkpoint(path)
    assert again.current_epoch == again.num_epochs == again.warmup_duration_whole_net == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_compiled_it_gives_the_same_logits(make_trainer, name) -> None:
    torch.compiler.reset()
    trainer = make_trainer(find_trainer(name), **PLANS["isotropic"])
    trainer.initialize()
    plain = trainer.network.eval()
    compiled = torch.compile(plain, backend="eager")
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        for enabled in (trainer.enable_deep_supervision, False):
            trainer.set_deep_supervision_enabled(enabled)
            for one, other in zip(as_list(plain(image)), as_list(compiled(image)), strict=True):
                torch.testing.assert_close(one, other)
