"""Scores of one dataset as arrays, by arm, training and patient, whatever trained and collected them.

One rule for structures that are absent from the truth: a prediction that leaves one out has the metric's best value,
one that draws it has its worst. It is a score of each prediction by itself, so that means of arms differ by exactly the
mean difference of their pair, and no arm's score depends on what others did.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from nnunet_deform.comparison.metrics import METRICS


@dataclass(frozen=True)
class Scores:
    """One row a training, case and class: ``table`` has the columns of :func:`collect.columns` of one dataset.

    arms: which, in order. A question is the mean over classes (the first) or one class.
    """

    table: pd.DataFrame
    arms: tuple[str, ...]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.table["label"]))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.table["seed"])))

    @cached_property
    def folds(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.table["fold"])))

    @cached_property
    def cases(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.table["case"])))

    @cached_property
    def _codes(self) -> dict[str, np.ndarray]:
        """Of each row, the position of its arm, its fold and so on among them."""
        keys = {"arm": self.arms, "fold": self.folds, "seed": self.seeds, "case": self.cases, "label": self.labels}
        return {key: pd.Index(values).get_indexer(self.table[key]) for key, values in keys.items()}

    @cached_property
    def _row_of_case(self) -> np.ndarray:
        """One row of each case."""
        return np.unique(self._codes["case"], return_index=True)[1]

    @cached_property
    def patients(self) -> tuple[str, ...]:
        """Of each case."""
        return tuple(self.table["patient"].iloc[self._row_of_case])

    @cached_property
    def trained(self) -> np.ndarray:
        """[arms, folds, seeds], whether there is such a training."""
        trained = np.zeros((len(self.arms), len(self.folds), len(self.seeds)), dtype=bool)
        trained[self._codes["arm"], self._codes["fold"], self._codes["seed"]] = True
        return trained

    def cells(self, metric: str) -> np.ndarray:
        """[arms, seeds, cases, classes]; NaN where nothing was predicted."""
        shape = (len(self.arms), len(self.seeds), len(self.cases), len(self.labels))
        values = np.full(shape, np.nan)
        position = tuple(self._codes[key] for key in ("arm", "seed", "case", "label"))
        values[position] = self.table[metric].fillna(METRICS[metric].perfect).to_numpy(dtype=float)
        return values

    def of_cases(self, metric: str) -> np.ndarray:
        """[arms, seeds, cases, questions]."""
        cells = self.cells(metric)
        return np.concatenate([cells.mean(axis=3, keepdims=True), cells], axis=3)

    @cached_property
    def _patients_of_folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each fold: its cases in the order of their patients, and where each patient begins."""
        folds = self._codes["fold"][self._row_of_case]
        _, numbers = np.unique(np.asarray(self.patients), return_inverse=True)
        found = []
        for fold in range(len(self.folds)):
            cases = np.flatnonzero(folds == fold)
            cases = cases[np.argsort(numbers[cases], kind="stable")]
            found.append((cases, np.flatnonzero(np.diff(numbers[cases], prepend=-1))))
        return found

    def _of_fold(self, values: np.ndarray, fold: int, arm: int, seeds: np.ndarray) -> np.ndarray:
        """[questions, patients, trainings], a patient's being the mean over its cases."""
        cases, starts = self._patients_of_folds[fold]
        mine = values[arm][np.flatnonzero(seeds)[:, None], cases[None]]  # [trainings, cases, questions]
        counts = np.diff(np.append(starts, len(cases)))
        return (np.add.reduceat(mine, starts, axis=1) / counts[:, None]).transpose(2, 1, 0)

    def of_arm(self, values: np.ndarray, arm: str) -> list[np.ndarray]:
        """What :func:`evidence.estimate` takes for an arm's mean.

        Args:
            values: from :meth:`of_cases`.
        """
        position = self.arms.index(arm)
        trained = self.trained[position]
        return [self._of_fold(values, f, position, trained[f]) for f in range(len(self.folds)) if trained[f].any()]

    def of_pair(
        self, values: np.ndarray, first: str, second: str, paired_starts: bool
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The scores of both arms on the folds that both have, [questions, patients, trainings] each.

        With paired starts the trainings are those of the seeds that both have on a fold, in the same order; otherwise
        each arm has its own.
        """
        one, two = self.arms.index(first), self.arms.index(second)
        of_first, of_second = [], []
        for fold in range(len(self.folds)):
            mine, theirs = self.trained[one, fold], self.trained[two, fold]
            if paired_starts:
                mine = theirs = mine & theirs
            if mine.any() and theirs.any():
                of_first.append(self._of_fold(values, fold, one, mine))
                of_second.append(self._of_fold(values, fold, two, theirs))
        return of_first, of_second

    def of_trainings(self, values: np.ndarray, metric: str) -> pd.DataFrame:
        """The mean over patients of each training, columns arm, fold, seed and the metric's name."""
        rows = []
        for position, arm in enumerate(self.arms):
            for number, fold in enumerate(self.folds):
                trained = self.trained[position, number]
                if trained.any():
                    means = self._of_fold(values[..., :1], number, position, trained)[0].mean(axis=0)
                    seeds = [seed for seed, there in zip(self.seeds, trained, strict=True) if there]
                    rows += [(arm, fold, seed, float(mean)) for seed, mean in zip(seeds, means, strict=True)]
        return pd.DataFrame(rows, columns=["arm", "fold", "seed", metric])
