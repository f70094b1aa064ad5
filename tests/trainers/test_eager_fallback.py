"""A compiler that fails costs speed, not the training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.backends.common import aot_autograd

from nnunet_deform.trainers.base import PlannedNetworkTrainer
from nnunet_deform.trainers.eager_fallback import EagerFallback

PLAN = {"patch_size": (16, 12), "strides": ((1, 1), (2, 2))}


class Tiny(nn.Module):
    """Takes a compiler a moment, and has running statistics."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.decoder = nn.Conv2d(channels, classes, 3, padding=1)
        self.decoder.deep_supervision = False

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(x))


class nnUNetTrainerOfNnunet(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        torch.manual_seed(0)
        return Tiny(num_input_channels, num_output_channels)

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


class nnUNetTrainerOurs(EagerFallback, nnUNetTrainerOfNnunet):
    pass


def raises(graph, inputs):
    raise RuntimeError("ptxas exited with error code 255\nand more")


def as_it_is(graph, inputs):
    return graph.forward


def raises_in_evaluation(graph, inputs):
    return graph.forward if torch.is_grad_enabled() else raises(graph, inputs)


def raises_when_it_runs(graph, inputs):
    return lambda *inputs: raises(graph, inputs)


COMPILERS = {
    "forward": raises,
    "backward": aot_autograd(fw_compiler=as_it_is, bw_compiler=raises),
    "launch": raises_when_it_runs,
}


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


@pytest.fixture
def started(make_trainer, monkeypatch) -> Callable[..., nnUNetTrainer]:
    """Returns started(trainer_class, compiler): a trainer at the first step of an epoch, with a batch in
    ``trainer.batch``, that nnU-Net has made for a device on which it compiles network and loss; with None it does not.
    """
    compiled = []
    torch_compile = torch.compile

    def start(trainer_class: type[nnUNetTrainer], compiler) -> nnUNetTrainer:
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: compiler is not None)
        monkeypatch.setattr(
            torch, "compile", lambda thing: compiled.append(thing) or torch_compile(thing, backend=compiler)
        )
        trainer = make_trainer(trainer_class, **PLAN, results=f"results {len(compiled)}")
        trainer.initialize()
        assert isinstance(trainer.network, OptimizedModule) == (compiler is not None)
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        trainer.on_train_epoch_start()
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (nnU-Net's loaders draw from it)
        trainer.batch = next(trainer.dataloader_train)
        return trainer

    return start


def log_of(trainer: nnUNetTrainer) -> str:
    return Path(trainer.log_file).read_text()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_first_training_step_is_taken_without_it(started, compiler) -> None:
    """As if it had never been tried, running statistics included. The compiled loss fails as well, if it is asked."""
    trainer = started(nnUNetTrainerOurs, COMPILERS[compiler])
    loss = trainer.train_step(trainer.batch)["loss"]
    never = started(nnUNetTrainerOurs, None)
    assert loss == never.train_step(never.batch)["loss"]
    assert not isinstance(trainer.network, OptimizedModule)
    expected = never.network.state_dict()
    assert any("running" in key for key in expected)
    for key, value in trainer.network.state_dict().items():
        assert torch.equal(value, expected[key]), key
    trainer.train_step(trainer.batch)
    (line,) = [line for line in log_of(trainer).splitlines() if "torch.compile failed" in line]
    assert "in the first step of training (" in line
    assert "ptxas exited with error code 255" in line
    assert "Please run nnunet-deform selftest --device cpu -o report.json" in line


def test_in_validation_and_in_prediction(started, monkeypatch) -> None:
    """Which compile the network again."""
    validated = []
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, _: validated.append(self.network))
    for step in ("validation", "prediction"):
        torch.compiler.reset()
        trainer = started(nnUNetTrainerOurs, raises_in_evaluation)
        trainer.train_step(trainer.batch)
        assert isinstance(trainer.network, OptimizedModule)
        if step == "validation":
            trainer.on_validation_epoch_start()
            with torch.no_grad():
                assert np.isfinite(trainer.validation_step(trainer.batch)["loss"])
        else:
            trainer.perform_actual_validation()
        assert not isinstance(trainer.network, OptimizedModule)
        assert f"torch.compile failed in the first step of {step} (" in log_of(trainer)
    assert validated == [trainer.network]


def test_a_compiler_that_works_stays(started) -> None:
    trainer = started(nnUNetTrainerOurs, "eager")
    trainer.train_step(trainer.batch)
    assert isinstance(trainer.network, OptimizedModule)
    assert "failed" not in log_of(trainer)

    # Later errors have other causes.
    def late(data):
        raise RuntimeError("later")

    trainer.network.forward = late
    with pytest.raises(RuntimeError, match="later"):
        trainer.train_step(trainer.batch)


@pytest.mark.parametrize(
    "error", [ValueError("of the loss"), torch.OutOfMemoryError("full"), FloatingPointError("nan")]
)
def test_a_step_that_fails_by_itself_raises_its_own_error(started, monkeypatch, error) -> None:
    trainer = started(nnUNetTrainerOurs, "eager")

    def loss(*arguments):
        raise error

    monkeypatch.setattr(trainer, "_build_loss", lambda: loss)
    trainer.loss = loss
    with pytest.raises(type(error), match=str(error)):
        trainer.train_step(trainer.batch)
    assert "torch.compile failed" not in log_of(trainer)


def test_a_rank_does_not_fall_back_alone(started) -> None:
    """The others would wait for it for ever."""
    trainer = started(nnUNetTrainerOurs, raises)
    trainer.is_ddp = True
    with pytest.raises(Exception, match="ptxas exited"):
        trainer.train_step(trainer.batch)
    assert isinstance(trainer.network, OptimizedModule)


def test_our_networks_trainers_have_it() -> None:
    """Outside of the guard, which looks at each step it is given."""
    order = [base.__name__ for base in PlannedNetworkTrainer.__mro__]
    assert order.index("OperatorReport") < order.index("EagerFallback") < order.index("NumericalGuard")


def test_networks_of_nnunets_own_trainers_are_left_as_they_are(started) -> None:
    trainer = started(nnUNetTrainerOfNnunet, raises)
    with pytest.raises(Exception, match="ptxas exited"):
        trainer.train_step(trainer.batch)
