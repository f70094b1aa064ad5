"""Each epoch, one line and some numbers on what the network's operators do."""

from contextlib import nullcontext
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_deform.networks.observation import EPOCHS_FILE, ObservableNetwork, joined, summarise, write_epoch
from nnunet_deform.trainers.wrapping import unwrapped

# More than one, because a batch may be a single sample, and some numbers are about differences between samples.
OBSERVED_BATCHES = 2


class OperatorReport(nnUNetTrainer):
    """Lets a network that is an :class:`nnunet_deform.networks.observation.ObservableNetwork` report on its operators.

    At the end of an epoch it sees the first ``OBSERVED_BATCHES`` of the validation batches that nnU-Net has drawn for
    that epoch: no further ones, which would change what comes after them. Weights, modes and random numbers are as
    they were. Numbers go to the log and to ``operators.jsonl`` in the fold's folder. Under DDP only rank 0 looks, at
    its own batches.
    """

    def initialize(self) -> None:
        super().initialize()
        self._observed_batches: list[torch.Tensor] = []

    def validation_step(self, batch: dict) -> dict:
        if (
            self.local_rank == 0
            and len(self._observed_batches) < OBSERVED_BATCHES
            and isinstance(unwrapped(self.network), ObservableNetwork)
        ):
            self._observed_batches.append(batch["data"].detach().cpu().clone())
        return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        if self._observed_batches:
            self._report_operators()
        super().on_epoch_end()

    def _report_operators(self) -> None:
        batches, self._observed_batches = self._observed_batches, []
        network = unwrapped(self.network)
        on_cuda = self.device.type == "cuda"
        with (
            torch.random.fork_rng(devices=[self.device] if on_cuda else []),
            torch.autocast("cuda") if on_cuda else nullcontext(),
        ):
            observed = joined([network.observe_operators(batch.to(self.device)) for batch in batches])
        values, words = summarise(observed)
        if not values:
            self.print_to_log_file("Operators: this network has no operator to report on.")
            return
        self.print_to_log_file(f"Operators on {sum(map(len, batches))} validation patches: {words}")
        file = Path(self.output_folder, EPOCHS_FILE)
        try:
            write_epoch(file, self.current_epoch, values)
        except OSError as error:
            self.print_to_log_file(f"WARNING: cannot write {file} ({error}); the training continues without it.")
