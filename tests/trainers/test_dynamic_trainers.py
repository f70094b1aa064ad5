"""The trainers of ODConv, DCD, DDConv, DYConv and CondConv: what they build, former names, and the twins' BatchNorm."""

from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from stock_prediction import assert_the_networks_logits, predictor_of
from torch import nn

from nnunet_deform import trainers
from nnunet_deform.layers import DCD, DDConv, MagicConv, ODConv, RunningNorm
from nnunet_deform.networks import DynamicPlainConvUNet, MagicPlainConvUNet
from nnunet_deform.trainers.variants import find_trainer

PLAN_2D = {"patch_size": (32, 24), "strides": ((1, 1), (2, 2), (2, 2))}


def network_of(make_trainer, name: str, **plan) -> DynamicPlainConvUNet:
    trainer = make_trainer(find_trainer(f"{name}_seed1"), **plan)
    trainer.initialize()
    return trainer.network


@pytest.mark.parametrize(
    ("name", "network", "layer", "n_kernels"),
    [
        ("DYConv", MagicPlainConvUNet, MagicConv, 4),
        ("CondConv", MagicPlainConvUNet, MagicConv, 8),
        ("ODConv", DynamicPlainConvUNet, ODConv, 4),
        ("DCD", DynamicPlainConvUNet, DCD, 1),
        ("DDConv", DynamicPlainConvUNet, DDConv, 8),
    ],
)
def test_networks_and_their_twins_with_batch_norm(make_trainer, name, network, layer, n_kernels) -> None:
    plain = network_of(make_trainer, f"nnUNetTrainer{name}", **PLAN_2D)
    twin = network_of(make_trainer, f"nnUNetTrainer{name}_BN", **PLAN_2D)
    for one, norm in ((plain, nn.InstanceNorm2d), (twin, nn.BatchNorm2d)):
        assert type(one) is network
        convs = list(one.dynamic_convs().values())
        assert len(convs) == 1  # one a level, of 8, 16 and 32 channels; 9 are needed
        assert all(isinstance(conv, layer) and conv.n_kernels == n_kernels for conv in convs)
        norms = [module for module in one.modules() if isinstance(module, (nn.InstanceNorm2d, nn.BatchNorm2d))]
        assert len(norms) == 5
        assert all(type(module) is norm and module.eps == 1e-5 and module.affine for module in norms)
    parameters = dict(plain.named_parameters())
    assert all(torch.equal(parameter, parameters[key]) for key, parameter in twin.named_parameters())


def test_the_modes(make_trainer) -> None:
    (odconv,) = network_of(make_trainer, "nnUNetTrainerODConv").dynamic_convs().values()
    assert type(odconv.attention.norm) is RunningNorm
    assert all(
        head is not None for head in (odconv.attention.channel, odconv.attention.filter, odconv.attention.spatial)
    )
    (dcd,) = network_of(make_trainer, "nnUNetTrainerDCD").dynamic_convs().values()
    assert (dcd.residual_norm, dcd.cells) == ("none", (2, 2, 2))
    (ddconv,) = network_of(make_trainer, "nnUNetTrainerDDConv").dynamic_convs().values()
    assert (ddconv.routing, ddconv.routing_dropout) == ("input", 0.0)


@pytest.mark.parametrize("twin", ["", "_BN"])
def test_slow_offsets_learn_at_a_hundredth_of_the_rate(make_trainer, twin) -> None:
    trainer = make_trainer(find_trainer(f"nnUNetTrainerDDConv_slowOffsets{twin}_AdamW_lr5e-3_1epochs5iters"), **PLAN_2D)
    trainer.initialize()
    trainer.lr_scheduler.step(0, 3)
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    rate = {names[id(one)]: group["lr"] for group in trainer.optimizer.param_groups for one in group["params"]}
    assert set(rate) == set(names.values())
    branches = ("offset_weight", "offset_bias", "offset_gates.weight", "offset_gates.bias")
    slow = [name for name in rate if name.endswith(branches)]
    assert len(slow) == len(branches)
    (usual,) = {value for name, value in rate.items() if name not in slow}
    assert [rate[name] for name in slow] == pytest.approx([0.01 * usual] * len(slow), rel=1e-12)


@pytest.mark.parametrize("name", ["MAGIC", "MAGIC_static", "DYConv", "CondConv", "ODConv", "DCD", "DDConv"])
def test_batch_norm_is_refused_in_3d_and_leaves_nothing_behind(make_trainer, tmp_path, name) -> None:
    message = r"norm='batch' is for 2D.* the patch \[16, 16, 16\] has three axes; use the 2d configuration, or"
    with pytest.raises(NotImplementedError, match=message):
        make_trainer(find_trainer(f"nnUNetTrainer{name}_BN"))
    assert not (tmp_path / "results").exists()


def test_the_stock_networks_twin_is_nnunets_own(make_trainer) -> None:
    network = network_of(make_trainer, "nnUNetTrainerBN_AdamW", **PLAN_2D)
    norms = [module for module in network.modules() if isinstance(module, (nn.InstanceNorm2d, nn.BatchNorm2d))]
    assert len(norms) == 5
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


@pytest.mark.parametrize("name", ["DYConv", "CondConv"])
def test_former_names_build_the_same_and_keep_their_folders(make_trainer, name) -> None:
    former = make_trainer(find_trainer(f"nnUNetTrainerMAGIC_{name}_seed1"), **PLAN_2D)
    former.initialize()
    assert f"nnUNetTrainerMAGIC_{name}_seed1__nnUNetPlans__2d" in former.output_folder
    checkpoint = f"{former.output_folder}/checkpoint_latest.pth"
    former.save_checkpoint(checkpoint)
    renamed = make_trainer(find_trainer(f"nnUNetTrainer{name}_seed2"), **PLAN_2D)
    renamed.initialize()
    renamed.load_checkpoint(checkpoint)
    assert all(
        torch.equal(value, renamed.network.state_dict()[key]) for key, value in former.network.state_dict().items()
    )
    assert issubclass(getattr(trainers, f"nnUNetTrainerMAGIC_{name}"), getattr(trainers, f"nnUNetTrainer{name}"))


@pytest.mark.parametrize("name", ["ODConv", "DCD_BN", "DDConv"])
def test_a_training_is_predicted_with_by_stock_prediction(make_trainer, name) -> None:
    trainer = make_trainer(find_trainer(f"nnUNetTrainer{name}_AdamW_2epochs1iters"), **PLAN_2D)
    trainer.run_training()
    predictor = predictor_of(trainer.output_folder_base, mirroring=False)
    image = torch.randn(1, 1, 32, 24)
    predicted = predictor.predict_logits_from_preprocessed_data(image)
    if name == "ODConv":
        # 0.2 epochs of annealing end before the second, and the temperature is saved.
        assert {float(conv.attention.temperature) for conv in predictor.network.dynamic_convs().values()} == {1}
    assert_the_networks_logits(predicted, trainer, image)
    (log,) = Path(trainer.output_folder).glob("training_log*")
    assert log.read_text().count("Operators on 2 validation patches: ") == 2


def test_odconv_is_not_compiled_and_says_why(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    for name in ("nnUNetTrainerDCD", "nnUNetTrainerODConv_layer"):
        assert make_trainer(find_trainer(name))._do_i_compile()
    trainer = make_trainer(find_trainer("nnUNetTrainerODConv"))
    assert not trainer._do_i_compile()
    assert "ODConv is not compiled: its gradients would be wrong" in Path(trainer.log_file).read_text()
