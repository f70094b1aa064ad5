"""The report's figures as SVG that takes the page's text colour, so that they suit a light and a dark page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from nnunet_deform.comparison.analysis import DatasetAnalysis, Hypothesis, MetricAnalysis
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.curves import Curve
from nnunet_deform.comparison.metrics import METRICS, Metric
from nnunet_deform.comparison.parts import Part
from nnunet_deform.comparison.ranking import Ranking
from nnunet_deform.comparison.report.words import number_format, with_interval
from nnunet_deform.comparison.verdicts import Contrast, Kind
from nnunet_deform.pages import COLOURS, INK, STYLE, colour, new_figure, png_url, svg

_VIOLIN_CASES = 2  # below, a density says nothing


def verdicts(hypotheses: Sequence[Hypothesis], band: float | None, name: str) -> str:
    """The declared differences with their intervals, scaled to what can be compared; an arrow where one goes on."""
    with matplotlib.rc_context(STYLE):
        several = len({hypothesis.title for hypothesis in hypotheses}) > 1
        metric = next((METRICS[h.contrast.metric] for h in hypotheses if h.contrast is not None), None)
        figure, ((axes,),) = new_figure(9.2, 0.75 + (0.44 if several else 0.34) * len(hypotheses))
        axes.axvline(0, color=INK, linewidth=0.8)
        if band is not None:
            axes.axvspan(-band, band, color="#7F7F7F", alpha=0.25, linewidth=0)
        left, right = _limits([h.contrast for h in hypotheses if _is_drawn(h)], band)
        axes.set_xlim(left, right)
        told = []
        for number, hypothesis in enumerate(hypotheses):
            row, contrast, kind = len(hypotheses) - number, hypothesis.contrast, hypothesis.verdict.kind
            shade, marker, filled = _VERDICTS[kind]
            label = kind.value if hypothesis.verdict.winner is None else f"{hypothesis.verdict.winner} is better"
            axes.annotate(label, (1.01, row), xycoords=("axes fraction", "data"), va="center", color=shade)
            pair = f"{hypothesis.first} - {hypothesis.second}" + (f" on {hypothesis.title}" if several else "")
            if not _is_drawn(hypothesis):
                told.append(f"{pair}, {label}")
                continue
            low, high = contrast.interval
            style = "-" if contrast.trainings_known else (0, (2, 1.5))
            axes.plot([max(low, left), min(high, right)], [row, row], color=shade, linewidth=2.2, linestyle=style)
            for end, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
                if end:
                    axes.plot(edge, row, arrow, color=shade, markersize=6, clip_on=False)
            axes.plot(contrast.mean, row, marker, color=shade, markersize=7, fillstyle="full" if filled else "none")
            told.append(f"{pair}, {label}: {with_interval(metric, contrast.mean, contrast.interval, '+')}")
        labels = [f"{h.first} - {h.second}" + (f"\n{h.title}" if several else "") for h in hypotheses]
        axes.set_yticks(range(len(hypotheses), 0, -1), labels)
        axes.set_ylim(0.4, len(hypotheses) + 0.6)
        if metric is not None:
            axes.set_xlabel(f"difference in {_with_unit(metric)}, {_better(metric)} is better for the first")
        what = "Declared differences" if metric is None else f"Declared differences in {metric.name} with intervals"
        return svg(figure, name, f"{what}. {'; '.join(told)}.")


# Colour, marker, and whether it is filled: the same things are told by shape and by colour.
_VERDICTS = {
    Kind.BETTER: (COLOURS[2], "D", True),
    Kind.EQUIVALENT: (COLOURS[0], "s", True),
    Kind.NO_DIFFERENCE: (COLOURS[0], "o", False),
    Kind.UNDECIDED: (COLOURS[1], "D", False),
    Kind.NOT_COMPARABLE: (COLOURS[7], "x", False),
}


def _is_drawn(hypothesis: Hypothesis) -> bool:
    return hypothesis.contrast is not None and hypothesis.verdict.kind is not Kind.NOT_COMPARABLE


def _limits(contrasts: Sequence[Contrast], band: float | None) -> tuple[float, float]:
    """Room for every mean and the band, and for intervals up to four times as far out."""
    band = band or 0.0
    furthest = 4 * max([band, *(abs(c.mean) for c in contrasts)]) or 1.0
    ends = [end for c in contrasts for end in (c.mean, *c.interval) if np.isfinite(end)]
    low, high = max(min([-band, *ends]), -furthest), min(max([band, *ends]), furthest)
    room = 0.05 * (high - low) or furthest
    return low - room, high + room


def _better(metric: Metric) -> str:
    return "higher" if metric.higher_is_better else "lower"


def _with_unit(metric: Metric) -> str:
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def distributions(analysis: DatasetAnalysis, metric: MetricAnalysis, name: str) -> str:
    """Violin, box and mean with its interval of each arm's case scores, scaled to the arms that learned."""
    with matplotlib.rc_context(STYLE):
        arms = analysis.arms
        figure, ((axes,),) = new_figure(9.2, 0.7 + 0.36 * len(arms))
        learned = [position for position, arm in enumerate(arms) if arm not in analysis.failed] or list(
            range(len(arms))
        )
        shown = _frame(axes, [*metric.scores[learned].ravel(), *metric.means[learned]], metric.metric, metric.means)
        for position in shown:
            scores, row, shade = metric.scores[position], len(arms) - position, colour(position)
            scores = scores[~np.isnan(scores)]
            _violin(axes, scores, row, shade, 0.85)
            pen = {"color": INK, "linewidth": 0.8}
            axes.boxplot(
                [scores],
                positions=[row],
                orientation="horizontal",
                widths=0.25,
                boxprops=pen,
                whiskerprops=pen,
                capprops=pen,
                medianprops={"color": INK, "linewidth": 1.4},
                flierprops={"marker": ".", "markersize": 2.5, "markeredgecolor": shade},
                manage_ticks=False,
            )
            axes.plot(metric.intervals[:, position], [row - 0.3, row - 0.3], color=shade, linewidth=2)
            axes.plot(metric.means[position], row - 0.3, "D", color=shade, markersize=4)
        axes.set_yticks(range(len(arms), 0, -1), arms)
        axes.set_ylim(0.3, len(arms) + 0.6)
        axes.set_xlabel(f"{_with_unit(metric.metric)} of a case, {_better(metric.metric)} is better")
        told = [
            f"{arm} {with_interval(metric.metric, metric.means[p], metric.intervals[:, p])}, "
            f"median case {number_format(metric.metric)(float(np.nanmedian(metric.scores[p])))}"
            for p, arm in enumerate(arms)
        ]
        return svg(figure, name, f"{metric.metric.name} of cases by arm, mean with interval: {'; '.join(told)}.")


def _violin(axes: Axes, values: np.ndarray, row: float, shade: str, width: float) -> None:
    if len(values) > _VIOLIN_CASES and np.ptp(values) > 0:
        (body,) = axes.violinplot([values], [row], orientation="horizontal", showextrema=False, widths=width)["bodies"]
        body.set(facecolor=shade, alpha=0.25)


def _frame(axes: Axes, values: Sequence[float], metric: Metric, means: Sequence[float]) -> list[int]:
    """Limits around ``values``, and a word on each mean outside, the first one's in the uppermost row.

    Returns:
        Positions of the means inside.
    """
    low, high = np.nanmin(values), np.nanmax(values)
    room = 0.04 * (high - low) or 0.01
    low, high = low - room, high + room
    axes.set_xlim(low, high)
    for position, mean in enumerate(means):
        if not low <= mean <= high:
            left, words = mean < low, f"mean {number_format(metric)(mean)}"
            axes.annotate(
                f"\N{LEFTWARDS ARROW} {words}" if left else f"{words} \N{RIGHTWARDS ARROW}",
                (0.01 if left else 0.99, len(means) - position),
                xycoords=("axes fraction", "data"),
                ha="left" if left else "right",
                va="center",
                color=colour(position),
            )
    return [position for position, mean in enumerate(means) if low <= mean <= high]


def classes(analysis: DatasetAnalysis, metric: MetricAnalysis, name: str) -> str:
    """Each arm's mean on each class with its interval, a panel a class, scaled to the arms that learned it."""
    with matplotlib.rc_context(STYLE):
        arms, labels = analysis.arms, analysis.labels
        columns = min(3, len(labels))
        rows = -(-len(labels) // columns)
        figure, grid = new_figure(9.2, (0.75 + 0.21 * len(arms)) * rows, nrows=rows, ncols=columns, sharey=True)
        told = []
        for number, (axes, label) in enumerate(itertools.zip_longest(grid.flat, labels)):
            if label is None:
                axes.set_axis_off()
                continue
            means, intervals = metric.by_class[:, number], metric.by_class_intervals[..., number]
            learned = [p for p, arm in enumerate(arms) if label not in analysis.failed.get(arm, ())] or slice(None)
            for position in _frame(axes, [*means[learned], *intervals[:, learned].ravel()], metric.metric, means):
                row, shade = len(arms) - position, colour(position)
                axes.plot(intervals[:, position], [row, row], color=shade, linewidth=2)
                axes.plot(means[position], row, "D", color=shade, markersize=4.5)
            axes.set_yticks(range(len(arms), 0, -1), arms)
            axes.set_ylim(0.4, len(arms) + 0.6)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_title(label, fontsize=9, loc="left")
            numbers = map(number_format(metric.metric), means)
            told.append(f"{label}: " + ", ".join(f"{arm} {mean}" for arm, mean in zip(arms, numbers, strict=True)))
        figure.supxlabel(f"mean {_with_unit(metric.metric)}, {_better(metric.metric)} is better", fontsize=9)
        return svg(figure, name, f"Mean {metric.metric.name} of each class by arm. {'; '.join(told)}.")


def paired_differences(
    analysis: DatasetAnalysis,
    metric: MetricAnalysis,
    declared: Mapping[tuple[str, str], Contrast | None],
    band: float | None,
    name: str,
) -> str:
    """Differences case by case, with mean and interval, of arms that learned; declared pairs first and filled, with the
    interval of their hypothesis where they have one."""
    with matplotlib.rc_context(STYLE):
        learned = set(analysis.arms) - set(analysis.failed)
        known = [pair for pair in declared if set(pair) <= learned]
        others = [
            (c.first, c.second)
            for c in metric.contrasts
            if {c.first, c.second} <= learned and not {(c.first, c.second), (c.second, c.first)} & set(known)
        ]
        rows = [(pair, True) for pair in known] + [(pair, False) for pair in others]
        figure, ((axes,),) = new_figure(9.2, 0.75 + 0.27 * len(rows))
        axes.axvline(0, color=INK, linewidth=0.8)
        if band is not None:
            axes.axvspan(-band, band, color="#7F7F7F", alpha=0.25, linewidth=0)
        told = []
        for number, ((first, second), is_declared) in enumerate(rows):
            row, contrast = len(rows) - number, declared.get((first, second)) or metric.contrast(first, second)
            values = metric.case_differences(first, second)
            shade = COLOURS[0] if is_declared else COLOURS[-1]
            _violin(axes, values[~np.isnan(values)], row, shade, 0.9)
            axes.plot(contrast.interval, [row, row], color=shade, linewidth=2.5)
            axes.plot(contrast.mean, row, "D", color=shade, markersize=5, fillstyle="full" if is_declared else "none")
            told.append(
                f"{first} - {second}{' (declared)' if is_declared else ''} "
                f"{with_interval(metric.metric, contrast.mean, contrast.interval, '+')}"
            )
        labels = [f"{first} - {second}" for (first, second), _ in rows]
        axes.set_yticks(range(len(rows), 0, -1), labels)
        axes.set_xlabel(f"difference in {_with_unit(metric.metric)}")
        return svg(
            figure, name, f"Differences in {metric.metric.name} of pairs, mean with interval: {'; '.join(told)}."
        )


def parts(panels: Sequence[Part], metric: Metric, band: float | None, name: str) -> str:
    """The pairs' differences in several parts, a panel each, with intervals."""
    with matplotlib.rc_context(STYLE):
        pairs = list(dict.fromkeys((c.first, c.second) for part in panels for c in part.contrasts))
        columns = min(5, len(panels))
        rows = -(-len(panels) // columns)
        height = (0.7 + 0.24 * len(pairs)) * rows
        figure, grid = new_figure(9.2, height, nrows=rows, ncols=columns, sharex=True, sharey=True)
        told = []
        for axes, part in itertools.zip_longest(grid.flat, panels):
            if part is None:
                axes.set_axis_off()
                continue
            axes.axvline(0, color=INK, linewidth=0.8)
            if band is not None:
                axes.axvspan(-band, band, color="#7F7F7F", alpha=0.25, linewidth=0)
            for contrast in part.contrasts:
                row = len(pairs) - pairs.index((contrast.first, contrast.second))
                axes.plot(contrast.interval, [row, row], color=COLOURS[0], linewidth=2)
                axes.plot(contrast.mean, row, "D", color=COLOURS[0], markersize=4.5, fillstyle="none")
            axes.set_title(part.name, fontsize=9, loc="left")
            axes.set_yticks(range(len(pairs), 0, -1), [f"{first} - {second}" for first, second in pairs])
            axes.set_ylim(0.4, len(pairs) + 0.6)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            told += [
                f"{part.name}, {c.first} - {c.second} {with_interval(metric, c.mean, c.interval, '+')}"
                for c in part.contrasts
            ]
        axes = grid[0, 0]
        axes.set_xlim(*_limits([c for part in panels for c in part.contrasts], band))
        figure.supxlabel(f"difference in {_with_unit(metric)}", fontsize=9)
        return svg(figure, name, f"Differences in {metric.name}, mean with interval: {'; '.join(told)}.")


def ranking_stability(arms: Sequence[str], ranking: Ranking, name: str) -> str:
    """How often each arm has each rank over the bootstrap samples; the ring is its rank in the whole sample."""
    with matplotlib.rc_context(STYLE):
        figure, ((axes,),) = new_figure(1.8 + 0.62 * len(arms), 0.8 + 0.42 * len(arms))
        order = np.argsort(ranking.ranks, kind="stable")
        for row, arm in enumerate(order):
            for place, share in enumerate(ranking.frequencies[arm]):
                if share > 0:
                    axes.scatter(place + 1, -row, s=330 * share, color=colour(arm), linewidths=0)
            axes.scatter(ranking.ranks[arm], -row, s=330, facecolors="none", edgecolors=INK, linewidths=0.7)
        axes.set_yticks([-row for row in range(len(arms))], [arms[arm] for arm in order])
        axes.set_xticks(range(1, len(arms) + 1))
        axes.set_xlim(0.4, len(arms) + 0.6)
        axes.set_ylim(-len(arms) + 0.4, 0.6)
        axes.set_xlabel("rank")
        told = [
            f"{arms[arm]} rank {ranking.ranks[arm]:g}, {ranking.rank_interval[0, arm]:g} to "
            f"{ranking.rank_interval[1, arm]:g}"
            for arm in order
        ]
        return svg(figure, name, f"Ranks in the whole sample and in 95 % of bootstrap samples: {'; '.join(told)}.")


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Positions of those that nobody beats in both, cheapest first.

    Args:
        costs: lower is better; scores: higher is better.
    """
    front: list[int] = []
    for position in sorted(range(len(costs)), key=lambda p: (costs[p], -scores[p])):
        if not front or scores[position] > scores[front[-1]]:
            front.append(position)
    return front


def pareto(analysis: DatasetAnalysis, metric: MetricAnalysis, costs: Mapping[str, Cost], name: str) -> str:
    """Mean score with its interval against each cost; the dashed line joins the arms nobody beats in both."""
    with matplotlib.rc_context(STYLE):
        arms = [arm for arm in analysis.arms if arm in costs]
        where = [analysis.arms.index(arm) for arm in arms]
        panels = (
            ("seconds per iteration", [costs[arm].seconds_per_iteration for arm in arms]),
            ("seconds per case", [costs[arm].seconds_per_case for arm in arms]),
            ("multiply-adds per patch (G)", [costs[arm].macs / 1e9 for arm in arms]),
            ("peak memory of a step (GB)", [costs[arm].peak_bytes / 1e9 for arm in arms]),
        )
        figure, grid = new_figure(9.2, 4.6, nrows=2, ncols=2, sharey=True)
        sign, told = 1 if metric.metric.higher_is_better else -1, []
        for axes, (label, values) in zip(grid.flat, panels, strict=True):
            for arm, position, value in zip(arms, where, values, strict=True):
                mean, (low, high) = metric.means[position], metric.intervals[:, position]
                axes.errorbar(
                    value,
                    mean,
                    yerr=None if np.isnan(low) else [[max(0, mean - low)], [max(0, high - mean)]],
                    fmt="o",
                    color=colour(position),
                    label=arm,
                )
            front = pareto_front(values, [sign * metric.means[position] for position in where])
            told.append(f"{label}: {', '.join(f'{arms[p]} at {values[p]:.3g}' for p in front)}")
            axes.plot(
                [values[p] for p in front],
                [metric.means[where[p]] for p in front],
                linestyle="--",
                color=INK,
                linewidth=0.8,
                zorder=0,
            )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlim(min(values) / 1.5, max(values) * 1.5)
            axes.set_xlabel(label)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"mean {metric.metric.name}")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return svg(
            figure, name, f"Mean {metric.metric.name} against cost. Beaten by no other in both: {'; '.join(told)}."
        )


def learning_curves(arms: Sequence[str], curves: Mapping[str, Sequence[Curve]], name: str) -> str:
    """Loss over epochs: each training thin; training solid, validation dashed."""
    with matplotlib.rc_context(STYLE):
        figure, ((axes,),) = new_figure(9.2, 3.0)
        told = []
        for position, arm in enumerate(arms):
            if ends := [(train[-1], validation[-1]) for _, train, validation in curves.get(arm, ())]:
                train_end, validation_end = np.mean(ends, axis=0)
                told.append(f"{arm} {train_end:.3f} and {validation_end:.3f}")
            for number, (epochs, train, validation) in enumerate(curves.get(arm, ())):
                style = {"color": colour(position), "linewidth": 1, "marker": "." if len(epochs) < 20 else None}
                axes.plot(epochs, train, label=arm if number == 0 else None, **style)
                axes.plot(epochs, validation, linestyle="--", alpha=0.7, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss (validation dashed)")
        figure.legend(loc="outside lower center", ncols=4)
        return svg(
            figure,
            name,
            f"Losses over epochs; at the end, mean of an arm's training and validation: {'; '.join(told)}.",
        )


Panel = tuple[str, float | None, Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]]]
_POINTS = 200  # of a line; more are not told apart


def operator_values(arms: Sequence[str], panels: Sequence[Panel], name: str) -> str:
    """Numbers over epochs, a panel each: a line for each training, dashed the limit below which an operator is idle.

    Args:
        panels: title, limit or None, and by arm the epochs and values of each training.
    """
    with matplotlib.rc_context(STYLE):
        figure, grid = new_figure(9.2, 0.4 + 1.8 * len(panels), nrows=len(panels), sharex=True)
        labelled: set[str] = set()
        told = []
        for axes, (title, limit, curves) in zip(grid[:, 0], panels, strict=True):
            for position, arm in enumerate(arms):
                for epochs, values in curves.get(arm, ()):
                    # From the end, so that the last epoch is drawn.
                    chosen = slice(None, None, -max(1, len(epochs) // _POINTS))
                    axes.plot(
                        epochs[chosen],
                        values[chosen],
                        color=colour(position),
                        linewidth=1,
                        marker="." if len(epochs) < 20 else None,
                        label=None if arm in labelled else arm,
                    )
                    labelled.add(arm)
            if limit is not None:
                axes.axhline(limit, color=INK, linestyle="--", linewidth=0.8)
            ends = {arm: np.median([v[-1] for _, v in curves[arm]]) for arm in arms if arm in curves}
            told.append(f"{title}: " + ", ".join(f"{arm} {end:.3g}" for arm, end in ends.items()))
            axes.set_ylim(bottom=0)
            axes.set_title(title, fontsize=9, loc="left")
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[-1, 0].set_xlabel("epoch")
        figure.legend(loc="outside lower center", ncols=4)
        return svg(figure, name, f"Over epochs; median of an arm's trainings at the end. {'; '.join(told)}.")


def overlay(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, labels: Sequence[int], spacing: Sequence[float]
) -> str:
    """One slice as a PNG data URL: truth filled, prediction as lines, each label in its :func:`colour`.

    Args:
        image: [Y, X]; truth, prediction: label maps [Y, X]; labels: their values; spacing: mm, (y, x).
    """
    figure = Figure(figsize=(2.4, 2.4), dpi=110, facecolor="none")  # the page shows where a slice is no square
    axes = figure.add_axes((0, 0, 1, 1))
    low, high = np.percentile(image, [1, 99])
    height, width = image.shape
    extent = (0, width * spacing[1], height * spacing[0], 0)
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=extent, interpolation="nearest")
    ys = (np.arange(height) + 0.5) * spacing[0]
    xs = (np.arange(width) + 0.5) * spacing[1]
    for position, label in enumerate(labels):
        for mask, filled in ((truth == label, True), (prediction == label, False)):
            if not mask.any() or min(mask.shape) < 2:
                continue
            if filled:
                axes.contourf(xs, ys, mask, levels=[0.5, 1.5], colors=[colour(position)], alpha=0.35)
            else:
                axes.contour(xs, ys, mask, levels=[0.5], colors=[colour(position)], linewidths=1.4)
    axes.set_axis_off()
    return png_url(figure)
