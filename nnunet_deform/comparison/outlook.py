"""What an experiment has before it: what will be made, how long it takes, and what differences it can find."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_deform.comparison.check import Checked
from nnunet_deform.comparison.cost import read_cost
from nnunet_deform.comparison.evidence import Plan
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.prepare import PLANNERS, data_folder, is_preprocessed
from nnunet_deform.comparison.run import format_seconds
from nnunet_deform.comparison.trainings import Training, read_record
from nnunet_deform.comparison.verdicts import REQUIRED_PATIENTS, REQUIRED_TRAINING_FREEDOM

# Of one training's checkpoints, the best and the last: nnU-Net's 31 million weights with their momentum, twice.
_CHECKPOINT_BYTES = 500_000_000
# For 1000 epochs of 250 iterations on an A100, as nnU-Net's documentation has them for its own plans.
_HOURS = {
    "nnUNetPlans": 9,
    "nnUNetResEncUNetMPlans": 12,
    "nnUNetResEncUNetLPlans": 35,
    "nnUNetResEncUNetXLPlans": 66,
}
_EPOCHS, _ITERATIONS = 1000, 250


# Assumed where nothing is stated, of metrics that are shares: of patients' differences between similar and between
# different networks, and of trainings of one arm on one fold, long and short ones.
_PATIENT_SDS, _TRAINING_SDS = (0.02, 0.05), (0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Power:
    """What hypotheses of one design can decide. patients: on the folds; grouped: whether they are known, or one a case;
    seeds: see :class:`evidence.Plan`; lacking_patients, lacking_trainings: what a verdict needs besides, the latter by
    arm, beyond the first of a fold; plans: one for each pair of SDs."""

    dataset: str
    hypotheses: tuple[tuple[str, str], ...]
    paired_starts: bool
    patients: int
    grouped: bool
    seeds: tuple[tuple[int, ...], ...]
    lacking_patients: int
    lacking_trainings: dict[str, int]
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class Outlook:
    """to_make: what is not there yet; trainings, done: their numbers; seconds: of all that are left, None where nothing
    is known; basis: where that comes from; free_bytes, needed_bytes: for checkpoints that are not there yet; assumed:
    whether the SDs of ``powers`` are; unit: of the primary metric."""

    to_make: tuple[str, ...]
    trainings: int
    done: int
    seconds: float | None
    basis: str
    folder: Path
    free_bytes: int
    needed_bytes: int
    primary: str
    unit: str
    assumed: bool
    powers: tuple[Power, ...]


def look_ahead(checked: Checked, *, patient_sd: float | None = None, training_sd: float | None = None) -> Outlook:
    """
    Args:
        patient_sd, training_sd: of patients' differences, and between trainings of one arm on one fold, in the primary
            metric's unit; None: several are assumed, if the metric is a share.
    """
    experiment, folders = checked.source.experiment, checked.folders
    metric = METRICS[experiment.primary]
    assumable = not metric.unit
    patient_sds = (_PATIENT_SDS if assumable else ()) if patient_sd is None else (patient_sd,)
    training_sds = (_TRAINING_SDS if assumable else ()) if training_sd is None else (training_sd,)
    left = [training for training in checked.trainings if training not in checked.done]
    seconds, basis = _estimate_time(checked, left)
    folder = next(path for path in (folders.results, *folders.results.parents) if path.exists())
    return Outlook(
        to_make=tuple(_to_make(checked)),
        trainings=len(checked.trainings),
        done=len(checked.done),
        seconds=seconds,
        basis=basis,
        folder=folder,
        free_bytes=shutil.disk_usage(folder).free,
        needed_bytes=_CHECKPOINT_BYTES * sum(not training.folder(folders.results).exists() for training in left),
        primary=metric.name,
        unit=metric.unit,
        assumed=patient_sd is None or training_sd is None,
        powers=tuple(_powers(checked, patient_sds, training_sds)),
    )


def _to_make(checked: Checked) -> Iterator[str]:
    for dataset, found in zip(checked.source.experiment.datasets, checked.datasets, strict=True):
        if not found.splits_file.exists():
            grouped = "which keep patients together" if dataset.patients else "each case taken for a patient"
            yield f"{dataset.splits} folds of {found.name}, {grouped}"
        for plans in dict.fromkeys(arm.plans for arm in checked.source.experiment.arms):
            if not found.plans_file(plans).exists():
                yield f"{plans} of {found.name} by {PLANNERS[plans]}, and its preprocessed cases"
            elif not is_preprocessed(data_folder(plans, dataset, found), found.cases):
                yield f"preprocessed cases of {found.name} for {plans}"


def _estimate_time(checked: Checked, left: Sequence[Training]) -> tuple[float | None, str]:
    """Seconds of what is left, and what they are taken from."""
    experiment, folders = checked.source.experiment, checked.folders
    measured: dict[str, list[float]] = {}
    for training in checked.done:
        record = read_record(training, folders)
        if record is not None and record.seconds:
            measured.setdefault(training.arm_key, []).append(record.seconds)
    iterations = (experiment.budget.epochs or _EPOCHS) * (experiment.budget.iterations or _ITERATIONS)
    total, bases = 0.0, dict.fromkeys([])
    for training in left:
        if times := measured.get(training.arm_key):
            total += sum(times) / len(times)
            bases["finished trainings of the same arm"] = None
        elif (cost := read_cost(training, folders)) is not None:
            total += cost.seconds_per_iteration * iterations
            bases["measured steps of the same arm"] = None
        elif experiment.device == "cuda":
            hours = _HOURS.get(experiment.arm(training.arm).plans, _HOURS["nnUNetPlans"])
            total += 3600 * hours * iterations / (_EPOCHS * _ITERATIONS)
            bases[
                "what nnU-Net's documentation has for an A100 (9 h for nnUNetPlans; 12, 35 and 66 h for ResEnc M, L "
                "and XL), as if every network took as long as nnU-Net's"
            ] = None
        else:
            return None, ""
    return total, " and ".join(bases)


def _powers(checked: Checked, patient_sds: Sequence[float], training_sds: Sequence[float]) -> Iterator[Power]:
    experiment = checked.source.experiment
    family = len(experiment.hypotheses) * len(checked.datasets)
    ours = zip(experiment.datasets, checked.datasets, checked.splits, checked.patients, strict=True)
    for dataset, found, splits, patients in ours:
        cases = [case for fold in experiment.folds for case in splits[fold]["val"]]
        number = len(cases) if patients is None else len({patients[case] for case in cases})
        designs: dict[tuple[bool, tuple[tuple[int, ...], ...]], list[tuple[str, str]]] = {}
        for pair in experiment.hypotheses:
            designs.setdefault(_seeds(checked, found.name, dataset.configuration, pair), []).append(pair)
        for (alike, seeds), pairs in designs.items():
            lacking: dict[str, int] = {}
            for pair in pairs:
                for arm, sample in zip(pair, seeds * (2 if alike else 1), strict=True):
                    if (further := REQUIRED_TRAINING_FREEDOM - sum(sample) + len(sample)) > 0:
                        lacking[arm] = further
            yield Power(
                dataset=f"{found.name} ({dataset.configuration})",
                hypotheses=tuple(pairs),
                paired_starts=alike,
                patients=number,
                grouped=patients is not None,
                seeds=seeds,
                lacking_patients=max(0, REQUIRED_PATIENTS - number),
                lacking_trainings=lacking,
                plans=tuple(
                    Plan(
                        patients=number,
                        patient_sd=patient_sd,
                        seeds=seeds,
                        # Of differences, as if nothing of a seed were common to both arms.
                        training_sds=(math.sqrt(2) * sd,) if alike else (sd, sd),
                        family=family,
                        alpha=experiment.statistics.alpha,
                    )
                    for patient_sd in patient_sds
                    for sd in training_sds
                ),
            )


def _seeds(
    checked: Checked, dataset: str, configuration: str, pair: tuple[str, str]
) -> tuple[bool, tuple[tuple[int, ...], ...]]:
    """Whether a pair's trainings are analysed seed by seed, and how many each sample has on each fold."""
    experiment = checked.source.experiment
    trained: dict[tuple[str, int], set[int]] = {}
    for t in checked.trainings:
        if (t.dataset, t.configuration) == (dataset, configuration):
            trained.setdefault((t.arm, t.fold), set()).add(t.seed)
    samples = [[trained[arm, fold] for fold in experiment.folds] for arm in pair]
    alike = experiment.paired_starts(*pair)
    if alike:
        samples = [[one & two for one, two in zip(*samples, strict=True)]]
    return alike, tuple(tuple(len(seeds) for seeds in sample) for sample in samples)


def describe(outlook: Outlook) -> list[str]:
    """In words, a line each."""
    lines = [f"To make: {what}." for what in outlook.to_make]
    left = outlook.trainings - outlook.done
    lines.append(f"Trainings: {outlook.trainings}, {outlook.done} of them done.")
    if left and outlook.seconds is None:
        lines.append("Time: not known before each arm has finished a training.")
    elif left:
        lines.append(f"Time: about {format_seconds(outlook.seconds)} one after the other, by {outlook.basis}.")
    needed, free = outlook.needed_bytes / 1e9, outlook.free_bytes / 1e9
    room = f"Disk: {free:.0f} GB are free at {outlook.folder}"
    if needed:
        room += (
            f"; {needed:.0f} GB for checkpoints, where networks are as large as nnU-Net's (0.5 GB a training), and as "
            "much as the images, unpacked, for preprocessed cases"
        )
    lines.append(f"{room}.{' THAT IS NOT ENOUGH.' if needed > free else ''}")
    for power in outlook.powers:
        lines += _describe_power(outlook, power)
    return lines


def _describe_power(outlook: Outlook, power: Power) -> Iterator[str]:
    pairs = ", ".join(" - ".join(pair) for pair in power.hypotheses)
    patients = f"{power.patients} patients" if power.grouped else f"{power.patients} cases, each counted as a patient"
    first, last = power.seeds[0], power.seeds[-1]
    shape = _shape(first) if first == last else f"{_shape(first)} and {_shape(last)}"
    yield f"{power.dataset}, {pairs}: {patients}; {shape} an arm."
    if power.lacking_patients:
        missing = f"{power.lacking_patients} more patients needed, {REQUIRED_PATIENTS} in all"
        yield f"  UNDECIDED whatever is found: {missing}."
    if power.lacking_trainings:
        further = ", ".join(f"{number} more of {arm}" for arm, number in power.lacking_trainings.items())
        yield (
            f"  UNDECIDED whatever is found: more repeated trainings needed, {further}; {REQUIRED_TRAINING_FREEDOM} "
            "beyond the first of each fold, as three seeds on three folds have."
        )
    if power.lacking_patients or power.lacking_trainings:
        return
    unit = f" {outlook.unit}" if outlook.unit else ""
    if not power.plans:
        yield (
            f"  What can be found depends on SDs of {outlook.primary}, of which none are assumed; state them with "
            "--patient-sd and --training-sd."
        )
        return
    source = "assumed; --patient-sd and --training-sd state others" if outlook.assumed else "as stated"
    yield f"  Found in four of five such experiments ({outlook.primary}; SDs {source}):"
    for plan in power.plans:
        training_sd = plan.training_sds[0] / (math.sqrt(2) if power.paired_starts else 1)
        yield (
            f"    a difference of {plan.detectable:.2g}{unit}, if patients' differences have an SD of "
            f"{plan.patient_sd:g}{unit} and trainings of one arm on one fold one of {training_sd:g}{unit}"
        )


def _shape(trainings: tuple[int, ...]) -> str:
    """Of trainings a fold: '3 folds x 3 seeds', or '7 trainings on 3 folds (3, 2, 2)'."""
    if len(set(trainings)) == 1:
        return f"{_count(len(trainings), 'fold')} x {_count(trainings[0], 'seed')}"
    each = ", ".join(map(str, trainings))
    return f"{sum(trainings)} trainings on {_count(len(trainings), 'fold')} ({each})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
