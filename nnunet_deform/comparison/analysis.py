"""All statistics of a comparison, from the tidy table of scores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from nnunet_deform.comparison.design import Design
from nnunet_deform.comparison.evidence import estimate
from nnunet_deform.comparison.metrics import METRICS, Metric
from nnunet_deform.comparison.ranking import Ranking, beaten_ranks, bootstrap_ranking
from nnunet_deform.comparison.scores import Scores
from nnunet_deform.comparison.statistics import SeedNoise, bootstrap_means, holm, seed_noise
from nnunet_deform.comparison.trainings import Training
from nnunet_deform.comparison.verdicts import (
    REQUIRED_TRAINING_FREEDOM,
    Contrast,
    Kind,
    Reason,
    Verdict,
    contrasts,
    hardly_learned,
    judge,
    turned,
)


@dataclass(frozen=True)
class MetricAnalysis:
    """One metric on one dataset, all complete arms, out of fold.

    band: within which differences count as equal; scores: [arms, cases], a case's mean over its classes and the arm's
    trainings; by_class: [arms, classes], the mean over patients, with intervals [2, arms, classes]; means and
    intervals: of each arm, the latter [2, arms]; contrasts: all pairs of arms, each at alpha alone (exploratory),
    p_holm over these pairs; differences: [pairs, cases]; by_class_contrasts: class by class; seed_means: of each
    training; noise: of seeds; ranking: None with fewer than two arms.
    """

    metric: Metric
    band: float
    scores: np.ndarray
    by_class: np.ndarray
    by_class_intervals: np.ndarray
    means: np.ndarray
    intervals: np.ndarray
    contrasts: tuple[Contrast, ...]
    p_holm: np.ndarray
    differences: np.ndarray
    by_class_contrasts: dict[str, tuple[Contrast, ...]]
    noise: SeedNoise
    seed_means: pd.DataFrame
    ranking: Ranking | None

    def contrast(self, first: str, second: str) -> Contrast:
        """Of two arms in either order."""
        for contrast in self.contrasts:
            if (contrast.first, contrast.second) == (first, second):
                return contrast
            if (contrast.first, contrast.second) == (second, first):
                return turned(contrast)
        raise KeyError((first, second))

    def case_differences(self, first: str, second: str) -> np.ndarray:
        """What :meth:`contrast` is about, [cases]."""
        for contrast, values in zip(self.contrasts, self.differences, strict=True):
            if (contrast.first, contrast.second) == (first, second):
                return values
            if (contrast.first, contrast.second) == (second, first):
                return -values
        raise KeyError((first, second))


@dataclass(frozen=True)
class DatasetAnalysis:
    """arms: those with a training of every fold, in the design's order; incomplete: why the others are left out of
    all but the hypotheses; cases, patients: of the columns of every ``scores``; trainings: how many each arm has;
    absent: cells of case and class that are absent from the truth; drawn: how many of them a training of each arm draws
    on average; failed: arms that hardly learned beside the best of each class, and their mean Dice there."""

    dataset: str
    configuration: str
    arms: tuple[str, ...]
    incomplete: dict[str, str]
    cases: tuple[str, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    trainings: dict[str, int]
    absent: int
    drawn: dict[str, float]
    failed: dict[str, dict[str, float]]
    metrics: dict[str, MetricAnalysis]

    @property
    def title(self) -> str:
        return f"{self.dataset} ({self.configuration})"


@dataclass(frozen=True)
class Hypothesis:
    """A declared pair on one dataset; contrast is None where the arms have no fold in common."""

    dataset: str
    configuration: str
    first: str
    second: str
    contrast: Contrast | None
    verdict: Verdict

    @property
    def title(self) -> str:
        return f"{self.dataset} ({self.configuration})"


@dataclass(frozen=True)
class Analysis:
    datasets: tuple[DatasetAnalysis, ...]
    hypotheses: tuple[Hypothesis, ...]


def analyse(design: Design, cases: pd.DataFrame, missing: Mapping[Training, str]) -> Analysis:
    """
    Args:
        cases: out-of-fold scores, with :func:`collect.columns`.
        missing: why trainings of the design have no scores.
    """
    keys = list(dict.fromkeys(zip(cases["dataset"], cases["configuration"], strict=True)))
    keys += [key for key in dict.fromkeys((t.dataset, t.configuration) for t in missing) if key not in keys]
    family = len(design.hypotheses) * max(1, len(keys))
    datasets, hypotheses = [], []
    for dataset, configuration in keys:
        table = cases[(cases["dataset"] == dataset) & (cases["configuration"] == configuration)]
        lacking = {t: why for t, why in missing.items() if (t.dataset, t.configuration) == (dataset, configuration)}
        datasets.append(_analyse_dataset(design, dataset, configuration, table, lacking))
        for first, second in design.hypotheses:
            contrast, verdict = _decide(design, first, second, table, lacking, family)
            hypotheses.append(Hypothesis(dataset, configuration, first, second, contrast, verdict))
    return Analysis(tuple(datasets), tuple(hypotheses))


def _decide(
    design: Design,
    first: str,
    second: str,
    table: pd.DataFrame,
    missing: Mapping[Training, str],
    family: int,
) -> tuple[Contrast | None, Verdict]:
    """Of a declared pair, from the scores of its two arms alone."""
    scores = pair_scores(table, first, second)
    metric = METRICS[design.primary]
    lacking = {t: why for t, why in missing.items() if t.arm in (first, second)}
    contrast = next(iter(pair_contrasts(design, scores, family)), None)
    trained = set(scores.table["arm"])
    crashed = {
        arm: {}
        for arm in (first, second)
        if arm not in trained and any(t.arm == arm and why.startswith("failed") for t, why in lacking.items())
    }
    words = tuple(f"{t.arm}, seed {t.seed}, fold {t.fold}: {why}" for t, why in lacking.items())
    if crashed:
        return contrast, Verdict(Kind.NOT_COMPARABLE, reason=Reason.FAILED, missing=words, arms=crashed)
    if contrast is not None and (hardly := hardly_learned(_present_dice(scores.table))):
        return contrast, Verdict(Kind.NOT_COMPARABLE, reason=Reason.HARDLY_LEARNED, arms=hardly)
    if lacking or contrast is None:
        return contrast, Verdict(Kind.UNDECIDED, reason=Reason.MISSING, missing=words)
    return contrast, judge(contrast, higher_is_better=metric.higher_is_better)


def pair_scores(table: pd.DataFrame, first: str, second: str) -> Scores:
    """Of these two arms alone, whatever else the table of a dataset holds."""
    return Scores(table[table["arm"].isin((first, second))], (first, second))


def pair_contrasts(design: Design, scores: Scores, family: int) -> list[Contrast]:
    """What a declared pair's verdicts rest on: of the primary metric, one for each question of :func:`pair_scores`,
    each at the level that one of ``family`` hypotheses has; none where the arms have no fold in common."""
    first, second = scores.arms
    if scores.table.empty:
        return []
    alike = design.starts_alike(first, second)
    of_first, of_second = scores.of_pair(scores.of_cases(design.primary), first, second, alike)
    if not of_first:
        return []
    return contrasts(
        of_first,
        of_second,
        names=(first, second),
        metric=design.primary,
        cases=_common_cases(scores, first, second, alike),
        paired_starts=alike,
        alpha=design.alpha,
        family=family,
        band=design.bands[design.primary],
    )


def _common_cases(scores: Scores, first: str, second: str, paired_starts: bool) -> int:
    one, two = (scores.trained[scores.arms.index(arm)] for arm in (first, second))
    common = (one & two).any(axis=1) if paired_starts else one.any(axis=1) & two.any(axis=1)
    folds = [fold for fold, both in zip(scores.folds, common, strict=True) if both]
    return int(scores.table[scores.table["fold"].isin(folds)]["case"].nunique())


def _present_dice(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean Dice of each class by arm, over the cases that have the structure."""
    means = table[table["voxels_truth"] > 0].groupby(["arm", "label"])["Dice"].mean()
    found: dict[str, dict[str, float]] = {}
    for (arm, label), value in means.items():
        found.setdefault(arm, {})[label] = float(value)
    return found


def _analyse_dataset(
    design: Design,
    dataset: str,
    configuration: str,
    table: pd.DataFrame,
    missing: Mapping[Training, str],
) -> DatasetAnalysis:
    folds = table.drop_duplicates(["arm", "fold"]).groupby("arm")["fold"].agg(set)
    incomplete = {}
    for arm in design.arms:
        lacking = [fold for fold in design.folds if fold not in folds.get(arm, ())]
        if lacking:
            whys = {t.fold: why for t, why in missing.items() if t.arm == arm and t.fold in lacking}
            incomplete[arm] = "; ".join(f"fold {fold} {whys.get(fold, 'has no scores')}" for fold in lacking)
    arms = tuple(arm for arm in design.arms if arm not in incomplete)
    scores = Scores(table[table["arm"].isin(arms)], arms)
    first_class = scores.table.drop_duplicates(["arm", "fold", "seed"])
    absent = scores.table[scores.table["voxels_truth"] == 0]
    analysis = DatasetAnalysis(
        dataset=dataset,
        configuration=configuration,
        arms=arms,
        incomplete=incomplete,
        cases=scores.cases,
        patients=scores.patients,
        labels=scores.labels,
        trainings={arm: int((first_class["arm"] == arm).sum()) for arm in arms},
        absent=len(absent.drop_duplicates(["case", "label"])),
        drawn={arm: _drawn(absent[absent["arm"] == arm]) for arm in arms},
        failed=hardly_learned(_present_dice(scores.table)),
        metrics={},
    )
    if not arms:
        return analysis
    metrics = {name: _analyse_metric(design, metric, scores, analysis.failed) for name, metric in METRICS.items()}
    return replace(analysis, metrics=metrics)


def _drawn(absent: pd.DataFrame) -> float:
    """Structures that a training draws where there are none, the sum over folds of the mean over seeds."""
    drawn = (absent["voxels_prediction"] > 0).groupby([absent["fold"], absent["seed"]]).sum()
    return float(drawn.groupby("fold").mean().sum())


def _analyse_metric(design: Design, metric: Metric, scores: Scores, failed: Mapping[str, object]) -> MetricAnalysis:
    arms, labels = scores.arms, scores.labels
    values = scores.of_cases(metric.name)
    of_arms = [estimate(scores.of_arm(values, arm)) for arm in arms]
    intervals = [result.interval(design.alpha) for result in of_arms]
    pairs = list(itertools.combinations(arms, 2))
    by_question = []
    for pair in pairs:
        alike = design.starts_alike(*pair)
        by_question.append(
            contrasts(
                *scores.of_pair(values, *pair, alike),
                names=pair,
                metric=metric.name,
                cases=len(scores.cases),
                paired_starts=alike,
                alpha=design.alpha,
                band=design.bands[metric.name],
            )
        )
    overall = tuple(questions[0] for questions in by_question)
    with np.errstate(invalid="ignore"):
        of_cases = np.nanmean(values[..., 0], axis=1)
    seed_means = scores.of_trainings(values, metric.name)
    p_holm = holm([contrast.p for contrast in overall])
    return MetricAnalysis(
        metric=metric,
        band=design.bands[metric.name],
        scores=of_cases,
        by_class=np.array([result.mean[1:] for result in of_arms]),
        by_class_intervals=np.array([[low[1:] for low, _ in intervals], [high[1:] for _, high in intervals]]),
        means=np.array([result.mean[0] for result in of_arms]),
        intervals=np.array([[low[0] for low, _ in intervals], [high[0] for _, high in intervals]]),
        contrasts=overall,
        p_holm=p_holm,
        differences=np.array([of_cases[arms.index(one)] - of_cases[arms.index(two)] for one, two in pairs]),
        by_class_contrasts={
            label: tuple(questions[1 + number] for questions in by_question) for number, label in enumerate(labels)
        },
        noise=_seed_noise(design, arms, seed_means, failed),
        seed_means=seed_means,
        ranking=_rank(design, metric, scores, values, overall) if pairs else None,
    )


def _rank(design: Design, metric: Metric, scores: Scores, values: np.ndarray, overall: Sequence[Contrast]) -> Ranking:
    of_patients = np.stack(
        [np.concatenate([fold[0].mean(axis=1) for fold in scores.of_arm(values, arm)]) for arm in scores.arms], axis=1
    )
    # The same random numbers for every dataset and metric, so that adding one changes no other's figures.
    rng = np.random.default_rng(design.bootstrap_seed)
    draws = bootstrap_means(of_patients, design.draws, rng)
    sign = 1 if metric.higher_is_better else -1
    tested = beaten_ranks(
        sign * np.array([c.mean for c in overall]),
        np.array([1.0 if c.ranks_contradict else c.p for c in overall]),
        design.alpha,
    )
    return bootstrap_ranking(sign * of_patients.mean(axis=0), sign * draws, tested)


def _seed_noise(
    design: Design, arms: Sequence[str], seed_means: pd.DataFrame, failed: Mapping[str, object]
) -> SeedNoise:
    """Arms that hardly learned are left out: their distance to the others would pass for that of methods."""
    learned = [arm for arm in arms if arm not in failed]
    cube = np.full((len(design.folds), len(learned), len(design.seeds)), np.nan)
    for arm, fold, seed, value in seed_means.itertuples(index=False):
        if arm in learned:
            cube[design.folds.index(fold), learned.index(arm), design.seeds.index(seed)] = value
    return seed_noise(cube)


def few_trainings(analysis: DatasetAnalysis) -> list[str]:
    """Complete arms whose trainings say too little about how much one differs from the next."""
    if not analysis.metrics:
        return []
    means = next(iter(analysis.metrics.values())).seed_means
    freedom = means.groupby("arm").size() - means.groupby("arm")["fold"].nunique()
    return [arm for arm in analysis.arms if freedom[arm] < REQUIRED_TRAINING_FREEDOM]
