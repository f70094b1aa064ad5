"""The pictures of docs/evidence/phantoms.md: what is asked, what the arms answer, and what the operator does for it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from phantom_tasks import TASKS, Phantoms
from phantom_training import follows, held_out, predicted, trained
from torch import Tensor

from nnunet_deform.networks.observation import MixingWeights, Offsets

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
NAMES = {
    "distortion": {"network": "DeformUX-Net", "twin": "its twin"},
    "contrast changes": {"network": "MAGIC", "twin": "its static twin"},
}


def draw_pictures(folder: Path, seeds: Mapping[str, int]) -> None:
    """phantoms_distortion.png and phantoms_contrast.png, of the networks of one seed of each of the two tasks."""
    for name, draw in (("distortion", _distortion), ("contrast changes", _contrast)):
        task = TASKS[name]
        networks = {arm: trained(task, arm, seeds[name]) for arm in NAMES[name]}
        phantoms = held_out(task)
        answers = {arm: predicted(task, arm, network, phantoms.images) for arm, network in networks.items()}
        (observation,) = networks["network"].observe_operators(phantoms.images).values()
        figure = Figure(figsize=(11, 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, phantoms, answers, observation)
        figure.savefig(folder / f"phantoms_{name.split()[0]}.png", dpi=80)


def _panel(axis: Axes, image: Tensor, title: str, limit: float, mask: Tensor | None = None) -> None:
    axis.imshow(image, cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    if mask is not None and mask.any():
        axis.contour(mask, levels=[0.5], colors=[COLOURS[1]], linewidths=1.4)
    axis.set(xticks=[], yticks=[], title=title)


def _distortion(figure: Figure, phantoms: Phantoms, answers: Mapping[str, Tensor], observation: Offsets) -> None:
    image, shift, truth = phantoms.images[0, 0], phantoms.cause[0], phantoms.labels[0, 0]
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    axes = left.subplots(3, 2)
    _panel(axes[0, 0], image, "what the network sees: image", 1.4)
    axes[0, 1].imshow(shift, cmap="coolwarm", interpolation="nearest")
    axes[0, 1].set(xticks=[], yticks=[], title="and by how much each row is shifted")
    _panel(axes[1, 0], image, "what is asked: the true discs", 1.4, truth)
    for axis, (arm, answer) in zip([axes[1, 1], axes[2, 0]], answers.items(), strict=True):
        _panel(axis, image, NAMES["distortion"][arm], 1.4, answer[0, 0])
    _panel(axes[2, 1], image, "where DeformUX-Net looks from pixels of the discs", 1.4)
    offsets = observation.values[0].numpy()
    tap = int(np.argmax(follows(observation.values, phantoms.cause)))
    rows, columns = np.nonzero(truth.numpy())
    chosen = np.flatnonzero((rows % 3 == 1) & (columns % 4 == 1))
    down, along = offsets[tap, 0], offsets[tap, 1]
    for row, column in zip(rows[chosen], columns[chosen], strict=True):
        # The taps of a kernel of 3 x 3 lie around the pixel.
        start = (column + tap % 3 - 1, row + tap // 3 - 1)
        end = (start[0] + along[row, column], start[1] + down[row, column])
        axes[2, 1].annotate(
            "", end, start, arrowprops={"arrowstyle": "->", "color": COLOURS[1], "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
        )
    axis = right.subplots()
    every = phantoms.cause.flatten().numpy()
    edges = np.linspace(every.min(), every.max(), 13)
    bins = np.clip(np.digitize(every, edges) - 1, 0, 11)
    for number in range(observation.values.shape[1]):
        moved = observation.values[:, number, 1].flatten().numpy()
        means = [moved[bins == one].mean() for one in range(12)]
        axis.plot((edges[1:] + edges[:-1]) / 2, means, color=COLOURS[0], lw=1.2, label="a tap" if number == 0 else None)
    axis.plot(edges[[0, -1]], edges[[0, -1]], color="black", ls="--", lw=1, label="the shift itself")
    axis.set(
        xlabel="shift of the row (pixels)", ylabel="offset along the row (pixels)", title="offsets of the nine taps"
    )
    axis.legend(frameon=False)


def _contrast(figure: Figure, phantoms: Phantoms, answers: Mapping[str, Tensor], observation: MixingWeights) -> None:
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.1, 1))
    axes = top.subplots(2, 4)
    for row, tube in zip(axes, (1, -1), strict=True):
        scan = int(torch.nonzero(phantoms.cause == tube)[0])
        image = phantoms.images[scan, 0]
        kind = "bright" if tube == 1 else "dark"
        _panel(row[0], image, f"scan with a {kind} tube", 2.5)
        _panel(row[1], image, "what is asked", 2.5, phantoms.labels[scan, 0])
        for axis, (arm, answer) in zip(row[2:], answers.items(), strict=True):
            _panel(axis, image, NAMES["contrast changes"][arm], 2.5, answer[scan, 0])
    axis = bottom.subplots()
    shares = observation.shares().numpy()
    order = np.argsort(-phantoms.cause.numpy(), kind="stable")
    floor = np.zeros(len(order))
    for kernel in range(shares.shape[1]):
        axis.bar(
            range(len(order)), shares[order, kernel], bottom=floor, color=COLOURS[kernel], label=f"kernel {kernel + 1}"
        )
        floor += shares[order, kernel]
    bright = int((phantoms.cause == 1).sum())
    axis.axvline(bright - 0.5, color="black", lw=1.5)
    axis.set(
        xlim=(-0.5, len(order) - 0.5),
        ylim=(0, 1),
        xticks=[(bright - 1) / 2, (bright + len(order) - 1) / 2],
        xticklabels=["scans with a bright tube", "scans with a dark tube"],
        ylabel="share of each kernel",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
