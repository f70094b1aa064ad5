"""Reads an experiment file: YAML with a line for every fault, and all faults at once."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from nnunet_deform.comparison.experiment import (
    Arm,
    Budget,
    Dataset,
    Experiment,
    ExperimentError,
    Folders,
    Place,
    Resources,
    Seeds,
    SettingError,
    Statistics,
)

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?\d[\d_]*")
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MOST_DIGITS = 15
_MOST_VALUES = 100_000  # aliases of aliases multiply

_MODELS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Experiment,
    ("datasets",): Dataset,
    ("arms",): Arm,
    ("seeds",): Seeds,
    ("budget",): Budget,
    ("statistics",): Statistics,
    ("resources",): Resources,
}


@dataclass(frozen=True)
class ExperimentFile:
    """An experiment with where it stands. path: absolute; lines: of every setting that the file has."""

    path: Path
    experiment: Experiment
    lines: Mapping[Place, int]

    def fault(self, place: Place, words: str) -> str:
        """``file:line: place: words``; the line is that of the innermost part of ``place`` that the file has."""
        return _fault(self.path, self.lines, place, words)


def load_experiment(file: Path) -> ExperimentFile:
    """Read and check an experiment file.

    Raises:
        ExperimentError: it cannot be read, or see :func:`parse_experiment`.
    """
    if file.exists() and not file.is_file():
        raise ExperimentError(f"cannot read {file}: it is a folder or a device, and no file.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ExperimentError(f"cannot read {file} ({error.strerror}).") from error
    try:
        text = content.decode("utf-8-sig")  # Windows begins some files with a mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ExperimentError(f"{file}:{line}: this is no UTF-8; save the file in that encoding.") from None
    return parse_experiment(text, file)


def parse_experiment(text: str, file: Path) -> ExperimentFile:
    """
    Args:
        file: where the text stands, for messages and for paths in it.

    Raises:
        ExperimentError: it is no YAML, or does not fit; every fault with its line.
    """
    reader = _Reader(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = None if node is None else reader.read(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}"
        raise ExperimentError(f"{file}:{line}: the character {character} cannot stand in YAML; delete it.") from None
    except yaml.MarkedYAMLError as error:
        opened = "quoted scalar" in (error.context or "") or "flow" in (error.context or "")
        mark = error.context_mark if opened else error.problem_mark
        raise ExperimentError(f"{file}:{mark.line + 1 if mark else 1}: {_yaml_words(error)}") from None
    except RecursionError:
        raise ExperimentError(f"{file}:1: lists or mappings are nested too deeply.") from None
    if reader.faults:
        raise ExperimentError("\n".join(dict.fromkeys(reader.faults)))
    if not isinstance(content, dict):
        raise ExperimentError(f"{file}:1: an experiment is a mapping with name, datasets, arms and hypotheses.")
    try:
        # As JSON, because only there lists are tuples and texts are paths, but neither "5" nor true is a number.
        experiment = Experiment.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        faults = (_fault(file, reader.lines, *fault) for fault in _faults(error, reader.written))
        raise ExperimentError("\n".join(dict.fromkeys(faults))) from None
    return ExperimentFile(file.resolve(), experiment, reader.lines)


def _fault(file: Path, lines: Mapping[Place, int], place: Place, words: str) -> str:
    found = next((lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in lines), 1)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return f"{file}:{found}: {name}: {words}"


class _Reader:
    """Values from YAML's nodes, with their lines.

    Numbers are decimal: 027 is dataset 27, as everywhere in nnU-Net, and not the octal 23 of YAML 1.1, and 1e-3, which
    is text there, is a number.
    """

    def __init__(self, file: Path) -> None:
        self.faults: list[str] = []
        self.lines: dict[Place, int] = {}
        self.written: dict[Place, str] = {}
        self._file = file
        self._open: list[yaml.Node] = []
        self._count = 0

    def _fail(self, node: yaml.Node, words: str) -> None:
        self.faults.append(f"{self._file}:{node.start_mark.line + 1}: {words}")

    def read(self, node: yaml.Node, place: Place) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem="too many", problem_mark=node.start_mark)
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if any(node is outer for outer in self._open):
            self._fail(node, "an alias stands inside of what it stands for.")
            return None
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self._fail(node, f"{_shown(node.tag)} is a tag, which no setting has; delete it.")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*place, number)) for number, item in enumerate(node.value)]
            return self._mapping(node, place)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        content: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fail(key, "a list or mapping cannot be the name of a setting.")
            elif key.tag == f"{_TAG}merge":
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(part, yaml.MappingNode):
                        merged = {**self.read(part, place), **merged}
                    else:
                        self._fail(key, "'<<' takes a mapping, for example an alias of one.")
            elif key.value in content:
                self._fail(key, f"{key.value!r} is set twice.")
            else:
                self.lines[(*place, key.value)] = key.start_mark.line + 1
                content[key.value] = self.read(value, (*place, key.value))
        return {**merged, **content}

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        self.written[place] = text
        if kind not in ("str", "int", "float", "bool", "null", "timestamp", "value"):
            self._fail(node, f"{_shown(node.tag)} is a tag, which no setting has; delete it.")
            return None
        if _CONTROL.search(text):
            self._fail(node, f"{_shown(text)} has a control character; delete it.")
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("true", "yes", "on")
        if node.style is None and _INTEGER.fullmatch(text):
            return self._finite(node, int(text) if len(text) <= _MOST_DIGITS else math.inf)
        if node.style is None and (_FLOAT.fullmatch(text) or text.lower().lstrip("+-") in (".inf", ".nan")):
            return self._finite(node, float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")))
        return text

    def _finite(self, node: yaml.ScalarNode, number: float) -> float | None:
        if math.isfinite(number):
            return number
        self._fail(node, f"{_shown(node.value)} is no number that any setting can have.")
        return None


def _yaml_words(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "", error.context or ""
    if problem == "too many":
        return "aliases multiply to more than 100,000 values."
    if r"'\t'" in problem:
        return "a tab stands here; indent with spaces."
    if "undefined alias" in problem:
        return f"the alias {problem.split()[-1]} has no anchor before it."
    if "second document" in problem or "but found another document" in problem:
        return "'---' begins a second document; a file has one experiment."
    if "quoted scalar" in context:
        return "a quotation mark is not closed, or what follows a backslash in it is unknown."
    if "flow" in context:
        return "a bracket is not closed, or a comma is missing in it."
    if "mapping values are not allowed" in problem:
        return "a ':' too many, or the indentation does not fit the lines before; put a text with a ':' into quotes."
    if "could not find expected ':'" in problem:
        return "a ':' is missing, here or in the line before."
    if "expected <block end>" in problem:
        return "the indentation does not fit the lines before."
    return "this is no YAML; look at indentation, colons, quotes and brackets."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}...{text[-6:]}"


def _faults(error: ValidationError, written: Mapping[Place, str]) -> Iterator[tuple[Place, str]]:
    places = [fault["loc"] for fault in error.errors()]
    for fault in error.errors():
        place = fault["loc"]
        if fault["type"] == "too_short" and any(
            len(other) > len(place) and other[: len(place)] == place for other in places
        ):
            continue  # entries with a fault of their own are not counted
        if fault["type"] == "value_error":
            cause = fault["ctx"]["error"]
            faults = cause.faults if isinstance(cause, SettingError) else [((), str(cause))]
            yield from (((*place, *inner), words) for inner, words in faults)
        else:
            yield place, _words(fault, place, written)


def _words(fault: Mapping[str, Any], place: Place, written: Mapping[Place, str]) -> str:
    """A sentence instead of pydantic's."""
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        settings = list(_MODELS[tuple(part for part in place[:-1] if isinstance(part, str))].model_fields)
        return f"is no setting here{_meant(str(place[-1]), settings)}."
    if kind == "missing":
        return "is missing."
    if value is None:
        return "has no value; give it one, or delete the line."
    if isinstance(value, list | dict):
        shown = "a list" if isinstance(value, list) else "a mapping"
    elif isinstance(value, str):
        shown = _shown(value)
    else:
        shown = written.get(place, str(value))
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in re.findall(r"'[^']*'", context["expected"])]
        return f"{shown} is none of {', '.join(choices)}."
    if kind == "string_type" and not isinstance(value, list | dict):
        what = "true or false" if isinstance(value, bool) else "a number"
        return f"{shown} is {what} in YAML; put it into quotes, if it is meant as a text."
    if kind == "string_pattern_mismatch":
        return f"{shown} is no name; use letters, digits, '.', '+', '-' and single '_' between them."
    limits = {"greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "above")}
    limits |= {"less_than_equal": ("le", "at most"), "less_than": ("lt", "below")}
    if kind in limits:
        key, words = limits[kind]
        return f"{shown} must be {words} {context[key]:g}."
    sizes = {"too_short": "at least {min_length}", "too_long": "at most {max_length}"}
    if kind in sizes:
        number = sizes[kind].format(**context)
        return (
            f"has {context['actual_length']} {'entry' if context['actual_length'] == 1 else 'entries'}, not {number}."
        )
    if kind == "string_too_long":
        return f"{shown} has more than {context['max_length']} characters."
    needed = {
        "string_type": "a text",
        "path_type": "a path",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "tuple_type": "a list in [brackets] or with a '-' each",
        "model_type": "a mapping of settings",
        "model_attributes_type": "a mapping of settings",
    }
    return f"{shown} is not {needed.get(kind, 'what is needed')}; see the table in docs/comparison.md."


def _meant(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(choices)}"


def find_folders(source: ExperimentFile) -> Folders:
    """Relative paths in the file start from the file's folder. raw and preprocessed default to nnU-Net's environment
    variables, output to a folder beside the file with the experiment's name, results to a folder in there.

    Raises:
        ExperimentError: a folder is given nowhere, is no folder, or raw does not exist.
    """
    experiment, base, faults = source.experiment, source.path.parent, []

    def stated(key: str, default: Path | None) -> Path:
        given: Path | None = getattr(experiment, key)
        variable = f"nnUNet_{key}"
        if given is not None:
            try:
                folder = base / given.expanduser()
            except RuntimeError:  # ~nobody
                faults.append(source.fault((key,), f"{str(given)!r} names the home of a user that there is not."))
                return base
        elif default is not None:
            folder = default
        elif os.environ.get(variable):
            folder = Path(os.environ[variable]).resolve()
        else:
            faults.append(source.fault((key,), f"set it in the file, or the environment variable {variable}."))
            return base
        try:
            blocking = next((path for path in (folder, *folder.parents) if path.exists()), base)
        except OSError as error:
            faults.append(source.fault((key,), f"{_shown(str(folder))} cannot be used ({error.strerror})."))
            return base
        if given is None and key == "results":
            return folder  # inside of output
        if not blocking.is_dir():
            faults.append(source.fault((key,), f"{blocking} is a file, and no folder."))
        elif key == "raw" and not folder.is_dir():
            faults.append(source.fault((key,), f"the folder of raw datasets {folder} does not exist."))
        return folder

    raw, preprocessed = stated("raw", None), stated("preprocessed", None)
    output = stated("output", base / experiment.name)
    results = stated("results", output / "nnUNet_results")
    if faults:
        raise ExperimentError("\n".join(faults))
    return Folders(raw, preprocessed, results, output)


def default_experiment(
    dataset: int | str, file: Path, *, configuration: str = "3d_fullres", test: bool = False, device: str = "cuda"
) -> str:
    """The text of a good first experiment file."""
    template = files(__package__).joinpath("template.yaml").read_text(encoding="utf-8")
    return Template(template).substitute(
        file=file.name,
        name=f"comparison_{dataset}",
        dataset=dataset,
        configuration=configuration,
        test=str(test).lower(),
        device=device,
    )
