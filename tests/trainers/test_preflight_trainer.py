"""A training on a machine whose Triton kernels do not work goes on with another backend, and says so in its log.

The kernels are the real ones: without a GPU they raise when they are launched. Ways to fail that are worse are in
tests/ops/preflight_interpreted.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._functorch import config as functorch_config

from nnunet_deform.layers import DeformConv
from nnunet_deform.ops import choose_backend
from nnunet_deform.ops.backends import preflight, triton_
from nnunet_deform.plans import deformux
from nnunet_deform.processes import isolation
from nnunet_deform.trainers import nnUNetTrainerLightMedSeg
from nnunet_deform.trainers.preflight import _trials
from nnunet_deform.trainers.variants import find_trainer

PLAN = {"patch_size": (32, 24), "strides": ((1, 1), (2, 2), (2, 2))}
needs_triton = pytest.mark.skipif(triton_.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _a_machine_that_has_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(deformux, "BASE_FEATURES", 8)
    monkeypatch.setattr(triton_, "unable", lambda *tensors: None)
    monkeypatch.setattr(triton_, "_current_device", triton_.nullcontext)
    monkeypatch.delenv("NNUNET_DEFORM_BACKEND", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(preflight, "_verdicts", {})
    monkeypatch.setattr(isolation, "Popen", Forked)
    monkeypatch.setattr(Forked, "started", 0)
    with functorch_config.patch(enable_autograd_cache=True):
        yield


def log_of(trainer: nnUNetTrainer) -> list[str]:
    return Path(trainer.log_file).read_text().splitlines()


def warnings_in(trainer: nnUNetTrainer) -> list[str]:
    return [line for line in log_of(trainer) if "WARNING: the triton backend" in line]


@needs_triton
def test_a_training_goes_on(make_trainer) -> None:
    trainer = make_trainer(find_trainer("nnUNetTrainerDeformUX_1epochs1iters_seed0"), **PLAN)
    trainer.run_training()
    (line,) = warnings_in(trainer)
    assert "raised " in line
    assert "(float32, 2D, 8 channels at a time, on " in line
    assert "Please run nnunet-deform selftest --device cpu -o report.json" in line
    losses = trainer.logger.get_value("train_losses", step=None)
    assert len(losses) == 1
    assert torch.tensor(losses).isfinite().all()
    assert Forked.started == len(preflight.remembered()) == 1


def refused(trial: preflight.Trial) -> preflight.Verdict:
    return preflight.Verdict("was wrong")


@pytest.mark.parametrize("fault", [None, "was wrong"])
def test_a_compiled_network_of_before_is_not_taken_from_the_disk(make_trainer, monkeypatch, fault) -> None:
    """It has the kernels in it. Where they work, it is."""
    monkeypatch.setattr(preflight, "verdict", lambda trial: preflight.Verdict(fault))
    make_trainer(find_trainer("nnUNetTrainerDeformUX_seed0"), **PLAN).initialize()
    assert functorch_config.enable_autograd_cache == (fault is None)


def test_a_stock_trainer_with_a_suffix_and_our_plan_does_the_same(make_trainer, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "verdict", refused)
    ours = make_trainer(find_trainer("nnUNetTrainerDeformUX_seed0"), **PLAN)
    architecture = ours.planned_architecture(ours.configuration_manager)
    trainer = make_trainer(find_trainer("nnUNetTrainer_seed0"), **PLAN, architecture=architecture, results="stock")
    trainer.initialize()
    assert len(warnings_in(trainer)) == 1


def test_a_network_without_the_operator_has_nothing_tried(make_trainer, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "verdict", refused)
    trainer = make_trainer(nnUNetTrainerLightMedSeg, **PLAN)
    trainer.initialize()
    assert warnings_in(trainer) == []
    for options in ({"deformable": False}, {}):
        layer = DeformConv(torch.nn.Conv2d, 32, (3, 3), **options)
        assert len(_trials(layer, torch.device("cpu"), torch.float16)) == (not options)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_decides_for_all(make_trainer, monkeypatch, rank) -> None:
    """Rank 1 tries nothing, says nothing, and does not use what it never tried."""
    tried, sent = [], []

    def verdict(trial: preflight.Trial) -> preflight.Verdict:
        tried.append(trial)
        return refused(trial)

    def broadcast(message: list, src: int) -> None:
        assert src == 0
        sent.append(message[0])
        trials = [preflight.Trial("cuda:0", "float32", 2, block, False) for block in (8, 4)]
        message[0] = message[0] or [(trial, refused(trial)) for trial in trials]

    monkeypatch.setattr(preflight, "verdict", verdict)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", lambda network: network)
    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.DDP", lambda network, device_ids: network)
    trainer = make_trainer(find_trainer("nnUNetTrainerDeformUX_seed0"), **PLAN)
    trainer.is_ddp, trainer.local_rank = True, rank
    monkeypatch.setattr(trainer, "_set_batch_size_and_oversample", lambda: setattr(trainer, "batch_size", 2))
    trainer.initialize()
    assert len(tried) == (1 if rank == 0 else 0)
    assert (sent == [None]) == (rank == 1)
    assert len(warnings_in(trainer)) == (1 if rank == 0 else 0)
    tensors = [torch.zeros(1, 8, 2, 2), torch.zeros(1, 18, 2, 2), torch.zeros(8, 1, 3, 3)]
    assert choose_backend(*tensors)[0] != "triton"
    assert Forked.started == 0
