"""What an analysis is about, whoever planned and trained it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from nnunet_deform.comparison.experiment import Experiment
from nnunet_deform.comparison.metrics import METRICS


@dataclass(frozen=True)
class Design:
    """
    arms: in their order; folds, seeds: of the trainings; hypotheses: pairs of arms, on the ``primary`` metric and every
    dataset, which share alpha; paired_starts: pairs whose networks start from the same weights at a seed; bands: of
    each metric, within which differences count as equal, in its unit; draws: of the ranking's bootstrap, and seed of
    its random numbers.
    """

    arms: tuple[str, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    hypotheses: tuple[tuple[str, str], ...]
    paired_starts: frozenset[frozenset[str]]
    primary: str
    alpha: float
    bands: Mapping[str, float]
    draws: int
    bootstrap_seed: int

    def starts_alike(self, first: str, second: str) -> bool:
        return frozenset((first, second)) in self.paired_starts


def design_of(experiment: Experiment) -> Design:
    arms = tuple(arm.name for arm in experiment.arms)
    return Design(
        arms=arms,
        folds=experiment.folds,
        seeds=(experiment.seeds.first, *experiment.seeds.repeats),
        hypotheses=experiment.hypotheses,
        paired_starts=frozenset(
            frozenset(pair) for pair in itertools.combinations(arms, 2) if experiment.paired_starts(*pair)
        ),
        primary=experiment.primary,
        alpha=experiment.statistics.alpha,
        bands={name: experiment.band(name) for name in METRICS},
        draws=experiment.statistics.draws,
        bootstrap_seed=experiment.statistics.seed,
    )
