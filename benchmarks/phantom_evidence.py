"""Networks and their twins on made-up tasks with a known answer, judged as real comparisons are.

    python benchmarks/phantom_evidence.py [--tasks TASK ...] [--output FILE.jsonl] [--page]

What the tasks are says ``phantom_tasks.py``, how networks are trained ``phantom_training.py``, and what came out
docs/evidence/phantoms.md. Beside network and twin there is a mutant, the network with its operator broken in the code.
Every training is one line of the output, and a line that is there is not trained again. ``--page`` puts the table into
docs/evidence/phantoms.md and the pictures beside it, for which the median training is repeated.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from phantom_pictures import NAMES, draw_pictures
from phantom_tasks import TASKS
from phantom_training import run

from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.verdicts import Contrast, Kind, Reason, Verdict, contrasts, hardly_learned, judge
from nnunet_deform.selftest.measuring import describe

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "benchmarks" / "results" / "phantom_evidence.jsonl"
PAGE = REPOSITORY / "docs" / "evidence" / "phantoms.md"
MARKS = ("<!-- table -->", "<!-- end of table -->")

ALPHA = 0.05
NO_HELP = (Kind.EQUIVALENT, Kind.NO_DIFFERENCE)


@dataclass(frozen=True)
class Pair:
    """``arm`` against the twin; expected: the verdicts that are right, of the hypotheses that share alpha; none where
    nothing is claimed and the pair is only explored."""

    task: str
    arm: str
    expected: tuple[Kind, ...] = ()

    @property
    def family(self) -> int:
        return FAMILY if self.expected else 1

    def is_right(self, verdict: Verdict) -> bool:
        return verdict.kind in self.expected and verdict.winner in (None, self.arm)


PAIRS = (
    Pair("distortion", "network", (Kind.BETTER,)),
    Pair("distortion", "mutant", NO_HELP),
    Pair("no distortion", "network", NO_HELP),
    Pair("contrast changes", "network", (Kind.BETTER,)),
    Pair("contrast changes", "mutant", NO_HELP),
    Pair("contrast stays", "network", NO_HELP),
    Pair("large tube", "network"),
    Pair("large tube, BatchNorm", "network"),
)
FAMILY = sum(bool(pair.expected) for pair in PAIRS)


def compare(arm: str, first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], family: int) -> Contrast:
    """An arm against the twin, from Dice by seed and phantom, as a comparison's declared pair is."""
    scores = [[np.array(of_seeds).T[None]] for of_seeds in (first, second)]
    return contrasts(
        *scores,
        names=(arm, "twin"),
        metric="Dice",
        cases=len(first[0]),
        paired_starts=True,
        alpha=ALPHA,
        family=family,
        band=METRICS["Dice"].band,
    )[0]


def verdict_of(
    arm: str, first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], family: int
) -> tuple[Contrast, Verdict]:
    """What a report would say of the pair."""
    contrast = compare(arm, first, second, family)
    means = {arm: {"structure": float(np.mean(first))}, "twin": {"structure": float(np.mean(second))}}
    if hardly := hardly_learned(means):
        return contrast, Verdict(Kind.NOT_COMPARABLE, reason=Reason.HARDLY_LEARNED, arms=hardly)
    return contrast, judge(contrast, higher_is_better=METRICS["Dice"].higher_is_better)


def read(file: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """By task, arm and seed.

    Raises:
        SystemExit: a line was trained with other settings than the task has now.
    """
    found = {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
        result = json.loads(line)
        settings = asdict(TASKS[result["task"]])
        if settings != {key: result.get(key) for key in settings}:
            raise SystemExit(f"{file}:{number} has other settings than the task now; delete it to train it again.")
        found[result["task"], result["arm"], result["seed"]] = result
    return found


def in_words(verdict: Verdict) -> str:
    return f"{verdict.winner} better" if verdict.kind is Kind.BETTER else verdict.kind.value


def table(done: Mapping[tuple[str, str, int], Mapping[str, Any]], pairs: Sequence[Pair]) -> str:
    rows = [
        "| task | arm | Dice | twin's | difference [interval] | verdict | as it must be | detectable | CPU s each |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in pairs:
        if any((pair.task, arm, seed) not in done for arm in (pair.arm, "twin") for seed in TASKS[pair.task].seeds):
            rows.append(f"| {pair.task} | {pair.arm} | not trained yet | | | | | | |")
            continue
        results = [[done[pair.task, arm, seed] for seed in TASKS[pair.task].seeds] for arm in (pair.arm, "twin")]
        first, second = ([result["dice"] for result in of_arm] for of_arm in results)
        contrast, verdict = verdict_of(pair.arm, first, second, pair.family)
        low, high = contrast.interval
        cells = [
            pair.task + ("" if pair.expected else " (explored)"),
            pair.arm,
            f"{np.mean(first):.4f}",
            f"{np.mean(second):.4f}",
            f"{contrast.mean:+.4f} [{low:+.4f}, {high:+.4f}]",
            f"**{in_words(verdict)}**",
            ("yes" if pair.is_right(verdict) else "NO") if pair.expected else "-",
            f"{contrast.detectable:.4f}",
            " / ".join(f"{fmean(result['seconds'] for result in of_arm):.1f}" for of_arm in results),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def median_seed(done: Mapping[tuple[str, str, int], Mapping[str, Any]], name: str) -> int:
    """Whose network has the median Dice of all seeds in this task."""
    of_seeds = sorted(TASKS[name].seeds, key=lambda seed: fmean(done[name, "network", seed]["dice"]))
    return of_seeds[len(of_seeds) // 2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", action="store_true", help="rewrite the page's table and pictures")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    done = read(options.output)
    pairs = [pair for pair in PAIRS if pair.task in options.tasks]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name, arm in dict.fromkeys((pair.task, arm) for pair in pairs for arm in ("twin", pair.arm)):
        for seed in TASKS[name].seeds:
            if (name, arm, seed) in done:
                continue
            result = {**run(name, TASKS[name], arm, seed), "about": describe()}
            done[name, arm, seed] = result
            with open(options.output, "a") as output:
                output.write(json.dumps(result) + "\n")
            words = f"{name}, {arm}, seed {seed}: Dice {fmean(result['dice']):.4f}, {result['seconds']:.0f} s"
            print(words, file=sys.stderr, flush=True)
    found = table(done, pairs)
    print(found)
    if options.page:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{found}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
        draw_pictures(PAGE.parent, {name: median_seed(done, name) for name in NAMES})


if __name__ == "__main__":
    main()
