"""The estimates of :mod:`evidence` on parts of the scores: one fold, structures of one size, the test set.

Nothing is decided on parts: their intervals are each at alpha alone, and their contrasts exploratory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnunet_deform.comparison.evidence import estimate
from nnunet_deform.comparison.scores import Scores
from nnunet_deform.comparison.verdicts import Contrast, contrasts

SIZES = ("small", "middle", "large")


@dataclass(frozen=True)
class Mean:
    """Of one arm over patients, with its interval and what it was made from."""

    arm: str
    value: float
    interval: tuple[float, float]
    cases: int
    patients: int


@dataclass(frozen=True)
class Part:
    """means: of the arms that have scores there; contrasts: of the pairs that share a fold and cases there."""

    name: str
    means: tuple[Mean, ...]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class SizePart(Part):
    """Structures of one class, or of all, that are small, of middle size or large, a third of those of each class.

    label: the class, None for all; structures: how many; voxels: the smallest and the largest of them.
    """

    label: str | None
    structures: int
    voxels: tuple[int, int]


Pairs = Mapping[tuple[str, str], bool]
"""Whether the networks of two arms start from the same weights."""


def whole(table: pd.DataFrame, arms: Sequence[str], pairs: Pairs, metric: str, alpha: float, name: str = "all") -> Part:
    """The estimates on all of these scores.

    Args:
        table: of one dataset, with the columns of :func:`collect.columns`; where two arms have other cases, their
            contrast is of those that both have.
        arms: those without scores are left out.
    """
    return Part(name, _means(table, arms, metric, alpha), _contrasts(table, pairs, metric, alpha))


def by_fold(table: pd.DataFrame, arms: Sequence[str], pairs: Pairs, metric: str, alpha: float) -> list[Part]:
    """See :func:`whole`; one for each fold."""
    return [
        whole(of_fold, arms, pairs, metric, alpha, name=f"fold {fold}")
        for fold, of_fold in table.groupby("fold", sort=True)
    ]


def by_size(table: pd.DataFrame, arms: Sequence[str], pairs: Pairs, metric: str, alpha: float) -> list[SizePart]:
    """See :func:`whole`; for all classes together and each of them, a part for each of SIZES.

    A class's structures are sorted by their voxels in the truth and cut into thirds; absent ones are in none. Parts
    without structures, of a class with fewer than three sizes, are left out.
    """
    structures = table[table["voxels_truth"] > 0].drop_duplicates(["case", "label"])
    labels = list(dict.fromkeys(structures["label"]))
    cuts = structures.groupby("label")["voxels_truth"].quantile([1 / 3, 2 / 3]).unstack()
    sized = table[table["voxels_truth"] > 0]
    bounds = cuts.loc[sized["label"]].to_numpy()
    size = (sized["voxels_truth"].to_numpy()[:, None] > bounds).sum(axis=1)
    found = []
    for label in (None, *labels) if len(labels) > 1 else (None,):
        mine = np.ones(len(sized), dtype=bool) if label is None else (sized["label"] == label).to_numpy()
        for number, name in enumerate(SIZES):
            rows = sized[mine & (size == number)]
            if not len(rows):
                continue
            voxels = rows.drop_duplicates(["case", "label"])["voxels_truth"]
            keys = ["arm", "seed", "fold", "case", "patient"]
            # A case's structures of this size, whichever classes they are of, are one question.
            of_cases = rows.groupby(keys, sort=False, as_index=False)[metric].mean().assign(label="all")
            found.append(
                SizePart(
                    name=name,
                    means=_means(of_cases, arms, metric, alpha),
                    contrasts=_contrasts(of_cases, pairs, metric, alpha),
                    label=label,
                    structures=len(voxels),
                    voxels=(int(voxels.min()), int(voxels.max())),
                )
            )
    return found


def _means(table: pd.DataFrame, arms: Sequence[str], metric: str, alpha: float) -> tuple[Mean, ...]:
    found = []
    for arm in arms:
        scores = Scores(table[table["arm"] == arm], (arm,))
        if not len(scores.table):
            continue
        result = estimate(scores.of_arm(scores.of_cases(metric)[..., :1], arm))
        low, high = result.interval(alpha)
        interval = (float(low[0]), float(high[0]))
        found.append(Mean(arm, float(result.mean[0]), interval, len(scores.cases), result.number))
    return tuple(found)


def _contrasts(table: pd.DataFrame, pairs: Pairs, metric: str, alpha: float) -> tuple[Contrast, ...]:
    found = []
    cases = {arm: set(mine) for arm, mine in table.groupby("arm")["case"]}
    for (first, second), paired_starts in pairs.items():
        common = cases.get(first, set()) & cases.get(second, set())
        rows = table["arm"].isin((first, second)) & table["case"].isin(common)
        scores = Scores(table[rows], (first, second))
        if not common:
            continue
        of_first, of_second = scores.of_pair(scores.of_cases(metric)[..., :1], first, second, paired_starts)
        if of_first:
            found += contrasts(
                of_first,
                of_second,
                names=(first, second),
                metric=metric,
                cases=len(common),
                paired_starts=paired_starts,
                alpha=alpha,
            )
    return tuple(found)
