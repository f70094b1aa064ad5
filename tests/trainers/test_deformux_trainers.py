"""The trainers on a tiny dataset: what they build, that they train, resume, and say what is wrong."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from stock_prediction import assert_the_networks_logits, predictor_of

from nnunet_deform.networks import DeformUXNet
from nnunet_deform.networks.deformux import DepthwiseScaling, Mlp
from nnunet_deform.trainers import base as trainer_base
from nnunet_deform.trainers import (
    nnUNetTrainerDeformUX,
    nnUNetTrainerDeformUX_opOff,
    nnUNetTrainerDeformUX_paper,
)
from nnunet_deform.trainers.variants import find_trainer

TWO_LEVELS = ((1, 1, 1), (2, 2, 2))
ANISOTROPIC = {
    "patch_size": (8, 48, 32),
    "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
}


def weights(trainer: nnUNetTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def test_options_of_the_ablations(make_trainer) -> None:
    def network(name: str) -> DeformUXNet:
        trainer = make_trainer(find_trainer(name))
        trainer.initialize()
        return trainer.network

    def count(name: str, kind: type) -> int:
        return sum(isinstance(module, kind) for module in network(name).modules())

    def offset_axes(name: str) -> tuple[int, ...]:
        return network(name).encoder.stages[0][0].branches[0][1].offset_axes

    assert offset_axes("nnUNetTrainerDeformUX") == (0, 1, 2)
    assert offset_axes("nnUNetTrainerDeformUX_triPlanar") == (0, 1, 2)
    assert offset_axes("nnUNetTrainerDeformUX_xy") == (1, 2)
    assert offset_axes("nnUNetTrainerDeformUX_xz") == (0, 2)
    assert offset_axes("nnUNetTrainerDeformUX_yz") == (0, 1)
    assert offset_axes("nnUNetTrainerDeformUX_opOff") == ()
    assert count("nnUNetTrainerDeformUX", Mlp) == 4
    assert count("nnUNetTrainerDeformUX_noMLP", Mlp) == 0
    assert count("nnUNetTrainerDeformUX_depthwiseScaling", DepthwiseScaling) == 4
    dense = network("nnUNetTrainerDeformUX_dense").encoder.stages[0][0].branches[0][1]
    assert dense.weight.shape == (48, 48, 3, 3, 3)
    offset_kernel = network("nnUNetTrainerDeformUX_offsetKernel3").encoder.stages[0][0].branches[0][1].offset
    assert offset_kernel.kernel_size == (3, 3, 3)
    assert len(network("nnUNetTrainerDeformUX_convnext").encoder.stages[0][0].branches) == 1
    reference = network("nnUNetTrainerUXNet").encoder.stages[0][0].branches[0][0]
    assert reference.kernel_size == (7, 7, 7)
    assert reference.offset is None


def test_plane_ablations_are_refused_in_2d_and_leave_nothing_behind(make_trainer, tmp_path) -> None:
    with pytest.raises(NotImplementedError, match=re.escape("offset_axes=(0, 2)")):
        make_trainer(find_trainer("nnUNetTrainerDeformUX_xz"), (32, 32), ((1, 1), (2, 2), (2, 2)))
    assert not (tmp_path / "results").exists()


def test_a_plan_with_one_level_is_refused_and_leaves_nothing_behind(make_trainer, tmp_path) -> None:
    with pytest.raises(ValueError, match="the plan has 1 level"):
        make_trainer(nnUNetTrainerDeformUX, (16, 16, 16), ((1, 1, 1),))
    assert not (tmp_path / "results").exists()


def test_deep_supervision_covers_the_networks_outputs(make_trainer) -> None:
    # The plan has six levels, the network keeps five, so four outputs.
    strides = ((1, 1, 1), *[(2, 2, 2)] * 5)
    trainer = make_trainer(nnUNetTrainerDeformUX, (64, 64, 64), strides)
    assert trainer._get_deep_supervision_scales() == [[1 / 2**level] * 3 for level in range(4)]
    assert trainer._build_loss().weight_factors == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])


@pytest.mark.usefixtures("narrow")
def test_deep_supervision_is_off_with_a_single_output(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerDeformUX, (8, 8, 8), TWO_LEVELS)
    assert not trainer.enable_deep_supervision
    assert trainer._get_deep_supervision_scales() is None
    trainer.initialize()
    assert isinstance(trainer.network(torch.zeros(1, 1, 8, 8, 8)), torch.Tensor)


@pytest.mark.usefixtures("narrow")
def test_paper_recipe(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerDeformUX_paper)
    trainer.initialize()
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-4, 0.08, (0.9, 0.999), 1e-8)
    assert trainer.num_epochs * trainer.num_iterations_per_epoch == 40_000
    for epoch, loss in enumerate([1.0, *[2.0] * 11]):
        trainer.logger.log("val_losses", loss, epoch)
    trainer.lr_scheduler.step(11)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4
    trainer.lr_scheduler.step(12)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.9e-4)


def offset_names(trainer: nnUNetTrainer) -> set[str]:
    return {name for name, _ in trainer.network.named_parameters() if ".offset." in name}


RECIPES = ["nnUNetTrainerDeformUX{}", "nnUNetTrainerDeformUX{}_AdamW", "nnUNetTrainerDeformUX_paper"]


@pytest.fixture(params=RECIPES)
def with_offset_rate(request, make_trainer, monkeypatch):
    """Returns make(factor, suffixes, **options): a trainer of each recipe with the factor 1, 3 or 10."""

    def make(factor: int, suffixes: str, **options) -> nnUNetTrainer:
        # The paper's recipe has no trainers with factors, so its class gets one, as a subclass of two lines would.
        monkeypatch.setattr(nnUNetTrainerDeformUX_paper, "offset_rate", factor)
        name = request.param.format("" if factor == 1 else f"_offsetRate{factor}")
        return make_trainer(find_trainer(name + suffixes), **options)

    return make


@pytest.mark.usefixtures("narrow")
def test_offset_branches_at_a_multiple_of_the_rate(with_offset_rate) -> None:
    groups, rates = {}, {}
    for factor in (1, 3, 10):
        trainer = with_offset_rate(factor, "_4epochs5iters_seed0")
        trainer.initialize()
        trainer.logger.local_logger.my_fantastic_logging["val_losses"] = [0.0] * 4
        names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
        groups[factor] = trainer.optimizer.param_groups
        rates[factor] = []
        positions = [(0,), (0, 3), (2,), (3, 4)] if "AdamW" in type(trainer).__name__ else [(0,), (1,), (3,)]
        for position in positions:
            trainer.lr_scheduler.step(*position)
            rates[factor].append([group["lr"] for group in groups[factor]])
        # Every parameter once.
        in_groups = [names[id(parameter)] for group in groups[factor] for parameter in group["params"]]
        assert sorted(in_groups) == sorted(names.values())
        assert len(offset_names(trainer)) == 8
        own = [group for group in groups[factor] if "rate_factor" in group]
        moved = {names[id(parameter)] for group in own for parameter in group["params"]}
        assert moved == (offset_names(trainer) if factor > 1 else set())
    usual = len(groups[1])
    for factor in (3, 10):
        assert len(groups[factor]) == 2 * usual
        for group, stock in zip(groups[factor], groups[1] * 2, strict=True):
            options = ({key: value for key, value in g.items() if "lr" not in key} for g in (group, stock))
            one, two = ({k: v for k, v in o.items() if k not in ("params", "rate_factor")} for o in options)
            assert one == two
        for now, alone in zip(rates[factor], rates[1], strict=True):
            assert now == pytest.approx(alone + [factor * rate for rate in alone], rel=1e-12)


@pytest.mark.usefixtures("narrow")
def test_a_first_step_of_sgd_moves_the_offsets_by_the_factor(make_trainer) -> None:
    moved = {}
    for factor, name in ((1, "nnUNetTrainerDeformUX"), (10, "nnUNetTrainerDeformUX_offsetRate10")):
        trainer = make_trainer(find_trainer(f"{name}_2epochs1iters_seed0"))
        trainer.initialize()
        trainer.dataloader_train, _ = trainer.get_dataloaders()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.train_step(next(trainer.dataloader_train))
        moved[factor] = weights(trainer)
        offsets = offset_names(trainer)
    for key, value in moved[1].items():
        if key in offsets:
            torch.testing.assert_close(moved[10][key], 10 * value, rtol=1e-5, atol=0)
        else:
            assert torch.equal(moved[10][key], value)
    assert any(moved[1][key].any() for key in offsets)


@pytest.mark.usefixtures("narrow")
def test_offset_rates_are_continued_bit_equal(with_offset_rate) -> None:
    undisturbed = with_offset_rate(10, "_3epochs1iters_seed1", results="undisturbed")
    undisturbed.save_every = 1
    undisturbed.run_training()

    killed = with_offset_rate(10, "_3epochs1iters_seed1", results="killed")
    killed.save_every = 1
    epoch_start = killed.on_train_epoch_start

    def die_in_the_second_epoch() -> None:
        epoch_start()
        if killed.current_epoch == 1:
            raise KeyboardInterrupt

    killed.on_train_epoch_start = die_in_the_second_epoch
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    continued = with_offset_rate(10, "_3epochs1iters_seed1", results="killed")
    continued.load_checkpoint(os.path.join(continued.output_folder, "checkpoint_latest.pth"))
    assert continued.current_epoch == 1
    continued.run_training()
    one, two = weights(undisturbed), weights(continued)
    assert all(torch.equal(one[key], two[key]) for key in one)
    rates = [[group["lr"] for group in trainer.optimizer.param_groups] for trainer in (undisturbed, continued)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("rate", [0, -3, float("nan"), float("inf"), "3"])
def test_an_offset_rate_that_is_no_positive_number_leaves_nothing_behind(make_trainer, tmp_path, rate) -> None:
    trainer_class = type("nnUNetTrainerMine", (nnUNetTrainerDeformUX,), {"offset_rate": rate})
    with pytest.raises(ValueError, match=f"offset_rate={rate!r} of nnUNetTrainerMine must be a positive number"):
        make_trainer(trainer_class)
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("narrow")
def test_an_offset_rate_without_offsets(make_trainer) -> None:
    trainer_class = type("nnUNetTrainerMine", (nnUNetTrainerDeformUX_opOff,), {"offset_rate": 3})
    with pytest.raises(ValueError, match="has nothing to act on: its network has no offset branch"):
        make_trainer(trainer_class).initialize()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["nnUNetTrainerDeformUX_AdamW", "nnUNetTrainer"])
def test_seeded_runs_are_bit_equal_also_when_killed_and_continued(make_trainer, name) -> None:
    seeded = find_trainer(f"{name}_4epochs2iters_seed1")

    undisturbed = make_trainer(seeded, results="undisturbed")
    undisturbed.run_training()
    first = weights(undisturbed)

    killed = make_trainer(seeded, results="killed")
    epoch_start = killed.on_train_epoch_start

    def die_in_the_third_epoch() -> None:
        epoch_start()
        if killed.current_epoch == 2:
            raise KeyboardInterrupt

    killed.on_train_epoch_start = die_in_the_third_epoch
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    continued = make_trainer(seeded, results="killed")
    continued.load_checkpoint(os.path.join(continued.output_folder, "checkpoint_latest.pth"))
    assert continued.current_epoch == 2
    continued.run_training()
    second = weights(continued)
    assert all(torch.equal(first[key], second[key]) for key in first)

    other = make_trainer(find_trainer(f"{name}_4epochs2iters_seed2"), results="other")
    other.run_training()
    third = weights(other)
    assert not all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.usefixtures("narrow")
def test_stock_prediction_finds_a_variant_and_gives_the_networks_logits(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerDeformUX_AdamW_lr1.6e-2_1epochs1iters"))
    trainer.run_training()
    predictor = predictor_of(trainer.output_folder_base, mirroring=False)
    image = torch.randn(1, 16, 16, 16)
    predicted = predictor.predict_logits_from_preprocessed_data(image)
    assert_the_networks_logits(predicted, trainer, image[None])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "plan",
    [{"patch_size": (96, 80), "strides": ((1, 1), *[(2, 2)] * 4)}, ANISOTROPIC],
    ids=["2d", "anisotropic"],
)
def test_one_epoch_on_other_plans_unchanged(make_trainer, plan) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerDeformUX_1epochs1iters"), **plan)
    trainer.run_training()
    (loss,) = trainer.logger.get_value("train_losses", step=None)
    assert np.isfinite(loss)
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()
    if len(plan["patch_size"]) == 3:
        stage = trainer.network.encoder.stages[0]
        assert stage[0].branches[0][1].offset_axes == (1, 2)


@pytest.mark.usefixtures("narrow")
def test_a_failed_save_keeps_the_old_checkpoint(make_trainer, monkeypatch) -> None:
    trainer = make_trainer(nnUNetTrainerDeformUX)
    trainer.initialize()
    path = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(path))
    complete = path.read_bytes()

    def disk_full(checkpoint, filename) -> None:
        Path(filename).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == complete
    assert [p.name for p in path.parent.glob("checkpoint*")] == ["checkpoint_latest.pth"]


@pytest.mark.usefixtures("narrow")
def test_no_checkpoint_where_checkpointing_is_disabled(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerDeformUX)
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    assert not list(Path(trainer.output_folder).glob("checkpoint*"))


def test_memory_is_reported_beside_the_stock_networks_and_advice_given_when_short(make_trainer, monkeypatch) -> None:
    monkeypatch.setattr(trainer_base, "_device_gigabytes", lambda device: 0.01)
    trainer = make_trainer(find_trainer("nnUNetTrainerDeformUX_1epochs1iters"), (32, 32, 32))
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text()
    estimates = re.search(r"training: ([\d.]+) GB \(the plan's own network: ([\d.]+) GB\)", log)
    needed, stock = map(float, estimates.groups())
    assert needed > stock
    assert "WARNING: that is more than the 0.0 GB of cpu" in log
    assert "smaller batch_size" in log


@pytest.mark.usefixtures("narrow")
def test_out_of_memory_ends_with_advice(make_trainer, monkeypatch) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerDeformUX_1epochs1iters"))

    def exhausted(batch) -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(trainer, "train_step", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried to allocate 1 GiB.*smaller batch_size"):
        trainer.run_training()
