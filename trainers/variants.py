"""Trainer variants by name, for our trainers, nnU-Net's own and those that ``nnUNet_extTrainer`` leads to:
``<trainer>[_recompute][_AdamW][_lr{rate}][_{N}epochs[{M}iters]][_seed{S}][_unmirrored]``.

A variant is a class like any other: importable from this module and picklable under its name, and nnU-Net finds it
again when it predicts. The suffixes mean:

- ``_recompute``: for less memory blocks at full resolution are computed again in the backward pass, of networks that
  take ``recompute``. The result is the same to rounding.
- ``_AdamW``: our one second recipe, so that network and recipe can be told apart. AdamW at 1e-3, weight decay 1e-4 and
  none on norms and biases, linear warm-up over 10 epochs, cosine to 1e-6.
- ``_lr{rate}``: the initial learning rate of the recipe, ``_AdamW`` or the trainer's own, a positive number such as
  ``8e-3`` or ``0.008``. A name is a name: each spelling is a class, and so an output folder, of its own.
- ``_{N}epochs``: N epochs, a checkpoint every max(1, min(50, N // 4)), warm-up and annealing at most N / 10 epochs;
  ``{M}iters``: M iterations in an epoch and max(1, M // 5) validation iterations.
- ``_seed{S}``: python, numpy and torch are seeded before the network is built, and again at each epoch's start from
  (S, epoch, fold). On a CPU with ``nnUNet_n_proc_DA=0`` two such runs of a fold end in bit-equal weights, and so does
  one that was killed and continued.
- ``_unmirrored``: the validation after training predicts each case once instead of averaging over mirrored images, 8
  times as fast in 3D. Training and its mirroring augmentation are the same.
"""

import math
import os
import random
import re
from os.path import join
from typing import Any, ClassVar

import nnunetv2
import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

import nnunet_deform
from nnunet_deform import trainers
from nnunet_deform.trainers.checkpoints import AtomicCheckpoints
from nnunet_deform.trainers.numerical_guard import NumericalGuard
from nnunet_deform.trainers.preflight import Preflight
from nnunet_deform.trainers.recipes import AdamWRecipe

_EXTERNAL_TRAINERS = "nnUNet_extTrainer"
_NAME = re.compile(
    r"(?P<base>nnUNetTrainer\w*?)"
    r"(?P<recompute>_recompute)?"
    r"(?P<adamw>_AdamW)?"
    r"(?:_lr(?P<rate>[^_]*))?"
    r"(?:_(?P<epochs>[1-9]\d*)epochs(?:(?P<iterations>[1-9]\d*)iters)?)?"
    r"(?:_seed(?P<seed>0|[1-9]\d*))?"
    r"(?P<unmirrored>_unmirrored)?"
)
_RATE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class VariantError(AttributeError):
    """A trainer that there is, in a variant that there is not."""


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """One of our trainers, or a variant of any that nnU-Net finds.

    Raises:
        VariantError: a variant but for its learning rate, or for a network that has nothing to recompute.
        AttributeError: the name is neither; nnU-Net then goes on searching elsewhere.
    """
    if name in trainers.__all__:
        return getattr(trainers, name)
    parts = _NAME.fullmatch(name)
    if parts is None or parts["base"] == name:
        raise AttributeError(f"{name!r} is no trainer of nnunet-deform and no variant of one.")
    if name not in globals():
        globals()[name] = _make_variant(name, _find_base(parts["base"]), parts)
    return globals()[name]


def __getattr__(name: str) -> Any:
    # A variant is pickled by its name in this module; another process makes it when it is asked for.
    if name.startswith("nnUNetTrainer"):
        return find_trainer(name.replace(",", "."))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _find_base(name: str) -> type[nnUNetTrainer]:
    if name in trainers.__all__:
        return getattr(trainers, name)
    stock = recursive_find_python_class(
        join(nnunetv2.__path__[0], "training", "nnUNetTrainer"),
        name,
        "nnunetv2.training.nnUNetTrainer",
        nnunetv2.__path__[0],
    )
    if stock is not None:
        return stock
    for folder in filter(os.path.exists, os.environ.get(_EXTERNAL_TRAINERS, "").split(os.pathsep)):
        # Ours would be asked for what it is just looking for.
        if not os.path.samefile(folder, os.path.join(nnunet_deform.__path__[0], "_ext")):
            found = recursive_find_python_class(folder, name, None, cleanup_imports_from_base_folder=True)
            if found is not None:
                return found
    raise AttributeError(f"nnU-Net finds no trainer {name!r}, so it has no variants.")


def _make_variant(name: str, base: type[nnUNetTrainer], parts: re.Match[str]) -> type[nnUNetTrainer]:
    bases: list[type] = [Unmirrored] if parts["unmirrored"] else []
    attributes: dict[str, Any] = {
        "__module__": __name__,
        # pickle looks for what follows a dot inside of what precedes it.
        "__qualname__": name.replace(".", ","),
        "__doc__": f"{base.__name__}, varied as its name says.",
    }
    if parts["recompute"]:
        attributes["network_options"] = _recomputing(base)
    if parts["seed"]:
        bases.append(Seeded)
        attributes["seed"] = int(parts["seed"])
    if parts["epochs"]:
        bases.append(Shortened)
        attributes["variant_epochs"] = int(parts["epochs"])
        attributes["variant_iterations"] = int(parts["iterations"]) if parts["iterations"] else None
    if parts["adamw"]:
        attributes["learning_rate"] = AdamWRecipe.learning_rate
        if not issubclass(base, AdamWRecipe):
            bases.append(AdamWRecipe)
    if parts["rate"] is not None:
        attributes["learning_rate"] = _learning_rate(parts["rate"])
        if not issubclass(base, AdamWRecipe) and not parts["adamw"]:
            bases.append(Rated)
    bases += [shared for shared in (NumericalGuard, Preflight, AtomicCheckpoints) if not issubclass(base, shared)]
    return type(name, (*bases, base), attributes)


def _recomputing(base: type[nnUNetTrainer]) -> dict[str, Any]:
    if not getattr(base, "recomputes_blocks", False):
        raise VariantError(
            f"the network of {base.__name__} does not recompute blocks; leave out _recompute, which is for "
            "DeformUX-Net, LightMedSeg, and MAGIC and other dynamic convolutions in nnU-Net's U-Nets."
        )
    return {**base.network_options, "recompute": "blocks"}


def _learning_rate(spelling: str) -> float:
    rate = float(spelling) if _RATE.fullmatch(spelling) else math.nan
    if not 0 < rate < math.inf:
        raise VariantError(
            f"the learning rate {spelling!r} after _lr is not a positive number; write one such as 8e-3 or 0.008."
        )
    return rate


class Rated(nnUNetTrainer):
    """The trainer's own recipe from another initial learning rate."""

    learning_rate: ClassVar[float]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.learning_rate


class Shortened(nnUNetTrainer):
    """The number of epochs and iterations that a variant's name gives."""

    variant_epochs: ClassVar[int]
    variant_iterations: ClassVar[int | None]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.variant_epochs
        self.save_every = max(1, min(50, self.num_epochs // 4))
        if self.variant_iterations is not None:
            self.num_iterations_per_epoch = self.variant_iterations
            self.num_val_iterations_per_epoch = max(1, self.variant_iterations // 5)
        for length in ("warmup_epochs", "annealing_epochs"):
            if hasattr(self, length):
                setattr(self, length, min(getattr(self, length), self.num_epochs / 10))
        if hasattr(self, "warmup_duration_whole_net"):
            # Of nnU-Net's warm-up trainers, which compare it with the epoch.
            self.warmup_duration_whole_net = min(self.warmup_duration_whole_net, math.ceil(self.num_epochs / 10))


class Seeded(nnUNetTrainer):
    """All random number generators of this process seeded, before the network is built and at each epoch.

    Each fold of a seed has random numbers of its own. Were they the same, all folds would start from the same weights
    and be good or bad together, and their mean no more reliable than one training.
    """

    seed: ClassVar[int]

    def initialize(self) -> None:
        self._seed_generators(epoch=0, rank=0)
        super().initialize()

    def on_epoch_start(self) -> None:
        # The rank too: under DDP each process must draw its own batches.
        self._seed_generators(self.current_epoch, self.local_rank)
        super().on_epoch_start()

    def _seed_generators(self, epoch: int, rank: int) -> None:
        fold = 0 if self.fold == "all" else int(self.fold)
        for_python, for_numpy, for_torch = np.random.SeedSequence((self.seed, epoch, rank, fold)).generate_state(3)
        random.seed(int(for_python))
        np.random.seed(for_numpy)  # noqa: NPY002 (the generator nnU-Net's loaders draw from)
        torch.manual_seed(int(for_torch))


class Unmirrored(nnUNetTrainer):
    """Validation without averaging over mirrored images."""

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        mirrored, self.inference_allowed_mirroring_axes = self.inference_allowed_mirroring_axes, None
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.inference_allowed_mirroring_axes = mirrored
