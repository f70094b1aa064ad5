"""Short trainings: are dynamic kernels alive and of use, do the rivals learn, how long does a light network need?

    python benchmarks/short_trainings.py --arms modes|dynamic|rivals|light --rates RATE ... [--seeds 0 1]
                                         [--steps 500] [--data FOLDER] [--work FOLDER] [--output FILE.jsonl]

"modes" are MAGIC's, and its static twin; "dynamic" are MAGIC and what it is compared with, with InstanceNorm and with
BatchNorm, in ten epochs instead of one, because temperatures fall from epoch to epoch; "rivals" are the networks of the
papers' tables, in 3D; "light" is LightMedSeg, for which --steps asks what is missing. Data, split, recipe and score are
those of ``benchmarks/recipes.py``; what came out is in docs/recipes.md. What networks share, but nnU-Net's own two,
starts from the same weights at a seed. Each training is one line of the output, and a line that is there is not trained
again.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from recipes import BATCH, DATASET, DEFAULT_DATA, REPOSITORY, WORK, folders, prepare, spelled, train

from nnunet_deform.selftest.measuring import describe

RESULTS = REPOSITORY / "benchmarks" / "results"
_DYNAMIC = {
    "MAGIC's static twin": "nnUNetTrainerMAGIC_static",
    "MAGIC": "nnUNetTrainerMAGIC",
    "DYConv": "nnUNetTrainerDYConv",
    "CondConv": "nnUNetTrainerCondConv",
    "ODConv": "nnUNetTrainerODConv",
    "DCD": "nnUNetTrainerDCD",
    # At the full rate AdamW throws samples out of the image: seed 0 of nnUNetTrainerDDConv learned nothing.
    "DDConv, slow offsets": "nnUNetTrainerDDConv_slowOffsets",
}
MODES = {
    "static twin": "nnUNetTrainerMAGIC_static",
    "letter of the paper": "nnUNetTrainerMAGIC_letter",
    "letter of the released code": "nnUNetTrainerMAGIC_released",
    "ours": "nnUNetTrainerMAGIC",
}
DYNAMIC = {
    "stock": "nnUNetTrainer",
    **_DYNAMIC,
    "ODConv, attention_norm layer": "nnUNetTrainerODConv_layer",
    "stock, BatchNorm": "nnUNetTrainerBN",
    **{f"{arm}, BatchNorm": f"{base}_BN" for arm, base in _DYNAMIC.items()},
}
RIVALS = {
    "stock": "nnUNetTrainer",
    "nnFormer": "nnUNetTrainerNnFormer",
    "nnFormer, width 96": "nnUNetTrainerNnFormer_96",
    "UNETR++": "nnUNetTrainerUNETRPP",
    "SegFormer3D": "nnUNetTrainerSegFormer3D",
    "UNesT-B": "nnUNetTrainerUNesT_B",
    "UNesT-L": "nnUNetTrainerUNesT_L",
    "TransBTS": "nnUNetTrainerTransBTS",
}
LIGHT = {"LightMedSeg": "nnUNetTrainerLightMedSeg", "LightMedSeg, width 16": "nnUNetTrainerLightMedSeg_w2"}


@dataclass(frozen=True)
class Arms:
    """What is trained side by side, how, and where the results are."""

    trainers: dict[str, str]
    file: Path
    epochs: int = 1
    configuration: str = "2d"
    batch: int = BATCH


ARMS = {
    "modes": Arms(MODES, RESULTS / "magic_modes.jsonl"),
    "dynamic": Arms(DYNAMIC, RESULTS / "dynamic_rivals.jsonl", epochs=10),
    "rivals": Arms(RIVALS, RESULTS / "rivals.jsonl", configuration="3d_fullres", batch=2),
    "light": Arms(LIGHT, RESULTS / "light_budget.jsonl"),
}


def read(file: Path) -> dict[str, dict[str, Any]]:
    """By the trainer's full name."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {result["trainer"]: result for result in map(json.loads, lines)}


def table(
    arms: dict[str, str], done: dict[str, dict[str, Any]], rates: Sequence[float], seeds: Sequence[int], length: str
) -> str:
    rows = ["| rate | arm | validation Dice | by seed | training loss | kernels below 1 % | spread over samples |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for rate in rates:
        for mode, base in arms.items():
            found = [done[full_name(base, rate, seed, length)] for seed in seeds]
            if any("stopped" in result for result in found):
                rows.append(f"| {spelled(rate)} | {mode} | stopped | | | | |")
                continue
            operators = [result["operators"] for result in found]
            mixing = [each for each in operators if "mixing_dead" in each]
            dead = ", ".join(f"{each['mixing_dead']:.0f} of {each['mixing_kernels']:.0f}" for each in mixing)
            spread = ", ".join(filter(None, map(spread_of, operators)))
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


def spread_of(operators: dict[str, float]) -> str:
    """Of the mixing weights, or of DCD's lambda and Phi, the median layer's; empty of a static network."""
    if "lambda_spread_median" in operators:
        return f"{operators['lambda_spread_median']:.4f} and {operators['phi_spread_median']:.4f}"
    return f"{operators['mixing_spread_median']:.4f}" if "mixing_spread_median" in operators else ""


def full_name(base: str, rate: float, seed: int, length: str) -> str:
    return f"{base}_AdamW_lr{spelled(rate)}_{length}_seed{seed}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", choices=ARMS, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"the folder that holds {DATASET}")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, help="by default a file in benchmarks/results for each --arms")
    options = parser.parse_args(argv)
    arms = ARMS[options.arms]
    if options.steps % arms.epochs:
        parser.error(f"--steps {options.steps} must be a multiple of {arms.epochs} epochs")
    length = f"{arms.epochs}epochs{options.steps // arms.epochs}iters"
    file = options.output or arms.file

    torch.set_num_threads(1)
    prepared = prepare(options.data, options.work)
    os.environ.update(folders(prepared), nnUNet_n_proc_DA="0", nnUNet_compile="f")
    for rate in options.rates:
        for seed in options.seeds:
            for base in arms.trainers.values():
                name = full_name(base, rate, seed, length)
                if name in read(file):
                    continue
                result = {"trainer": name, **train(name, prepared, arms.configuration, arms.batch), "about": describe()}
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "a") as output:
                    output.write(json.dumps(result) + "\n")
                outcome = result.get("stopped") or f"Dice {result['dice']:.4f}, loss {result['loss']:.3f}"
                print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    print(table(arms.trainers, read(file), options.rates, options.seeds, length))


if __name__ == "__main__":
    main()
