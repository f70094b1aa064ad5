"""What an arm costs, measured on one real batch: ``python -m nnunet_deform.comparison.cost``, a process for each."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_deform.comparison.experiment import Folders
from nnunet_deform.comparison.files import read_json, write_json
from nnunet_deform.comparison.trainings import Training
from nnunet_deform.processes.memory import most_resident

if TYPE_CHECKING:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """What one arm costs.

    parameters: their number; macs: multiply-adds of convolutions and matrix products for one patch, interpolation and
    element-wise work not counted; peak_bytes: of a training step, on a GPU what torch allocated, on a CPU by how much
    the process grew; seconds_per_iteration: the median of three training steps, data loading not counted;
    seconds_per_case: sliding-window prediction of one case of the plan's median size, mirrored as the experiment says.
    """

    parameters: int
    macs: int
    peak_bytes: int
    seconds_per_iteration: float
    seconds_per_case: float


def costs_file(training: Training, folders: Folders) -> Path:
    return folders.output / "costs" / f"{training.arm_key}.json"


def read_cost(training: Training, folders: Folders) -> Cost | None:
    file = costs_file(training, folders)
    return Cost(**read_json(file)) if file.exists() else None


def count_macs(network: torch.nn.Module, patch: torch.Tensor) -> int:
    """Multiply-adds of one forward pass without gradients.

    Args:
        network: anything; its weights and buffers are left as they are.
        patch: [1, channels, *patch size].
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import nnunet_deform.ops  # noqa: F401 (registers the operator)

    def deformable(
        _input: object, _offset: object, weight: Sequence[int], *_: object, out_shape: Sequence[int], **__: object
    ) -> int:
        # As a plain convolution's: 2 operations a multiply-add.
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.nnunet_deform.deform_conv: deformable})
    training = network.training
    with torch.no_grad(), counter:
        network.eval()(patch)
    network.train(training)
    return counter.get_total_flops() // 2


class _PeakMemory:
    """Highest memory of this process above what it had at the start, in bytes.

    On the CPU above its highest before: peaks in imports, for example, hide smaller ones after.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = most_resident()

    def read(self) -> int:
        if self._device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() - self._start
        return most_resident() - self._start


def _seconds(call: Callable[[], object], device: str) -> float:
    import torch

    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(trainer: nnUNetTrainer, device: str, mirroring: bool) -> Cost:
    """
    Args:
        trainer: constructed, not initialised; it must find its preprocessed data.
        device: "cpu", "cuda" or "mps".
        mirroring: whether the prediction averages over mirrored images.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.initialize()
    batches, _ = trainer.get_dataloaders()
    batch = next(iter(batches))
    network = trainer.network
    plain = getattr(network, "_orig_mod", network)
    configuration = trainer.configuration_manager
    memory = _PeakMemory(device)
    network.train()
    # The step writes into the batch's tensors on some devices; each step gets its own.
    steps = [_seconds(lambda: trainer.train_step(copy.deepcopy(batch)), device) for _ in range(1 + _STEPS)]
    peak = memory.read()

    trainer.set_deep_supervision_enabled(False)
    network.eval()
    patch = torch.zeros(1, trainer.num_input_channels, *configuration.patch_size, device=trainer.device)
    macs = count_macs(plain, patch)
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        configuration,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    size = [round(n) for n in configuration.configuration["median_image_size_in_voxels"]]
    if len(size) == 2:
        size = [1, *size]
    image = torch.randn(trainer.num_input_channels, *size, generator=torch.Generator().manual_seed(0))
    seconds_per_case = _seconds(lambda: predictor.predict_sliding_window_return_logits(image), device)
    return Cost(
        parameters=sum(p.numel() for p in plain.parameters()),
        macs=macs,
        peak_bytes=peak,
        seconds_per_iteration=statistics.median(steps[1:]),
        seconds_per_case=seconds_per_case,
    )


def main(arguments: list[str]) -> None:
    """dataset, configuration, fold, trainer, plans, device, mirroring (True or False), file to write."""
    dataset, configuration, fold, trainer_name, plans, device, mirroring, file = arguments
    with tempfile.TemporaryDirectory() as scratch:
        # A trainer makes its output folder, and augmentation in other processes would hide in no measurement.
        os.environ |= {"nnUNet_results": scratch, "nnUNet_n_proc_DA": "0"}
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args

        # as nnUNetv2_train does
        torch.set_num_threads(multiprocessing.cpu_count() if device == "cpu" else 1)
        trainer = get_trainer_from_args(
            dataset, configuration, int(fold), trainer_name, plans, device=torch.device(device)
        )
        cost = measure(trainer, device, mirroring == "True")
    write_json(Path(file), asdict(cost))
    print(json.dumps(asdict(cost), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
