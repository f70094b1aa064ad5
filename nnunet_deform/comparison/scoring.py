"""All metrics of files with predictions and files with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json

from nnunet_deform.comparison.files import read_json
from nnunet_deform.comparison.metrics import METRICS, Region, Structure

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ScoringError(ValueError):
    """Files that cannot be scored against each other; one sentence."""


@dataclass(frozen=True)
class Classes:
    """What a dataset.json says of labels.

    labels: value of each class, or values of each region, by name, without background and ignore label;
    ignore_label: of voxels that do not count, in either mask.
    """

    labels: Mapping[str, Region]
    ignore_label: int | None = None

    @property
    def values(self) -> list[int]:
        """Of all files, background included."""
        found = {0} if self.ignore_label is None else {0, self.ignore_label}
        for value in self.labels.values():
            found |= {value} if isinstance(value, int) else set(value)
        return sorted(found)


@dataclass(frozen=True)
class Description:
    """What a dataset.json says, or files without one do. reader: nnU-Net's for the dataset's files."""

    classes: Classes
    file_ending: str
    reader: BaseReaderWriter


def read_description(file: Path) -> Description:
    """
    Raises:
        ScoringError: it is no dataset.json of nnU-Net.
    """
    try:
        content = read_json(file)
        labels = {
            str(name): tuple(int(v) for v in value) if isinstance(value, list) else int(value)
            for name, value in content["labels"].items()
            if name not in ("background", "ignore")
        }
        ignore = int(content["labels"]["ignore"]) if "ignore" in content["labels"] else None
        ending = content["file_ending"]
        reader = determine_reader_writer_from_dataset_json(content, verbose=False)()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ScoringError(f"{file} is no dataset.json of nnU-Net ({type(error).__name__}: {error}).") from None
    return Description(Classes(labels, ignore), ending, reader)


@dataclass(frozen=True)
class CaseFiles:
    """One case's labels and prediction."""

    case: str
    truth: Path
    prediction: Path


def score_columns() -> list[str]:
    """Of a table of scores, without what tells trainings and datasets apart."""
    return ["case", "label", *METRICS, "voxels_truth", "voxels_prediction"]


def read_labels(file: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, tuple[float, ...]]:
    """
    Returns:
        [Z, Y, X], and the spacing in mm.

    Raises:
        ScoringError: it cannot be read.
    """
    try:
        array, properties = reader.read_seg(str(file))
    except (OSError, RuntimeError, ValueError):
        raise ScoringError(f"cannot read {file}, which is no image or a damaged one.") from None
    return array[0], tuple(float(step) for step in properties["spacing"])


def score_case(
    files: CaseFiles, *, reader: BaseReaderWriter, classes: Classes, tolerances: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a class, with every metric.

    Args:
        reader: nnU-Net's for these files.
        tolerances: of each class, mm.

    Raises:
        ScoringError: a file cannot be read or has values that are no labels, or the two are of different size or
            spacing.
    """
    truth, spacing = read_labels(files.truth, reader)
    prediction, other_spacing = read_labels(files.prediction, reader)
    if truth.shape != prediction.shape:
        raise ScoringError(
            f"{files.prediction} has {_size(prediction.shape)} voxels and {files.truth} {_size(truth.shape)}; predict "
            "in the labels' space."
        )
    if not np.allclose(spacing, other_spacing, rtol=1e-3):
        raise ScoringError(
            f"{files.prediction} has voxels of {_size(other_spacing)} mm and {files.truth} of {_size(spacing)} mm; one "
            "of the two is of another image."
        )
    for file, array in ((files.truth, truth), (files.prediction, prediction)):
        if foreign := _foreign_values(array, classes):
            raise ScoringError(
                f"{file} has the value {foreign[0]:g}, which is not a label; those of dataset.json are "
                f"{', '.join(map(str, classes.values))}."
            )
    valid = np.ones(truth.shape, dtype=bool) if classes.ignore_label is None else truth != classes.ignore_label
    rows = []
    for name, region in classes.labels.items():
        masks = [region_or_label_to_mask(array, region) & valid for array in (truth, prediction)]
        structure = Structure(*masks, spacing, tolerances[name])
        rows.append(
            {
                "case": files.case,
                "label": name,
                **{name: metric.of(structure) for name, metric in METRICS.items()},
                "voxels_truth": np.count_nonzero(structure.truth),
                "voxels_prediction": np.count_nonzero(structure.prediction),
            }
        )
    return rows


def _foreign_values(array: np.ndarray, classes: Classes) -> list[float]:
    known = np.zeros(array.shape, dtype=bool)
    for value in classes.values:
        known |= array == value
    return [] if known.all() else np.unique(array[~known]).tolist()


def _size(lengths: Sequence[float]) -> str:
    return " x ".join(f"{length:g}" for length in lengths)


def _nothing() -> None:
    pass


def _each(
    function: Callable[[_Item], _Result], items: Sequence[_Item], processes: int, on_each: Callable[[], None]
) -> list[_Result]:
    found = []
    processes = min(processes, len(items))
    if processes > 1:
        with get_context("spawn").Pool(processes) as pool:
            for result in pool.imap(function, items):
                found.append(result)
                on_each()
        return found
    for item in items:
        found.append(function(item))
        on_each()
    return found


def score_files(
    cases: Sequence[CaseFiles],
    *,
    reader: BaseReaderWriter,
    classes: Classes,
    tolerances: Mapping[str, float],
    processes: int = 1,
    on_case: Callable[[], None] = _nothing,
) -> pd.DataFrame:
    """
    Args:
        on_case: called after each case.

    Returns:
        :func:`score_columns`; one row a case and class, in this order.

    Raises:
        ScoringError: see :func:`score_case`.
    """
    score = partial(score_case, reader=reader, classes=classes, tolerances=tolerances)
    scored = _each(score, cases, processes, on_case)
    return pd.DataFrame([row for rows in scored for row in rows], columns=score_columns())


def summarised_files(summary: Path, file_ending: str) -> list[CaseFiles]:
    """What a summary.json of nnU-Net is about. The folder may have been moved since: predictions lie beside it."""
    found = []
    for entry in load_summary_json(str(summary))["metric_per_case"]:
        prediction = summary.parent / Path(entry["prediction_file"]).name
        case = prediction.name.removesuffix(file_ending)
        found.append(CaseFiles(case, Path(entry["reference_file"]), prediction))
    return found


def files_of_cases(folder: Path, file_ending: str) -> dict[str, Path]:
    """By case, sorted."""
    return {file.name.removesuffix(file_ending): file for file in sorted(folder.glob(f"*{file_ending}"))}


def pair_files(predictions: Mapping[str, Path], labels: Path, file_ending: str) -> list[CaseFiles]:
    """
    Raises:
        ScoringError: a prediction has no labels.
    """
    without = [case for case in predictions if not (labels / f"{case}{file_ending}").is_file()]
    if without:
        raise ScoringError(f"{labels} has no labels of {some(without)}, of which there are predictions.")
    return [CaseFiles(case, labels / file.name, file) for case, file in predictions.items()]


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def parse_tolerances(stated: Sequence[str], labels: Sequence[str]) -> dict[str, float] | None:
    """
    Args:
        stated: nothing, one number of mm for all classes, or ``class=mm`` for each.

    Returns:
        None where nothing is stated.

    Raises:
        ScoringError: it is none of these.
    """
    if not stated:
        return None
    named = [part.rpartition("=") for part in stated]
    try:
        found = {name: float(number) for name, _, number in named}
    except ValueError:
        found = {}
    if list(found) == [""]:
        found = dict.fromkeys(labels, found[""])
    if set(found) != set(labels) or len(named) != len(set(named)) or not all(0 < mm < np.inf for mm in found.values()):
        wanted = " ".join(f"{name}=MM" for name in labels)
        raise ScoringError(f"the tolerance {' '.join(stated)} is neither one number of mm nor {wanted}.")
    return found


def default_tolerance(
    plans: Path | None, labels: Sequence[Path], reader: BaseReaderWriter, processes: int = 1
) -> float:
    """The smallest voxel side of the median spacing, in mm.

    Args:
        plans: nnU-Net's, which know the training cases' median spacing; without them it is that of ``labels``.
    """
    if plans is not None:
        return float(min(read_json(plans)["original_median_spacing_after_transp"]))
    spacings = _each(partial(_spacing, reader=reader), labels, processes, _nothing)
    return float(np.median(spacings, axis=0).min())


def _spacing(file: Path, *, reader: BaseReaderWriter) -> tuple[float, ...]:
    return read_labels(file, reader)[1]


@dataclass(frozen=True)
class ScoredFolder:
    """table: of :func:`score_files`; tolerances: of each class, mm; unpredicted: cases that have labels only."""

    table: pd.DataFrame
    tolerances: Mapping[str, float]
    unpredicted: tuple[str, ...]


def score_folder(
    predictions: Path,
    labels: Path,
    *,
    dataset_json: Path | None = None,
    tolerance: Sequence[str] = (),
    processes: int = 1,
    on_case: Callable[[], None] = _nothing,
) -> ScoredFolder:
    """Every prediction in a folder, against the file of the same name in another.

    Args:
        dataset_json: see :func:`describe_folder`.
        tolerance: see :func:`parse_tolerances`; the default is that of :func:`default_tolerance`.

    Raises:
        ScoringError: see there, :func:`score_case` and :func:`pair_files`.
    """
    description = describe_folder(predictions, labels, dataset_json, processes)
    ending, reader = description.file_ending, description.reader
    found = files_of_cases(predictions, ending)
    if not found:
        raise ScoringError(f"{predictions} has no prediction, no *{ending} file.")
    cases = pair_files(found, labels, ending)
    names = list(description.classes.labels)
    tolerances = parse_tolerances(tolerance, names)
    if tolerances is None:
        plans = predictions / "plans.json"
        truths = [files.truth for files in cases]
        default = default_tolerance(plans if plans.is_file() else None, truths, reader, processes)
        tolerances = dict.fromkeys(names, default)
    table = score_files(
        cases,
        reader=reader,
        classes=description.classes,
        tolerances=tolerances,
        processes=processes,
        on_case=on_case,
    )
    return ScoredFolder(table, tolerances, tuple(case for case in files_of_cases(labels, ending) if case not in found))


def describe_folder(predictions: Path, labels: Path, dataset_json: Path | None, processes: int = 1) -> Description:
    """
    Args:
        dataset_json: None is that in the folder of predictions or of labels, or in the one above the latter; without
            any, every value but 0 in the labels is a class, named by its number.

    Raises:
        ScoringError: it cannot be read, or the folders do not exist, or nothing tells their files' ending.
    """
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise ScoringError(f"there is no folder {folder}.")
    places = [predictions, labels, labels.resolve().parent]
    candidates = [dataset_json] if dataset_json is not None else [place / "dataset.json" for place in places]
    for file in candidates:
        if dataset_json is not None or file.is_file():
            return read_description(file)
    known = {ending: reader for reader in LIST_OF_IO_CLASSES[::-1] for ending in reader.supported_file_endings}
    endings = sorted({e for e in known if any(labels.glob(f"*{e}")) and any(predictions.glob(f"*{e}"))}, key=len)
    # *.gz would match *.nii.gz as well, so the longest.
    if not endings:
        raise ScoringError(f"{predictions} and {labels} have no images of the same sort.")
    ending = endings[-1]
    reader = known[ending]()
    found = files_of_cases(predictions, ending)
    truths = [labels / file.name for file in found.values() if (labels / file.name).is_file()]
    values = sorted(set().union(*_each(partial(_values, reader=reader), truths, processes, _nothing)) - {0})
    if not values:
        raise ScoringError(f"the labels in {labels} are all 0; give --dataset-json to say which classes there are.")
    return Description(Classes({f"{value:g}": int(value) for value in values}), ending, reader)


def _values(file: Path, *, reader: BaseReaderWriter) -> set[float]:
    return set(np.unique(read_labels(file, reader)[0]).tolist())
