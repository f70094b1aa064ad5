"""Whether nnU-Net finds a trainer, and why not: one sentence with what to do about it."""

import contextlib
import difflib
import io
import os
import re
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_deform import activation, trainers
from nnunet_deform.trainers.variants import VariantError, find_trainer

_SUFFIXES = (
    r"_recompute(?![a-z])",
    r"_AdamW(?![a-z])",
    r"_lr[^_]*",
    r"_\d+epochs(?:\d+iters)?",
    r"_seed\d+",
    r"_unmirrored(?![a-z])",
)


class BrokenLookup(Exception):
    """nnU-Net's look-up fails before it is through; the message says where, and what to do."""


def lookup(name: str) -> type | None:
    """The class that nnU-Net's own look-up gives for a trainer's name, None where it finds none.

    Raises:
        BrokenLookup: a module cannot be imported, or a class of this name is no trainer.
    """
    # nnU-Net prints where it searches.
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        try:
            return recursive_find_trainer_class_by_name(name)
        except AssertionError as error:
            raise BrokenLookup(
                f"a class named {name} in a folder of {activation.VARIABLE} is not a trainer ({error}); rename it."
            ) from error
        except Exception as error:  # the user's modules are imported, which may raise anything
            if isinstance(error, RuntimeError) and str(error).startswith("Could not find requested nnunet trainer"):
                return None
            raise BrokenLookup(_where_it_breaks_off(error)) from error


@dataclass(frozen=True)
class LookedUp:
    """What nnU-Net's look-up gives for one of our trainers.

    Args:
        name: the trainer's.
        state: "found", or in some words what else came of it.
        problem: a sentence with what to do, where the look-up fails or finds a class of somebody else.
    """

    name: str
    state: str
    problem: str | None = None


def look_up_ours() -> list[LookedUp]:
    """Every trainer of ours, looked up as nnU-Net does."""
    return [_looked_up(name) for name in trainers.__all__]


def _looked_up(name: str) -> LookedUp:
    try:
        found = lookup(name)
    except BrokenLookup as error:
        return LookedUp(name, "look-up fails", str(error))
    if found is None:
        return LookedUp(name, "not found")
    if found is getattr(trainers, name):
        return LookedUp(name, "found")
    return LookedUp(
        name,
        f"another class, {found.__module__}",
        f"nnU-Net finds another class named {name}, in {found.__module__}; remove that copy, or the path that leads to "
        f"it from {activation.VARIABLE}.",
    )


def _where_it_breaks_off(error: Exception) -> str:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    folders = [os.path.join(path, "") for path in activation.configured_paths()]
    mine = [file for file in files if any(file.startswith(folder) for folder in folders)]
    return (
        f"nnU-Net's look-up fails in {mine[-1] if mine else files[-1]} ({type(error).__name__}: {error}); "
        f"it imports the modules of every folder in {activation.VARIABLE}, so fix this one or remove it."
    )


def variant_problem(name: str, variant: str) -> str | None:
    """Why a trainer cannot be used by an experiment, which adds suffixes to its name, whether the plugin is active here
    or not; None where it can.

    Args:
        variant: ``name`` with the experiment's suffixes.
    """
    try:
        # nnU-Net prints where it searches.
        with contextlib.redirect_stdout(io.StringIO()):
            found = find_trainer(variant)
    except AttributeError:
        return explain_missing_trainer(name)
    except Exception as error:  # the user's modules are imported, which may raise anything
        return _where_it_breaks_off(error)
    if not issubclass(found, nnUNetTrainer):
        return f"{name} is a class in a folder of {activation.VARIABLE}, but no nnUNetTrainer."
    return None


def trainer_problem(name: str) -> str | None:
    """Why a trainer cannot be used here, in one sentence with what to do; None where it can."""
    try:
        found = lookup(name)
    except BrokenLookup as error:
        return str(error)
    return None if found is not None else explain_missing_trainer(name)


def explain_missing_trainer(name: str) -> str:
    """Why nnU-Net does not find a trainer, in one sentence with what to do."""
    base, suffixes = name, []
    for pattern in _SUFFIXES:
        suffixes += re.findall(pattern, base)
        base = re.sub(pattern, "", base)
    ordered = base + "".join(suffixes)
    try:
        find_trainer(ordered)
    except VariantError as error:
        return f"{name} cannot be: {error}"
    except AttributeError:
        known = difflib.get_close_matches(base, _known_trainers(), n=1, cutoff=0.9)
        hint = f" (did you mean {known[0]}?)" if known else ""
        return (
            f"{name} is neither a trainer of nnunet-deform or nnU-Net nor a variant of one{hint}; if it is your own, "
            f"name its folder in {activation.VARIABLE}."
        )
    if ordered != name:
        return (
            f"{name} has its suffixes in another order than _recompute, _AdamW, _lr, _epochs, _seed, _unmirrored; its "
            f"name is {ordered}."
        )
    return f"{name} is ours, but nnU-Net cannot find it, because the plugin is not active here."


def _known_trainers() -> list[str]:
    """Ours, nnU-Net's and the user's, by the files' text, because importing them all would take long."""
    folders = [Path(nnunetv2.__path__[0], "training", "nnUNetTrainer"), *map(Path, activation.configured_paths())]
    texts = (file.read_text(encoding="utf-8", errors="replace") for folder in folders for file in folder.rglob("*.py"))
    return [
        *trainers.__all__,
        *(name for text in texts for name in re.findall(r"^class (nnUNetTrainer\w*)", text, re.M)),
    ]


def command_notes() -> list[str]:
    """Commands of nnU-Net that do not know our trainers."""
    if shutil.which("nnUNetv2_train_pretrained") is None:
        return []
    return [
        "nnUNetv2_train_pretrained looks for trainers in nnU-Net's own folder only, so it finds none of ours; "
        "nnUNetv2_train finds them, and starts from given weights with -pretrained_weights."
    ]
