"""Results trained elsewhere, nnU-Net's model folders or folders of predictions, as one table of scores."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_deform.comparison.collect import columns
from nnunet_deform.comparison.design import Design
from nnunet_deform.comparison.experiment import MOST_HYPOTHESES
from nnunet_deform.comparison.files import read_json
from nnunet_deform.comparison.metrics import METRICS
from nnunet_deform.comparison.scoring import (
    CaseFiles,
    Description,
    default_tolerance,
    describe_folder,
    files_of_cases,
    pair_files,
    parse_tolerances,
    read_description,
    score_files,
    some,
    summarised_files,
)
from nnunet_deform.comparison.splits import load_patients

_SEED = re.compile(r"_seed(\d+)(?=_|$)")
_FOLD = re.compile(r"fold_(\d+)")
# Of the ranking's bootstrap, as in an experiment file that says nothing of it.
_DRAWS, _BOOTSTRAP_SEED, _ALPHA = 10_000, 0, 0.05
PREDICTIONS = "predictions"
"""In the place of a configuration, where there is none."""


class ResultsError(ValueError):
    """Results that cannot be compared; one sentence."""


@dataclass(frozen=True)
class Source:
    """One folder of the command line: the predictions of one training of each fold.

    trainer, plans: without the seed's suffix, empty for a folder of predictions; seed: by the trainer's name;
    folds: predictions by case, fold by fold; one fold 0 in a folder of predictions.
    """

    folder: Path
    dataset: str
    configuration: str
    description: Description
    folds: Mapping[int, Mapping[str, Path]]
    trainer: str = ""
    plans: str = ""
    seed: int | None = None

    @property
    def is_model(self) -> bool:
        return bool(self.trainer)

    def fold_folder(self, fold: int) -> Path:
        return self.folder / f"fold_{fold}"


@dataclass(frozen=True)
class ResultTraining:
    """A source as one of an arm's trainings."""

    arm: str
    seed: int
    source: Source


@dataclass(frozen=True)
class Results:
    """What is compared, checked and not yet scored.

    trainings: in the order of the command line; labels: folder of the truth; files: of each training, by its number,
    and fold; tolerances: of NSD, of each class in mm; patients: of each case; cautions: what a reader must know.
    """

    dataset: str
    configuration: str
    description: Description
    design: Design
    trainings: tuple[ResultTraining, ...]
    labels: Path
    files: Mapping[tuple[int, int], Sequence[CaseFiles]]
    tolerances: Mapping[str, float]
    patients: Mapping[str, str]
    patients_given: bool
    cautions: tuple[str, ...]


def find_dataset_name(identifier: str) -> str:
    """The full name of a dataset of nnU-Net's folders.

    Raises:
        ResultsError: none has it, or several.
    """
    pattern = f"Dataset{int(identifier):03d}_*" if identifier.isdigit() else identifier
    folders = [Path(os.environ[v]) for v in _VARIABLES if os.environ.get(v)]
    names = sorted({path.name for folder in folders for path in folder.glob(pattern) if path.is_dir()})
    if len(names) != 1:
        found = f"has {len(names)} datasets" if names else "has no dataset"
        where = ", ".join(map(str, folders)) or f"none of {', '.join(_VARIABLES)}, which are not set,"
        raise ResultsError(f"{where} {found} {pattern}.")
    return names[0]


_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def _in_nnunet(variable: str, *parts: str) -> Path | None:
    """A file or folder in one of nnU-Net's folders, None where it does not exist."""
    path = Path(os.environ[variable], *parts) if os.environ.get(variable) else None
    return path if path is not None and path.exists() else None


def read_source(
    given: Path, *, dataset: str | None, labels: Path | None, dataset_json: Path | None, folds: Sequence[int]
) -> Source:
    """A model folder of nnU-Net (the default), or with ``labels`` and no fold in it a folder of predictions.

    Args:
        given: its path, or of a model its name alone where ``dataset`` is named.
        folds: which to use, all where empty.

    Raises:
        ResultsError, ScoringError: it is neither, or incomplete.
    """
    folder = given
    if not given.is_dir() and dataset is not None:
        folder = _in_nnunet("nnUNet_results", dataset, str(given)) or given
    if not folder.is_dir():
        raise ResultsError(f"there is no folder {given}.")
    folder = Path(os.path.abspath(folder))  # "." has no name, and a link its own
    if any(_FOLD.fullmatch(path.name) or path.name == "fold_all" for path in folder.iterdir()):
        return _read_model(folder, folds)
    if labels is None:
        raise ResultsError(
            f"{given} is not a model folder of nnU-Net: it has no fold_0 or other fold; for a folder of predictions "
            "give the folder of labels with --labels."
        )
    if folds:
        raise ResultsError(f"{given} is a folder of predictions, which has no folds; leave --fold out.")
    if dataset_json is None and dataset is not None and not (folder / "dataset.json").is_file():
        dataset_json = _in_nnunet("nnUNet_raw", dataset, "dataset.json")
    description = describe_folder(folder, labels, dataset_json)
    found = files_of_cases(folder, description.file_ending)
    if not found:
        raise ResultsError(f"{given} has no prediction, no *{description.file_ending} file.")
    known = _dataset_of(folder) if (folder / "plans.json").is_file() else labels.resolve().parent.name
    return Source(folder, dataset or known, PREDICTIONS, description, {0: found})


def _read_model(folder: Path, folds: Sequence[int]) -> Source:
    parts = folder.name.split("__")
    if len(parts) != 3:
        raise ResultsError(
            f"{folder} is not named <trainer>__<plans>__<configuration>, as nnU-Net's model folders are."
        )
    for name in ("dataset.json", "plans.json"):
        if not (folder / name).is_file():
            raise ResultsError(f"{folder} has no {name}, which nnU-Net writes into every model folder.")
    description = read_description(folder / "dataset.json")
    there = sorted(int(found[1]) for path in folder.iterdir() if (found := _FOLD.fullmatch(path.name)))
    if not there:
        raise ResultsError(
            f"{folder} has only fold_all, which was trained on every case: nothing is left to score it on."
        )
    if lacking := [fold for fold in folds if fold not in there]:
        raise ResultsError(f"{folder} has no fold_{lacking[0]}; its folds are {', '.join(map(str, there))}.")
    predictions = {fold: _validated(folder / f"fold_{fold}", description.file_ending) for fold in folds or there}
    seen: dict[str, int] = {}
    for fold, cases in predictions.items():
        for case in cases:
            if case in seen:
                raise ResultsError(f"{folder} validates {case} in fold {seen[case]} and in fold {fold}.")
            seen[case] = fold
    trainer, plans, configuration = parts
    seed = _SEED.search(trainer)
    return Source(
        folder=folder,
        dataset=_dataset_of(folder),
        configuration=configuration,
        description=description,
        folds=predictions,
        trainer=_SEED.sub("", trainer),
        plans=plans,
        seed=int(seed[1]) if seed else None,
    )


def _dataset_of(folder: Path) -> str:
    try:
        return str(read_json(folder / "plans.json")["dataset_name"])
    except (ValueError, KeyError, TypeError):
        raise ResultsError(f"{folder / 'plans.json'} is no plan of nnU-Net, it names no dataset.") from None


def _validated(fold: Path, ending: str) -> dict[str, Path]:
    summary = fold / "validation" / "summary.json"
    if not summary.is_file():
        raise ResultsError(
            f"{summary} does not exist, so the fold is not validated to its end; nnUNetv2_train with --val does that, "
            "and --fold chooses other folds."
        )
    found = files_of_cases(summary.parent, ending)
    try:
        listed = [files.case for files in summarised_files(summary, ending)]
    except (ValueError, KeyError, TypeError):
        raise ResultsError(f"{summary} is no summary of nnU-Net; nnUNetv2_train with --val writes it anew.") from None
    if gone := [case for case in listed if case not in found]:
        raise ResultsError(f"{summary.parent} no longer has the predictions of {some(gone)}.")
    return {case: found[case] for case in sorted(listed)}


def name_arms(sources: Sequence[Source], names: Sequence[str]) -> list[ResultTraining]:
    """The same trainer, plans and configuration but for the seed is one arm, as are folders of the same name.

    Args:
        names: one a source, or none: then the shortest part of the folders' names that tells arms apart.

    Raises:
        ResultsError: too few or too many names or arms, or a training twice.
    """
    if names and len(names) != len(sources):
        raise ResultsError(f"{len(names)} times --name for {len(sources)} folders; give one for each, or none.")
    for position, source in enumerate(sources):
        if source.folder in [other.folder for other in sources[:position]]:
            raise ResultsError(f"{source.folder} is given twice.")
    arms = list(names) or _shortest([_parts(source) for source in sources])
    trainings: list[ResultTraining] = []
    for arm, source in zip(arms, sources, strict=True):
        taken = {t.seed for t in trainings if t.arm == arm}
        if source.seed is not None and source.seed in taken:
            raise ResultsError(f"{arm} has seed {source.seed} twice, the second time in {source.folder}.")
        free = next(number for number in range(len(sources) + 1) if number not in taken)
        trainings.append(ResultTraining(arm, free if source.seed is None else source.seed, source))
    distinct = list(dict.fromkeys(arms))
    if len(distinct) < 2:
        raise ResultsError(f"all folders are trainings of one arm, {distinct[0]}; give others to compare it with.")
    if len(distinct) - 1 > MOST_HYPOTHESES:
        raise ResultsError(
            f"{len(distinct)} arms; each is compared with the first, and more than {MOST_HYPOTHESES} comparisons share "
            "alpha, so that hardly any can be decided."
        )
    return trainings


def _parts(source: Source) -> tuple[str, ...]:
    return (source.trainer, source.plans, source.configuration) if source.is_model else source.folder.parts[::-1]


def _shortest(parts: Sequence[tuple[str, ...]]) -> list[str]:
    lengths = range(1, max(map(len, parts)) + 1)
    length = next(n for n in lengths if len({part[:n] for part in parts}) == len(set(parts)))
    return ["-".join(part[:length]) for part in parts]


def find_results(
    folders: Sequence[Path],
    *,
    dataset: str | None = None,
    labels: Path | None = None,
    dataset_json: Path | None = None,
    names: Sequence[str] = (),
    folds: Sequence[int] = (),
    patients: Path | None = None,
    primary: str = "Dice",
    band: float | None = None,
    tolerance: Sequence[str] = (),
    processes: int = 1,
) -> Results:
    """Check that folders may be compared; the first is the baseline of all others.

    Args:
        dataset: number or name, of nnU-Net's folders.
        labels: folder of the truth; for model folders the default is nnUNet_preprocessed's gt_segmentations, what
            nnU-Net itself evaluates on, or nnUNet_raw's labelsTr.
        tolerance: see :func:`scoring.parse_tolerances`; the default is that of the first folder's plans.

    Raises:
        ResultsError, ScoringError, SplitError: they may not, in one sentence.
    """
    if len(folders) < 2:
        raise ResultsError("give two folders or more; the first is what the others are compared with.")
    if primary not in METRICS:
        raise ResultsError(f"there is no metric {primary}; choose one of {', '.join(METRICS)}.")
    if band is not None and not 0 < band < np.inf:
        raise ResultsError(f"the band {band:g} is not a positive number.")
    full_name = None if dataset is None else find_dataset_name(dataset)
    sources = [
        read_source(path, dataset=full_name, labels=labels, dataset_json=dataset_json, folds=folds) for path in folders
    ]
    first = sources[0]
    for other in sources[1:]:
        _refuse_unlike(first, other)
    if full_name is not None and first.dataset != full_name:
        raise ResultsError(f"{first.folder} is of {first.dataset}, not of {full_name}.")
    trainings = name_arms(sources, names)
    common, cautions = _common_folds(trainings)
    of_folds = {fold: [source for source in sources if fold in source.folds] for fold in common}
    for fold, having in of_folds.items():
        for other in having[1:]:
            _refuse_other_cases(having[0], other, fold)
    if labels is None:
        labels = _find_labels(first.dataset)
    elif not labels.is_dir():
        raise ResultsError(f"there is no folder {labels}.")
    ending, reader = first.description.file_ending, first.description.reader
    files = {
        (number, fold): pair_files(source.folds[fold], labels, ending)
        for number, source in enumerate(sources)
        for fold in common
        if fold in source.folds
    }
    truths = {
        case: labels / file.name for fold, having in of_folds.items() for case, file in having[0].folds[fold].items()
    }
    known = None if patients is None else load_patients(patients, list(truths))
    classes = list(first.description.classes.labels)
    tolerances = parse_tolerances(tolerance, classes)
    if tolerances is None:
        plans = first.folder / "plans.json"
        default = default_tolerance(plans if plans.is_file() else None, list(truths.values()), reader, processes)
        tolerances = dict.fromkeys(classes, default)
    return Results(
        dataset=first.dataset,
        configuration=" and ".join(dict.fromkeys(source.configuration for source in sources)),
        description=first.description,
        design=_design(trainings, common, primary, band),
        trainings=tuple(trainings),
        labels=labels,
        files=files,
        tolerances=tolerances,
        patients=known or {case: case for case in truths},
        patients_given=known is not None,
        cautions=tuple(cautions),
    )


def _refuse_unlike(first: Source, other: Source) -> None:
    if first.is_model != other.is_model:
        model, predictions = (first, other) if first.is_model else (other, first)
        raise ResultsError(
            f"{model.folder} is a model folder and {predictions.folder} a folder of predictions; give only one kind."
        )
    if first.dataset != other.dataset:
        raise ResultsError(f"{first.folder} is of {first.dataset} and {other.folder} of {other.dataset}.")
    for what, mine, theirs in (
        ("classes", first.description.classes, other.description.classes),
        ("file ending", first.description.file_ending, other.description.file_ending),
    ):
        if mine != theirs:
            raise ResultsError(f"the dataset.json of {other.folder} has another {what} than that of {first.folder}.")


def _common_folds(trainings: Sequence[ResultTraining]) -> tuple[list[int], list[str]]:
    """Folds that every arm has, and in words those that not every arm has."""
    of_arms: dict[str, set[int]] = {}
    for training in trainings:
        of_arms.setdefault(training.arm, set()).update(training.source.folds)
    common = sorted(set.intersection(*of_arms.values()))
    if not common:
        which = "; ".join(f"{arm} has {', '.join(map(str, sorted(folds)))}" for arm, folds in of_arms.items())
        raise ResultsError(f"there is no fold that every arm has: {which}.")
    left = {arm: sorted(folds - set(common)) for arm, folds in of_arms.items()}
    return common, [
        f"Left out, because not every arm has it: fold {', '.join(map(str, folds))} of {arm}."
        for arm, folds in left.items()
        if folds
    ]


def _refuse_other_cases(first: Source, other: Source, fold: int) -> None:
    mine, theirs = first.folds[fold], other.folds[fold]
    where = f" in fold {fold}" if first.is_model else ""
    lacks = [
        f"{source.folder.name} lacks {some(missing)}"
        for source, missing in (
            (first, [case for case in theirs if case not in mine]),
            (other, [case for case in mine if case not in theirs]),
        )
        if missing
    ]
    if lacks:
        raise ResultsError(f"{first.folder.name} and {other.folder.name} have other cases{where}: {'; '.join(lacks)}.")


def _find_labels(dataset: str) -> Path:
    places = (("nnUNet_preprocessed", "gt_segmentations"), ("nnUNet_raw", "labelsTr"))
    for variable, name in places:
        if (found := _in_nnunet(variable, dataset, name)) is not None:
            return found
    raise ResultsError(
        f"there are no labels of {dataset}: neither nnUNet_preprocessed (gt_segmentations) nor nnUNet_raw (labelsTr) "
        "has them; give their folder with --labels."
    )


def images_of(results: Results) -> Path | None:
    """nnU-Net's folder of the images that were predicted, None where it is not there."""
    case = next(iter(results.patients))
    for part in ("imagesTr", "imagesTs"):
        folder = _in_nnunet("nnUNet_raw", results.dataset, part)
        if folder is not None and (folder / f"{case}_0000{results.description.file_ending}").exists():
            return folder
    return None


def _design(trainings: Sequence[ResultTraining], folds: Sequence[int], primary: str, band: float | None) -> Design:
    arms = tuple(dict.fromkeys(t.arm for t in trainings))
    bands = {name: metric.band for name, metric in METRICS.items()}
    return Design(
        arms=arms,
        folds=tuple(folds),
        seeds=tuple(sorted({t.seed for t in trainings})),
        hypotheses=tuple((arm, arms[0]) for arm in arms[1:]),
        paired_starts=frozenset(
            frozenset(pair) for pair in itertools.combinations(arms, 2) if _start_alike(trainings, *pair)
        ),
        primary=primary,
        alpha=_ALPHA,
        bands=bands if band is None else {**bands, primary: band},
        draws=_DRAWS,
        bootstrap_seed=_BOOTSTRAP_SEED,
    )


def _start_alike(trainings: Sequence[ResultTraining], first: str, second: str) -> bool:
    """By the names, see :meth:`Experiment.paired_starts`; only trainings with a seed can."""
    sources = [t.source for t in trainings if t.arm in (first, second)]
    networks = {(source.trainer.split("_")[0], source.plans, source.configuration) for source in sources}
    return len(networks) == 1 and all(source.seed is not None for source in sources)


def score_results(results: Results, *, processes: int = 1, on_case: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """
    Args:
        on_case: called after each of the cases.

    Returns:
        :func:`collect.columns`.

    Raises:
        ScoringError: see :func:`scoring.score_case`.
    """
    cases = [entry for entries in results.files.values() for entry in entries]
    description = results.description
    table = score_files(
        cases,
        reader=description.reader,
        classes=description.classes,
        tolerances=results.tolerances,
        processes=processes,
        on_case=on_case,
    )
    rows = len(description.classes.labels)
    counts = [rows * len(entries) for entries in results.files.values()]
    table = table.assign(
        dataset=results.dataset,
        configuration=results.configuration,
        arm=np.repeat([results.trainings[number].arm for number, _ in results.files], counts),
        seed=np.repeat([results.trainings[number].seed for number, _ in results.files], counts),
        fold=np.repeat([fold for _, fold in results.files], counts),
        patient=table["case"].map(results.patients),
    )
    return table[columns()]
