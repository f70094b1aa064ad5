"""Writes the workflow's files into the experiment's output folder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from nnunet_deform.comparison.check import check_experiment
from nnunet_deform.comparison.collect import predicts_alone, scores_file, scores_file_of_test
from nnunet_deform.comparison.cost import costs_file
from nnunet_deform.comparison.files import fingerprint, write_json, write_text
from nnunet_deform.comparison.run import Comparison
from nnunet_deform.comparison.trainings import Training
from nnunet_deform.processes.commands import find_command

PROFILES = ("local", "slurm")


def write_workflow(comparison: Comparison) -> Path:
    """Check the experiment and write ``workflow/`` into the output folder: Snakefile, jobs.json, and the profiles,
    which are the user's and are not replaced.

    Returns:
        The folder.

    Raises:
        ExperimentError: see :func:`check_experiment`.
        CommandError: nnunet-deform is not installed as a command.
    """
    check_experiment(comparison.source, comparison.folders, trains_here=False)
    jobs = describe_jobs(comparison)
    folder = comparison.folders.output / "workflow"
    texts = files(__package__)
    write_json(folder / "jobs.json", jobs)
    write_text(folder / "Snakefile", texts.joinpath("Snakefile").read_text(encoding="utf-8"))
    for name in PROFILES:
        file = folder / name / "config.yaml"
        if not file.exists():
            write_text(file, texts.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return folder


def _by_ensemble(comparison: Comparison, training: Training) -> bool:
    """Whether the test set is a job of its own, for all folds together."""
    return comparison.has_test_set(training) and not predicts_alone(comparison.experiment, training)


def describe_jobs(comparison: Comparison) -> dict[str, Any]:
    """What the Snakefile has to know.

    Files are relative to the output folder. An arm's files are the scores of its folds under the first seed, which its
    test predictions and costs wait for.
    """
    experiment, folders = comparison.experiment, comparison.folders

    def relative(file: Path) -> str:
        return file.relative_to(folders.output).as_posix()

    return {
        "experiment": str(comparison.file),
        "experiment_sha256": fingerprint(comparison.file),
        "output": str(folders.output),
        "nnunet_deform": find_command("nnunet-deform"),
        "environment": {"nnUNet_raw": str(folders.raw), "nnUNet_preprocessed": str(folders.preprocessed)},
        "gpu": experiment.device == "cuda",
        "trainings": {training.key: relative(scores_file(training, folders)) for training in comparison.trainings},
        "arms": {
            arm[0].arm_key: {
                "folds": [relative(scores_file(training, folders)) for training in arm],
                "test": relative(scores_file_of_test(arm[0], folders)) if _by_ensemble(comparison, arm[0]) else None,
                "cost": relative(costs_file(arm[0], folders)),
            }
            for arm in comparison.arms()
        },
    }
