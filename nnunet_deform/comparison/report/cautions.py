"""What a reader must know before the figures."""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_deform.comparison.analysis import DatasetAnalysis, few_trainings
from nnunet_deform.comparison.report.content import ReportContent
from nnunet_deform.comparison.verdicts import REQUIRED_TRAINING_FREEDOM


def cautions(content: ReportContent) -> list[str]:
    """One or two sentences each: those of whoever collected the scores, and those that the analysis asks for."""
    found = list(content.cautions)
    for dataset in content.analysis.datasets:
        found += _of_dataset(content, dataset)
    found.append(
        "Out-of-fold scores of different folds come from trainings that share most of their cases; tests and intervals "
        "count patients and trainings as independent, as is usual, and say nothing about other datasets."
    )
    return found


def _of_dataset(content: ReportContent, dataset: DatasetAnalysis) -> Iterator[str]:
    for arm, why in dataset.incomplete.items():
        yield f"{arm} is left out of all but the hypotheses on {dataset.title}: {why}."
    if few := few_trainings(dataset):
        yield (
            f"{dataset.title}: {', '.join(few)} {'has' if len(few) == 1 else 'have'} too few repeated trainings, "
            "so nothing is decided about them: how much their trainings differ by chance is not known. Trainings "
            f"beyond the first of each fold must be at least {REQUIRED_TRAINING_FREEDOM}."
        )
    for arm, classes in dataset.failed.items():
        reached = ", ".join(f"{dice:.4f} ({label})" for label, dice in classes.items())
        yield (
            f"{dataset.title}: {arm} reaches a mean Dice of {reached}, at most a tenth of the best arm's, so its "
            "training failed or was too short. Differences from it say nothing about networks; the spread between "
            "methods and between seeds below is that of the other arms."
        )
    if not content.of(dataset.dataset, dataset.configuration).patients_mapped:
        yield (
            f"{dataset.title}: no file says which cases belong to one patient, so each case counts as a patient. "
            "Where patients have several cases, intervals are too short, and trainings may have seen patients they "
            "are scored on."
        )
    yield from content.of(dataset.dataset, dataset.configuration).cautions
    if content.test_of(dataset).groupby("arm")["case"].agg(frozenset).nunique() > 1:
        yield f"{dataset.title}: the arms' test scores are of different cases, so they cannot be compared."
