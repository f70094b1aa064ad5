"""Figures of what was found, each as SVG for a page of either colour and as PNG for a paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nnunet_deform.inspection import offsets
from nnunet_deform.inspection.examination import CONFUSED, EXTRA, MISSED, Field, Findings
from nnunet_deform.inspection.mixing import Mixing
from nnunet_deform.inspection.receptive_field import centre
from nnunet_deform.pages import STYLE, colour, new_figure, svg

_PNG_DPI = 200
_PIXELS = 320  # of a slice's longer side; more are not seen, and make the page heavy
_HEAT = "inferno"
_ERRORS = {MISSED: ("missed", "#D55E00"), EXTRA: ("extra", "#56B4E9"), CONFUSED: ("confused", "#CC79A7")}


@dataclass(frozen=True)
class Picture:
    """name: of the PNG; svg: for the page; caption: what it shows."""

    name: str
    svg: str
    caption: str


class Album:
    """Draws figures, and writes each as PNG into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, caption: str, draw: Callable[[], Figure]) -> Picture:
        with matplotlib.rc_context({**STYLE, "image.interpolation": "none"}):
            figure = draw()
            figure.savefig(
                self._folder / f"{name}.png",
                dpi=_PNG_DPI,
                facecolor="white",
                bbox_inches="tight",
                metadata={"Software": None},
            )
            figure.set_layout_engine("none")  # it is laid out, which takes most of the time
            return Picture(name, svg(figure, name, caption), caption)


def best_slice(findings: Findings) -> int:
    """Of the case's array, the slice with most of the first class, in the truth where there is one."""
    labels = findings.prediction if findings.case.truth is None else findings.case.truth
    area = findings.mask(findings.classes[0], labels).sum((1, 2))
    return int(area.argmax()) if area.any() else len(area) // 2


def _tile(axes: Axes, picture: np.ndarray, spacing: Sequence[float], **options: object) -> None:
    """A slice [Y, X], in voxel coordinates with the aspect of mm."""
    height, width = picture.shape[:2]
    step = max(1, -(-max(height, width) // _PIXELS))
    axes.imshow(
        picture[::step, ::step],
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        aspect=spacing[0] / spacing[1],
        **options,
    )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _scan(axes: Axes, picture: np.ndarray, spacing: Sequence[float]) -> None:
    low, high = np.percentile(picture, [1, 99])
    _tile(axes, picture, spacing, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))


def _heat(axes: Axes, values: np.ndarray, spacing: Sequence[float], top: float) -> None:
    """Over a scan, the more opaque the larger."""
    share = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    painted = matplotlib.colormaps[_HEAT](share)
    painted[..., 3] = 0.75 * np.sqrt(share)
    _tile(axes, (painted * 255).astype(np.uint8), spacing)


def _classes(axes: Axes, findings: Findings, labels: np.ndarray, place: int) -> None:
    for position, name in enumerate(findings.model.heads):
        mask = findings.mask(name, labels[place])
        if mask.any() and min(mask.shape) > 1:
            axes.contour(mask, levels=[0.5], colors=[colour(position)], linewidths=1.1)


def overview(found: Sequence[Findings], place: int) -> Figure:
    """The scan, the truth, and each model's prediction and errors, at a slice."""
    first = found[0]
    spacing = first.case.geometry.spacing[1:]
    drawn: list[tuple[str, Findings | None, str]] = [("scan", None, "scan")]
    if first.case.truth is not None:
        drawn.append(("truth", first, "truth"))
    for number, findings in enumerate(found, start=1):
        of = f" {number}" if len(found) > 1 else ""
        drawn.append((f"prediction{of}", findings, "prediction"))
        if findings.errors is not None:
            drawn.append((f"errors{of}", findings, "errors"))
    figure, grid = new_figure(1.9 * len(drawn), 2.4, ncols=len(drawn))
    for axes, (title, findings, what) in zip(grid[0], drawn, strict=True):
        _scan(axes, first.case.image[place], spacing)
        if what == "truth" and first.case.truth is not None:
            _classes(axes, first, first.case.truth, place)
        elif what == "prediction" and findings is not None:
            _classes(axes, findings, findings.prediction, place)
        elif what == "errors" and findings is not None and findings.errors is not None:
            for value, (_, shade) in _ERRORS.items():
                painted = np.zeros((*findings.errors[place].shape, 4))
                painted[findings.errors[place] == value] = matplotlib.colors.to_rgba(shade, 0.8)
                _tile(axes, (painted * 255).astype(np.uint8), spacing)
        axes.set_title(title, fontsize=9)
    handles = [matplotlib.lines.Line2D([], [], color=colour(i), label=name) for i, name in enumerate(first.model.heads)]
    if first.errors is not None:
        handles += [matplotlib.patches.Patch(color=shade, label=name) for name, shade in _ERRORS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def activation(findings: Findings, place: int) -> Figure:
    """Each class a row, each level a column, coarsest first; every map scaled to its own maximum in the case."""
    layers = len(findings.layers)
    spacing = findings.case.geometry.spacing[1:]
    figure, grid = new_figure(
        1.75 * layers, 0.3 + 2.0 * len(findings.classes), nrows=len(findings.classes), ncols=layers
    )
    for line, (row, name) in enumerate(zip(grid, findings.classes, strict=True)):
        for column, (axes, layer) in enumerate(zip(row, findings.layers, strict=True)):
            level = layers - 1 - column
            values = findings.maps[f"activation of {name}, level {level}"]
            _scan(axes, findings.case.image[place], spacing)
            _heat(axes, values[place], spacing, float(values.max()))
            _classes(axes, findings, findings.prediction, place)
            if line == 0:
                axes.set_title(f"level {level}\n{'x'.join(map(str, layer.size))}", fontsize=8)
            if column == 0:
                axes.set_ylabel(name)
    return figure


def receptive_fields(fields: Mapping[str, Field]) -> Figure:
    """The middle slice of each, logarithmic; dashed the radius that holds half."""
    figure, grid = new_figure(2.4 * len(fields), 2.6, ncols=len(fields))
    for axes, (title, one) in zip(grid[0], fields.items(), strict=True):
        middle = centre(one.values.shape)
        values = one.values[middle[0]] if one.values.ndim == 3 else one.values
        spacing = one.spacing[-2:]
        low, left = ((-middle[i - 2] - 0.5) * spacing[i] for i in (0, 1))
        extent = (left, left + values.shape[1] * spacing[1], low + values.shape[0] * spacing[0], low)
        top = float(values.max()) or 1.0
        shown = np.maximum(values / top, 1e-4)
        image = axes.imshow(shown, cmap=_HEAT, norm=LogNorm(1e-4, 1), extent=extent)
        if np.isfinite(one.radius):
            axes.add_patch(matplotlib.patches.Circle((0, 0), one.radius, fill=False, color="#56B4E9", linestyle="--"))
        axes.set_title(f"{title}\nhalf within {one.radius:.1f} mm", fontsize=8)
        axes.set_xlabel("mm")
    figure.colorbar(image, ax=grid, shrink=0.8, label="of the largest")
    return figure


def arrows(findings: Findings) -> Figure:
    """From each regular position, a dot, to where the last block of a level reads, on the slice of each voxel."""
    last = {layer.level: name for name, layer in findings.offsets.items()}
    voxels = list(next(iter(findings.offsets.values())).arrows)
    spacing = findings.case.geometry.spacing
    figure, grid = new_figure(2.1 * len(last), 0.3 + 2.2 * len(voxels), nrows=len(voxels), ncols=len(last))
    places = {voxel.name: voxel.case for voxel in findings.voxels}
    for line, (row, voxel) in enumerate(zip(grid, voxels, strict=True)):
        place = int(np.clip(round(places[voxel][0]), 0, len(findings.case.image) - 1))
        for axes, (level, name) in zip(row, last.items(), strict=True):
            regular, moved = findings.offsets[name].arrows[voxel]
            _scan(axes, findings.case.image[place], spacing[1:])
            shift = moved - regular
            axes.plot(regular[:, 2], regular[:, 1], ".", color="#56B4E9", markersize=2.5)
            axes.quiver(
                *(regular[:, 2], regular[:, 1], shift[:, 2], shift[:, 1]),
                angles="xy", scale_units="xy", scale=1, color="#E69F00", width=0.008, headwidth=4,
            )  # fmt: skip
            points = np.concatenate([regular, moved])[:, 1:]
            middle = (points.min(0) + points.max(0)) / 2
            # mm, so that both axes show as much of the body
            reach = max(float(((points.max(0) - points.min(0)) / 2 * spacing[1:]).max()) * 1.3, 6 * min(spacing[1:]))
            axes.set_xlim(middle[1] - reach / spacing[2], middle[1] + reach / spacing[2])
            axes.set_ylim(middle[0] + reach / spacing[1], middle[0] - reach / spacing[1])
            if line == 0:
                axes.set_title(f"level {level}", fontsize=9)
        row[0].set_ylabel(voxel, fontsize=7)
    return figure


def overlays(findings: Findings, names: Sequence[str], place: int, unit: str, top: float | None = None) -> Figure:
    """Maps over the scan at a slice, of one scale.

    Args:
        names: of maps; unit: of the colour bar; top: of the scale, None for the largest value.
    """
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    spacing = findings.case.geometry.spacing[1:]
    top = top or max(float(findings.maps[name].max()) for name in names) or 1.0
    figure, grid = new_figure(2.0 * columns + 0.6, 2.3 * rows, nrows=rows, ncols=columns)
    for position, axes in enumerate(grid.flat):
        if position >= len(names):
            axes.set_axis_off()
            continue
        _scan(axes, findings.case.image[place], spacing)
        _heat(axes, findings.maps[names[position]][place], spacing, top)
        axes.set_title(names[position].removeprefix("offset of ").removeprefix("encoder."), fontsize=7)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, top), _HEAT)
    figure.colorbar(scale, ax=grid, shrink=0.8, label=unit)
    return figure


def offset_histograms(findings: Findings) -> Figure:
    """For each level the distribution of offsets along each axis, all its blocks together."""
    found = sorted({layer.level for layer in findings.offsets.values()})
    figure, grid = new_figure(2.3 * len(found), 2.3, ncols=len(found), sharey=True)
    middles = (offsets.EDGES[1:] + offsets.EDGES[:-1]) / 2
    for axes, level in zip(grid[0], found, strict=True):
        counts = sum(layer.counts for layer in findings.offsets.values() if layer.level == level)
        for axis, of_axis in enumerate(counts):
            axes.plot(middles, of_axis / max(of_axis.sum(), 1), color=colour(axis), label=f"axis {axis}", linewidth=1.2)
        axes.set_yscale("log")
        axes.set_title(f"level {level}", fontsize=9)
        axes.set_xlabel("offset (voxels of the level)")
    grid[0, 0].set_ylabel("share")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure


def anchors(findings: Findings, name: str) -> Figure:
    """Anchors of every patch, on the largest values along each axis; a colour for each anchor."""
    places = findings.anchor_places(name)
    image, spacing = findings.case.image, findings.case.geometry.spacing
    planes = [(0, "axis 0")] if image.shape[0] == 1 else [(0, "along axis 0"), (1, "along axis 1"), (2, "along axis 2")]
    figure, grid = new_figure(2.6 * len(planes), 2.7, ncols=len(planes))
    for axes, (axis, title) in zip(grid[0], planes, strict=True):
        y, x = (a for a in range(3) if a != axis)
        _scan(axes, image.max(axis), (spacing[y], spacing[x]))
        for anchor in range(places.shape[1]):
            axes.plot(
                places[:, anchor, x], places[:, anchor, y], "o", color=colour(anchor), markersize=4, alpha=0.8,
                markeredgecolor="white", markeredgewidth=0.4, label=f"{anchor + 1}",
            )  # fmt: skip
        axes.set_title(f"projected {title}", fontsize=8)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(8, len(names)), title="anchor")
    return figure


def mixing_weights(findings: Findings) -> Figure:
    """Mean shares, layers by kernels, and those of the two patches that differ most, with their middle slices."""
    layers: dict[str, Mixing] = findings.mixing
    pair = findings.different_patches()
    kernels = max(layer.shares.shape[1] for layer in layers.values())

    def table(patch: int | None) -> np.ndarray:
        out = np.full((len(layers), kernels), np.nan)
        for row, layer in zip(out, layers.values(), strict=True):
            shares = layer.shares.mean(0) if patch is None else layer.shares[patch]
            row[: len(shares)] = shares
        return out

    shown: list[tuple[str, int | None]] = [("mean of patches", None)]
    shown += [(f"patch {patch + 1}", patch) for patch in dict.fromkeys(pair)]
    figure, grid = new_figure(
        *(2.1 * len(shown) + 1.2, 2.2 + 0.19 * len(layers)),
        nrows=2,
        ncols=len(shown),
        height_ratios=[1.5, 0.25 * len(layers)],
    )
    size, flat = findings.model.patch_size, 3 - len(findings.model.patch_size)
    for column, (title, patch) in enumerate(shown):
        above, axes = grid[:, column]
        if patch is None:
            above.set_axis_off()
        else:
            corner = findings.corners[patch]
            ends = np.stack([corner, corner + np.array((1,) * flat + size) - 1])
            low, high = np.sort(findings.case.geometry.to_case(ends), 0)
            middle = int(np.clip(round((low[0] + high[0]) / 2), 0, len(findings.case.image) - 1))
            _scan(above, findings.case.image[middle], findings.case.geometry.spacing[1:])
            above.add_patch(
                matplotlib.patches.Rectangle((low[2], low[1]), *(high - low)[:0:-1], fill=False, color="#E69F00")
            )
        image = axes.imshow(table(patch), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("kernel")
        axes.set_xticks(range(kernels), [str(k + 1) for k in range(kernels)])
        names = [name.removeprefix("encoder.").removesuffix(".conv") for name in layers]
        axes.set_yticks(range(len(layers)), names if column == 0 else [""] * len(layers), fontsize=6)
    figure.colorbar(image, ax=grid[1], shrink=0.8, label="share")
    return figure
