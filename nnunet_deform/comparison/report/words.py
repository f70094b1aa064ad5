"""Verdicts in English."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nnunet_deform.comparison.analysis import Analysis, Hypothesis
from nnunet_deform.comparison.metrics import METRICS, Metric
from nnunet_deform.comparison.verdicts import REQUIRED_PATIENTS, Contrast, Kind, Reason


def p_value(p: float) -> str:
    """Three significant digits, and no more than a p-value deserves."""
    return "-" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def with_p(p: float, name: str = "p") -> str:
    words = p_value(p)
    return f"{name} {words}" if words.startswith("<") else f"{name} = {words}"


def number_format(metric: Metric, sign: str = "") -> Callable[[float], str]:
    """With the metric's decimals; a dash for NaN. ``sign`` is "+" for differences."""

    def number(value: float) -> str:
        # Adding zero takes the sign from what is rounded to -0.
        return "-" if math.isnan(value) else f"{round(value, metric.decimals) + 0.0:{sign}.{metric.decimals}f}"

    return number


def with_interval(metric: Metric, value: float, interval: Sequence[float], sign: str = "") -> str:
    number = number_format(metric, sign)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def _count(number: int, noun: str) -> str:
    return f"{number} more {noun}" + ("" if number == 1 else "s")


def numbers(contrast: Contrast) -> str:
    metric = METRICS[contrast.metric]
    unit = f" {metric.unit}" if metric.unit else ""
    signed = number_format(metric, "+")
    low, high = contrast.interval
    family = "" if contrast.family == 1 else f" for all {contrast.family} hypotheses together"
    about = "" if contrast.trainings_known else " of these trainings alone"
    return (
        f"mean difference {signed(contrast.mean)}{unit}, {100 * (1 - contrast.alpha):g} % interval {signed(low)} to "
        f"{signed(high)}{family}{about}, {with_p(contrast.p_adjusted)}"
    )


def sentence(hypothesis: Hypothesis, band: float) -> str:
    """The verdict on a declared pair with its numbers."""
    verdict, contrast = hypothesis.verdict, hypothesis.contrast
    figures = "" if contrast is None else f" ({numbers(contrast)})"
    pair = f"{hypothesis.first} and {hypothesis.second}"
    if verdict.kind is Kind.BETTER:
        loser = hypothesis.second if verdict.winner == hypothesis.first else hypothesis.first
        return f"{verdict.winner} is better than {loser}{figures}."
    if verdict.kind is Kind.EQUIVALENT:
        return f"{pair} are equivalent within +-{band:g}{figures}."
    if verdict.kind is Kind.NO_DIFFERENCE:
        assert contrast is not None
        if verdict.reason is Reason.RANKS:
            return (
                f"{pair}: no difference shown. The mean differs significantly, but most patients differ in the other "
                f"direction (rank-biserial {contrast.rank_biserial:+.2f}), so a few patients decide the mean{figures}."
            )
        detectable = f"{contrast.detectable:.{METRICS[contrast.metric].decimals}f}"
        return f"{pair}: no difference shown; {detectable} would have been found with 80 % power{figures}."
    if verdict.kind is Kind.UNDECIDED:
        return f"{pair}: undecided, {_what_is_missing(hypothesis)}{figures}."
    if verdict.reason is Reason.FAILED:
        failed = ", ".join(verdict.arms)
        return f"{pair} are not comparable, because no training of {failed} succeeded. {'; '.join(verdict.missing)}."
    reached = "; ".join(
        f"{arm} reaches a mean Dice of " + ", ".join(f"{dice:.4f} ({label})" for label, dice in classes.items())
        for arm, classes in verdict.arms.items()
    )
    return (
        f"{pair} are not comparable: {reached}. Its training failed or was too short, so this says nothing about the "
        "networks."
    )


def _what_is_missing(hypothesis: Hypothesis) -> str:
    verdict, contrast = hypothesis.verdict, hypothesis.contrast
    if verdict.reason is Reason.MISSING:
        return "trainings are missing: " + ("; ".join(verdict.missing) or "no fold has both arms")
    assert contrast is not None
    parts = []
    if verdict.further_patients:
        parts.append(
            f"{_count(verdict.further_patients, 'patient')} needed (it has {contrast.patients} of {REQUIRED_PATIENTS})"
        )
    if verdict.further_trainings:
        needed = " and ".join(f"{_count(number, 'seed')} of {arm}" for arm, number in verdict.further_trainings.items())
        alone = "" if any(contrast.training_freedoms) else "one training each: "
        parts.append(f"{alone}{needed} needed on any of the folds, to know how much trainings differ by chance")
    return " and ".join(parts)


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def scope(analysis: Analysis) -> str:
    """What was compared on what."""
    return "; ".join(
        f"{_some(len(d.arms) + len(d.incomplete), 'arm')} on {_some(len(d.cases), 'case')} of "
        f"{_some(len(set(d.patients)), 'patient')} of {d.title}, {_some(sum(d.trainings.values()), 'training')}"
        for d in analysis.datasets
    )


def summary(analysis: Analysis) -> str:
    """What may be said, in a few short sentences."""
    total = len(analysis.hypotheses)
    if not total:
        return "No comparison was declared, so nothing is decided; all differences are exploratory."
    parts = [
        f"{h.verdict.winner} is better than {h.second if h.verdict.winner == h.first else h.first} on {h.title}"
        for h in analysis.hypotheses
        if h.verdict.kind is Kind.BETTER
    ]
    parts += [
        f"{h.first} and {h.second} are equivalent on {h.title}"
        for h in analysis.hypotheses
        if h.verdict.kind is Kind.EQUIVALENT
    ]
    of_total = _some(total, "comparison")
    for kind, words in (
        (Kind.NO_DIFFERENCE, "No difference is shown in"),
        (Kind.UNDECIDED, "Undecided, because trainings or patients are missing:"),
        (Kind.NOT_COMPARABLE, "Not comparable, because an arm failed or hardly learned:"),
    ):
        if count := sum(h.verdict.kind is kind for h in analysis.hypotheses):
            parts.append(f"{words} {count} of {of_total}")
    return ". ".join(parts) + "."
