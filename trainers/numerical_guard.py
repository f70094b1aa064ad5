"""Stop when the numbers break, and say where: the epoch, the iteration and the first layer that is not finite."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nnunet_deform.trainers.wrapping import unwrapped

# A scaler starts with a scale that overflows and halves it at each skipped step: 2^16 down to 2^-5.
MAX_SKIPPED_STEPS = 20


class NumericalGuard(nnUNetTrainer):
    """Stops a training whose loss or gradients are not finite, before it spoils a weight.

    Without a GradScaler (CPU, MPS) it stops at the first loss or gradient that is not finite. With one, nnU-Net skips
    such steps and the scaler lowers its scale: that stays so until more than ``MAX_SKIPPED_STEPS`` in a row were
    skipped. A skipped step's loss enters the epoch's mean as in nnU-Net, so the log may show NaN for an epoch whose
    training goes on. When it stops, the batch is run once more, with hooks that find the layer. Normal steps get no
    further device synchronisation: nnU-Net has already copied the loss to the host when it is looked at, and the scaler
    its own verdict.

    Raises:
        FloatingPointError: from ``train_step``; the message says where it broke and what to do.
    """

    def initialize(self) -> None:
        super().initialize()
        self._iteration_of_epoch = 0
        self._skipped_steps = 0
        self._stepped = False
        self._weights_before: list[Tensor] | None = None
        self._gradient_norm: Tensor | None = None
        self._found_inf: Tensor | None = None
        self.optimizer.register_step_pre_hook(self._before_optimizer_step)

    def _before_optimizer_step(self, *_: Any) -> None:
        # A scaler does not call the optimiser in a step that it skips, but for fused ones, as Primus' is, which skip it
        # by the scaler's verdict.
        self._stepped = True
        if self.grad_scaler is not None:
            self._found_inf = getattr(self.optimizer, "found_inf", None)
            return
        # Without a scaler the step is taken whatever the gradients are, so the weights are kept for the second run.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        with torch.no_grad():
            if self._weights_before is None:
                self._weights_before = [torch.empty_like(parameter) for parameter in parameters]
            for before, parameter in zip(self._weights_before, parameters, strict=True):
                before.copy_(parameter)
        # nnU-Net has clipped them, which leaves NaN where one was infinite.
        self._gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def on_train_epoch_start(self) -> None:
        self._iteration_of_epoch = 0
        super().on_train_epoch_start()

    def train_step(self, batch: dict) -> dict:
        self._stepped = False
        self._found_inf = None
        result = super().train_step(batch)
        loss = float(result["loss"])
        if self.grad_scaler is not None:
            skipped = not self._stepped if self._found_inf is None else bool(self._found_inf.item())
            self._skipped_steps = self._skipped_steps + 1 if skipped or not math.isfinite(loss) else 0
            if self._skipped_steps > MAX_SKIPPED_STEPS:
                self._stop(
                    batch,
                    "the loss or the gradients were not finite and the step was skipped, "
                    f"{self._skipped_steps} times in a row (the last loss is {loss})",
                )
        elif not math.isfinite(loss):
            self._stop(batch, f"the loss is {loss}")
        elif not math.isfinite(norm := self._gradient_norm.item()):
            self._stop(batch, f"the norm of the gradients is {norm}")
        self._iteration_of_epoch += 1
        return result

    def _stop(self, batch: dict, what: str) -> None:
        if self.grad_scaler is None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            with torch.no_grad():
                for before, parameter in zip(self._weights_before, parameters, strict=True):
                    parameter.copy_(before)
        offender = self._first_offender(batch)
        self.optimizer.zero_grad(set_to_none=True)
        names = ("checkpoint_latest.pth", "checkpoint_best.pth")
        saved = [name for name in names if os.path.isfile(os.path.join(self.output_folder, name))]
        message = (
            f"Training stopped in epoch {self.current_epoch}, iteration {self._iteration_of_epoch} (both counted from "
            f"0): {what}. {offender} "
            + (
                f"Run the same command with --c to continue from {saved[0]}."
                if saved
                else "No checkpoint has been saved yet: the same command starts anew."
            )
            + " If it happens again, look for images with NaN or values far from the others, or train with a lower "
            "learning rate (the suffix _lr)."
        )
        self.print_to_log_file(message)
        raise FloatingPointError(message)

    def _first_offender(self, batch: dict) -> str:
        """Run the batch once more, forward and backward, and say what is the first to be not finite."""
        network = unwrapped(self.network)
        data = batch["data"].to(self.device)
        target = [t.to(self.device) for t in _tensors(batch["target"])]
        target = target if isinstance(batch["target"], list) else target[0]
        if not _finite(data):
            return "The images of the batch are not finite."
        for name, parameter in network.named_parameters():
            if not _finite(parameter):
                layer, _, key = name.rpartition(".")
                return f"First offending layer: {layer or 'the network'} (its {key} is not finite before the step)."

        mixed = torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext()
        with _unchanged(network), _Watch(network) as watch:
            with mixed:
                outputs = network(data)
                loss = self.loss(outputs, target)
            if watch.found is None and not _finite(loss):
                watch.found = "The network's outputs are finite, the loss is not."
            if watch.found is None:
                (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return watch.found or (
            "In a second run of the batch every layer was finite: the step is not reproducible, or torch.compile "
            "rounds otherwise (nnUNet_compile=f turns it off)."
        )


class _Watch:
    """Hooks on every module of a network; ``found`` says which was the first to be not finite, and in what."""

    def __init__(self, network: nn.Module) -> None:
        self.found: str | None = None
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = []
        # The layers that read a tensor, and the tensor itself, so that its id is not given to another one.
        self._readers: dict[int, tuple[Tensor, list[str]]] = {}
        for name, module in network.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._entering(name)),
                module.register_forward_hook(self._leaving(name)),
            ]
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._gradient_of(name, key)))

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple) -> None:
            tensors = list(_tensors(arguments))
            if self._running and not all(map(_finite, tensors)):
                self._find(self._running[-1], f"an operation in its forward pass, before {name or 'the network'}")
            for tensor in tensors:
                if tensor.requires_grad:
                    self._read(tensor, name)
            self._running.append(name)

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            self._running.pop()
            if not all(map(_finite, _tensors(output))):
                self._find(name, "its output, in the forward pass")
            if not self._running:
                for tensor in _tensors(output):
                    self._read(tensor, "the loss")

        return hook

    def _read(self, tensor: Tensor, name: str) -> None:
        if id(tensor) not in self._readers:
            self._readers[id(tensor)] = (tensor, [])
            self._handles.append(tensor.register_hook(self._gradient_of_input(id(tensor))))
        readers = self._readers[id(tensor)][1]
        # A block hands its input on to its first layer, which is then the one to name.
        if readers and readers[-1] in self._running:
            readers.pop()
        readers.append(name)

    def _gradient_of(self, name: str, key: str) -> Any:
        return lambda gradient: None if _finite(gradient) else self._find(name, f"the gradient of its {key}")

    def _gradient_of_input(self, number: int) -> Any:
        def hook(gradient: Tensor) -> None:
            if not _finite(gradient):
                self._find(" or ".join(self._readers[number][1]), "the gradient of its input, in the backward pass")

        return hook

    def _find(self, name: str, what: str) -> None:
        if self.found is None:
            self.found = f"First offending layer: {name or 'the network'} ({what})."


@contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """Put buffers, such as running means, back afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point and other tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
