"""What each epoch says of a network's operators, and that nothing else changes by it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import without_waiting
from torch.nn.parallel import DistributedDataParallel

from nnunet_deform.networks import DeformUXNet, LightMedSeg
from nnunet_deform.networks.observation import read_epochs
from nnunet_deform.plans import deformux
from nnunet_deform.trainers import operator_report
from nnunet_deform.trainers.operator_report import OBSERVED_BATCHES, OperatorReport
from nnunet_deform.trainers.variants import find_trainer

KEYS = {
    "nnUNetTrainerDeformUX": {
        f"{quantity}_level{level}"
        for quantity in ("offset_mean", "offset_max", "outside", "outside_undeformed")
        for level in (1, 2)
    },
    "nnUNetTrainerLightMedSeg": {"anchor_distance", "anchor_spread", "routing_entropy"},
    "nnUNetTrainerMAGIC": {
        *(f"mixing_{quantity}_{which}" for quantity in ("entropy", "spread") for which in ("median", "min")),
        "mixing_dead",
        "mixing_kernels",
    },
}
PLAN = {"patch_size": (32, 24), "strides": ((1, 1), (2, 2), (2, 2))}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformux, "BASE_FEATURES", 8)
    without_waiting(monkeypatch)


def trained(trainer: nnUNetTrainer) -> Path:
    trainer.run_training()
    return Path(trainer.output_folder)


def log_of(folder: Path) -> str:
    return "".join(log.read_text() for log in sorted(folder.glob("training_log_*.txt")))


@pytest.mark.parametrize("name", list(KEYS))
def test_each_epoch_has_one_line_and_the_numbers(make_trainer, name) -> None:
    trainer = make_trainer(find_trainer(f"{name}_2epochs5iters_seed0"), **PLAN)
    folder = trained(trainer)
    assert log_of(folder).count("Operators on 2 validation patches: ") == 2  # one batch an epoch
    epochs = read_epochs(folder / "operators.jsonl")
    assert list(epochs) == [0, 1]
    assert [set(values) for values in epochs.values()] == [KEYS[name]] * 2
    assert all(np.isfinite(value) for values in epochs.values() for value in values.values())
    # The first epoch's offsets are not zero any more, and the second's are others.
    assert len({json.dumps(values) for values in epochs.values()}) == 2


@pytest.mark.parametrize("name", ["nnUNetTrainerDeformUX_opOff", "nnUNetTrainerLightMedSeg_opOff"])
def test_a_twin_says_that_it_has_no_operator(make_trainer, name) -> None:
    folder = trained(make_trainer(find_trainer(f"{name}_2epochs1iters_seed0"), **PLAN))
    assert log_of(folder).count("Operators: this network has no operator to report on.") == 2
    assert not (folder / "operators.jsonl").exists()


def test_a_network_that_cannot_report_is_not_asked(make_trainer) -> None:
    class nnUNetTrainerStock(OperatorReport, nnUNetTrainer):
        pass

    trainer = make_trainer(nnUNetTrainerStock, **PLAN)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    assert "Operators" not in log_of(trained(trainer))
    assert trainer._observed_batches == []


def test_it_sees_the_first_validation_batches_and_draws_none(make_trainer, monkeypatch) -> None:
    seen, validated = [], []
    observe, validate = LightMedSeg.observe_operators, nnUNetTrainer.validation_step
    monkeypatch.setattr(LightMedSeg, "observe_operators", lambda self, x: seen.append(x.clone()) or observe(self, x))
    monkeypatch.setattr(
        nnUNetTrainer,
        "validation_step",
        lambda self, batch: validated.append(batch["data"].clone()) or validate(self, batch),
    )
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_2epochs15iters_seed0"), **PLAN)
    folder = trained(trainer)
    assert len(validated) == 2 * 3
    assert len(seen) == 2 * OBSERVED_BATCHES == 4
    for batch, expected in zip(seen, [*validated[:2], *validated[3:5]], strict=True):
        assert torch.equal(batch, expected)
    assert log_of(folder).count("Operators on 4 validation patches: ") == 2
    assert trainer._observed_batches == []


@pytest.mark.parametrize("name", list(KEYS))
def test_a_seeded_training_is_bit_equal_without_the_report(make_trainer, monkeypatch, name) -> None:
    def run(results: str) -> tuple[dict, list, list]:
        trainer = make_trainer(find_trainer(f"{name}_2epochs2iters_seed3"), results=results, **PLAN)
        folder = trained(trainer)
        weights = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
        drawn = [random.random(), np.random.random_sample(), torch.rand(()).item()]  # noqa: NPY002
        return weights, trainer.logger.get_value("val_losses", step=None), drawn

    network_class = {"DeformUX": DeformUXNet, "LightMedSeg": LightMedSeg}.get(name.removeprefix("nnUNetTrainer"))
    if network_class is not None:
        observe = network_class.observe_operators

        # As a network might that samples something in its report.
        def drawing(self, x):
            torch.rand(3)
            return observe(self, x)

        monkeypatch.setattr(network_class, "observe_operators", drawing)
    weights, losses, drawn = run("with")
    monkeypatch.setattr(OperatorReport, "_report_operators", lambda self: None)
    without, losses_without, drawn_without = run("without")
    assert all(torch.equal(weights[key], without[key]) for key in weights)
    assert losses == losses_without
    assert drawn == drawn_without


class _Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["before the report", "after the report"])
def test_a_continued_training_repeats_no_epoch(make_trainer, monkeypatch, moment) -> None:
    name = "nnUNetTrainerDeformUX_4epochs2iters_seed0"
    whole = trained(make_trainer(find_trainer(name), results="whole", **PLAN)) / "operators.jsonl"
    trainer = make_trainer(find_trainer(name), **PLAN)
    with monkeypatch.context() as patch:

        def killed_in_epoch_2(self, report=OperatorReport._report_operators) -> None:
            if self.current_epoch == 2 and moment == "before the report":
                raise _Killed
            report(self)
            if self.current_epoch == 2:
                raise _Killed

        patch.setattr(OperatorReport, "_report_operators", killed_in_epoch_2)
        with pytest.raises(_Killed):
            trainer.run_training()
    file = Path(trainer.output_folder, "operators.jsonl")
    assert list(read_epochs(file)) == ([0, 1] if moment == "before the report" else [0, 1, 2])
    # The last checkpoint is that of epoch 1.
    continued = make_trainer(find_trainer(name), **PLAN)
    continued.initialize()
    continued.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    continued.run_training()
    assert file.read_text() == whole.read_text()
    assert list(read_epochs(file)) == [0, 1, 2, 3]


def test_a_disk_that_is_full_does_not_stop_a_training(make_trainer, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(operator_report, "write_epoch", full)
    folder = trained(make_trainer(find_trainer("nnUNetTrainerLightMedSeg_1epochs1iters_seed0"), **PLAN))
    assert "WARNING: cannot write" in log_of(folder)
    assert (folder / "checkpoint_final.pth").exists()


@pytest.mark.parametrize("wrapped", ["compiled", "distributed", "both"])
def test_it_looks_at_the_network_itself(make_trainer, tmp_path, monkeypatch, wrapped) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_seed0"), **PLAN)
    trainer.initialize()
    _, trainer.dataloader_val = trainer.get_dataloaders()
    calls = []
    if wrapped != "compiled":
        dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    try:
        if wrapped != "distributed":
            trainer.network = torch.compile(trainer.network, backend="eager")
        if wrapped != "compiled":
            trainer.network = DistributedDataParallel(trainer.network)
            monkeypatch.setattr(DistributedDataParallel, "forward", lambda *_: calls.append(_))
        trainer._observed_batches = [next(trainer.dataloader_val)["data"]]
        trainer.network.train()
        trainer._report_operators()
    finally:
        if wrapped != "compiled":
            dist.destroy_process_group()
    assert set(read_epochs(Path(trainer.output_folder, "operators.jsonl"))[0]) == KEYS["nnUNetTrainerLightMedSeg"]
    assert not calls
    assert all(module.training for module in trainer.network.modules())


def test_under_ddp_only_the_first_process_looks(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerLightMedSeg_seed0"), **PLAN)
    trainer.initialize()
    _, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.eval()
    for rank, kept in ((1, 0), (0, 1)):
        trainer.local_rank = rank
        with torch.no_grad():
            trainer.validation_step(next(trainer.dataloader_val))
        assert len(trainer._observed_batches) == kept
