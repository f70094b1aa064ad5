"""Puts the report together."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_deform import __version__
from nnunet_deform.comparison import operators
from nnunet_deform.comparison.analysis import (
    Analysis,
    DatasetAnalysis,
    Hypothesis,
    MetricAnalysis,
    analyse,
    few_trainings,
)
from nnunet_deform.comparison.collect import Collected, collect, test_commands
from nnunet_deform.comparison.cost import Cost, read_cost
from nnunet_deform.comparison.declaration import declaration, differences, digest, read_declaration
from nnunet_deform.comparison.evidence import estimate
from nnunet_deform.comparison.experiment import Experiment, Folders, find_folders, load_experiment
from nnunet_deform.comparison.files import read_json, write_text
from nnunet_deform.comparison.metrics import METRICS, Metric
from nnunet_deform.comparison.prepare import DatasetFolders, find_dataset
from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.report.words import p_value, sentence, summary
from nnunet_deform.comparison.trainings import Record, Training, list_trainings, now, read_record
from nnunet_deform.comparison.verdicts import REQUIRED_TRAINING_FREEDOM, Contrast

_NNUNETS_EPOCHS, _NNUNETS_ITERATIONS = 1000, 250


def build_report(file: Path) -> Path:
    """Collect what the experiment has so far, and write ``report/`` into its output folder.

    Args:
        file: the experiment.

    Returns:
        The HTML page.

    Raises:
        ExperimentError, PreparationError, SplitError, TrainingError, CollectionError: see there.
    """
    experiment = load_experiment(file)
    folders = find_folders(experiment, file)
    collected = collect(experiment, folders, file.resolve())
    analysis = analyse(experiment, collected.cases, collected.missing)
    folder = folders.output / "report"
    write_tables(folder, analysis, collected, experiment.statistics.band)
    histories = operators.read_histories(list_trainings(experiment, folders), folders.results)
    operators.last_epochs(histories).to_csv(folder / "operators.csv", index=False)
    write_text(folder / "report.html", _render(experiment, file, folders, collected, analysis, histories))
    return folder / "report.html"


def write_tables(folder: Path, analysis: Analysis, collected: Collected, band: float) -> None:
    """cases.parquet and .csv, arms.csv and .tex, contrasts.csv, hypotheses.csv and .tex, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = pd.concat([collected.cases.assign(set="out of fold"), collected.test.assign(set="test")])
    everything.to_parquet(folder / "cases.parquet", index=False)
    everything.to_csv(folder / "cases.csv", index=False)
    arms = pd.DataFrame([row for dataset in analysis.datasets for row in _arm_rows(dataset)])
    arms.to_csv(folder / "arms.csv", index=False)
    contrasts = pd.DataFrame([row for dataset in analysis.datasets for row in _contrast_rows(dataset)])
    contrasts.to_csv(folder / "contrasts.csv", index=False)
    hypotheses = pd.DataFrame([_hypothesis_row(hypothesis, band) for hypothesis in analysis.hypotheses])
    hypotheses.to_csv(folder / "hypotheses.csv", index=False)
    _write_latex(folder / "arms.tex", _latex_arms(analysis))
    cells = pd.DataFrame([_hypothesis_cells(hypothesis) for hypothesis in analysis.hypotheses])
    names = hypotheses[["dataset", "configuration", "first", "second"]]
    _write_latex(folder / "hypotheses.tex", pd.concat([names, cells], axis=1))


def _write_latex(file: Path, table: pd.DataFrame) -> None:
    write_text(file, table.to_latex(index=False, escape=True))


def _arm_rows(dataset: DatasetAnalysis) -> list[dict[str, Any]]:
    rows = []
    for name, metric in dataset.metrics.items():
        for position, arm in enumerate(dataset.arms):
            classes = dict(
                zip((f"mean of {label}" for label in dataset.labels), metric.by_class[position], strict=True)
            )
            rows.append(
                {
                    "dataset": dataset.dataset,
                    "configuration": dataset.configuration,
                    "arm": arm,
                    "metric": name,
                    "mean": metric.means[position],
                    "low": metric.intervals[0, position],
                    "high": metric.intervals[1, position],
                    "trainings": dataset.trainings[arm],
                    "structures absent": dataset.absent,
                    "absent, drawn": dataset.drawn[arm],
                    **classes,
                }
            )
    return rows


def _contrast_rows(dataset: DatasetAnalysis) -> list[dict[str, Any]]:
    rows = []
    for metric in dataset.metrics.values():
        for label, contrasts in [("all", metric.contrasts), *metric.by_class_contrasts.items()]:
            for position, c in enumerate(contrasts):
                row = {
                    "dataset": dataset.dataset,
                    "configuration": dataset.configuration,
                    "class": label,
                    "metric": c.metric,
                    "first": c.first,
                    "second": c.second,
                    **_figures_of(c),
                }
                rows.append({**row, "p Holm over pairs": metric.p_holm[position]} if label == "all" else row)
    return rows


def _figures_of(c: Contrast) -> dict[str, float | bool]:
    return {
        "cases": c.cases,
        "patients": c.patients,
        "folds": c.folds,
        "paired starts": c.paired_starts,
        "mean difference": c.mean,
        "median difference": c.median,
        "standard error": c.se,
        "degrees of freedom": c.freedom,
        "of trainings": min(c.training_freedoms),
        "share of trainings in variance": c.trainings_share,
        "low": c.interval[0],
        "high": c.interval[1],
        "p": c.p,
        "smallest detectable": c.detectable,
        "rank-biserial": c.rank_biserial,
        "p signed-rank": c.p_ranks,
    }


def _hypothesis_row(hypothesis: Hypothesis, band: float) -> dict[str, Any]:
    verdict, c = hypothesis.verdict, hypothesis.contrast
    row = {
        "dataset": hypothesis.dataset,
        "configuration": hypothesis.configuration,
        "first": hypothesis.first,
        "second": hypothesis.second,
        "verdict": verdict.kind.value,
        "winner": verdict.winner or "",
        "reason": "" if verdict.reason is None else verdict.reason.value,
        "sentence": sentence(hypothesis, band),
    }
    if c is not None:
        low, high = c.equivalence
        row |= {
            **_figures_of(c),
            "family": c.family,
            "p for family": c.p_adjusted,
            "p of equivalence for family": c.p_equivalence,
            "equivalence low": low,
            "equivalence high": high,
        }
    return row


def _hypothesis_cells(hypothesis: Hypothesis) -> dict[str, str]:
    """For readers; where the arms have no fold in common there are dashes."""
    c = hypothesis.contrast
    names = ("difference", "interval", "p", "trainings' share", "rank-biserial", "smallest detectable")
    if c is None:
        values = ("-",) * len(names)
    else:
        metric = METRICS[c.metric]
        signed = _number(metric, "+")
        interval = f"{signed(c.interval[0])} to {signed(c.interval[1])}"
        share = f"{100 * c.trainings_share:.0f} %" if c.trainings_known else "not known"
        found = _number(metric)(c.detectable)
        values = (signed(c.mean), interval, p_value(c.p_adjusted), share, f"{c.rank_biserial:+.2f}", found)
    return {**dict(zip(names, values, strict=True)), "verdict": hypothesis.verdict.kind.value}


def _latex_arms(analysis: Analysis) -> pd.DataFrame:
    rows = []
    for dataset in analysis.datasets:
        for position, arm in enumerate(dataset.arms):
            row = {"dataset": dataset.dataset, "configuration": dataset.configuration, "arm": arm}
            for name, metric in dataset.metrics.items():
                row[name] = _with_interval(metric, position)
            rows.append(row)
    return pd.DataFrame(rows, columns=["dataset", "configuration", "arm", *METRICS])


def _with_interval(metric: MetricAnalysis, position: int) -> str:
    number = _number(metric.metric)
    low, high = metric.intervals[:, position]
    return f"{number(metric.means[position])} [{number(low)}, {number(high)}]"


def _number(metric: Metric, sign: str = "") -> Callable[[float], str]:
    return lambda value: "-" if math.isnan(value) else f"{value:{sign}.{metric.decimals}f}"


def _render(
    experiment: Experiment,
    file: Path,
    folders: Folders,
    collected: Collected,
    analysis: Analysis,
    histories: operators.Histories,
) -> str:
    trainings = list_trainings(experiment, folders)
    records = {training: read_record(training, folders) for training in trainings}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(
        files("nnunet_deform.comparison.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=experiment.name,
        date=now(),
        version=__version__,
        summary=summary(analysis),
        cautions=_cautions(experiment, file, folders, collected, analysis, records),
        hypotheses=[
            (hypothesis, _hypothesis_cells(hypothesis), sentence(hypothesis, experiment.statistics.band))
            for hypothesis in analysis.hypotheses
        ],
        operators=[_operators_section(experiment, d, n, histories) for n, d in enumerate(analysis.datasets)],
        operator_cautions=[
            operators.caution(
                experiment, operators.of_dataset(histories, h.dataset, h.configuration), h.first, h.second
            )
            for h in analysis.hypotheses
        ],
        experiment=experiment,
        experiment_text=file.read_text(encoding="utf-8"),
        p_value=p_value,
        datasets=[
            _dataset_section(experiment, dataset, analysis.hypotheses, number, collected, trainings, folders)
            for number, dataset in enumerate(analysis.datasets)
        ],
        provenance=_provenance(records),
        packages=", ".join(f"{name} {version(name)}" for name in ("monai", "scipy", "numpy", "pandas")),
        file=file.name,
        commands=_commands(experiment, folders, collected, records),
    )


def _commands(
    experiment: Experiment, folders: Folders, collected: Collected, records: Mapping[Training, Record | None]
) -> list[str]:
    """nnU-Net's, of all trainings and of the test sets that have scores."""
    found = [command for record in records.values() if record for command in record.commands]
    tested = set(zip(*(collected.test[key] for key in ("dataset", "configuration", "arm", "seed")), strict=True))
    for training in records:
        key = (training.dataset, training.configuration, training.arm, training.seed)
        if key in tested and training.fold == experiment.folds[0]:
            dataset = find_dataset(experiment.dataset(training.dataset, training.configuration), folders)
            commands = test_commands(experiment, training, dataset, folders)
            found += [" ".join(_portable(argument, folders) for argument in command) for command in commands]
    return found


def _portable(argument: str, folders: Folders) -> str:
    """Quoted for a shell, without what only this machine has in its paths."""
    for name, folder in (("output", folders.output), ("nnUNet_raw", folders.raw)):
        if Path(argument).is_relative_to(folder):
            return f'"${name}"/{shlex.quote(Path(argument).relative_to(folder).as_posix())}'
    return shlex.quote(argument)


def _declared_when(experiment: Experiment, file: Path, folders: Folders, records: Iterable[Record | None]) -> str:
    content = declaration(experiment, file)
    stored = read_declaration(folders.output)
    if stored is None:
        return (
            "Nothing shows that all this was declared before the first training: "
            f"{folders.output / 'declared.json'} is missing or was changed."
        )
    date, sha256, declared = stored
    when = f"on {date} (SHA-256 {sha256[:12]})"
    first = min((record.started for record in records if record), default=None)
    if first is not None and first < date:
        when += f", AFTER the first training had begun ({first}). What is decided below was not decided in advance."
    elif digest(content) == sha256:
        when += ", before the first training."
    else:
        when += ", before the first training, and CHANGED afterwards. What is decided below was not decided in advance."
    changes = differences(declared, content)
    return f"What is compared was declared {when}" + "".join(f" {change}." for change in changes)


def _cautions(
    experiment: Experiment,
    file: Path,
    folders: Folders,
    collected: Collected,
    analysis: Analysis,
    records: Mapping[Training, Record | None],
) -> list[str]:
    """What a reader must know before the figures."""
    found = [_declared_when(experiment, file, folders, records.values())]
    epochs = experiment.budget.epochs or _NNUNETS_EPOCHS
    iterations = experiment.budget.iterations or _NNUNETS_ITERATIONS
    share = epochs * iterations / (_NNUNETS_EPOCHS * _NNUNETS_ITERATIONS)
    if share < 1:
        found.append(
            f"Trainings were of {epochs} epochs of {iterations} iterations, {share:.2g} of nnU-Net's own "
            f"{_NNUNETS_EPOCHS} of {_NNUNETS_ITERATIONS}. What is found holds for this budget: an arm that learns "
            "slowly at first may be better in the end."
        )
    for training, why in collected.missing.items():
        found.append(f"No scores of {training}: {why}.")
    for dataset in analysis.datasets:
        for arm, why in dataset.incomplete.items():
            found.append(f"{arm} is left out of all but the hypotheses on {dataset.title}: {why}.")
        if few := few_trainings(dataset):
            found.append(
                f"{dataset.title}: {', '.join(few)} {'has' if len(few) == 1 else 'have'} too few repeated trainings, "
                "so nothing is decided about them: how much their trainings differ by chance is not known. Trainings "
                f"beyond the first of each fold must be at least {REQUIRED_TRAINING_FREEDOM}."
            )
        found += _failed_trainings(dataset)
        found += _not_tested_or_measured(experiment, dataset, collected, records, folders)
    found.append(
        "Out-of-fold scores of different folds come from trainings that share most of their cases; tests and intervals "
        "count patients and trainings as independent, as is usual, and say nothing about other datasets."
    )
    return found


def _failed_trainings(dataset: DatasetAnalysis) -> list[str]:
    """Arms that hardly learned a class: figures of theirs are no figures of a method."""
    found = []
    for arm, classes in dataset.failed.items():
        reached = ", ".join(f"{dice:.4f} ({label})" for label, dice in classes.items())
        found.append(
            f"{dataset.title}: {arm} reaches a mean Dice of {reached}, at most a tenth of the best arm's, so its "
            "training failed or was too short. Differences from it say nothing about networks; the spread between "
            "methods and between seeds below is that of the other arms."
        )
    return found


def _not_tested_or_measured(
    experiment: Experiment,
    dataset: DatasetAnalysis,
    collected: Collected,
    records: Mapping[Training, Record | None],
    folders: Folders,
) -> list[str]:
    """Complete arms whose test predictions or cost are missing."""
    of_arm = _first_trainings(experiment, dataset, records)
    asked = experiment.dataset(dataset.dataset, dataset.configuration).test
    tested = _rows_of(dataset, collected.test).groupby("arm")["case"].agg(frozenset)
    found = []
    lacking = {
        "test scores (compare run predicts with the folds as they are)": [
            arm for arm in dataset.arms if asked and arm not in tested.index
        ],
        "cost (compare run measures it)": [arm for arm in dataset.arms if read_cost(of_arm[arm], folders) is None],
    }
    for what, arms in lacking.items():
        if arms:
            found.append(f"{dataset.title}: {', '.join(arms)} {'has' if len(arms) == 1 else 'have'} no {what}.")
    if tested.nunique() > 1:
        found.append(f"{dataset.title}: the arms' test scores are of different cases, so they cannot be compared.")
    return found


def _rows_of(dataset: DatasetAnalysis, table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["dataset"] == dataset.dataset) & (table["configuration"] == dataset.configuration)]


def _first_trainings(
    experiment: Experiment, dataset: DatasetAnalysis, trainings: Iterable[Training]
) -> dict[str, Training]:
    """Each arm's training of the first fold with the first seed."""
    return {
        t.arm: t
        for t in trainings
        if (t.dataset, t.configuration) == (dataset.dataset, dataset.configuration)
        and (t.seed, t.fold) == (experiment.seeds.first, experiment.folds[0])
    }


def _dataset_section(
    experiment: Experiment,
    dataset: DatasetAnalysis,
    hypotheses: Sequence[Hypothesis],
    number: int,
    collected: Collected,
    trainings: list[Training],
    folders: Folders,
) -> dict[str, Any]:
    mine = [t for t in trainings if (t.dataset, t.configuration) == (dataset.dataset, dataset.configuration)]
    of_arm = _first_trainings(experiment, dataset, mine)
    costs = {arm: cost for arm, training in of_arm.items() if (cost := read_cost(training, folders)) is not None}
    section: dict[str, Any] = {
        "analysis": dataset,
        "title": dataset.title,
        "metrics": [],
        "costs": [(arm.name, _cost_cells(costs[arm.name])) for arm in experiment.arms if arm.name in costs],
        "test": _test_rows(experiment, dataset, collected.test),
    }
    curves = {
        arm: [curve for t in mine if t.arm == arm and (curve := figures.read_curve(t.folder(folders.results)))[0]]
        for arm in of_arm
    }
    arms = [arm.name for arm in experiment.arms]
    if any(curves.values()):
        section["curves"] = figures.learning_curves(arms, curves, f"curves{number}")
    if not dataset.arms:
        return section
    declared = {
        (h.first, h.second): h.contrast
        for h in hypotheses
        if (h.dataset, h.configuration) == (dataset.dataset, dataset.configuration)
    }
    primary = dataset.metrics[experiment.primary]
    section["primary"] = primary
    for name, metric in dataset.metrics.items():
        prefix = f"{name}{number}"
        is_primary = name == experiment.primary
        section["metrics"].append(
            {
                "metric": metric,
                "number": _number(metric.metric),
                "signed": _number(metric.metric, "+"),
                "with_interval": [_with_interval(metric, position) for position in range(len(dataset.arms))],
                "distributions": figures.distributions(dataset, metric, f"distributions-{prefix}"),
                "differences": figures.paired_differences(
                    dataset,
                    metric,
                    {pair: declared.get(pair) if is_primary else None for pair in experiment.hypotheses},
                    experiment.statistics.band if is_primary else None,
                    f"differences-{prefix}",
                ),
            }
        )
    if primary.ranking is not None:
        section["ranking"] = figures.ranking_stability(dataset.arms, primary.ranking, f"ranking-{number}")
    if set(costs) & set(dataset.arms):
        section["pareto"] = figures.pareto(dataset, primary, costs, f"pareto-{number}")
    section["overlays"] = _overlays(dataset, primary, of_arm, folders, experiment)
    return section


def _operators_section(
    experiment: Experiment, dataset: DatasetAnalysis, number: int, histories: operators.Histories
) -> dict[str, Any] | None:
    """What the operators of a dataset's arms did, and which contrasts are empty; None where no arm wrote of any."""
    mine = operators.of_dataset(histories, dataset.dataset, dataset.configuration)
    arms = [arm.name for arm in experiment.arms]
    panels = [(m.title, m.threshold, curves) for m in operators.MEASURES if (curves := operators.curves(mine, m))]
    if not panels:
        return None
    return {
        "figure": figures.operator_values(arms, panels, f"operators{number}"),
        "rows": operators.rows(mine, arms),
        "cautions": operators.cautions(experiment, mine, arms),
    }


def _cost_cells(cost: Cost) -> list[str]:
    return [
        f"{cost.parameters / 1e6:.3f}",
        f"{cost.macs / 1e9:.2f}",
        f"{cost.peak_bytes / 1e9:.2f}",
        f"{cost.seconds_per_iteration:.3g}",
        f"{cost.seconds_per_case:.3g}",
    ]


def _test_rows(
    experiment: Experiment, dataset: DatasetAnalysis, test: pd.DataFrame
) -> list[tuple[str, int, int, list[str]]]:
    """Arm, numbers of cases and of patients, and each metric's mean with its interval."""
    table = _rows_of(dataset, test)
    rows = []
    for arm in dict.fromkeys(table["arm"]):
        mine = table[table["arm"] == arm].fillna({name: metric.perfect for name, metric in METRICS.items()})
        of_cases = mine.groupby(["case", "patient"])[list(METRICS)].mean()
        patients = list(of_cases.index.get_level_values("patient"))
        of_patients = of_cases.groupby("patient").mean().to_numpy(dtype=float)
        result = estimate([of_patients.T[:, :, None]])
        low, high = result.interval(experiment.statistics.alpha)
        cells = []
        for position, metric in enumerate(METRICS.values()):
            number = _number(metric)
            cells.append(f"{number(float(result.mean[position]))} [{number(low[position])}, {number(high[position])}]")
        rows.append((arm, len(of_cases), len(set(patients)), cells))
    return rows


def _overlays(
    dataset: DatasetAnalysis,
    primary: MetricAnalysis,
    of_arm: dict[str, Training],
    folders: Folders,
    experiment: Experiment,
) -> list[dict[str, Any]]:
    """The worst and the median case by the arms' mean score, one slice of each arm's prediction."""
    found = find_dataset(experiment.dataset(dataset.dataset, dataset.configuration), folders)
    scored = np.flatnonzero(~np.isnan(primary.scores).all(axis=0))
    if not scored.size:
        return []
    mean = np.nanmean(primary.scores[:, scored], axis=0)
    order = scored[np.argsort(mean if primary.metric.higher_is_better else -mean)]
    fold_of = {
        case: fold
        for fold, split in enumerate(read_json(found.splits_file))
        for case in split["val"]
        if fold in experiment.folds
    }
    rows = []
    for title, position in (("worst", order[0]), ("median", order[len(order) // 2])):
        case = dataset.cases[position]
        pictures = []
        for index, arm in enumerate(dataset.arms):
            training = of_arm[arm]
            folder = training.model_folder(folders.results) / f"fold_{fold_of[case]}" / "validation"
            pictures.append(
                {
                    "arm": arm,
                    "score": _number(primary.metric)(primary.scores[index, position]),
                    "url": _picture(found, training, case, folder),
                }
            )
        rows.append({"title": title, "case": case, "pictures": pictures})
    return rows


def _picture(found: DatasetFolders, training: Training, case: str, predictions: Path) -> str | None:
    """None where the prediction was deleted, to save space perhaps."""
    if not (predictions / f"{case}{found.file_ending}").exists():
        return None
    reader = PlansManager(str(found.plans_file(training.plans))).image_reader_writer_class()
    ending = found.file_ending
    channel = found.raw / "imagesTr" / f"{case}_0000{ending}"
    if not channel.exists():  # a dataset that lists its files elsewhere
        channel = Path(read_json(found.raw / "dataset.json")["dataset"][case]["images"][0])
    image, properties = reader.read_images([str(channel)])
    truth, _ = reader.read_seg(str(found.raw / "labelsTr" / f"{case}{ending}"))
    prediction, _ = reader.read_seg(str(predictions / f"{case}{ending}"))
    wanted = truth[0] > 0 if found.ignore_label is None else (truth[0] > 0) & (truth[0] != found.ignore_label)
    slice_index = int(wanted.sum(axis=(1, 2)).argmax()) if wanted.any() else truth.shape[1] // 2
    labels = sorted({v for value in found.labels.values() for v in ([value] if isinstance(value, int) else value)})
    spacing = properties["spacing"][1:]
    return figures.overlay(image[0, slice_index], truth[0, slice_index], prediction[0, slice_index], labels, spacing)


def _provenance(records: Mapping[Training, Record | None]) -> list[dict[str, Any]]:
    """What trainings were made from: one row for all that agree."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for training, record in records.items():
        if record is not None:
            versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
            key = (training.dataset, training.plans, record.splits, record.plans, record.dataset, versions)
            rows.setdefault((*key, record.machine), []).append(training.arm)
    names = ("dataset", "plans", "splits_hash", "plans_hash", "dataset_hash", "versions", "machine")
    return [
        {**dict(zip(names, key, strict=True)), "count": len(arms), "arms": ", ".join(dict.fromkeys(arms))}
        for key, arms in rows.items()
    ]
