"""Whether the operators under comparison act: what trainings wrote about them, and a caution where they do not."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunet_deform.comparison.trainings import Training
from nnunet_deform.networks.observation import EPOCHS_FILE, Values, read_epochs

_TWIN = re.compile(r"_(opOff|static)(?=_|$)")

Histories = dict[Training, dict[int, Values]]
Series = tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class Measure:
    """One number of an epoch; below ``threshold`` the operator does not act, None: no number says that it does not."""

    title: str
    threshold: float | None
    of: Callable[[Values], float | None]


def _best_level(values: Values) -> float | None:
    """The mean |offset| of the level where it is largest."""
    return max((value for key, value in values.items() if key.startswith("offset_mean_level")), default=None)


MEASURES = (
    Measure("mean |offset| at the best level (voxels)", 0.1, _best_level),
    Measure(
        "spread of mixing shares over samples (median layer)", 0.01, lambda values: values.get("mixing_spread_median")
    ),
    Measure("spread of anchors over samples (sides of the patch)", 0.01, lambda values: values.get("anchor_spread")),
    Measure("spread of lambda over samples (median layer)", None, lambda values: values.get("lambda_spread_median")),
    Measure("spread of Phi over samples (median layer)", None, lambda values: values.get("phi_spread_median")),
    Measure("entropy of mixing shares (median layer)", None, lambda values: values.get("mixing_entropy_median")),
    Measure("entropy of routing weights", None, lambda values: values.get("routing_entropy")),
)


@dataclass(frozen=True)
class Diagnostics:
    """What the operators of one dataset's arms did.

    panels: title, threshold and curves by arm of each measure that some training has; rows: see :func:`rows`; cautions:
    see :func:`caution`, by the pair's arms.
    """

    panels: tuple[tuple[str, float | None, dict[str, list[Series]]], ...]
    rows: tuple[tuple[str, str, int, str, str], ...]
    cautions: Mapping[frozenset[str], str]


def read_histories(trainings: Iterable[Training], results: Path) -> Histories:
    """What each training wrote of its epochs; trainings that wrote nothing are left out."""
    histories = {training: read_epochs(training.folder(results) / EPOCHS_FILE) for training in trainings}
    return {training: epochs for training, epochs in histories.items() if epochs}


def of_dataset(histories: Histories, dataset: str, configuration: str) -> Histories:
    return {t: epochs for t, epochs in histories.items() if (t.dataset, t.configuration) == (dataset, configuration)}


def last_epochs(histories: Histories) -> pd.DataFrame:
    """One row for each training and number, of its last epoch."""
    rows = [
        (t.dataset, t.configuration, t.arm, t.seed, t.fold, max(epochs), quantity, value)
        for t, epochs in histories.items()
        for quantity, value in epochs[max(epochs)].items()
    ]
    columns = ["dataset", "configuration", "arm", "seed", "fold", "epoch", "quantity", "value"]
    return pd.DataFrame(rows, columns=columns)


def curves(histories: Histories, measure: Measure) -> dict[str, list[Series]]:
    """Epochs and values of each training that has this measure, by arm."""
    found: dict[str, list[Series]] = {}
    for training, epochs in histories.items():
        values = {epoch: measure.of(numbers) for epoch, numbers in epochs.items()}
        known = {epoch: value for epoch, value in values.items() if value is not None and not math.isnan(value)}
        if known:
            found.setdefault(training.arm, []).append((list(known), list(known.values())))
    return found


def ends(histories: Histories, measure: Measure) -> dict[str, list[float]]:
    """The measure at the end of each training that has it, by arm."""
    return {arm: [values[-1] for _, values in series] for arm, series in curves(histories, measure).items()}


def rows(histories: Histories, arms: Sequence[str]) -> list[tuple[str, str, int, str, str]]:
    """Arm, measure, trainings, median [least, largest] at their end, and in how many the operator acts."""
    found = []
    for measure in MEASURES:
        of_arms = ends(histories, measure)
        for arm in arms:
            if values := of_arms.get(arm):
                span = f"{statistics.median(values):.4f} [{min(values):.4f}, {max(values):.4f}]"
                acting = "" if measure.threshold is None else str(sum(value >= measure.threshold for value in values))
                found.append((arm, measure.title, len(values), span, acting))
    return found


def operator_under_test(trainers: Mapping[str, str], first: str, second: str) -> str | None:
    """The arm whose operator a contrast is about: the other one is its op-off or static twin, by the trainers' names.
    None for other contrasts.

    Args:
        trainers: names by arm.
    """
    twins = [arm for arm in (first, second) if _TWIN.search(trainers[arm])]
    if len(twins) != 1 or len({trainers[arm].split("_")[0] for arm in (first, second)}) != 1:
        return None
    return second if twins == [first] else first


def caution(trainers: Mapping[str, str], histories: Histories, first: str, second: str) -> str | None:
    """Why a contrast may be empty: the operator that it is about does not act, or that is not known.

    Args:
        trainers: names by arm; histories: of one dataset.
    """
    arm = operator_under_test(trainers, first, second)
    if arm is None:
        return None
    found, known = [], False
    for measure in MEASURES:
        values = ends(histories, measure).get(arm, [])
        if measure.threshold is None or not values:
            continue
        known = True
        idle = [value for value in values if value < measure.threshold]
        if idle:
            found.append(
                f"{measure.title} ended below {measure.threshold:g} in {len(idle)} of {len(values)} trainings "
                f"({min(idle):.4f} to {max(idle):.4f})"
            )
    if found:
        return (
            f"Caution: {arm}'s operator does not act, {'; '.join(found)}. What differs from its twin is then no effect "
            "of the operator."
        )
    if not known:
        return f"Caution: whether {arm}'s operator acts is not known, its trainings left no {EPOCHS_FILE}."
    return None


def diagnose(trainers: Mapping[str, str], histories: Histories) -> Diagnostics:
    """
    Args:
        trainers: names by arm, in the order of the arms; histories: of one dataset.
    """
    arms = list(trainers)
    pairs = itertools.combinations(arms, 2)
    return Diagnostics(
        panels=tuple((m.title, m.threshold, found) for m in MEASURES if (found := curves(histories, m))),
        rows=tuple(rows(histories, arms)),
        cautions={frozenset(pair): words for pair in pairs if (words := caution(trainers, histories, *pair))},
    )
