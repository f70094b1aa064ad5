"""From results trained elsewhere to what the report is made of."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import load_summary_json

from nnunet_deform.comparison import operators
from nnunet_deform.comparison.analysis import analyse
from nnunet_deform.comparison.collect import columns
from nnunet_deform.comparison.curves import Curve, read_curve
from nnunet_deform.comparison.files import fingerprint, read_json
from nnunet_deform.comparison.report.content import DatasetContent, Provenance, ReadVolumes, ReportContent, Volumes
from nnunet_deform.comparison.report.pictures import read_volumes
from nnunet_deform.comparison.results import Results, images_of
from nnunet_deform.comparison.trainings import Training
from nnunet_deform.networks.observation import EPOCHS_FILE, read_epochs

_UNKNOWN = "not known"


def results_content(results: Results, table: pd.DataFrame, command: str) -> ReportContent:
    """
    Args:
        table: of :func:`results.score_results`.
        command: the one that makes the report.
    """
    design = results.design
    curves = _curves(results)
    histories = _histories(results)
    return ReportContent(
        name=f"{results.dataset}: {' and '.join(design.arms)}",
        design=design,
        analysis=analyse(design, table, {}),
        cases=table,
        test=pd.DataFrame(columns=columns()),
        datasets={
            (results.dataset, results.configuration): DatasetContent(
                labels=results.description.classes.labels,
                ignore_label=results.description.classes.ignore_label,
                tolerances=results.tolerances,
                patients_mapped=results.patients_given,
                volumes=_reader_of_volumes(results),
                curves=curves,
                operators=operators.diagnose({t.arm: t.source.trainer for t in results.trainings}, histories),
            )
        },
        command=command,
        provenance=tuple(_provenance(results)),
        operators=operators.last_epochs(histories) if histories else None,
        cautions=(
            "Nothing shows that what is compared was chosen before its results were seen: arms, metric and band came "
            "with the command that made this page.",
            *results.cautions,
            *_lengths(results, curves),
            *_other_dice(results, table),
        ),
    )


def _curves(results: Results) -> dict[str, list[Curve]]:
    found: dict[str, list[Curve]] = {arm: [] for arm in results.design.arms}
    for training in results.trainings:
        if training.source.is_model:
            curves = (read_curve(training.source.fold_folder(fold)) for fold in results.design.folds)
            found[training.arm] += [curve for curve in curves if curve[0]]
    return found


def _histories(results: Results) -> operators.Histories:
    found = {}
    for training in results.trainings:
        source = training.source
        for fold in results.design.folds if source.is_model else ():
            if epochs := read_epochs(source.fold_folder(fold) / EPOCHS_FILE):
                names = (results.dataset, results.configuration, training.arm, source.trainer, source.plans)
                found[Training(*names, training.seed, fold)] = epochs
    return found


def _lengths(results: Results, curves: dict[str, list[Curve]]) -> list[str]:
    """A caution where arms had different numbers of epochs."""
    lengths = {arm: sorted({epochs[-1] + 1 for epochs, _, _ in of_arm}) for arm, of_arm in curves.items() if of_arm}
    if len(set(map(tuple, lengths.values()))) < 2:
        return []
    words = ", ".join(f"{arm} {' or '.join(map(str, epochs))}" for arm, epochs in lengths.items())
    return [f"{results.dataset}: epochs of the trainings differ ({words}), and so may be what arms differ by."]


def _other_dice(results: Results, table: pd.DataFrame) -> list[str]:
    """A caution where nnU-Net's validation had another Dice of the same case: files have changed since, or labels are
    others."""
    cautions = []
    names = {region: name for name, region in results.description.classes.labels.items()}
    of_keys = table.set_index(["arm", "seed", "case", "label"])["Dice"].to_dict()
    for training in results.trainings:
        changed = set()
        for fold in results.design.folds:
            if not training.source.is_model or fold not in training.source.folds:
                continue
            summary = training.source.fold_folder(fold) / "validation" / "summary.json"
            for entry in load_summary_json(str(summary))["metric_per_case"]:
                case = Path(entry["prediction_file"]).name.removesuffix(results.description.file_ending)
                for region, scores in entry["metrics"].items():
                    key = (training.arm, training.seed, case, names.get(region))
                    then, now = scores["Dice"], of_keys.get(key, math.nan)
                    if not (then == now or (math.isnan(then) and math.isnan(now))):
                        changed.add(case)
        if changed:
            cautions.append(
                f"{training.arm}, seed {training.seed}: Dice of {len(changed)} cases, {sorted(changed)[0]} among them, "
                f"is not that of nnU-Net's summary.json; labels in {results.labels} or predictions have changed since."
            )
    return cautions


def _reader_of_volumes(results: Results) -> ReadVolumes | None:
    """Of each arm's first training that has the case; None without the images."""
    ending, reader = results.description.file_ending, results.description.reader
    images = images_of(results)
    if images is None:
        return None
    files = {}
    for (number, _), entries in results.files.items():
        for entry in entries:
            files.setdefault((results.trainings[number].arm, entry.case), entry)

    def read(arm: str, case: str) -> Volumes | None:
        image, entry = images / f"{case}_0000{ending}", files[arm, case]
        return read_volumes(image, entry.truth, entry.prediction, reader) if image.exists() else None

    return read


def _provenance(results: Results) -> list[Provenance]:
    cases = {fold: [] for fold in results.design.folds}
    for (_, fold), entries in results.files.items():
        cases[fold] = sorted(entry.case for entry in entries)
    digest = hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest()
    rows = []
    for training in results.trainings:
        source = training.source
        folds = [fold for fold in results.design.folds if fold in source.folds]
        debug = source.fold_folder(folds[0]) / "debug.json"
        known = read_json(debug) if source.is_model and debug.is_file() else {}
        hashes = [
            fingerprint(file) if (file := source.folder / name).is_file() else "-"
            for name in ("plans.json", "dataset.json")
        ]
        rows.append(
            Provenance(
                dataset=source.dataset,
                plans=source.plans or "-",
                trainings=training.arm
                + (f", seed {source.seed}" if source.seed is not None else "")
                + (f", folds {', '.join(map(str, folds))}" if source.is_model else ""),
                splits=digest,
                plans_file=hashes[0],
                dataset_file=hashes[1],
                versions=f"torch {known['torch_version']}" if "torch_version" in known else f"versions {_UNKNOWN}",
                machine=known.get("gpu_name", known.get("device", f"machine {_UNKNOWN}")),
            )
        )
    return rows
