"""What holds for every trainer of a network of ours: a new one is tested by being listed in ``trainers.__all__``."""

import pickle

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import LABELS, REGIONS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_deform import networks, trainers
from nnunet_deform.trainers.variants import find_trainer

OURS = [name for name in trainers.__all__ if name not in (*trainers.BASELINES, *trainers.RIVALS)]
MAIN = ("nnUNetTrainerDeformUX", "nnUNetTrainerLightMedSeg", "nnUNetTrainerMAGIC", "nnUNetTrainerMAGICResEnc")
PLANS = {
    "3d": {"patch_size": (16, 16, 16)},
    "2d": {"patch_size": (32, 24), "strides": ((1, 1), (2, 2), (2, 2))},
}
pytestmark = pytest.mark.usefixtures("narrow")
main_trainers = pytest.mark.parametrize("name", MAIN)
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def started(trainer: nnUNetTrainer) -> nnUNetTrainer:
    """Initialised, with loaders, in the middle of training."""
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    return trainer


def tensors(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize("name", OURS)
def test_it_builds_its_network_takes_a_step_and_loads_again(make_trainer, name) -> None:
    # Those with BatchNorm are for 2D.
    size = (32, 32) if name.endswith("_BN") else (16, 16, 16)
    trainer = make_trainer(find_trainer(name), size, ((1,) * len(size), (2,) * len(size), (2,) * len(size)))
    trainer.initialize()
    planned = trainer.planned_architecture(trainer.configuration_manager)["network_class_name"]
    assert type(trainer.network) is networks.NETWORKS[planned.removeprefix("nnunet_deform.networks.")]
    trained = {key for key, parameter in trainer.network.named_parameters() if parameter.requires_grad}
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    assert batch["data"].shape == (2, 1, *size)
    loss = trainer.train_step(batch)["loss"]
    assert np.isfinite(loss)
    changed = {key for key, value in trainer.network.state_dict().items() if not torch.equal(value, before[key])}
    # nnU-Net gives the coarsest output weight zero.
    assert {key for key in trained if "decoder" in key and "seg_layers.0" not in key} <= changed

    # As prediction does it: without deep supervision, every weight in its place, the same logits.
    single = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    single.load_state_dict(trainer.network.state_dict(), strict=True)
    # In training mode running statistics would change from one pass to the next.
    single.eval()
    trainer.network.eval()
    with torch.no_grad():
        expected = tensors(trainer.network(batch["data"]))[0]
        assert expected.shape == (2, 3, *size)
        assert torch.equal(single(batch["data"]), expected)
        assert torch.equal(pickle.loads(pickle.dumps(single))(batch["data"]), expected)
    assert pickle.loads(pickle.dumps(type(trainer))) is type(trainer)


# What the trainers do with a compiled network is the same for all, and nnU-Net's own compiles fastest;
# test_compiled_networks switches each of ours compiled.
@pytest.mark.parametrize(
    ("plan", "compiled", "name"),
    [
        pytest.param(
            PLANS[plan],
            compiled,
            name,
            id=f"{plan}-{'compiled' if compiled else 'eager'}-{name}",
            marks=pytest.mark.slow if compiled and name != "nnUNetTrainer_AdamW" else (),
        )
        for plan, compiled in (("3d", False), ("2d", False), ("2d", True))
        for name in (*MAIN, *(["nnUNetTrainer_AdamW"] if compiled else []))
    ],
)
def test_deep_supervision_is_switched_by_the_trainer(make_trainer, plan, compiled, name) -> None:
    torch.compiler.reset()
    trainer = started(make_trainer(find_trainer(name), **plan))
    plain = trainer.network
    if compiled:
        # What it wraps is nnU-Net's business; the backend that generates code runs only where there is a compiler.
        trainer.network = torch.compile(plain, backend="eager")
    batch = next(trainer.dataloader_train)
    sizes = [tuple(target.shape[2:]) for target in batch["target"]]
    for enabled in (True, False, True):
        trainer.set_deep_supervision_enabled(enabled)
        outputs = trainer.network(batch["data"])
        assert isinstance(outputs, Tensor) != enabled
        expected = sizes if enabled else sizes[:1]
        assert [tuple(output.shape[2:]) for output in tensors(outputs)] == expected
    assert np.isfinite(trainer.train_step(batch)["loss"])
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(path)
    weights = torch.load(path, weights_only=False)["network_weights"]
    plain_weights = plain.state_dict()
    assert list(weights) == list(plain_weights)
    assert all(torch.equal(weights[key], plain_weights[key]) for key in weights)


@main_trainers
@plans
def test_deep_supervision_off(make_trainer, name, plan) -> None:
    trainer = make_trainer(find_trainer(name), **plan)
    trainer.enable_deep_supervision = False
    started(trainer)
    batch = next(trainer.dataloader_train)
    assert isinstance(batch["target"], Tensor)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    # Distributed training waits for the gradient of every parameter.
    trained = [parameter for parameter in trainer.network.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


@main_trainers
@plans
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients_under_autocast(make_trainer, name, plan, dtype) -> None:
    trainer = started(make_trainer(find_trainer(f"{name}_seed0"), **plan))
    batch = next(trainer.dataloader_train)
    exact = trainer.loss(trainer.network(batch["data"]), batch["target"])
    with torch.autocast("cpu", dtype=dtype):
        outputs = trainer.network(batch["data"])
        loss = trainer.loss(outputs, batch["target"])
    assert all(output.dtype == dtype for output in outputs)
    assert loss.item() == pytest.approx(exact.item(), abs={torch.bfloat16: 0.05, torch.float16: 0.005}[dtype])
    # Without oneDNN: its bfloat16 gradients of a 3D convolution's weight are wrong in torch 2.15, see the README.
    with torch.backends.mkldnn.flags(enabled=False):
        (loss * 2.0**7).backward()
    gradients = {key: p.grad for key, p in trainer.network.named_parameters() if p.requires_grad}
    # nnU-Net gives the coarsest output weight zero.
    assert {key for key, gradient in gradients.items() if gradient is None} == {
        "decoder.seg_layers.0.weight",
        "decoder.seg_layers.0.bias",
    }
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


@main_trainers
@pytest.mark.parametrize("labels", [{**LABELS, "third": 3}, REGIONS], ids=["more-labels", "regions"])
def test_pretrained_weights_go_over_to_other_labels(make_trainer, name, labels) -> None:
    pretrained = make_trainer(find_trainer(name))
    pretrained.initialize()
    path = f"{pretrained.output_folder}/checkpoint_final.pth"
    pretrained.save_checkpoint(path)
    dataset = {"labels": labels, **({"regions_class_order": [1, 2]} if labels is REGIONS else {})}
    trainer = make_trainer(find_trainer(name), dataset=dataset)
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    source = pretrained.network.state_dict()
    load_pretrained_weights(trainer.network, path)
    heads = 0
    for key, value in trainer.network.state_dict().items():
        if ".seg_layers." in key:
            heads += 1
            assert torch.equal(value, before[key])
        else:
            assert torch.equal(value, source[key])
    assert heads == 4
    head = trainer.network.decoder.seg_layers[-1]
    assert head.out_channels == trainer.label_manager.num_segmentation_heads != 3


class NoDoublePrecision(TorchDispatchMode):
    """Fails at every tensor of a type that Apple's GPUs do not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                assert leaf.dtype not in (torch.float64, torch.complex64, torch.complex128), func
        return result


@main_trainers
@plans
def test_a_step_needs_no_type_that_apple_gpus_do_not_have(make_trainer, name, plan) -> None:
    trainer = started(make_trainer(find_trainer(name), **plan))
    batch = next(trainer.dataloader_train)
    with NoDoublePrecision():
        trainer.train_step(batch)
        trainer.set_deep_supervision_enabled(False)
        with torch.inference_mode():
            trainer.network(batch["data"])
