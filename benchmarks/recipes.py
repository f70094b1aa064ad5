"""A search for each network's learning rate in short trainings, with the same number of tries for every network.

    python benchmarks/recipes.py [--data FOLDER] [--work FOLDER] [--only NAME ...] [--seeds 0 1] [--steps 500]
                                 [--output FILE.jsonl]

What it does and why is in docs/recipes.md. Each (network, rate, offset factor, seed) is one line of the output, written
when its training is done, and a line that is there is not trained again: the same command goes on after an
interruption. Several processes may share work folder and output if each has networks of its own (``--only``).
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from nnunet_deform.selftest.measuring import describe

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENTS = REPOSITORY / "docs" / "recipes" / "patients.json"
RESULTS = REPOSITORY / "benchmarks" / "results" / "recipes.jsonl"
WORK = REPOSITORY / "benchmarks" / ".work" / "recipes"
DEFAULT_DATA = Path(os.environ.get("NNUNET_DEFORM_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
DATASET = "Dataset004_Hippocampus"
BATCH = 8
LAST = 50  # steps whose mean training loss is reported
OBSERVED_BATCHES = 2  # of validation, in the report on operators at the end

NETWORKS = {
    "stock": "nnUNetTrainer",
    "DeformUX": "nnUNetTrainerDeformUX",
    "LightMedSeg": "nnUNetTrainerLightMedSeg",
    "MAGIC": "nnUNetTrainerMAGIC",
}
RATES = (5e-4, 1.6e-3, 5e-3, 1.6e-2)
STEP = 10**0.5  # from one rate to the next
OFFSET_FACTORS = (3, 10)


@dataclass(frozen=True)
class Try:
    """A recipe of a network: the learning rate, and that of its offset branches as a multiple of it."""

    network: str
    rate: float
    offset_factor: int = 1


@dataclass(frozen=True)
class Job:
    """One training of a try."""

    network: str
    rate: float
    offset_factor: int
    seed: int
    steps: int

    @property
    def trainer(self) -> str:
        base = NETWORKS[self.network]
        if self.offset_factor != 1:
            base += f"_offsetRate{self.offset_factor}"
        # One epoch: warm-up and cosine go by iteration, and nnU-Net's plots and validations by epoch.
        return f"{base}_AdamW_lr{spelled(self.rate)}_1epochs{self.steps}iters_seed{self.seed}"


def spelled(rate: float) -> str:
    """Two digits at most: 0.008 -> 8e-3, 0.016 -> 1.6e-2."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def draw_patients(cases: Iterable[str], test_cases: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """20 patients to train on and 10 to validate on, drawn among those without a test case, with their cases.

    Case ids n (odd) and n + 1 are one patient, (n + 1) // 2.
    """

    def patient(case: str) -> int:
        return (int(case.rpartition("_")[2]) + 1) // 2

    tested = {patient(case) for case in test_cases}
    of_patient: dict[int, list[str]] = {}
    for case in sorted(cases):
        if patient(case) not in tested:
            of_patient.setdefault(patient(case), []).append(case)
    drawn = np.random.default_rng(0).choice(sorted(of_patient), 30, replace=False).tolist()
    return {
        part: {str(number): of_patient[number] for number in sorted(numbers)}
        for part, numbers in (("train", drawn[:20]), ("validation", drawn[20:]))
    }


def prepare(data: Path, work: Path) -> Path:
    """The folder with nnU-Net's raw and preprocessed data of the patients, made by nnU-Net's own command."""
    prepared = work / "prepared"
    if prepared.exists():
        return prepared
    if not (data / DATASET / "dataset.json").exists():
        raise SystemExit(f"there is no {DATASET} in {data}; name its folder with --data.")
    patients = json.loads(PATIENTS.read_text())
    split = {part: [case for cases in people.values() for case in cases] for part, people in patients.items()}
    work.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="preparing-", dir=work))
    try:
        raw = partial / "raw" / DATASET
        for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (raw / folder).mkdir(parents=True)
            for case in split["train"] + split["validation"]:
                shutil.copy(data / DATASET / folder / f"{case}{ending}", raw / folder)
        about = json.loads((data / DATASET / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**about, "numTraining": sum(map(len, split.values()))}))
        # Planning takes the number of augmentation processes for a number of threads, so it must not be 0 here.
        subprocess.run(
            ["nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "2d", "3d_fullres", "-np", "1", "1", "-npfp", "1"],
            env={**os.environ, **folders(partial), "nnUNet_n_proc_DA": "1"},
            stdout=sys.stderr,
            check=True,
        )
        splits = [{"train": split["train"], "val": split["validation"]}]
        (partial / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
        try:
            partial.rename(prepared)
        except OSError:  # unless another process was faster
            if not prepared.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return prepared


def folders(prepared: Path) -> dict[str, str]:
    """nnU-Net's environment variables."""
    return {f"nnUNet_{name}": str(prepared / name) for name in ("raw", "preprocessed", "results")}


def run(job: Job, prepared: Path) -> dict[str, Any]:
    """A line of the output file."""
    return {**asdict(job), "trainer": job.trainer, **train(job.trainer, prepared)}


def train(name: str, prepared: Path, configuration: str = "2d", batch: int = BATCH) -> dict[str, Any]:
    """Train and validate: Dice of each validation case and class, the loss of the last steps, what the operators do
    in the end, seconds of CPU time.

    Args:
        name: of a trainer, its recipe, length and seed in it.
        prepared: from :func:`prepare`.
        configuration: of the plan.
        batch: samples of a step.
    """
    from nnunet_deform.networks.observation import EPOCHS_FILE, read_epochs
    from nnunet_deform.trainers.variants import find_trainer

    plans = json.loads((prepared / "preprocessed" / DATASET / "nnUNetPlans.json").read_text())
    plans["configurations"][configuration]["batch_size"] = batch
    dataset_json = json.loads((prepared / "preprocessed" / DATASET / "dataset.json").read_text())
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as results, contextlib.redirect_stdout(io.StringIO()):
        os.environ.update(nnUNet_results=results)
        plans["continue_training"] = False
        trainer = find_trainer(name)(plans, configuration, 0, dataset_json, torch.device("cpu"))
        trainer.num_val_iterations_per_epoch = OBSERVED_BATCHES  # for the report on operators; nothing is decided by it
        trainer.disable_checkpointing = True
        train_step = trainer.train_step

        def recorded_step(batch: dict) -> dict:
            output = train_step(batch)
            losses.append(float(output["loss"]))
            return output

        trainer.train_step = recorded_step
        start = time.process_time()
        try:
            trainer.run_training()
        except FloatingPointError as error:
            return {"stopped": str(error)}
        trained = time.process_time()
        cases = validate(trainer)
        predicted = time.process_time()
        epochs = read_epochs(Path(trainer.output_folder) / EPOCHS_FILE)
        operators = epochs[max(epochs)] if epochs else {}
    return {
        "dice": fmean(fmean(classes) for classes in cases.values()),
        "loss": fmean(losses[-LAST:]),
        "seconds": {"training": round(trained - start, 1), "prediction": round(predicted - trained, 1)},
        "cases": {case: [round(dice, 4) for dice in classes] for case, classes in cases.items()},
        "operators": {name: round(value, 5) for name, value in operators.items()},
    }


def validate(trainer: Any) -> dict[str, list[float]]:
    """Dice of each foreground class over each validation case's volume, predicted by the sliding window, not mirrored.

    In the preprocessed volumes, which have the images' own voxels: every case's spacing is the plan's.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        None,
    )
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, trainer.do_split()[1])
    found = {}
    for case in dataset.identifiers:
        image, truth, _, _ = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(image[:])))
        predicted, expected = logits.argmax(0).numpy(), truth[0]
        found[case] = [
            float(2 * ((predicted == label) & (expected == label)).sum())
            / float((predicted == label).sum() + (expected == label).sum())
            for label in trainer.label_manager.foreground_labels
        ]
    return found


def further_tries(network: str, best: float) -> list[Try]:
    """the last two of a network's six, near the best of the four rates."""
    if network == "DeformUX":
        return [Try(network, best, factor) for factor in OFFSET_FACTORS]
    return [Try(network, float(spelled(rate))) for rate in (best / STEP**0.5, best * STEP**0.5)]


class Results:
    """The lines of the output file that belong to a number of steps and to seeds."""

    def __init__(self, file: Path, steps: int, seeds: Sequence[int]) -> None:
        self.file = file
        self.steps = steps
        self.seeds = tuple(seeds)

    def jobs(self, one: Try) -> list[Job]:
        return [Job(one.network, one.rate, one.offset_factor, seed, self.steps) for seed in self.seeds]

    def read(self) -> dict[Job, dict[str, Any]]:
        if not self.file.exists():
            return {}
        found = {}
        for number, line in enumerate(self.file.read_text().splitlines(), start=1):
            try:
                values = json.loads(line)
                job = Job(**{field: values[field] for field in Job.__dataclass_fields__})
            except (ValueError, KeyError) as error:
                raise SystemExit(f"{self.file}:{number} is no result ({error!r}); delete this line.") from error
            found[job] = values
        return found

    def add(self, result: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as output:
            output.write(json.dumps(result) + "\n")

    def mean(self, one: Try, value: str) -> float | None:
        """Over the seeds; None while one is missing, and where one was stopped."""
        done = self.read()
        values = [done.get(job, {}).get(value) for job in self.jobs(one)]
        return None if None in values else fmean(values)

    def best(self, tries: Sequence[Try]) -> Try | None:
        """The one of the highest mean Dice; None if every one was stopped."""
        dice = {one: self.mean(one, "dice") for one in tries}
        finished = [one for one in tries if dice[one] is not None]
        return max(finished, key=dice.__getitem__, default=None)


def search(network: str, results: Results, prepared: Path) -> list[Try]:
    """Train what is missing of a network's tries; returns the tries."""
    tries = [Try(network, rate) for rate in RATES]
    train_missing(tries, results, prepared)
    best = results.best(tries)
    if best is not None:
        more = further_tries(network, best.rate)
        train_missing(more, results, prepared)
        tries += more
    return tries


def train_missing(tries: Sequence[Try], results: Results, prepared: Path) -> None:
    for job in [job for one in tries for job in results.jobs(one)]:
        if job in results.read():
            continue
        result = run(job, prepared)
        results.add({**result, "about": describe()})
        outcome = result.get("stopped") or f"Dice {result['dice']:.4f}, loss {result['loss']:.3f}, {result['seconds']}"
        print(f"{job.trainer}: {outcome}", file=sys.stderr, flush=True)


def table(tries: Sequence[Try], results: Results) -> str:
    """One network's tries as rows of Markdown, in the order of their rates, the chosen one in bold."""
    done, chosen = results.read(), results.best(tries)
    rows = []
    for one in sorted(tries, key=lambda one: (one.rate, one.offset_factor)):
        dice, loss = results.mean(one, "dice"), results.mean(one, "loss")
        seeds = [done[job].get("dice") for job in results.jobs(one)]
        cells = [
            one.network,
            spelled(one.rate),
            str(one.offset_factor) if one.network == "DeformUX" else "",
            "stopped" if dice is None else f"{dice:.4f}",
            ", ".join("stopped" if value is None else f"{value:.4f}" for value in seeds),
            "" if loss is None else f"{loss:.3f}",
        ]
        rows.append(" | ".join(f"**{cell}**" if one == chosen and cell else cell for cell in cells))
    return "\n".join(f"| {row} |" for row in rows)


HEADING = """| network | rate | offset factor | validation Dice | by seed | training loss |
| --- | --- | --- | --- | --- | --- |"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"the folder that holds {DATASET}")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    prepared = prepare(options.data, options.work)
    os.environ.update(folders(prepared), nnUNet_n_proc_DA="0", nnUNet_compile="f")
    results = Results(options.output, options.steps, options.seeds)
    print(HEADING, *(table(search(network, results, prepared), results) for network in options.only), sep="\n")


if __name__ == "__main__":
    main()
