"""The page of a case: sections of words, pictures and numbers, self-contained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from nnunet_deform import __version__
from nnunet_deform.inspection import anchors, pictures
from nnunet_deform.inspection.examination import Findings
from nnunet_deform.inspection.pictures import Album, Picture
from nnunet_deform.pages import style, template


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    title: str
    words: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def render(found: Sequence[Findings], album: Album) -> str:
    """One self-contained HTML page.

    Args:
        found: of one case, by each model.
        album: where the pictures' PNGs go.
    """
    place = pictures.best_slice(found[0])
    names, marks = _names(found), _marks(found)
    sections = [_case(found, names, place, album)]
    sections += [_activation(findings, mark, place, album) for findings, mark in zip(found, marks, strict=True)]
    sections.append(_fields(found, album))
    for findings, mark in zip(found, marks, strict=True):
        sections += _operators(findings, mark, place, album)
    return template("nnunet_deform.inspection", "page.html").render(
        title=found[0].case.name,
        version=__version__,
        date=datetime.now().astimezone().isoformat(" ", "minutes"),
        style=style(),
        summary=_summary(found, names),
        sections=sections,
    )


def _names(found: Sequence[Findings]) -> list[str]:
    """Of the models; numbered where there are several."""
    if len(found) == 1:
        return [found[0].model.name]
    return [f"{number}: {findings.model.name}" for number, findings in enumerate(found, start=1)]


def _marks(found: Sequence[Findings]) -> list[str]:
    """What tells the models apart in titles and file names: their numbers, where there are several."""
    return [""] if len(found) == 1 else [str(position) for position in range(1, len(found) + 1)]


def number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def _summary(found: Sequence[Findings], names: Sequence[str]) -> str:
    parts = []
    for findings, name in zip(found, names, strict=True):
        sentence = (
            f"{name} sees half of what moves a logit of {findings.classes[0]} within "
            f"{number(findings.trained.radius)} mm ({number(findings.untrained.radius)} mm before training)."
        )
        if findings.dice:
            sentence += f" Dice: {', '.join(f'{key} {number(value)}' for key, value in findings.dice.items())}."
        parts.append(sentence)
    return " ".join(parts)


def _case(found: Sequence[Findings], names: Sequence[str], place: int, album: Album) -> Section:
    section = Section("Prediction")
    first = found[0]
    voxel = first.case.geometry.spacing
    if len(found) > 1:
        section.words.append("; ".join(names) + ".")
    for findings in found:
        if not findings.mask(findings.classes[0], findings.prediction).any():
            section.words.append(
                f"{findings.model.name} predicts no {findings.classes[0]}; activation maps of it are empty, and the "
                "receptive field is that of its largest logit."
            )
    section.pictures.append(
        album.add(
            "prediction", f"Slice {place + 1} of {len(first.case.image)}.", lambda: pictures.overview(found, place)
        )
    )
    head = ["class"]
    for findings, of in zip(found, _marks(found), strict=True):
        head += [f"volume {of} (ml)".replace("  ", " "), *([f"Dice {of}".strip()] if findings.dice else [])]
    rows = []
    for name in first.model.heads:
        row = [name]
        for findings in found:
            if name not in findings.model.heads:
                row += ["-"] * (1 + bool(findings.dice))
                continue
            millilitres = findings.mask(name, findings.prediction).sum() * math.prod(voxel) / 1000
            row += [number(float(millilitres)), *([number(findings.dice[name])] if findings.dice else [])]
        rows.append(row)
    section.tables.append(Table(head, rows))
    return section


def _activation(findings: Findings, mark: str, place: int, album: Album) -> Section:
    section = Section(f"Class activation maps {mark}".strip())
    section.words.append(
        "Grad-CAM++ of the class's predicted voxels at the last block of each resolution, level 0 being full, stitched "
        "over the sliding window. Each map has its own scale. It shows where features lie that raise the class's "
        "logits, not that the network is right for that reason."
    )
    section.pictures.append(
        album.add(
            f"activation{mark}",
            f"Slice {place + 1}; lines: the prediction. Blocks: "
            + "; ".join(f"level {len(findings.layers) - 1 - i} {layer.name}" for i, layer in enumerate(findings.layers))
            + ".",
            lambda: pictures.activation(findings, place),
        )
    )
    return section


def _fields(found: Sequence[Findings], album: Album) -> Section:
    section = Section("Effective receptive field")
    section.words.append(
        "|d logit / d image|, mean over a few voxels, each in the middle of a patch, whose logit is that of "
        f"{found[0].classes[0]}: trained, and with the weights that training starts from."
    )
    fields = {}
    rows = []
    channels = found[0].model.predictor.dataset_json.get("channel_names", {})
    for findings, mark in zip(found, _marks(found), strict=True):
        for what, one in (("trained", findings.trained), ("untrained", findings.untrained)):
            fields[f"{what} {mark}".strip()] = one
    for what, one in fields.items():
        rows.append([what, number(one.radius), *(f"{share:.1%}" for share in one.channels)])
    section.pictures.append(
        album.add(
            "receptive_field",
            "Middle slices, logarithmic, down to 1/10000 of the largest; dashed: the ball about the voxel that holds "
            "half of the sum over the patch. What lies beyond the patch is not seen.",
            lambda: pictures.receptive_fields(fields),
        )
    )
    shares = [f"channel {channels.get(str(i), i)}" for i in range(len(found[0].trained.channels))]
    section.tables.append(Table(["weights", "radius of half (mm)", *shares], rows))
    places = [
        [voxel.name, ", ".join(f"{v:.1f}" for v in voxel.case), ", ".join(f"{v:.1f}" for v in voxel.world)]
        for voxel in found[0].voxels
    ]
    section.tables.append(Table(["voxels looked at", "index (z, y, x)", "position (mm: x, y, z)"], places))
    return section


def _operators(findings: Findings, mark: str, place: int, album: Album) -> list[Section]:
    """One for each kind of operator; one that says so of a network that could speak of them and has none."""
    sections = []
    if findings.offsets:
        sections.append(_offsets(findings, mark, place, album))
    if findings.anchors:
        sections.append(_anchors(findings, mark, album))
    overlays = [key for key in findings.maps if not key.startswith(("activation of", "receptive", "offset of"))]
    if overlays:
        section = Section(f"Maps inside the network {mark}".strip())
        section.words.append("Weights and gates between 0 and 1, stitched over the sliding window.")
        section.pictures.append(
            album.add(
                f"maps{mark}",
                f"Slice {place + 1}.",
                lambda: pictures.overlays(findings, overlays, place, "weight", 1.0),
            )
        )
        sections.append(section)
    if findings.mixing:
        sections.append(_mixing(findings, mark, album))
    if findings.operators:
        section = Section(f"What the operators do {mark}".strip())
        section.words.append("Over all patches of this case, counted as in the training log.")
        section.tables.append(Table(["number", "value"], [[k, number(v, 4)] for k, v in findings.operators.items()]))
        sections.append(section)
    if findings.observable and not sections:
        section = Section(f"What the operators do {mark}".strip())
        section.words.append("This network has no operator to look at: it is a twin, whose operator is switched off.")
        sections.append(section)
    return sections


def _offsets(findings: Findings, mark: str, place: int, album: Album) -> Section:
    section = Section(f"Where deformable convolutions read {mark}".strip())
    layers = findings.offsets
    idle = max(layer.mean for layer in layers.values()) < 0.1 * min(findings.case.geometry.resampled_spacing)
    if idle:
        section.words.append("Every layer's mean |offset| is below a tenth of a voxel: it hardly changes what is read.")
    section.pictures += [
        album.add(
            f"sampling{mark}",
            "Of the last block of each level: dots are the regular grid about a voxel, arrows lead to where it reads "
            "instead; taps of all slices, drawn in the voxel's own.",
            lambda: pictures.arrows(findings),
        ),
        album.add(
            f"offsets{mark}",
            f"Mean |offset| over taps, slice {place + 1}.",
            lambda: pictures.overlays(findings, [f"offset of {key}" for key in layers], place, "mm"),
        ),
        album.add(
            f"offset_histogram{mark}",
            "Offsets by level and axis, of all blocks, taps and patches; the axes are those of the preprocessed image.",
            lambda: pictures.offset_histograms(findings),
        ),
    ]
    rows = [
        [key, str(layer.level), f"{layer.mean:.3f}", f"{layer.outside:.2%}", f"{layer.outside_undeformed:.2%}"]
        for key, layer in layers.items()
    ]
    section.tables.append(
        Table(["block", "level", "mean |offset| (mm)", "samples beyond the patch", "the same undeformed"], rows)
    )
    return section


def _anchors(findings: Findings, mark: str, album: Album) -> Section:
    section = Section(f"Anchors {mark}".strip())
    size = findings.model.patch_size
    for key, found in findings.anchors.items():
        spacing = findings.case.geometry.resampled_spacing[3 - len(size) :]
        moved = anchors.movement([found], size, spacing)
        if len(found) == 1:
            section.words.append(
                "This case is one patch, so it does not show whether anchors move from patch to patch."
            )
        else:
            sides = ", ".join(f"{s * n:.0f}" for s, n in zip(spacing, size, strict=True))
            section.words.append(
                f"From patch to patch an anchor moves by {moved.within:.2f} mm (root mean square) about its mean place "
                f"in the patch, whose sides are {sides} mm."
            )
        section.pictures.append(
            album.add(
                f"anchors{mark}",
                f"Patches: {len(found)}; their anchors on the largest values along each axis of the scan.",
                lambda key=key: pictures.anchors(findings, key),
            )
        )
        rows = [[str(k + 1), *(f"{v:.3f}" for v in mean)] for k, mean in enumerate(moved.mean)]
        section.tables.append(Table(["anchor", *(f"axis {a} (sides of the patch)" for a in range(len(size)))], rows))
    return section


def _mixing(findings: Findings, mark: str, album: Album) -> Section:
    section = Section(f"Mixing of kernels {mark}".strip())
    patches = len(findings.corners)
    if patches == 1:
        section.words.append("This case is one patch, so nothing can be said of how mixing differs between patches.")
    dead = sum(layer.dead for layer in findings.mixing.values())
    total = sum(layer.shares.shape[1] for layer in findings.mixing.values())
    spread = float(np.median([layer.spread for layer in findings.mixing.values()]))
    words = f"{dead} of {total} kernels have less than 1 % of their layer's weight"
    if patches > 1:
        words += f"; the shares' standard deviation over {patches} patches is {spread:.4f} in the median layer"
    section.words.append(f"{words}.")
    section.pictures.append(
        album.add(
            f"mixing{mark}",
            "Shares of kernels: mean over patches, and the two patches that differ most, with their middle slices.",
            lambda: pictures.mixing_weights(findings),
        )
    )
    rows = [
        [key, f"{layer.entropy:.3f}", f"{layer.spread:.4f}", str(layer.dead)] for key, layer in findings.mixing.items()
    ]
    section.tables.append(Table(["layer", "entropy (1: all alike)", "spread over patches", "kernels below 1 %"], rows))
    return section
