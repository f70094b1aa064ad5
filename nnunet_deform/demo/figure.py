"""The demo's picture: image, truth and prediction side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_deform.demo.phantom import LABELS

# Okabe and Ito's palette, which colour-blind readers can tell apart; neighbours in the phantom differ in lightness too
_COLOURS = {"liver": "#E69F00", "spleen": "#56B4E9", "kidney": "#009E73", "vessels": "#0072B2", "lesions": "#CC79A7"}
_WINDOW_HU = (-160, 350)
_ROWS = 3


def _choose_slices(label: np.ndarray) -> list[int]:
    """In each third of the labelled slices of ``label`` [Z, Y, X], the one with most classes, then most voxels."""
    labelled = np.flatnonzero(label.any(axis=(1, 2)))
    return [
        max(part.tolist(), key=lambda z: (len(np.unique(label[z])), np.count_nonzero(label[z])))
        for part in np.array_split(labelled, min(_ROWS, len(labelled)))
    ]


def save_figure(path: Path, image: Path, truth: Path, prediction: Path, title: str, dice: dict[str, float]) -> None:
    """Save a PNG with a few axial slices of one case.

    Args:
        path: file to write.
        image: CT of the case, NIfTI.
        truth: its reference labels.
        prediction: its predicted labels.
        title: one line above the slices.
        dice: shown beside each class of ``LABELS`` in the legend.
    """
    ct, expected, predicted = (sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in (image, truth, prediction))
    slices = _choose_slices(expected)
    figure = Figure(figsize=(8.4, 2.75 * len(slices) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    colours = ListedColormap([_COLOURS[name] for name in LABELS if name != "background"])
    headings = ("image", "truth", "prediction")
    axes = figure.subplots(len(slices), 3, squeeze=False)
    for row, z in zip(axes, slices, strict=True):
        for axis, heading, overlay in zip(row, headings, (None, expected, predicted), strict=True):
            axis.imshow(ct[z], cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1])
            if overlay is not None:
                shown = np.ma.masked_equal(overlay[z], LABELS["background"])
                axis.imshow(shown, cmap=colours, vmin=1, vmax=len(LABELS) - 1, alpha=0.75, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if z == slices[0]:
                axis.set_title(heading)
        row[0].set_ylabel(f"slice {z + 1} of {len(ct)}")
    handles = [Patch(color=_COLOURS[name], label=f"{name}, Dice {value:.2f}") for name, value in dice.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
