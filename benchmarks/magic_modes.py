"""MAGIC's modes, and its static twin, in short trainings: are its kernels alive, and does it help that they are mixed?

    python benchmarks/magic_modes.py [--data FOLDER] [--work FOLDER] [--rates RATE ...] [--seeds 0 1] [--steps 500]
                                     [--output FILE.jsonl]

Data, split, recipe, length and score are those of ``benchmarks/recipes.py``; what came out is in docs/recipes.md. All
modes start from the same weights at a seed, but for those of the attention. Each training is one line of the output,
and a line that is there is not trained again.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measuring import describe
from recipes import DATASET, DEFAULT_DATA, REPOSITORY, WORK, folders, prepare, spelled, train

OUTPUT = REPOSITORY / "benchmarks" / "results" / "magic_modes.jsonl"
MODES = {
    "static twin": "nnUNetTrainerMAGIC_static",
    "letter of the paper": "nnUNetTrainerMAGIC_letter",
    "letter of the released code": "nnUNetTrainerMAGIC_released",
    "ours": "nnUNetTrainerMAGIC",
}


def read(file: Path) -> dict[str, dict[str, Any]]:
    """By the trainer's full name."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {result["trainer"]: result for result in map(json.loads, lines)}


def table(done: dict[str, dict[str, Any]], rates: Sequence[float], seeds: Sequence[int], steps: int) -> str:
    rows = ["| rate | mode | validation Dice | by seed | training loss | kernels below 1 % | spread over samples |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for rate in rates:
        for mode, base in MODES.items():
            found = [done[full_name(base, rate, seed, steps)] for seed in seeds]
            if any("stopped" in result for result in found):
                rows.append(f"| {spelled(rate)} | {mode} | stopped | | | | |")
                continue
            operators = [result["operators"] for result in found]
            dead = ", ".join(f"{each['mixing_dead']:.0f} of {each['mixing_kernels']:.0f}" for each in operators if each)
            spread = ", ".join(f"{each['mixing_spread_median']:.4f}" for each in operators if each)
            cells = [
                spelled(rate),
                mode,
                f"{fmean(result['dice'] for result in found):.4f}",
                ", ".join(f"{result['dice']:.4f}" for result in found),
                ", ".join(f"{result['loss']:.3f}" for result in found),
                dead,
                spread,
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def full_name(base: str, rate: float, seed: int, steps: int) -> str:
    return f"{base}_AdamW_lr{spelled(rate)}_1epochs{steps}iters_seed{seed}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"the folder that holds {DATASET}")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    prepared = prepare(options.data, options.work)
    os.environ.update(folders(prepared), nnUNet_n_proc_DA="0", nnUNet_compile="f")
    for rate in options.rates:
        for seed in options.seeds:
            for base in MODES.values():
                name = full_name(base, rate, seed, options.steps)
                if name in read(options.output):
                    continue
                result = {"trainer": name, **train(name, prepared), "about": describe()}
                options.output.parent.mkdir(parents=True, exist_ok=True)
                with open(options.output, "a") as output:
                    output.write(json.dumps(result) + "\n")
                outcome = result.get("stopped") or f"Dice {result['dice']:.4f}, loss {result['loss']:.3f}"
                print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    print(table(read(options.output), options.rates, options.seeds, options.steps))


if __name__ == "__main__":
    main()
