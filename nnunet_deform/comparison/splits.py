"""Cross-validation folds that never separate a patient, and the checks that an existing split must pass."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_deform.comparison.files import write_json

Split = dict[str, list[str]]


class SplitError(ValueError):
    """The folds cannot be made or used."""


def load_patients(file: Path, cases: Sequence[str], test_cases: Sequence[str] = ()) -> dict[str, str]:
    """The patient of each case, from JSON (``{"case": "patient"}``) or CSV (columns case and patient).

    Args:
        cases: those to train on; the file must name them all.
        test_cases: the file names all of them or none.

    Raises:
        SplitError: the file cannot be read, names a case twice, leaves cases out, or has a patient among the cases and
            among the test cases.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # Excel begins its CSV files with a mark
    except OSError as error:
        raise SplitError(f"cannot read {file} ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise SplitError(f"{file} is no UTF-8; save the file in that encoding.") from None
    rows = _rows_of_json(file, text) if file.suffix == ".json" else _rows_of_csv(file, text)
    patients: dict[str, str] = {}
    for case, patient in rows:
        if case in patients:
            raise SplitError(f"{file} names the case {case!r} twice.")
        patients[case] = patient
    wanted = [*cases, *(test_cases if set(test_cases) & set(patients) else ())]
    missing = [case for case in wanted if not patients.get(case)]
    if missing:
        raise SplitError(f"{file} gives no patient for {_some(missing)}.")
    found = {case: patients[case] for case in wanted}
    trained_on = {found[case] for case in cases}
    shared = [case for case in test_cases if found.get(case) in trained_on]
    if shared:
        raise SplitError(
            f"{file} has the patients of the test cases {_some(shared)} among the training cases, too; take those out "
            "of one of the two, or set test: false."
        )
    return found


def _rows_of_json(file: Path, text: str) -> list[tuple[str, str]]:
    try:
        rows = json.loads(text, object_pairs_hook=list)  # a dictionary would keep the last of two
        return [(case, "" if patient is None else str(patient)) for case, patient in rows]
    except (ValueError, TypeError):
        raise SplitError(f'{file} is not JSON of the form {{"case": "patient", ...}}.') from None


def _rows_of_csv(file: Path, text: str) -> list[tuple[str, str]]:
    rows = list(csv.DictReader(text.splitlines(), restval=""))
    if not rows or not {"case", "patient"} <= set(rows[0]):
        raise SplitError(f"{file} needs a first line 'case,patient' and one line a case.")
    # ' 7' and '7' are one patient.
    return [(row["case"].strip(), row["patient"].strip()) for row in rows]


def make_splits(cases: Sequence[str], patients: Mapping[str, str] | None, folds: int) -> list[Split]:
    """nnU-Net's own shuffled folds (seed 12345), of patients where they are known.

    Raises:
        SplitError: fewer patients than folds.
    """
    patients = patients or {case: case for case in cases}
    people = sorted({patients[case] for case in cases})
    if len(people) < folds:
        raise SplitError(f"{len(people)} patients cannot be split into {folds} folds.")
    splits = []
    for fold in generate_crossval_split(people, seed=12345, n_splits=folds):
        held_out = set(fold["val"])
        splits.append(
            {
                "train": sorted(case for case in cases if patients[case] not in held_out),
                "val": sorted(case for case in cases if patients[case] in held_out),
            }
        )
    return splits


def check_splits(
    splits: Sequence[Split], cases: Sequence[str], patients: Mapping[str, str] | None, folds: Sequence[int], file: Path
) -> None:
    """Refuse folds that would make out-of-fold scores wrong.

    Raises:
        SplitError: a fold does not exist, names unknown cases, has a case or patient on both sides, or a case is
            validated in two of ``folds``.
    """
    validated: dict[str, int] = {}
    for fold in folds:
        if fold >= len(splits):
            raise SplitError(f"{file} has {len(splits)} folds, so there is no fold {fold}; nnU-Net would draw its own.")
        train, val = splits[fold]["train"], splits[fold]["val"]
        if not train or not val:
            raise SplitError(f"fold {fold} of {file} has no cases to {'validate on' if train else 'train on'}.")
        unknown = sorted({*train, *val} - set(cases))
        if unknown:
            raise SplitError(f"fold {fold} of {file} names {_some(unknown)}, which the dataset does not have.")
        both = sorted(set(train) & set(val))
        if both:
            raise SplitError(f"fold {fold} of {file} trains on {_some(both)} and validates on them, too.")
        if patients is not None:
            shared = sorted({patients[case] for case in train} & {patients[case] for case in val})
            if shared:
                raise SplitError(
                    f"fold {fold} of {file} has patient {_some(shared)} in training and in validation; move the file "
                    "away, with all results that rest on it, and a patient-grouped one will be written."
                )
        for case in val:
            if case in validated:
                raise SplitError(f"{file} validates {case!r} twice, in folds {validated[case]} and {fold}.")
            validated[case] = fold


def read_splits(file: Path) -> list[Split]:
    """
    Raises:
        SplitError: it is no list of folds with train and val.
    """
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
        return [{side: [str(case) for case in fold[side]] for side in ("train", "val")} for fold in splits]
    except (ValueError, TypeError, KeyError):
        raise SplitError(f"{file} is no list of folds with train and val; nnU-Net could not use it, either.") from None


def find_splits(
    file: Path, cases: Sequence[str], patients: Mapping[str, str] | None, number: int, folds: Sequence[int]
) -> list[Split]:
    """Of ``splits_final.json``, or what :func:`ensure_splits` would write.

    Raises:
        SplitError: see :func:`make_splits` and :func:`check_splits`.
    """
    splits = read_splits(file) if file.exists() else make_splits(cases, patients, number)
    check_splits(splits, cases, patients, folds, file)
    return splits


def ensure_splits(
    file: Path, cases: Sequence[str], patients: Mapping[str, str] | None, number: int, folds: Sequence[int]
) -> list[Split]:
    """Write ``splits_final.json`` if there is none; an existing one is checked, used and never replaced.

    Raises:
        SplitError: see :func:`find_splits`.
    """
    splits = find_splits(file, cases, patients, number, folds)
    if not file.exists():
        write_json(file, splits)
    return splits


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
