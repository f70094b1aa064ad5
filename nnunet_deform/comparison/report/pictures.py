"""One slice of a case with truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_deform.comparison.report import figures
from nnunet_deform.comparison.report.content import DatasetContent, Volumes


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


def picture(volumes: Volumes, dataset: DatasetContent) -> str:
    """The slice with the largest structures, as a PNG data URL."""
    wanted = volumes.truth > 0
    if dataset.ignore_label is not None:
        wanted &= volumes.truth != dataset.ignore_label
    position = int(wanted.sum(axis=(1, 2)).argmax()) if wanted.any() else len(volumes.truth) // 2
    image, truth, prediction = (array[position] for array in (volumes.image, volumes.truth, volumes.prediction))
    return figures.overlay(image, truth, prediction, _values(dataset), volumes.spacing[1:])


def _values(dataset: DatasetContent) -> Sequence[int]:
    """Of all labels, those of regions included."""
    return sorted({v for value in dataset.labels.values() for v in ([value] if isinstance(value, int) else value)})
