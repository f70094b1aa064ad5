"""What a report is made of, whoever trained and collected it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nnunet_deform.comparison.analysis import Analysis, DatasetAnalysis
from nnunet_deform.comparison.cost import Cost
from nnunet_deform.comparison.curves import Curve
from nnunet_deform.comparison.design import Design
from nnunet_deform.comparison.metrics import Region
from nnunet_deform.comparison.operators import Diagnostics


@dataclass(frozen=True)
class Volumes:
    """One case and one arm's prediction of it. image, truth, prediction: [Z, Y, X]; spacing: mm, (z, y, x)."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float, float]


ReadVolumes = Callable[[str, str], Volumes | None]
"""Of an arm's out-of-fold prediction (the first argument) of a case (the second); None where a file is gone."""

FindPage = Callable[[str, str], str | None]
"""Of an arm (the first argument) and a case the page of ``nnunet-deform inspect``, relative to the report, or None."""


@dataclass(frozen=True)
class DatasetContent:
    """What there is of one dataset beside its scores; parts that are empty are left out of the page.

    labels: value of each class, or values of each region, by name; ignore_label: the value that does not count;
    tolerances: of NSD in mm, by class; patients_mapped: whether cases were told which patient they are of;
    volumes: None without images; page: None where none can be; costs, curves: by arm; operators: what they did;
    cautions: what a reader must know, one sentence each.
    """

    labels: Mapping[str, Region] = field(default_factory=dict)
    ignore_label: int | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    patients_mapped: bool = False
    volumes: ReadVolumes | None = None
    page: FindPage | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Curve]] = field(default_factory=dict)
    operators: Diagnostics | None = None
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """What some trainings were made from. trainings: which, in words; splits, plans_file, dataset_file: SHA-256."""

    dataset: str
    plans: str
    trainings: str
    splits: str
    plans_file: str
    dataset_file: str
    versions: str
    machine: str


@dataclass(frozen=True)
class ReportContent:
    """
    design: what the analysis is about;
    cases, test: scores out of fold and of the test set, as :class:`collect.Collected` has them;
    datasets: by dataset and configuration, those of the analysis;
    source: the experiment file's text; command: the one that makes all this; commands: nnU-Net's;
    environment: variables that these need; measured: how costs were measured, in words;
    operators: of the last epochs, a table for those who ask; cautions: what a reader must know, one sentence each.
    """

    name: str
    design: Design
    analysis: Analysis
    cases: pd.DataFrame
    test: pd.DataFrame
    datasets: Mapping[tuple[str, str], DatasetContent]
    command: str
    source: str | None = None
    commands: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    provenance: tuple[Provenance, ...] = ()
    measured: str = ""
    operators: pd.DataFrame | None = None
    cautions: tuple[str, ...] = ()

    def of(self, dataset: str, configuration: str) -> DatasetContent:
        return self.datasets.get((dataset, configuration), DatasetContent())

    def scores_of(self, dataset: DatasetAnalysis) -> pd.DataFrame:
        """The out-of-fold scores of one dataset."""
        return _rows_of(dataset, self.cases)

    def test_of(self, dataset: DatasetAnalysis) -> pd.DataFrame:
        """The test scores of one dataset."""
        return _rows_of(dataset, self.test)


def _rows_of(dataset: DatasetAnalysis, table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["dataset"] == dataset.dataset) & (table["configuration"] == dataset.configuration)]
