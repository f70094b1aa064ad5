"""Before a network trains or predicts: have its operators' backend proven, alike on all ranks, and said in the log."""

from dataclasses import replace

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._functorch import config as functorch_config

from nnunet_deform.layers import DeformConv
from nnunet_deform.ops.backends import preflight, trial_due
from nnunet_deform.trainers.wrapping import unwrapped


class Preflight(nnUNetTrainer):
    """Has the Triton backend tried before a network's first pass, where it would run, in the dtype it would run in.

    Rank 0 tries, and all ranks do as it decides. A backend that fails is not used in this process; one line of the log
    says so. Prediction with nnU-Net's commands knows no trainer: there the operator's first call does the same, and
    says it on the standard error.
    """

    def initialize(self) -> None:
        super().initialize()
        # Autocast is nnU-Net's, which leaves its dtype to torch.
        dtype = torch.get_autocast_dtype("cuda") if self.device.type == "cuda" else torch.float32
        decided = None
        if self.local_rank == 0:
            decided = [(t, preflight.verdict(t)) for t in _trials(unwrapped(self.network), self.device, dtype)]
        if self.is_ddp:
            message = [decided]
            dist.broadcast_object_list(message, src=0)
            (decided,) = message
        for trial, verdict in decided:
            preflight.settle(replace(trial, device=str(self.device)), verdict)
        faults = [(trial, verdict) for trial, verdict in decided if verdict.fault is not None]
        if faults:
            # What torch.compile made of the network before, with the kernels in it, is on disk, and asks nobody.
            functorch_config.enable_autograd_cache = False
        if faults and self.local_rank == 0:
            # One line: other variants of the kernels tell the same story.
            self.print_to_log_file(preflight.warning(*faults[0]))


def _trials(network: nn.Module, device: torch.device, dtype: torch.dtype) -> list[preflight.Trial]:
    """What the deformable convolutions of a network would have tried, each once, in their order."""
    found: dict[preflight.Trial, None] = {}
    for layer in network.modules():
        if isinstance(layer, DeformConv) and layer.offset is not None:
            one_voxel = [1] * layer.ndim
            trial = trial_due(
                torch.empty(1, len(layer.bias), *one_voxel, dtype=dtype, device=device),
                torch.empty(1, layer.offset_channels, *one_voxel, device=device),
                torch.empty(layer.weight.shape, dtype=dtype, device=device),
            )
            if trial is not None:
                found[trial] = None
    return list(found)
