"""All statistics of an experiment, from the tidy table of scores."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from nnunet_deform.comparison.experiment import Experiment
from nnunet_deform.comparison.metrics import METRICS, Metric
from nnunet_deform.comparison.ranking import Ranking, beaten_ranks, bootstrap_ranking
from nnunet_deform.comparison.statistics import (
    REQUIRED_SEEDS,
    Contrast,
    SeedNoise,
    Verdict,
    bca_interval,
    bootstrap_means,
    detectable_effect,
    holm,
    judge,
    paired_differences,
    patient_sums,
    seed_noise,
    signed_rank,
    smallest_adjusted,
)


@dataclass(frozen=True)
class MetricAnalysis:
    """One metric on one dataset, all complete arms, first seed, out of fold.

    scores: [arms, cases], a case's mean over its scored classes; by_class: [arms, classes], the mean over cases, as in
    nnU-Net; means and intervals: of each arm, the latter [2, arms]; contrasts: all pairs of arms, Holm over these pairs
    (exploratory); differences: [pairs, cases], what each of these contrasts is about; by_class_contrasts: class by
    class; seed_means: of each training, on the scale of the differences, where a structure that is rightly left out and
    drawn by another training has the best score; noise: of seeds; no_score: [arms], cells without a score, because
    a structure is rightly absent; ranking: None with fewer than two arms.
    """

    metric: Metric
    scores: np.ndarray
    by_class: np.ndarray
    means: np.ndarray
    intervals: np.ndarray
    contrasts: tuple[Contrast, ...]
    differences: np.ndarray
    by_class_contrasts: dict[str, tuple[Contrast, ...]]
    noise: SeedNoise
    seed_means: pd.DataFrame
    no_score: np.ndarray
    ranking: Ranking | None

    def contrast(self, first: str, second: str) -> Contrast:
        """Of two arms in either order."""
        for contrast in self.contrasts:
            if (contrast.first, contrast.second) == (first, second):
                return contrast
            if (contrast.first, contrast.second) == (second, first):
                return _turned(contrast)
        raise KeyError((first, second))

    def case_differences(self, first: str, second: str) -> np.ndarray:
        """What :meth:`contrast` is about: [cases], NaN where neither arm has a score."""
        for contrast, values in zip(self.contrasts, self.differences, strict=True):
            if (contrast.first, contrast.second) == (first, second):
                return values
            if (contrast.first, contrast.second) == (second, first):
                return -values
        raise KeyError((first, second))


@dataclass(frozen=True)
class DatasetAnalysis:
    """arms: complete ones, in the experiment's order; incomplete: why the others are left out of all statistics;
    cases, patients: of the columns of every ``scores``; seeds: how many each complete arm has, at most, on a fold;
    failed: mean Dice of the classes that an arm hardly learned, at most a tenth of the best arm's."""

    dataset: str
    configuration: str
    arms: tuple[str, ...]
    incomplete: dict[str, str]
    cases: tuple[str, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    seeds: dict[str, int]
    failed: dict[str, dict[str, float]]
    metrics: dict[str, MetricAnalysis]

    @property
    def title(self) -> str:
        return f"{self.dataset} ({self.configuration})"


@dataclass(frozen=True)
class Hypothesis:
    """A declared pair on one dataset; contrast is None where an arm is incomplete."""

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

    @property
    def summary(self) -> str:
        """What may be said, in one sentence."""
        kinds = [hypothesis.verdict.kind for hypothesis in self.hypotheses]
        total = len(kinds)
        winners = [h for h in self.hypotheses if h.verdict.kind == "better"]
        if not winners and "equivalent" not in kinds:
            if total == 1:
                none = "The arms of the declared hypothesis are not distinguishable with this evidence."
            else:
                none = f"In none of the {total} declared comparisons are the arms distinguishable with this evidence."
            return none + self._failures
        parts = [
            f"{h.verdict.winner} is better than {h.second if h.verdict.winner == h.first else h.first} on {h.title}"
            for h in winners
        ]
        parts += [
            f"{h.first} and {h.second} are equivalent on {h.title}"
            for h in self.hypotheses
            if h.verdict.kind == "equivalent"
        ]
        rest = kinds.count("not distinguishable")
        if rest:
            parts.append(f"the arms of {rest} of {total} comparisons are not distinguishable")
        return "; ".join(parts) + "." + self._failures

    @property
    def _failures(self) -> str:
        arms = dict.fromkeys(arm for dataset in self.datasets for arm in dataset.failed)
        return f" {', '.join(arms)} hardly learned to segment, which says nothing about networks." if arms else ""


def analyse(experiment: Experiment, cases: pd.DataFrame, missing: dict[tuple[str, str, str], str]) -> Analysis:
    """
    Args:
        cases: the collected out-of-fold table.
        missing: why arms are incomplete, by (dataset, configuration, arm).
    """
    settings = experiment.statistics
    keys = list(dict.fromkeys(zip(cases["dataset"], cases["configuration"], strict=True)))
    keys += [key for key in dict.fromkeys((d, c) for d, c, _ in missing) if key not in keys]
    family = len(experiment.hypotheses) * max(1, len(keys))
    datasets = []
    for dataset, configuration in keys:
        table = cases[(cases["dataset"] == dataset) & (cases["configuration"] == configuration)]
        incomplete = {arm: why for (d, c, arm), why in missing.items() if (d, c) == (dataset, configuration)}
        datasets.append(_analyse_dataset(experiment, dataset, configuration, table, incomplete, family))

    declared = [(analysis, pair) for analysis in datasets for pair in experiment.hypotheses]
    contrasts: list[Contrast | None] = [
        analysis.metrics[experiment.primary].contrast(*pair) if set(pair) <= set(analysis.arms) else None
        for analysis, pair in declared
    ]
    p_values = [float("nan") if contrast is None else contrast.p for contrast in contrasts]
    smallest = smallest_adjusted(p_values, [0 if contrast is None else contrast.patients for contrast in contrasts])
    hypotheses = []
    for (analysis, (first, second)), contrast, p_holm, smallest_p in zip(
        declared, contrasts, holm(p_values), smallest, strict=True
    ):
        if contrast is None:
            reasons = [f"{arm}: {why}" for arm, why in analysis.incomplete.items() if arm in (first, second)]
            sentence = f"{first} and {second} are not distinguishable: evidence is missing ({'; '.join(reasons)})."
            verdict = Verdict("not distinguishable", None, sentence)
        else:
            contrast = replace(contrast, p_holm=float(p_holm))
            metric = analysis.metrics[experiment.primary]
            verdict = judge(
                contrast,
                noise=metric.noise,
                seeds=(analysis.seeds[first], analysis.seeds[second]),
                folds=len(experiment.folds),
                family=len(declared),
                smallest_p=float(smallest_p),
                band=settings.band,
                alpha=settings.alpha,
                higher_is_better=metric.metric.higher_is_better,
                number="{:+." + str(metric.metric.decimals) + "f}",
            )
        hypotheses.append(Hypothesis(analysis.dataset, analysis.configuration, first, second, contrast, verdict))
    return Analysis(tuple(datasets), tuple(hypotheses))


def _analyse_dataset(
    experiment: Experiment,
    dataset: str,
    configuration: str,
    table: pd.DataFrame,
    incomplete: dict[str, str],
    family: int,
) -> DatasetAnalysis:
    arms = tuple(arm.name for arm in experiment.arms if arm.name not in incomplete)
    table = table[table["arm"].isin(arms)]
    first = table[table["seed"] == experiment.seeds.first]
    by_case = first.drop_duplicates("case").sort_values("case")
    seeds = table.groupby(["arm", "fold"])["seed"].nunique()
    labels = tuple(dict.fromkeys(table["label"]))
    analysis = DatasetAnalysis(
        dataset=dataset,
        configuration=configuration,
        arms=arms,
        incomplete=incomplete,
        cases=tuple(by_case["case"]),
        patients=tuple(by_case["patient"]),
        labels=labels,
        seeds={arm: int(seeds[arm].max()) for arm in arms},
        failed=_failed(first, arms, labels),
        metrics={},
    )
    if not arms:
        return analysis
    metrics = {
        name: _analyse_metric(experiment, metric, first, table, analysis, family) for name, metric in METRICS.items()
    }
    return replace(analysis, metrics=metrics)


def _failed(first: pd.DataFrame, arms: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    means = first.groupby(["arm", "label"])["Dice"].mean()
    limits = means.groupby("label").max() / 10
    failed = {arm: {x: float(means[arm, x]) for x in labels if means[arm, x] <= limits[x]} for arm in arms}
    return {arm: classes for arm, classes in failed.items() if classes}


def _analyse_metric(
    experiment: Experiment,
    metric: Metric,
    first: pd.DataFrame,
    table: pd.DataFrame,
    analysis: DatasetAnalysis,
    family: int,
) -> MetricAnalysis:
    settings = experiment.statistics
    arms, patients = analysis.arms, analysis.patients
    cells = np.full((len(arms), len(analysis.cases), len(analysis.labels)), np.nan)
    index = (
        pd.Categorical(first["arm"], arms).codes,
        pd.Categorical(first["case"], analysis.cases).codes,
        pd.Categorical(first["label"], analysis.labels).codes,
    )
    cells[index] = first[metric.name].to_numpy(dtype=float)
    # For the ranking every arm needs a score wherever one has it, by the same rule as in paired differences.
    absent_for_all = np.isnan(cells).all(axis=0)
    filled = np.where(np.isnan(cells) & ~absent_for_all, metric.perfect, cells)
    scores, ranked = _mean(cells, 2), _mean(filled, 2)

    pairs = list(itertools.combinations(range(len(arms)), 2))
    differences = [paired_differences(cells[i], cells[j], perfect=metric.perfect) for i, j in pairs]
    of_cases = [_mean(difference, 1) for difference in differences]
    columns = [scores.T, ranked.T, *(values[:, None] for values in of_cases), *differences]
    # The same random numbers for every dataset and metric, so that adding one changes no other's figures.
    rng = np.random.default_rng(settings.seed)
    sums, counts = patient_sums(np.concatenate(columns, axis=1), patients)
    draws = bootstrap_means(sums, counts, settings.draws, rng)
    low, high = bca_interval(sums, counts, draws)
    equal_low, equal_high = bca_interval(sums, counts, draws, level=1 - 2 * settings.alpha / family)

    with np.errstate(invalid="ignore"):
        of_patients = sums / counts
    p_values, effects = signed_rank(of_patients)
    values = np.concatenate(columns, axis=1)

    def contrast(column: int, pair: tuple[int, int], adjusted: float, one_sided: int) -> Contrast:
        units = of_patients[~np.isnan(of_patients[:, column]), column]
        spread = float(np.std(units, ddof=1)) if len(units) > 1 else float("nan")
        scored = values[~np.isnan(values[:, column]), column]
        return Contrast(
            first=arms[pair[0]],
            second=arms[pair[1]],
            metric=metric.name,
            cases=len(scored),
            patients=len(units),
            mean=float(scored.mean()) if len(scored) else float("nan"),
            median=float(np.median(scored)) if len(scored) else float("nan"),
            interval=(float(low[column]), float(high[column])),
            equivalence=(float(equal_low[column]), float(equal_high[column])),
            p=float(p_values[column]),
            p_holm=adjusted,
            rank_biserial=float(effects[column]),
            detectable=detectable_effect(len(units), settings.alpha / family) * spread,
            one_sided_absent=one_sided,
        )

    def contrasts(start: int, step: int, one_sided: Sequence[int]) -> tuple[Contrast, ...]:
        of_pairs = [start + number * step for number in range(len(pairs))]
        adjusted = holm(p_values[of_pairs])
        return tuple(
            contrast(column, pair, float(p), count)
            for column, pair, p, count in zip(of_pairs, pairs, adjusted, one_sided, strict=True)
        )

    alone = [np.isnan(cells[i]) != np.isnan(cells[j]) for i, j in pairs]
    start = 2 * len(arms)
    overall = contrasts(start, 1, [int(one.sum()) for one in alone])
    classes = len(analysis.labels)
    by_class = {
        label: contrasts(start + len(pairs) + number, classes, [int(one[:, number].sum()) for one in alone])
        for number, label in enumerate(analysis.labels)
    }
    ranking = None
    if pairs:
        sign = 1 if metric.higher_is_better else -1
        tested = beaten_ranks(
            sign * np.array([c.mean for c in overall]), np.array([c.p for c in overall]), settings.alpha
        )
        ranked_columns = slice(len(arms), 2 * len(arms))
        ranking = bootstrap_ranking(sign * _mean(ranked, 1), sign * draws[:, ranked_columns], tested)
    noise, seed_means = _seed_noise(experiment, metric, table, analysis)
    return MetricAnalysis(
        metric=metric,
        scores=scores,
        by_class=_mean(cells, 1),
        means=_mean(scores, 1),
        intervals=np.stack([low, high])[:, : len(arms)],
        contrasts=overall,
        differences=np.array(of_cases),
        by_class_contrasts=by_class,
        noise=noise,
        seed_means=seed_means,
        no_score=np.isnan(cells).sum(axis=(1, 2)),
        ranking=ranking,
    )


def _seed_noise(
    experiment: Experiment, metric: Metric, table: pd.DataFrame, analysis: DatasetAnalysis
) -> tuple[SeedNoise, pd.DataFrame]:
    """The noise, and the mean score of each training, columns arm, fold, seed and the metric.

    Arms that hardly learned are not in the noise: their distance to the others would pass for that of methods.
    """
    scored = table.groupby(["case", "label"])[metric.name].transform("count") > 0
    values = table[metric.name].mask(table[metric.name].isna() & scored, metric.perfect)
    of_cases = values.groupby([table[key] for key in ("arm", "fold", "seed", "case")]).mean()
    means = of_cases.groupby(["arm", "fold", "seed"]).mean()
    seeds = [experiment.seeds.first, *experiment.seeds.repeats]
    learned = [arm for arm in analysis.arms if arm not in analysis.failed]
    cube = np.full((len(experiment.folds), len(learned), len(seeds)), np.nan)
    for (arm, fold, seed), value in means.items():
        if arm in learned:
            cube[experiment.folds.index(fold), learned.index(arm), seeds.index(seed)] = value
    return seed_noise(cube), means.reset_index()


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def _turned(contrast: Contrast) -> Contrast:
    def flip(ends: tuple[float, float]) -> tuple[float, float]:
        return -ends[1], -ends[0]

    return replace(
        contrast,
        first=contrast.second,
        second=contrast.first,
        mean=-contrast.mean,
        median=-contrast.median,
        interval=flip(contrast.interval),
        equivalence=flip(contrast.equivalence),
        rank_biserial=-contrast.rank_biserial,
    )


def few_seeds(analysis: DatasetAnalysis) -> list[str]:
    """Arms with fewer seeds than a verdict needs."""
    return [arm for arm, count in analysis.seeds.items() if count < REQUIRED_SEEDS]
