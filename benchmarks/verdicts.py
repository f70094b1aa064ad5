"""How often a comparison's verdicts are wrong, and what they find: ``python benchmarks/verdicts.py``.

Experiments with a known truth in many worlds, judged as real ones are. Prints a table as Markdown; ``--output`` also
puts it into docs/verdicts.md, between its two marks, and the figures into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import scipy

from nnunet_deform.comparison.evidence import Plan
from nnunet_deform.comparison.simulation import ALPHA, FAMILIES, Rates, World, simulate

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "verdicts.md", ROOT / "benchmarks" / "results" / "verdicts.json"
CALM, UNEQUAL = (0.15, 0.15), (0.05, 0.3)
LOUD, LOUD_UNEQUAL = (0.5, 0.5), (0.25, 1.5)

GROUPS: dict[str, list[World]] = {
    "Patients and shapes, 3 folds x 3 seeds": [
        World(patients, shape, training_sds=sds)
        for shape in ("normal", "skewed", "heavy", "ties")
        for patients in (13, 30, 130, 1000)
        for sds in (CALM, UNEQUAL)
    ],
    "Two cases a patient": [World(n, shape, cases=2) for n in (30, 130) for shape in ("normal", "skewed")],
    "Paired starts": [
        World(n, shape, correlation=rho)
        for rho in (0.0, 0.8)
        for n in (30, 130, 1000)
        for shape in ("normal", "skewed")
    ],
    "Folds x seeds": [
        World(130, shape, folds, seeds, sds)
        for folds, seeds in ((1, 3), (1, 7), (5, 2), (5, 3))
        for shape in ("normal", "skewed")
        for sds in (CALM, UNEQUAL)
    ],
    "Trainings that differ more than patients let see": [
        World(130, "normal", folds, seeds, sds, correlation)
        for folds, seeds in ((3, 3), (5, 3), (5, 5))
        for sds, correlation in ((LOUD, None), (LOUD_UNEQUAL, None), (LOUD, 0.8))
    ],
    "Five arms beside that are in no hypothesis": [World(130, "normal", training_sds=UNEQUAL, others=True)],
}


def _row(world: World, rates: dict[int, Rates]) -> str:
    starts = "-" if world.correlation is None else f"{world.correlation:g}"
    one, two = world.training_sds
    cells = [f"{world.patients}", world.shape, f"{world.folds} x {world.seeds}", f"{one:g}, {two:g}", starts]
    if not world.decides:
        errors = "; ".join(
            f"{100 * rates[m].false_winner:.1f}, {100 * rates[m].false_equivalence:.1f}" for m in FAMILIES
        )
        return "| " + " | ".join([*cells, f"undecided ({errors})", *["-"] * 7]) + " |"
    for key in ("false_winner", "false_equivalence"):
        cells += [f"{100 * getattr(rates[m], key):.1f}" for m in FAMILIES]
    for m in FAMILIES:
        winner, against = rates[m].winner, rates[m].winner_against
        both = f"{100 * (winner + against) / 2 / 0.8:.0f}"
        cells.append(f"{both} ({winner / 0.8:.2f}, {against / 0.8:.2f})" if world.shape == "skewed" else both)
    cells += [f"{100 * rates[m].equivalence / 0.8:.0f}" for m in FAMILIES]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| patients | shape | folds x seeds | SDs of trainings | paired starts, correlation "
    "| false winner, % (1) | (6) | false equivalence, % (1) | (6) "
    "| winner found, % of ideal (1) | (6) | equivalence found, % of ideal (1) | (6) |\n|" + " --- |" * 13
)


def _designs() -> list[str]:
    """What can be found, in the unit of patients' SD, and how much more that is than with known variances."""
    lines = ["| patients | SD of trainings | folds x seeds | trainings an arm | 1 hypothesis | 6 hypotheses |"]
    lines.append("|" + " --- |" * 6)
    for patients in (30, 130, 500):
        for sd in (0.05, 0.15, 0.5):
            for folds, seeds in ((3, 3), (5, 3), (5, 5)):
                trainings = ((seeds,) * folds,) * 2
                found = [Plan(patients, 1.0, trainings, (sd, sd), family, ALPHA).detectable for family in FAMILIES]
                cells = [str(patients), f"{sd:g}", f"{folds} x {seeds}", str(folds * seeds)]
                lines.append("| " + " | ".join([*cells, *(f"{x:.2f}" for x in found)]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=16_000, help="of a world, with six hypotheses")
    parser.add_argument("--output", action="store_true", help="write docs/verdicts.md and benchmarks/results")
    arguments = parser.parse_args()
    started, lines, content = time.process_time(), [], []
    for title, worlds in GROUPS.items():
        lines += [f"\n### {title}\n", HEAD]
        for world in worlds:
            rates = simulate(world, arguments.experiments)
            lines.append(_row(world, rates))
            print(lines[-1], flush=True)
            of_families = {str(family): asdict(of_family) for family, of_family in rates.items()}
            content.append(
                {"world": asdict(world), "experiments": arguments.experiments, "decides": world.decides, **of_families}
            )
    lines += ["\n### What can be found\n", *_designs()]
    minutes = (time.process_time() - started) / 60
    made = f"numpy {np.__version__}, scipy {scipy.__version__}, {platform.machine()}"
    lines.append(f"\n`python benchmarks/verdicts.py --output`, {minutes:.0f} minutes of one core; {made}.")
    if arguments.output:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- end of table -->\n")
        table = "\n".join(lines).strip()
        PAGE.write_text(f"{head}<!-- table -->\n\n{table}\n\n<!-- end of table -->\n{tail}", encoding="utf-8")
        RESULTS.write_text(json.dumps({"made with": made, "worlds": content}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
