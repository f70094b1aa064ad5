"""What ``nnunet-deform status`` looks for: one sentence for each thing that is wrong, and what to do about it."""

import contextlib
import difflib
import io
import json
import os
import pydoc
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_deform import __version__, activation, trainers
from nnunet_deform.trainers.checkpoints import checkpoint_versions
from nnunet_deform.trainers.variants import RateError, find_trainer

_SUFFIXES = (r"_AdamW(?![a-z])", r"_lr[^_]*", r"_\d+epochs(?:\d+iters)?", r"_seed\d+", r"_unmirrored(?![a-z])")


class BrokenLookup(Exception):
    """nnU-Net's look-up breaks off before it is through; the message says where, and what to do."""


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
                f"a class named {name} in a folder of {activation.VARIABLE} is no trainer ({error}); rename it."
            ) from error
        except Exception as error:  # the user's modules are imported, which may raise anything
            if isinstance(error, RuntimeError) and str(error).startswith("Could not find requested nnunet trainer"):
                return None
            raise BrokenLookup(_where_it_breaks_off(error)) from error


def _where_it_breaks_off(error: Exception) -> str:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    folders = [os.path.join(path, "") for path in activation.configured_paths()]
    mine = [file for file in files if any(file.startswith(folder) for folder in folders)]
    return (
        f"nnU-Net's look-up breaks off in {mine[-1] if mine else files[-1]} ({type(error).__name__}: {error}); "
        f"it imports the modules of every folder in {activation.VARIABLE}, so mend this one or take it away."
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
    except RateError as error:
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
            f"{name} has its suffixes in another order than _AdamW, _lr, _epochs, _seed, _unmirrored; its name is "
            f"{ordered}."
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


def plan_problems() -> list[str]:
    """Plans in nnUNet_preprocessed and nnUNet_results that cannot be read, or whose network cannot be imported."""
    found = []
    for path in (*_files("nnUNet_preprocessed", "*/*.json"), *_files("nnUNet_results", "*/*/plans.json")):
        try:
            plans = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            found.append(f"{path} cannot be read ({error}); plan again, or take it from a copy.")
            continue
        if not isinstance(plans, dict) or "configurations" not in plans:
            continue
        names = _networks(plans["configurations"])
        if names is None:
            found.append(f"{path} is damaged: its configurations are not as nnU-Net writes them; plan again.")
            continue
        for name in sorted(names):
            if not _importable(name):
                found.append(
                    f"{path} asks for the network {name}, which cannot be imported here; install the package it comes "
                    "from, in the version that wrote the plan."
                )
    return found


def _networks(configurations: Any) -> set[str] | None:
    """The networks that a plan's configurations name, or None where these are no configurations."""
    if not isinstance(configurations, dict):
        return None
    names = set()
    for configuration in configurations.values():
        match configuration:
            case {"architecture": {"network_class_name": str(name)}}:
                names.add(name)
            case {"architecture": _}:
                return None
            case dict():  # it inherits its architecture, or is of an old nnU-Net
                pass
            case _:
                return None
    return names


def _importable(name: str) -> bool:
    try:
        return pydoc.locate(name) is not None
    except pydoc.ErrorDuringImport:
        return False


def checkpoint_problems() -> list[str]:
    """Trained models in nnUNet_results that cannot be used: trainer not found, checkpoint damaged."""
    models: dict[str, Path] = {}
    found = []
    for path in _files("nnUNet_results", "*/*__*__*/fold_*/checkpoint_*.pth"):
        models.setdefault(path.parts[-3].split("__")[0], path.parents[1])
        try:
            checkpoint_versions(str(path))
        except RuntimeError as error:
            found.append(str(error))
    for name, folder in models.items():
        problem = trainer_problem(name)
        if problem is not None:
            found.append(f"{folder} cannot be used for prediction here: {problem}")
    return found


def checkpoint_notes() -> list[str]:
    """Checkpoints that other versions of nnunet-deform or nnU-Net wrote, one note for each model."""
    here = {"nnunet-deform": __version__, "nnunetv2": metadata.version("nnunetv2")}
    notes: dict[str, None] = {}
    for path in _files("nnUNet_results", "*/*__*__*/fold_*/checkpoint_*.pth"):
        with contextlib.suppress(RuntimeError):
            versions = checkpoint_versions(str(path))
            for package, version in here.items():
                if versions.get(package, version) != version:
                    notes[
                        f"{path.parents[1]} was trained with {package} {versions[package]}, {version} is installed; if "
                        f"loading or results differ, run: pip install '{package}=={versions[package]}'"
                    ] = None
    return list(notes)


def command_notes() -> list[str]:
    """Commands of nnU-Net that do not know our trainers."""
    if shutil.which("nnUNetv2_train_pretrained") is None:
        return []
    return [
        "nnUNetv2_train_pretrained looks for trainers in nnU-Net's own folder only, so it finds none of ours; "
        "nnUNetv2_train finds them, and starts from given weights with -pretrained_weights."
    ]


def gpu_note(chosen: str, reasons: Mapping[str, str | None]) -> str | None:
    """Why Triton does not compute deformable convolutions on this machine's GPU, and what does; None where it does.

    Args:
        chosen: the backend that computes them.
        reasons: by backend, why it cannot run there; None where it can.
    """
    if reasons["triton"] is None:
        return None
    return (
        f"The triton backend cannot run on cuda: {reasons['triton']}. The {chosen} backend computes the deformable "
        "convolutions there, slower, and everything else works as it does with Triton."
    )


def _files(variable: str, pattern: str) -> Iterator[Path]:
    folder = os.environ.get(variable)
    if folder:
        yield from sorted(Path(folder).glob(pattern))
