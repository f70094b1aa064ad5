"""Slices of cases with truth and prediction, and which cases are worth a look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_deform.comparison.analysis import DatasetAnalysis, MetricAnalysis
from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.report.content import DatasetContent, Volumes
from nnunet_deform.comparison.report.words import number_format
from nnunet_deform.pages import colour


def read_volumes(image: Path, truth: Path, prediction: Path, reader: BaseReaderWriter) -> Volumes:
    """
    Args:
        image: one channel; reader: nnU-Net's for these files.
    """
    pixels, properties = reader.read_images([str(image)])
    return Volumes(
        image=pixels[0],
        truth=reader.read_seg(str(truth))[0][0],
        prediction=reader.read_seg(str(prediction))[0][0],
        spacing=tuple(properties["spacing"]),
    )


@dataclass(frozen=True)
class Picture:
    """score: in words; url: of the PNG, None where the prediction was deleted, to save space perhaps; page: see
    :data:`nnunet_deform.comparison.report.content.FindPage`."""

    arm: str
    case: str
    score: str
    url: str | None
    alt: str
    page: str | None = None


@dataclass(frozen=True)
class Row:
    title: str
    pictures: tuple[Picture, ...]


def case_rows(analysis: DatasetAnalysis, primary: MetricAnalysis, content: DatasetContent) -> list[Row]:
    """The worst and the median case by the mean score of the arms that learned, with all arms' predictions."""
    learned = [p for p, arm in enumerate(analysis.arms) if arm not in analysis.failed] or range(len(analysis.arms))
    order = _worst_first(primary, primary.scores[learned].mean(axis=0))
    chosen = (("worst", order[0]), ("median", order[len(order) // 2]))
    return [
        Row(
            f"The {title} case: {analysis.cases[case]}",
            tuple(_pictures(analysis, primary, content, analysis.arms, case, in_truth=True)),
        )
        for title, case in chosen
    ]


def arm_row(analysis: DatasetAnalysis, primary: MetricAnalysis, content: DatasetContent) -> Row:
    """The worst case of each arm."""
    pictures: list[Picture] = []
    for position, arm in enumerate(analysis.arms):
        case = worst_case(primary, position)
        pictures += _pictures(analysis, primary, content, (arm,), case)
    return Row("The worst case of each arm", tuple(pictures))


def worst_case(primary: MetricAnalysis, arm: int) -> int:
    """The position of the case on which an arm, given by its position, scores worst."""
    return int(_worst_first(primary, primary.scores[arm])[0])


def pair_rows(
    analysis: DatasetAnalysis, primary: MetricAnalysis, content: DatasetContent, pairs: Sequence[tuple[str, str]]
) -> list[Row]:
    """For each pair the case where the first arm is worst beside the second, and the other way round."""
    rows = []
    for first, second in pairs:
        order = _worst_first(primary, primary.case_differences(first, second))
        pictures: list[Picture] = []
        # The worse arm first: the slice is where it errs most.
        for worse, better, case in ((first, second, order[0]), (second, first, order[-1])):
            pictures += _pictures(analysis, primary, content, (worse, better), case)
        rows.append(Row(f"{first} and {second}, where they differ most in favour of either", tuple(pictures)))
    return rows


def _worst_first(primary: MetricAnalysis, values: np.ndarray) -> np.ndarray:
    return np.argsort(values if primary.metric.higher_is_better else -values, kind="stable")


def _pictures(
    analysis: DatasetAnalysis,
    primary: MetricAnalysis,
    content: DatasetContent,
    arms: Sequence[str],
    position: int,
    in_truth: bool = False,
) -> Iterator[Picture]:
    """
    Args:
        position: of the case; in_truth: the slice with the largest structures, instead of most errors of the first arm.
    """
    assert content.volumes is not None
    case, place = analysis.cases[position], None
    for arm in arms:
        score = number_format(primary.metric)(primary.scores[analysis.arms.index(arm), position])
        volumes = content.volumes(arm, case)
        url = None
        if volumes is not None:
            if place is None:
                place = _slice(volumes, content.ignore_label, in_truth)
            url = figures.overlay(
                *(array[place] for array in (volumes.image, volumes.truth, volumes.prediction)),
                label_values(content),
                volumes.spacing[1:],
            )
        where = "" if place is None else f", slice {place + 1}"
        alt = f"{case}{where}: truth filled and {arm}'s prediction outlined, {primary.metric.name} {score}"
        yield Picture(arm, case, score, url, alt, None if content.page is None else content.page(arm, case))


def _slice(volumes: Volumes, ignore_label: int | None, in_truth: bool) -> int:
    wanted = volumes.truth > 0 if in_truth else volumes.truth != volumes.prediction
    if ignore_label is not None:
        wanted &= volumes.truth != ignore_label
    return int(wanted.sum(axis=(1, 2)).argmax()) if wanted.any() else len(volumes.truth) // 2


def label_values(content: DatasetContent) -> Sequence[int]:
    """Of all labels, those of regions included, in the order of their colours."""
    return sorted({v for value in content.labels.values() for v in ([value] if isinstance(value, int) else value)})


def legend(content: DatasetContent) -> list[tuple[str, list[str]]]:
    """Name and colours of each class; of a region those of its parts."""
    values = list(label_values(content))
    return [
        (name, [colour(values.index(v)) for v in ([value] if isinstance(value, int) else value)])
        for name, value in content.labels.items()
    ]
