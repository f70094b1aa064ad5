"""The guard names the layer that breaks first, changes nothing, and costs a normal step nothing."""

import os
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import narrow_baselines
from torch import Tensor, nn

from nnunet_deform.trainers import numerical_guard, wrapping
from nnunet_deform.trainers.numerical_guard import MAX_SKIPPED_STEPS
from nnunet_deform.trainers.variants import find_trainer

# Of each main trainer, and of a variant of a stock one: a layer in the middle of the encoder and one of the decoder.
LAYERS = {
    "nnUNetTrainerDeformUX": ("encoder.stages.1.0.branches.0.0", "decoder.seg_layers.1"),
    "nnUNetTrainerLightMedSeg": ("encoder.stages.1", "decoder.seg_layers.1"),
    "nnUNetTrainerMAGIC": ("encoder.stages.1.0.convs.0.conv", "decoder.seg_layers.1"),
    "nnUNetTrainerMAGICResEnc": ("encoder.stages.1.blocks.0.conv1.conv", "decoder.seg_layers.1"),
    "nnUNetTrainer_AdamW": ("encoder.stages.1.0.convs.0.conv", "decoder.seg_layers.1"),
}
cases = pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, pair in LAYERS.items() for layer in pair])


pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def started(make_trainer) -> Callable[[str], nnUNetTrainer]:
    """Returns started(name): a trainer in the middle of an epoch, with a batch in ``trainer.batch``."""

    def start(name: str) -> nnUNetTrainer:
        trainer = make_trainer(find_trainer(f"{name}_2epochs4iters_seed0"))
        trainer.initialize()
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        trainer.current_epoch = 1
        trainer.on_train_epoch_start()
        trainer.batch = next(trainer.dataloader_train)
        trainer.train_step(trainer.batch)
        trainer.train_step(trainer.batch)
        return trainer

    return start


class PoisonedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.inf)


def break_output(trainer: nnUNetTrainer, layer: str, value: float = torch.nan) -> None:
    def spoil(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[(0,) * output.ndim] = value
        return output

    trainer.network.get_submodule(layer).register_forward_hook(spoil)


def break_gradient(trainer: nnUNetTrainer, layer: str) -> None:
    trainer.network.get_submodule(layer).register_forward_hook(lambda *args: PoisonedGradient.apply(args[-1]))


def state(trainer: nnUNetTrainer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in trainer.network.state_dict().items()}


def weights(trainer: nnUNetTrainer) -> dict[str, Tensor]:
    """Without running statistics, which a forward pass changes whether or not its step is taken."""
    return {key: value.detach().clone() for key, value in trainer.network.named_parameters()}


def stopped(trainer: nnUNetTrainer) -> str:
    """The message, after a check that the weights are those before the step."""
    before = weights(trainer)
    with pytest.raises(FloatingPointError) as error:
        trainer.train_step(trainer.batch)
    after = weights(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in trainer.network.parameters())
    message = str(error.value)
    assert message.startswith("Training stopped in epoch 1, iteration 2 (both counted from 0): ")
    with open(trainer.log_file) as log:
        assert message in log.read()
    return message


def offender(message: str) -> str:
    return re.search(r"First offending layer: (\S+) \(", message)[1]


@cases
def test_a_layers_output(started, name: str, layer: str) -> None:
    trainer = started(name)
    break_output(trainer, layer)
    message = stopped(trainer)
    assert "the loss is nan" in message
    # A block's own output breaks after its layers', and a layer's before its block's.
    assert offender(message) == layer
    assert "(its output, in the forward pass)" in message


@cases
def test_a_layers_gradient(started, name: str, layer: str) -> None:
    trainer = started(name)
    break_gradient(trainer, layer)
    message = stopped(trainer)
    assert "the norm of the gradients is nan" in message
    assert offender(message).startswith(layer)
    assert "the gradient of its" in message


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight(started, name: str) -> None:
    trainer = started(name)
    layer = LAYERS[name][1]
    with torch.no_grad():
        trainer.network.get_submodule(layer).bias[0] = torch.inf
    with pytest.raises(FloatingPointError) as error:
        trainer.train_step(trainer.batch)
    assert f"First offending layer: {layer} (its bias is not finite before the step)" in str(error.value)


def test_the_image_and_the_loss(started) -> None:
    trainer = started("nnUNetTrainerLightMedSeg")
    stock_loss = trainer.loss
    trainer.loss = lambda outputs, target: stock_loss(outputs, target) / 0
    assert "The network's outputs are finite, the loss is not." in stopped(trainer)
    trainer.loss = stock_loss
    trainer.batch["data"][0, 0, 0, 0, 0] = torch.inf
    assert "The images of the batch are not finite." in stopped(trainer)


def test_the_innermost_layer_is_named_and_buffers_stay() -> None:
    network = nn.Sequential()
    network.add_module("before", nn.Conv1d(1, 2, 1))
    network.add_module("block", nn.Sequential(nn.LeakyReLU(), nn.BatchNorm1d(2)))
    network.block[0].register_forward_hook(lambda *args: PoisonedGradient.apply(args[-1]))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with numerical_guard._unchanged(network), numerical_guard._Watch(network) as watch:
        network(torch.randn(3, 1, 4)).sum().backward()
        assert not torch.equal(network.block[1].running_mean, before["block.1.running_mean"])
    assert watch.found == "First offending layer: block.0 (the gradient of its input, in the backward pass)."
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # The hooks are gone.
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_an_operation_between_layers(started) -> None:
    trainer = started("nnUNetTrainerMAGIC")
    stage = trainer.network.encoder.stages[1]
    stock_forward = stage.forward
    stage.forward = lambda x: stock_forward(x * torch.inf)
    message = stopped(trainer)
    assert offender(message) == "encoder.stages.1"
    assert "an operation in its forward pass, before encoder.stages.1.0" in message


def test_a_step_that_cannot_be_reproduced(started) -> None:
    trainer = started("nnUNetTrainerMAGIC")
    once = [torch.nan]
    layer = trainer.network.encoder.stages[1]
    layer.register_forward_hook(lambda module, arguments, output: output * (once.pop() if once else 1))
    assert "In a second run of the batch every layer was finite" in stopped(trainer)


def test_without_deep_supervision(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_paper"))
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    break_output(trainer, "decoder.seg_layers.1")
    with pytest.raises(FloatingPointError, match=r"First offending layer: decoder\.seg_layers\.1 \("):
        trainer.train_step(next(trainer.dataloader_train))


def test_a_scaler_may_skip_twenty_steps_in_a_row(started) -> None:
    trainer = started("nnUNetTrainerMAGIC")
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    layer = trainer.network.encoder.stages[1]
    handle = layer.register_forward_hook(lambda *args: PoisonedGradient.apply(args[-1]))
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(trainer.batch)
    handle.remove()
    trainer.train_step(trainer.batch)
    handle = layer.register_forward_hook(lambda *args: PoisonedGradient.apply(args[-1]))
    before = weights(trainer)
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(trainer.batch)
    with pytest.raises(FloatingPointError, match=r"iteration 43 .*the step was skipped, 21 times in a row") as error:
        trainer.train_step(trainer.batch)
    assert offender(str(error.value)).startswith("encoder.stages.1")
    after = weights(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_scaler_may_not_skip_more_steps_of_a_fused_optimiser_either(started, monkeypatch) -> None:
    """Which is called in every step, and skips it itself."""
    narrow_baselines(monkeypatch)
    trainer = started("nnUNetTrainerPrimus_S")
    assert trainer.optimizer.defaults["fused"]
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    layer = next(name for name, module in trainer.network.named_modules() if name.endswith(".mlp"))
    for _ in range(2):
        module = trainer.network.get_submodule(layer)
        handle = module.register_forward_hook(lambda *args: PoisonedGradient.apply(args[-1]))
        before = weights(trainer)
        for _ in range(MAX_SKIPPED_STEPS):
            trainer.train_step(trainer.batch)
        after = weights(trainer)
        assert all(torch.equal(before[key], after[key]) for key in before)
        handle.remove()
        trainer.train_step(trainer.batch)
        assert any(not torch.equal(value, after[key]) for key, value in weights(trainer).items())
    break_gradient(trainer, layer)
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(trainer.batch)
    with pytest.raises(FloatingPointError, match=r"the step was skipped, 21 times in a row") as error:
        trainer.train_step(trainer.batch)
    assert offender(str(error.value)).startswith(layer)


class CountingScaler(torch.amp.GradScaler):
    """A GradScaler that works on this device and keeps its scale and whether the optimiser was called, step by step."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.history: list[tuple[float, bool]] = []

    def step(self, optimizer: torch.optim.Optimizer, *args, **options):
        self._called = False
        handle = optimizer.register_step_pre_hook(lambda *_: setattr(self, "_called", True))
        super().step(optimizer, *args, **options)
        handle.remove()

    def update(self, *args, **options) -> None:
        super().update(*args, **options)
        self.history.append((self.get_scale(), self._called))


def test_with_a_scaler_a_stock_trainer_with_a_suffix_is_stock(make_trainer) -> None:
    """Broken losses, broken gradients and good steps in turn: weights, scales, calls of the optimiser and the log."""
    # Broken are 1 and 2 by the loss, 4 by a gradient; 20 in a row from 6 on, and one after a good step.
    kinds = ["good", "loss", "loss", "good", "gradient", "good", *["loss", "gradient"] * 10, "good", "loss"]
    trained = []
    for trainer_class in (find_trainer("nnUNetTrainer_2epochs1iters"), nnUNetTrainer):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (the generator nnU-Net's loaders draw from)
        trainer = make_trainer(trainer_class)
        trainer.initialize()
        trainer.grad_scaler = CountingScaler()
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        trainer.on_train_epoch_start()
        batch = next(trainer.dataloader_train)
        layer, results = trainer.network.encoder.stages[1], []
        for kind in kinds:
            if kind == "loss":
                break_output(trainer, "encoder.stages.1", torch.inf)
            elif kind == "gradient":
                layer.register_forward_hook(lambda *args: PoisonedGradient.apply(args[-1]))
            results.append(trainer.train_step(batch))
            layer._forward_hooks.clear()
        trainer.on_train_epoch_end(results)
        trained.append((trainer, np.array([result["loss"] for result in results])))
    (ours, our_losses), (stock, stock_losses) = trained
    assert np.isnan(stock_losses).sum() == kinds.count("loss")
    assert np.array_equal(our_losses, stock_losses, equal_nan=True)
    assert ours.grad_scaler.history == stock.grad_scaler.history
    assert [called for _, called in stock.grad_scaler.history] == [kind == "good" for kind in kinds]
    assert ours.grad_scaler.get_scale() == 2.0 ** (16 - kinds.count("loss") - kinds.count("gradient"))
    one, two = state(ours), state(stock)
    assert all(torch.equal(one[key], two[key]) for key in one)
    # nnU-Net logs the mean as it is.
    assert np.isnan(ours.logger.get_value("train_losses", step=0))
    assert np.isnan(stock.logger.get_value("train_losses", step=0))


def test_with_a_scaler_losses_stop_it_after_as_many_skipped_steps(started) -> None:
    trainer = started("nnUNetTrainer")
    trainer.grad_scaler = CountingScaler()
    break_output(trainer, "encoder.stages.1", torch.inf)
    before = weights(trainer)
    for _ in range(MAX_SKIPPED_STEPS):
        assert np.isnan(trainer.train_step(trainer.batch)["loss"])
    with pytest.raises(
        FloatingPointError, match=r"the step was skipped, 21 times in a row \(the last loss is nan\)"
    ) as error:
        trainer.train_step(trainer.batch)
    assert offender(str(error.value)) == "encoder.stages.1"
    after = weights(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_epoch_with_a_skipped_loss_goes_on(make_trainer, monkeypatch) -> None:
    """Through nnU-Net's own epoch end, its log and its plot."""
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_2epochs2iters_seed0"))
    trainer.initialize()
    trainer.grad_scaler = CountingScaler()
    once = [torch.nan]
    trainer.network.encoder.stages[1].register_forward_hook(
        lambda module, arguments, output: output * (once.pop() if once else 1)
    )
    trainer.run_training()
    first, second = trainer.logger.get_value("train_losses", step=None)
    assert np.isnan(first)
    assert np.isfinite(second)
    assert [called for _, called in trainer.grad_scaler.history] == [False, True, True, True]


class Wrapped(nn.Module):
    """Stands in for DistributedDataParallel: a second run through it would wait for other processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return self.module(x)


def test_wrapped_and_compiled_networks_are_unwrapped(started, monkeypatch) -> None:
    trainer = started("nnUNetTrainer_AdamW")  # compiles fastest
    break_output(trainer, "decoder.seg_layers.1")
    monkeypatch.setattr(wrapping, "DistributedDataParallel", Wrapped)
    trainer.network = Wrapped(torch.compile(trainer.network, backend="eager"))
    assert offender(stopped(trainer)) == "decoder.seg_layers.1"
    assert trainer.network.calls == 1


def test_a_normal_step_is_the_same_and_reads_nothing_back(started, monkeypatch) -> None:
    trainer, other = (started("nnUNetTrainerMAGIC") for _ in range(2))
    # The guard's own hook on the optimiser gone, and nnU-Net's step in the place of the guarded one.
    for number in list(other.optimizer._optimizer_step_pre_hooks):
        del other.optimizer._optimizer_step_pre_hooks[number]
    trainer.train_step(trainer.batch)
    nnUNetTrainer.train_step(other, other.batch)
    one, two = state(trainer), state(other)
    assert all(torch.equal(one[key], two[key]) for key in one)

    copies: list[str] = []

    def counted(method: str) -> Callable:
        original = getattr(Tensor, method)

        def count(self: Tensor, *args, **options):
            copies.append(method)
            return original(self, *args, **options)

        return count

    for method in ("item", "cpu", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(Tensor, method, counted(method))
    nnUNetTrainer.train_step(other, other.batch)
    stock = sorted(copies)
    copies.clear()
    trainer.train_step(trainer.batch)
    # The norm, when the copy of the loss has already waited for the device.
    assert copies[-1] == "item"
    assert sorted(copies) == sorted([*stock, "item"])


def test_the_same_command_continues_from_the_last_checkpoint(make_trainer) -> None:
    seeded = find_trainer("nnUNetTrainerLightMedSeg_4epochs2iters_seed0")
    undisturbed = make_trainer(seeded, results="undisturbed")
    undisturbed.run_training()

    trainer = make_trainer(seeded)
    epoch_start = trainer.on_train_epoch_start

    def break_the_third_epoch() -> None:
        epoch_start()
        if trainer.current_epoch == 2:
            break_output(trainer, "decoder.seg_layers.1")

    trainer.on_train_epoch_start = break_the_third_epoch
    with pytest.raises(FloatingPointError, match=r"epoch 2, iteration 0 .*--c to continue from checkpoint_latest\.pth"):
        trainer.run_training()
    continued = make_trainer(seeded)
    continued.load_checkpoint(os.path.join(continued.output_folder, "checkpoint_latest.pth"))
    assert continued.current_epoch == 2
    continued.run_training()
    one, two = state(undisturbed), state(continued)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert np.isfinite(continued.logger.get_value("train_losses", step=None)).all()


def test_nothing_saved_yet(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_2epochs1iters"))
    trainer.initialize()
    break_output(trainer, "decoder.seg_layers.1")
    with pytest.raises(FloatingPointError, match="No checkpoint has been saved yet: the same command starts anew"):
        trainer.run_training()
