"""MAGIC's trainers on a tiny dataset: what they build, the temperature over epochs, freezing, prediction."""

import pytest
import torch
from stock_prediction import assert_the_networks_logits, predictor_of

from nnunet_deform import trainers
from nnunet_deform.layers import RunningNorm
from nnunet_deform.layers.magic import CondConvAttention, DyConvAttention, MagicAttention, MagicConv
from nnunet_deform.networks import MagicPlainConvUNet, MagicResidualEncoderUNet
from nnunet_deform.trainers.schedules import annealed_temperature
from nnunet_deform.trainers.variants import find_trainer

PLAN_2D = {"patch_size": (32, 24), "strides": ((1, 1), (2, 2), (2, 2))}


def network_of(make_trainer, name: str, **plan) -> MagicPlainConvUNet | MagicResidualEncoderUNet:
    trainer = make_trainer(find_trainer(name), **plan)
    trainer.initialize()
    return trainer.network


def first_conv(network: MagicPlainConvUNet | MagicResidualEncoderUNet) -> MagicConv:
    return next(iter(network.dynamic_convs().values()))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_networks_and_numbers_of_kernels(make_trainer) -> None:
    for name, kind, n_kernels in (
        ("nnUNetTrainerMAGIC", MagicPlainConvUNet, 4),
        ("nnUNetTrainerMAGIC_2x", MagicPlainConvUNet, 2),
        ("nnUNetTrainerMAGICResEnc", MagicResidualEncoderUNet, 2),
        ("nnUNetTrainerMAGIC_CondConv", MagicPlainConvUNet, 8),
    ):
        network = network_of(make_trainer, name)
        assert type(network) is kind
        assert {conv.n_kernels for conv in network.dynamic_convs().values()} == {n_kernels}


def test_options_of_the_ablations(make_trainer) -> None:
    def attention(name: str) -> MagicAttention:
        return first_conv(network_of(make_trainer, name)).attention

    def branches(name: str) -> tuple[bool, bool, bool]:
        module = attention(name)
        return module.use_spatial, module.use_channel, module.mask is not None

    assert branches("nnUNetTrainerMAGIC") == (True, True, True)
    assert branches("nnUNetTrainerMAGIC_spatial") == (True, False, False)
    assert branches("nnUNetTrainerMAGIC_channel") == (False, True, False)
    assert branches("nnUNetTrainerMAGIC_global") == (False, False, True)
    assert branches("nnUNetTrainerMAGIC_spatialChannel") == (True, True, False)
    assert branches("nnUNetTrainerMAGIC_spatialGlobal") == (True, False, True)
    assert branches("nnUNetTrainerMAGIC_channelGlobal") == (False, True, True)
    assert attention("nnUNetTrainerMAGIC").recalculation is not None
    assert attention("nnUNetTrainerMAGIC_noKR").recalculation is None
    paper, released = attention("nnUNetTrainerMAGIC"), attention("nnUNetTrainerMAGIC_released")
    assert (paper.mixing, float(paper.temperature)) == ("paper", 1)
    assert (released.mixing, float(released.temperature)) == ("released", 30)
    assert attention("nnUNetTrainerMAGIC_annealed").mixing == "released"
    assert isinstance(attention("nnUNetTrainerMAGIC_DYConv"), DyConvAttention)
    assert isinstance(attention("nnUNetTrainerMAGIC_CondConv"), CondConvAttention)


MODES = {
    "": "running calibrated paper 1",
    "_2x": "running calibrated paper 1",
    "_noKR": "running calibrated paper 1",
    "_static": "running calibrated paper 1",
    "_letter": "none released paper 1",
    "_released": "none released released 30",
    "_annealed": "none released released 30",
    "_BN": "running calibrated paper 1",
    "_static_BN": "running calibrated paper 1",
    "_DYConv": "none released - 30",
    "_CondConv": "none released - -",
    **{f"_{row}": "running calibrated paper 1" for row in ("spatial", "channel", "global")},
    **{f"_{row}": "running calibrated paper 1" for row in ("spatialChannel", "spatialGlobal", "channelGlobal")},
}


@pytest.mark.parametrize("name", [name for name in trainers.__all__ if name.startswith("nnUNetTrainerMAGIC")])
def test_the_mode_each_trainer_inherits(make_trainer, name) -> None:
    plan = PLAN_2D if name.endswith("_BN") else {}
    attention = first_conv(network_of(make_trainer, name, **plan)).attention
    norm = {RunningNorm: "running", torch.nn.Identity: "none"}[type(attention.norm)]
    temperature = f"{attention.temperature:g}" if hasattr(attention, "temperature") else "-"
    mode = f"{norm} {attention.init} {getattr(attention, 'mixing', '-')} {temperature}"
    assert mode == MODES[name.removeprefix("nnUNetTrainerMAGIC").removeprefix("ResEnc")]


def test_the_static_twin_has_equal_parameters(make_trainer) -> None:
    network, twin = (network_of(make_trainer, name) for name in ("nnUNetTrainerMAGIC", "nnUNetTrainerMAGIC_static"))
    assert count(twin) == count(network)
    assert not any(conv.dynamic for conv in twin.dynamic_convs().values())


def test_annealing_schedule() -> None:
    released = [annealed_temperature(epoch, start=30, epochs=29) for epoch in range(1000)]
    assert released == pytest.approx([max(1, 30 - epoch) for epoch in range(1000)])
    assert annealed_temperature(1, start=30, epochs=0.4) == 1
    assert annealed_temperature(0, start=30, epochs=0.4) == 30


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("nnUNetTrainerMAGIC_annealed", 29),
        ("nnUNetTrainerMAGIC_DYConv", 29),
        ("nnUNetTrainerDYConv", 29),
        ("nnUNetTrainerODConv", 10),
    ],
)
def test_the_temperature_follows_the_epoch_and_is_predicted_with(make_trainer, name, epochs) -> None:
    trainer = make_trainer(find_trainer(name))
    assert trainer.annealing_epochs == epochs
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    for epoch, expected in ((0, 30), (7, 30 - 29 * 7 / epochs), (epochs, 1), (500, 1)):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        assert float(first_conv(trainer.network).attention.temperature) == pytest.approx(expected)
    short = make_trainer(find_trainer(f"{name}_60epochs1iters"))
    assert short.annealing_epochs == 6
    # The released temperature is constant without annealing.
    constant = make_trainer(find_trainer("nnUNetTrainerMAGIC_released"))
    constant.initialize()
    constant.current_epoch = 500
    constant.on_train_epoch_start()
    assert first_conv(constant.network).attention.temperature == 30


def test_stock_prediction_gives_the_trained_networks_logits(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerMAGIC_annealed_AdamW_2epochs1iters"))
    trainer.run_training()
    # 0.2 epochs of annealing end before the second.
    assert first_conv(trainer.network).attention.temperature == 1
    predictor = predictor_of(trainer.output_folder_base, mirroring=False)
    image = torch.randn(1, 16, 16, 16)
    predicted = predictor.predict_logits_from_preprocessed_data(image)
    assert first_conv(predictor.network).attention.temperature == 1
    assert_the_networks_logits(predicted, trainer, image[None])


def test_a_training_begun_without_the_standardisation_goes_on_without_it(make_trainer) -> None:
    plan = {"patch_size": (16, 24), "strides": ((1, 1), (2, 2), (2, 2))}
    letter = make_trainer(find_trainer("nnUNetTrainerMAGIC_letter_2epochs1iters_unmirrored"), **plan)
    letter.run_training()
    begun = f"{letter.output_folder}/checkpoint_final.pth"
    names = letter.network.state_dict().keys()

    trainer = make_trainer(find_trainer("nnUNetTrainerMAGIC_3epochs1iters_unmirrored"), **plan)
    trainer.initialize()
    assert names < trainer.network.state_dict().keys()
    trainer.load_checkpoint(begun)
    trainer.run_training()
    assert len(trainer.logger.get_value("train_losses", step=None)) == 3
    continued = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)["network_weights"]
    assert continued.keys() == names
    before = torch.load(begun, weights_only=False)["network_weights"]
    assert all(not torch.equal(continued[key], before[key]) for key in names if key.endswith("bottleneck.0.weight"))


@pytest.mark.parametrize(
    "plan",
    [
        {"patch_size": (64, 48), "strides": ((1, 1), *[(2, 2)] * 3)},
        {
            "patch_size": (10, 32, 24),
            "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
            "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        },
    ],
    ids=["2d", "anisotropic"],
)
@pytest.mark.parametrize("name", ["nnUNetTrainerMAGIC", "nnUNetTrainerMAGICResEnc"])
def test_one_epoch_on_other_plans(make_trainer, name, plan) -> None:
    trainer = make_trainer(find_trainer(f"{name}_1epochs1iters"), **plan)
    trainer.run_training()
    (loss,) = trainer.logger.get_value("train_losses", step=None)
    assert loss == loss


def test_a_plan_for_another_network_is_refused_and_leaves_nothing_behind(make_trainer, tmp_path) -> None:
    architecture = {
        "network_class_name": "somewhere.OtherUNet",
        "arch_kwargs": {"strides": [[1] * 3, [2] * 3], "kernel_sizes": [[3] * 3] * 2},
        "_kw_requires_import": [],
    }
    with pytest.raises(ValueError, match=r"somewhere\.OtherUNet is none of nnU-Net's own U-Nets"):
        make_trainer(find_trainer("nnUNetTrainerMAGIC"), architecture=architecture)
    assert not (tmp_path / "results").exists()
