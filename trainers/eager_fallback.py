"""A network that cannot be compiled is trained without torch.compile."""

import contextlib
import datetime
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_deform.processes.isolation import described
from nnunet_deform.trainers.wrapping import unwrapped

# For the other ranks to fail as well; they compile the same network at the same time.
_PATIENCE = datetime.timedelta(minutes=5)


class EagerFallback(nnUNetTrainer):
    """Takes the first training step, and the first one in validation, again without torch.compile if they fail with it.

    If that works the compiler was to blame: the training goes on without it, the loss included, and one line of the log
    says so. If not, the step's own error is raised. nnU-Net's validation after training compiles a third time, for
    single patches without deep supervision, so a patch of zeros goes first.

    Under DDP a rank falls back only together with all others, because its next step waits for theirs; where only some
    fail, their error is raised.
    """

    _compilation_failed = False

    def initialize(self) -> None:
        self._succeeded: set[str] = set()
        super().initialize()
        self._all_ranks = None
        if self.is_ddp and _is_compiled(self.network):
            # Where gloo does not find its way a training is as it was without this class.
            with contextlib.suppress(RuntimeError):
                self._all_ranks = dist.new_group(backend="gloo")

    def _do_i_compile(self) -> bool:
        return not self._compilation_failed and super()._do_i_compile()

    def train_step(self, batch: dict) -> dict:
        return self._or_eagerly("training", super().train_step, batch)

    def validation_step(self, batch: dict) -> dict:
        return self._or_eagerly("validation", super().validation_step, batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        if _is_compiled(self.network):
            self.set_deep_supervision_enabled(False)
            self.network.eval()
            self._or_eagerly("prediction", self._predict_zeros)
        super().perform_actual_validation(save_probabilities)

    def _predict_zeros(self) -> None:
        patch = (1, self.num_input_channels, *self.configuration_manager.patch_size)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            # As nnU-Net's predictor calls it: inside of DDP.
            self.network(torch.zeros(patch, device=self.device))

    def _or_eagerly(self, what: str, step: Callable[..., Any], *arguments: Any) -> Any:
        if what in self._succeeded or not _is_compiled(self.network):
            return step(*arguments)
        network = unwrapped(self.network)
        buffers = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
        try:
            result = step(*arguments)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except Exception as error:  # dynamo's, inductor's, Triton's, those of compilers ...
            if self.is_ddp and not self._all_failed():
                raise
            failure = described(error)
        else:
            self._succeeded.add(what)
            return result
        # Statistics such as running means may have been updated already.
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        self._leave_compiler(network)
        result = step(*arguments)
        self.print_to_log_file(
            f"WARNING: torch.compile failed in the first step of {what} ({failure}); the network runs without it from "
            f"here on, slower. Please run nnunet-deform selftest --device {self.device.type} -o report.json and attach "
            "report.json to an issue."
        )
        return result

    def _all_failed(self) -> bool:
        if self._all_ranks is None:
            return False
        try:
            dist.monitored_barrier(self._all_ranks, timeout=_PATIENCE)
        except RuntimeError:
            return False
        return True

    def _leave_compiler(self, network: torch.nn.Module) -> None:
        self._compilation_failed = True
        if isinstance(self.network, DistributedDataParallel):
            # A new one, because the old one may wait for the rest of a backward pass.
            network = DistributedDataParallel(network, device_ids=self.network.device_ids)
        self.network = network
        # Its hooks on the parameters go with it.
        gc.collect()
        self.loss = self._build_loss()


def _is_compiled(network: torch.nn.Module) -> bool:
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return isinstance(network, OptimizedModule)
