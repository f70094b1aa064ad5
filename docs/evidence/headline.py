"""What the evidence page shows of the archived comparisons: table, verdicts, what the operators did, and one figure.

python docs/evidence/headline.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from nnunet_deform.comparison.analysis import Analysis, MetricAnalysis, analyse
from nnunet_deform.comparison.archive import read_archive
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.design import Design, design_of
from nnunet_deform.comparison.operators import Histories, rows
from nnunet_deform.comparison.report.figures import colour, pareto_front
from nnunet_deform.comparison.report.words import sentence, with_interval

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
FIGURE = "pareto.png"


def table(analysis: Analysis, costs: dict[str, Cost]) -> list[str]:
    """One row an arm, in Markdown: scores out of fold with 95 % intervals, trainings, cost."""
    lines = [
        "| arm | Dice | NSD at 1 mm | trainings | parameters | s a step | s a case | peak memory of a step |",
        "|" + " --- |" * 8,
    ]
    (dataset,) = analysis.datasets
    for position, arm in enumerate(dataset.arms):
        scores = [_score(dataset.metrics[name], position) for name in ("Dice", "NSD")]
        cost = costs.get(arm)
        cells = ["not measured"] * 4 if cost is None else _cells(cost)
        lines.append("| " + " | ".join([arm, *scores, str(dataset.trainings[arm]), *cells]) + " |")
    lines += [f"| {arm} | not complete: {why} |" + " |" * 6 for arm, why in dataset.incomplete.items()]
    return lines


def _score(metric: MetricAnalysis, position: int) -> str:
    return with_interval(metric.metric, metric.means[position], metric.intervals[:, position])


def _cells(cost: Cost) -> list[str]:
    return [
        f"{cost.parameters / 1e6:.2f} M",
        f"{cost.seconds_per_iteration:.2f}",
        f"{cost.seconds_per_case:.2f}",
        f"{cost.peak_bytes / 1e6:.0f} MB",
    ]


def verdicts(analysis: Analysis, design: Design) -> list[str]:
    return [f"- {sentence(hypothesis, design.bands[design.primary])}" for hypothesis in analysis.hypotheses]


def operators(histories: Histories, arms: Sequence[str]) -> list[str]:
    """What they did at the end of the trainings, in Markdown."""
    lines = [
        "| arm | what its operator did, at the end of training | trainings | median [least, largest] | acts in |",
        "|" + " --- |" * 5,
    ]
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in rows(histories, arms))
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


def draw(analysis: Analysis, costs: dict[str, Cost], file: Path) -> None:
    """Dice against the time of a step and the memory it needs; the line joins the arms that nobody beats in both."""
    (dataset,) = analysis.datasets
    metric = dataset.metrics["Dice"]
    arms = [arm for arm in dataset.arms if arm in costs]
    where = [dataset.arms.index(arm) for arm in arms]
    panels = (
        ("seconds a step", [costs[arm].seconds_per_iteration for arm in arms]),
        ("peak memory of a step (MB)", [costs[arm].peak_bytes / 1e6 for arm in arms]),
    )
    figure, grid = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axes, (label, values) in zip(grid, panels, strict=True):
        for arm, position, value in zip(arms, where, values, strict=True):
            mean, (low, high) = metric.means[position], metric.intervals[:, position]
            axes.errorbar(value, mean, [[mean - low], [high - mean]], fmt="o", color=colour(position), label=arm)
        front = pareto_front(values, metric.means[where])
        axes.plot([values[p] for p in front], metric.means[where][front], "--", color="grey", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
    grid[0].set_ylabel("mean Dice out of fold")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms), frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def write(part: str, lines: Sequence[str]) -> None:
    """Between the page's comments of that name."""
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    text = "\n".join(lines)
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")


def show(part: str, archive: Path, figure: str | None = None) -> None:
    found = read_archive(archive)
    design = design_of(found.experiment)
    analysis = analyse(design, found.collected.cases, found.collected.missing)
    costs = {t.arm: found.costs[t.arm_key] for t in found.trainings if t.arm_key in found.costs}
    lines = [*table(analysis, costs), "", *verdicts(analysis, design)]
    if figure is not None:
        draw(analysis, costs, HERE / figure)
        lines += ["", f"![Dice against the cost of a training step]({figure})"]
    write(part, [*lines, "", *operators(found.histories, design.arms)])


def main() -> None:
    show("headline", HERE / "2d" / "archive", FIGURE)
    show("3d", HERE / "3d" / "archive")


if __name__ == "__main__":
    main()
