"""The report's figures as SVG that takes the page's text colour, so that they suit a light and a dark page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from nnunet_deform.comparison.analysis import DatasetAnalysis, MetricAnalysis
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.ranking import Ranking
from nnunet_deform.comparison.report.content import Curve
from nnunet_deform.comparison.verdicts import Contrast

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow and black; the blue is lighter, for
# dark pages.
_COLOURS = ("#1B86CF", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7F7F7F")
_INK = "#010203"  # replaced by the page's own text colour
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nnunet-deform",  # the same figure has the same identifiers in every run
    "font.family": "sans-serif",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_VIOLIN = {"orientation": "horizontal", "showextrema": False}
_VIOLIN_CASES = 2  # below, a density says nothing


def colour(position: int) -> str:
    return _COLOURS[position % len(_COLOURS)]


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG. Identifiers get the figure's name, because all figures share the page's name space."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    # As wide as the page has room for, and no wider than drawn.
    size = re.compile(r'width="([^"]+)pt" height="[^"]+pt"')
    return size.sub(rf'style="max-width: \1pt" role="img" aria-label="{name}"', svg, count=1)


def _figure(width: float, height: float, **options: object) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **options)


def distributions(analysis: DatasetAnalysis, metric: MetricAnalysis, name: str) -> str:
    """Violin, box and mean with its interval of each arm's case scores."""
    with matplotlib.rc_context(_STYLE):
        arms = analysis.arms
        figure, ((axes,),) = _figure(7.2, 0.8 + 0.42 * len(arms))
        for position, (arm, scores) in enumerate(zip(arms, metric.scores, strict=True)):
            scores = scores[~np.isnan(scores)]
            row = len(arms) - position
            if len(scores) > _VIOLIN_CASES and np.ptp(scores) > 0:
                (body,) = axes.violinplot([scores], [row], orientation="horizontal", showextrema=False, widths=0.85)[
                    "bodies"
                ]
                body.set(facecolor=colour(position), alpha=0.3)
            pen = {"color": _INK, "linewidth": 0.8}
            axes.boxplot(
                [scores],
                positions=[row],
                orientation="horizontal",
                widths=0.25,
                boxprops=pen,
                whiskerprops=pen,
                capprops=pen,
                medianprops={"color": _INK, "linewidth": 1.4},
                flierprops={"marker": ".", "markersize": 2.5, "markeredgecolor": colour(position)},
                label=arm,
            )
            low, high = metric.intervals[:, position]
            axes.plot([low, high], [row - 0.3, row - 0.3], color=colour(position), linewidth=2)
            axes.plot(metric.means[position], row - 0.3, "D", color=colour(position), markersize=4)
        axes.set_yticks(range(len(arms), 0, -1), arms)
        axes.set_xlabel(_axis(metric))
        return _svg(figure, name)


def _axis(metric: MetricAnalysis) -> str:
    unit = f" ({metric.metric.unit})" if metric.metric.unit else ""
    better = "higher" if metric.metric.higher_is_better else "lower"
    return f"{metric.metric.name}{unit} of a case, {better} is better"


def paired_differences(
    analysis: DatasetAnalysis,
    metric: MetricAnalysis,
    declared: Mapping[tuple[str, str], Contrast | None],
    band: float | None,
    name: str,
) -> str:
    """Differences case by case, with mean and interval; declared pairs first and filled, with the interval of their
    hypothesis where they have one."""
    with matplotlib.rc_context(_STYLE):
        known = [pair for pair in declared if set(pair) <= set(analysis.arms)]
        others = [
            (c.first, c.second) for c in metric.contrasts if not {(c.first, c.second), (c.second, c.first)} & set(known)
        ]
        rows = [(pair, True) for pair in known] + [(pair, False) for pair in others]
        figure, ((axes,),) = _figure(7.2, 0.9 + 0.36 * len(rows))
        axes.axvline(0, color=_INK, linewidth=0.8)
        if band is not None:
            axes.axvspan(-band, band, color="#7F7F7F", alpha=0.25, linewidth=0)
        for number, ((first, second), is_declared) in enumerate(rows):
            row, contrast = len(rows) - number, declared.get((first, second)) or metric.contrast(first, second)
            values = metric.case_differences(first, second)
            values = values[~np.isnan(values)]
            shade = _COLOURS[0] if is_declared else _COLOURS[-1]
            if len(values) > _VIOLIN_CASES and np.ptp(values) > 0:
                (body,) = axes.violinplot([values], [row], orientation="horizontal", showextrema=False, widths=0.9)[
                    "bodies"
                ]
                body.set(facecolor=shade, alpha=0.25)
            axes.plot(contrast.interval, [row, row], color=shade, linewidth=2.5)
            axes.plot(contrast.mean, row, "D", color=shade, markersize=5, fillstyle="full" if is_declared else "none")
        labels = [f"{first} - {second}" for (first, second), _ in rows]
        axes.set_yticks(range(len(rows), 0, -1), labels)
        axes.set_xlabel(f"difference in {metric.metric.name}")
        return _svg(figure, name)


def ranking_stability(arms: Sequence[str], ranking: Ranking, name: str) -> str:
    """How often each arm has each rank over the bootstrap samples; the ring is its rank in the whole sample."""
    with matplotlib.rc_context(_STYLE):
        figure, ((axes,),) = _figure(1.8 + 0.62 * len(arms), 0.8 + 0.42 * len(arms))
        order = np.argsort(ranking.ranks, kind="stable")
        for row, arm in enumerate(order):
            for place, share in enumerate(ranking.frequencies[arm]):
                if share > 0:
                    axes.scatter(place + 1, -row, s=330 * share, color=colour(arm), linewidths=0)
            axes.scatter(ranking.ranks[arm], -row, s=330, facecolors="none", edgecolors=_INK, linewidths=0.7)
        axes.set_yticks([-row for row in range(len(arms))], [arms[arm] for arm in order])
        axes.set_xticks(range(1, len(arms) + 1))
        axes.set_xlim(0.4, len(arms) + 0.6)
        axes.set_ylim(-len(arms) + 0.4, 0.6)
        axes.set_xlabel("rank")
        return _svg(figure, name)


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
    with matplotlib.rc_context(_STYLE):
        arms = [arm for arm in analysis.arms if arm in costs]
        where = [analysis.arms.index(arm) for arm in arms]
        panels = (
            ("seconds per iteration", [costs[arm].seconds_per_iteration for arm in arms]),
            ("seconds per case", [costs[arm].seconds_per_case for arm in arms]),
            ("multiply-adds per patch (G)", [costs[arm].macs / 1e9 for arm in arms]),
            ("peak memory of a step (GB)", [costs[arm].peak_bytes / 1e9 for arm in arms]),
        )
        figure, grid = _figure(7.2, 5.6, nrows=2, ncols=2, sharey=True)
        sign = 1 if metric.metric.higher_is_better else -1
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
            axes.plot(
                [values[p] for p in front],
                [metric.means[where[p]] for p in front],
                linestyle="--",
                color=_INK,
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
        return _svg(figure, name)


def read_curve(folder: Path) -> Curve:
    """Epochs, training and validation losses from nnU-Net's logs of one fold; later runs replace earlier ones."""
    losses: dict[int, dict[str, float]] = {}
    for log in sorted(folder.glob("training_log_*.txt")):
        epoch = None
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := re.search(r": Epoch (\d+)\s*$", line):
                epoch = int(found[1])
            elif epoch is not None and (found := re.search(r": (train_loss|val_loss) (\S+)", line)):
                losses.setdefault(epoch, {})[found[1]] = float(found[2])
    epochs = sorted(epoch for epoch, values in losses.items() if len(values) == 2)
    return epochs, [losses[e]["train_loss"] for e in epochs], [losses[e]["val_loss"] for e in epochs]


def learning_curves(arms: Sequence[str], curves: Mapping[str, Sequence[Curve]], name: str) -> str:
    """Loss over epochs: each training thin; training solid, validation dashed."""
    with matplotlib.rc_context(_STYLE):
        figure, ((axes,),) = _figure(7.2, 3.2)
        for position, arm in enumerate(arms):
            for number, (epochs, train, validation) in enumerate(curves.get(arm, ())):
                style = {"color": colour(position), "linewidth": 1, "marker": "." if len(epochs) < 20 else None}
                axes.plot(epochs, train, label=arm if number == 0 else None, **style)
                axes.plot(epochs, validation, linestyle="--", alpha=0.7, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss (validation dashed)")
        figure.legend(loc="outside lower center", ncols=4)
        return _svg(figure, name)


Panel = tuple[str, float | None, Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]]]
_POINTS = 200  # of a line; more are not told apart


def operator_values(arms: Sequence[str], panels: Sequence[Panel], name: str) -> str:
    """Numbers over epochs, a panel each: a line for each training, dashed the limit below which an operator is idle.

    Args:
        panels: title, limit or None, and by arm the epochs and values of each training.
    """
    with matplotlib.rc_context(_STYLE):
        figure, grid = _figure(7.2, 0.4 + 2.2 * len(panels), nrows=len(panels), sharex=True)
        labelled: set[str] = set()
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
                axes.axhline(limit, color=_INK, linestyle="--", linewidth=0.8)
            axes.set_ylim(bottom=0)
            axes.set_title(title, fontsize=9, loc="left")
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[-1, 0].set_xlabel("epoch")
        figure.legend(loc="outside lower center", ncols=4)
        return _svg(figure, name)


def overlay(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, labels: Sequence[int], spacing: Sequence[float]
) -> str:
    """One slice as a PNG data URL: truth filled, prediction as lines.

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
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
