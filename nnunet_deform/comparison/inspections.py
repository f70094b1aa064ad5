"""Pages of ``nnunet-deform inspect`` for the worst case of each arm, to which the report links."""

from __future__ import annotations

import shutil
from pathlib import Path

from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.collect import collect
from nnunet_deform.comparison.design import design_of
from nnunet_deform.comparison.experiment_file import find_folders, load_experiment
from nnunet_deform.comparison.report.experiment import volume_readers
from nnunet_deform.comparison.report.pictures import worst_case


def inspect_worst_cases(file: Path) -> list[str]:
    """Make what is missing or older than its model, in the report's folder.

    Args:
        file: the experiment.

    Returns:
        A sentence for each page that could not be made.
    """
    from nnunet_deform.inspection.command import inspect_cases
    from nnunet_deform.inspection.model import InspectionError, load_model

    source_file = load_experiment(file)
    experiment, folders = source_file.experiment, find_folders(source_file)
    collected = collect(experiment, folders, source_file.path)
    design = design_of(experiment)
    sources = volume_readers(experiment, folders)
    failures = []
    for dataset in analyse(design, collected.cases, collected.missing).datasets:
        source = sources[dataset.dataset, dataset.configuration]
        for position, arm in enumerate(dataset.arms):
            case = dataset.cases[worst_case(dataset.metrics[design.primary], position)]
            training = source.training(arm, case)
            output = folders.output / "report" / source.inspected(arm)
            checkpoint = training.folder(folders.results) / "checkpoint_final.pth"
            if _is_current(output / case / "inspect.html", checkpoint):
                continue
            shutil.rmtree(output / case, ignore_errors=True)
            try:
                model = load_model(
                    training.model_folder(folders.results),
                    fold=str(training.fold),
                    device=experiment.device,
                    mirroring=experiment.mirroring,
                )
                inspect_cases([model], source.image(case), output, labels=source.labels)
            except InspectionError as error:
                failures.append(f"no page of {arm} and {case}: {error}")
    return failures


def _is_current(page: Path, checkpoint: Path) -> bool:
    """Also of a model that is gone, of which no other page could be made."""
    return page.exists() and not (checkpoint.exists() and page.stat().st_mtime < checkpoint.stat().st_mtime)
