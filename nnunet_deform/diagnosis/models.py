"""Plans and trained models in nnU-Net's folders: one sentence for each that cannot be used."""

import contextlib
import json
import os
import pydoc
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from nnunet_deform import __version__
from nnunet_deform.diagnosis.lookup import trainer_problem
from nnunet_deform.trainers.checkpoints import checkpoint_versions


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


def _files(variable: str, pattern: str) -> Iterator[Path]:
    folder = os.environ.get(variable)
    if folder:
        yield from sorted(Path(folder).glob(pattern))
