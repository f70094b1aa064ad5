"""What must be decided before results are seen: written before the first training, and compared later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_deform.comparison.experiment import Experiment
from nnunet_deform.comparison.files import fingerprint, read_json, write_json


def declaration(experiment: Experiment, file: Path) -> dict[str, Any]:
    """
    Args:
        file: the experiment, from whose folder paths start; datasets' patients are declared by their fingerprint.
    """
    budget, seeds, statistics = experiment.budget, experiment.seeds, experiment.statistics
    return {
        "primary metric": experiment.primary,
        "hypotheses": [" - ".join(pair) for pair in experiment.hypotheses],
        "arms": {arm.name: f"{arm.trainer} with {arm.plans}" for arm in experiment.arms},
        "folds": list(experiment.folds),
        "first seed": seeds.first,
        "further seeds": list(seeds.repeats),
        "folds of further seeds": list(experiment.folds if seeds.folds is None else seeds.folds),
        "arms with further seeds": list(seeds.arms or (arm.name for arm in experiment.arms)),
        "epochs": budget.epochs or "each trainer's own",
        "iterations of an epoch": budget.iterations or "each trainer's own",
        "mirrored predictions": experiment.mirroring,
        "alpha": statistics.alpha,
        "band": experiment.band(experiment.primary),
        "datasets": {
            f"{dataset.id} ({dataset.configuration})": {
                "batch": dataset.batch_size or "the plan's",
                "tolerance of NSD": "the smallest voxel side" if dataset.tolerance is None else dataset.tolerance,
                "patients": (
                    "one a case" if dataset.patients is None else fingerprint(file.parent / dataset.patients)[:12]
                ),
                "test set": dataset.test,
            }
            for dataset in experiment.datasets
        },
    }


Declared = tuple[str, str, dict[str, Any]]
"""Date, SHA-256 and content of what was declared."""


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a declaration, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def declare(folder: Path, content: Mapping[str, Any], date: str) -> None:
    """Keep the experiment's first declaration; later ones change nothing."""
    file = folder / "declared.json"
    if not file.exists():
        write_json(file, {"date": date, "sha256": digest(content), "content": content})


def read_declaration(folder: Path) -> Declared | None:
    """None where there is none, or one whose content and SHA-256 disagree."""
    file = folder / "declared.json"
    if not file.exists():
        return None
    stored = read_json(file)
    content = stored.get("content")
    if content is None or digest(content) != stored.get("sha256"):
        return None
    return stored["date"], stored["sha256"], content


def differences(declared: Any, found: Any, place: str = "") -> list[str]:
    """What is not as declared, one phrase each: ``band: 0.005 was declared, it is 0.01``."""
    if isinstance(declared, dict) and isinstance(found, dict):
        phrases = []
        for key in dict.fromkeys([*declared, *found]):
            where = f"{place}, {key}" if place else key
            if key not in found:
                phrases.append(f"{where}: {_words(declared[key])} was declared and is gone")
            elif key not in declared:
                phrases.append(f"{where}: {_words(found[key])} was not declared")
            else:
                phrases += differences(declared[key], found[key], where)
        return phrases
    if declared == found:
        return []
    return [f"{place}: {_words(declared)} was declared, it is {_words(found)}"]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
