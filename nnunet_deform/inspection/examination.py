"""Everything there is to see of one case in one model, as arrays in the case's own voxels and as numbers."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor, nn

from nnunet_deform.inspection import anchors, offsets
from nnunet_deform.inspection.activation_maps import Layer, activation_maps, hooked, levels
from nnunet_deform.inspection.mixing import Mixing, mixing, most_different
from nnunet_deform.inspection.model import Case, InspectionError, Model
from nnunet_deform.inspection.receptive_field import patch_around, radius_of_share, receptive_field
from nnunet_deform.inspection.windows import Stitched, Windows, to_case_grid, windows
from nnunet_deform.networks.observation import (
    Anchors,
    MappedNetwork,
    MixingWeights,
    ObservableNetwork,
    Observations,
    Offsets,
    Routing,
    joined,
    summarise,
)
from nnunet_deform.ops import resample_linear

LARGEST = 3  # classes that are looked at if none is named
RANDOM_VOXELS = 2  # of a structure, beside its innermost voxel and one of its boundary
MISSED, EXTRA, CONFUSED = 1, 2, 3
ERRORS = {"missed": MISSED, "extra": EXTRA, "confused": CONFUSED}  # values of an error map


@dataclass(frozen=True)
class Voxel:
    """A voxel that is looked at. place: in the preprocessed data; case: in the case's array; world: mm, x, y, z."""

    name: str
    place: tuple[int, ...]
    case: tuple[float, ...]
    world: tuple[float, ...]


@dataclass(frozen=True)
class Field:
    """The effective receptive field, mean over the voxels. values: in a patch; spacing: mm; radius: holds half of it,
    mm; channels: each input channel's share."""

    values: np.ndarray
    spacing: tuple[float, ...]
    radius: float
    channels: tuple[float, ...]


@dataclass
class OffsetLayer:
    """Of one deformable convolution, over all patches. mean: |offset| in mm; outside, outside_undeformed: shares of
    samples beyond the patch; counts: histogram by axis, see ``offsets.EDGES``; arrows: by voxel, regular and moved
    positions in the case's array, [taps, 3] each."""

    level: int
    mean: float = 0.0
    outside: float = 0.0
    outside_undeformed: float = 0.0
    counts: np.ndarray | None = None
    arrows: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """
    classes: looked at, the first also by its receptive field; layers: of the activation maps, coarsest first;
    prediction: labels; errors: where there is a truth; dice: by class, NaN where it is in neither; maps: by name, in
    the case's voxels; trained, untrained: receptive fields; corners: of each patch in the preprocessed data;
    operators: numbers of other operators, by name; observable: whether the network speaks of its operators at all;
    seconds: by step.
    """

    model: Model
    case: Case
    classes: tuple[str, ...]
    layers: tuple[Layer, ...]
    voxels: tuple[Voxel, ...]
    prediction: np.ndarray
    errors: np.ndarray | None
    dice: dict[str, float]
    maps: dict[str, np.ndarray]
    trained: Field
    untrained: Field
    corners: np.ndarray
    offsets: dict[str, OffsetLayer]
    anchors: dict[str, np.ndarray]
    mixing: dict[str, Mixing]
    operators: dict[str, float]
    observable: bool
    seconds: dict[str, float]

    def mask(self, name: str, labels: np.ndarray) -> np.ndarray:
        """Where a label map has a class or region."""
        return np.isin(labels, label_values(self.model, name))

    def anchor_places(self, name: str) -> np.ndarray:
        """Of a detector, in the case's array, [patches, K, 3]."""
        found = self.anchors[name]
        size = self.model.patch_size
        flat = 3 - len(size)
        places = anchors.positions(found, self.corners[:, flat:], size)
        if flat:
            slices = np.broadcast_to(self.corners[:, None, :1], (*places.shape[:2], 1))
            places = np.concatenate([slices, places], -1)
        return self.case.geometry.to_case(places)

    def different_patches(self) -> tuple[int, int]:
        """The two whose mixing weights differ most."""
        return most_different(self.mixing)


def label_values(model: Model, name: str) -> list[int]:
    value = model.predictor.dataset_json["labels"][name]
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]


def chosen_classes(model: Model, names: Sequence[str]) -> tuple[str, ...]:
    """Raises InspectionError, unless every name is a class or region of the model."""
    for name in names:
        if name not in model.heads:
            raise InspectionError(f"class {name} is not in {model.name}; it has {', '.join(model.heads)}.")
    return tuple(names)


def passes(model: Model, case: Case) -> int:
    """How many times :func:`examine` runs the network, at most, for a progress bar."""
    axes = model.predictor.allowed_mirroring_axes if model.predictor.use_mirroring else None
    looks = 1 + isinstance(model.network, ObservableNetwork) + isinstance(model.network, MappedNetwork)
    patches = len(windows(model, case).slicers)
    return patches * (2 ** len(axes or ()) + looks) + 1 + 2 * (2 + RANDOM_VOXELS)


def examine(
    model: Model,
    case: Case,
    classes: Sequence[str] = (),
    on_pass: Callable[[], None] = lambda: None,
    voxels: Sequence[Voxel] = (),
) -> Findings:
    """
    Args:
        classes: names; none: the largest ones of the prediction.
        on_pass: called after each pass of the network.
        voxels: to look at, of another model's findings of the case; none: of the first class's prediction.

    Raises:
        InspectionError: a class is not in the model.
    """
    chosen_classes(model, classes)
    seconds: dict[str, float] = {}
    with hooked([model.network], lambda *_: on_pass()):
        with _timed(seconds, "prediction"):
            logits = _logits(model, case)
        masks = _masks(model, logits)
        if not classes:
            sizes = {name: int(mask.sum()) for name, mask in masks.items()}
            largest = sorted(sizes, key=lambda name: -sizes[name])
            classes = [name for name in largest[:LARGEST] if sizes[name]] or largest[:1]
        if voxels:
            voxels = tuple(_voxel(case, voxel.name, _nearest(case, voxel)) for voxel in voxels)
        else:
            voxels = _voxels(model, case, classes[0], masks[classes[0]], logits.float())
        found = windows(model, case)
        with _timed(seconds, "activation maps"):
            layers, maps = _activation_maps(model, case, found, {name: masks[name] for name in classes})
        head = model.heads[classes[0]]
        with _timed(seconds, "receptive field"):
            trained, placed = _field(model, model.network, case, voxels, head)
        maps["receptive field"] = placed
        with (
            _timed(seconds, "receptive field, untrained"),
            hooked([untrained := model.untrained()], lambda *_: on_pass()),
        ):
            fresh, _ = _field(model, untrained, case, voxels, head)
        with _timed(seconds, "operators"):
            operators = _Operators(model, case, found, voxels)
            observable = isinstance(model.network, ObservableNetwork)
            if observable:
                operators.observe()
            if isinstance(model.network, MappedNetwork):
                operators.map()
    prediction = _prediction(model, case, logits)
    errors, dice = _compared(model, case, prediction)
    return Findings(
        model=model,
        case=case,
        classes=tuple(classes),
        layers=tuple(layers),
        voxels=voxels,
        prediction=prediction,
        errors=errors,
        dice=dice,
        maps=maps | operators.maps,
        trained=trained,
        untrained=fresh,
        corners=found.corners(),
        offsets=operators.offsets,
        anchors=operators.anchors,
        mixing=operators.mixing,
        operators=operators.numbers,
        observable=observable,
        seconds=seconds,
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started


def _logits(model: Model, case: Case) -> Tensor:
    """nnU-Net's own, mirrored if the model is, [heads, *spatial] on the preprocessed grid, in its half precision."""
    with contextlib.redirect_stdout(io.StringIO()):
        return model.predictor.predict_sliding_window_return_logits(case.data).cpu().clone()


def _masks(model: Model, logits: Tensor) -> dict[str, Tensor]:
    if model.predictor.label_manager.has_regions:
        return {name: logits[head] > 0 for name, head in model.heads.items()}
    best = logits.argmax(0)
    return {name: best == head for name, head in model.heads.items()}


def _voxels(model: Model, case: Case, name: str, mask: Tensor, logits: Tensor) -> tuple[Voxel, ...]:
    """Of a structure: its innermost voxel, that of its boundary that is worst, and a few at random. The worst is in the
    middle of the thickest error where there is a truth, and otherwise where another class comes closest."""
    inside = mask.numpy()
    head = model.heads[name]
    spacing = case.geometry.resampled_spacing
    if not inside.any():
        places = {f"where {name} has its largest logit": np.unravel_index(int(logits[head].argmax()), inside.shape)}
    else:
        depth = distance_transform_edt(np.pad(inside, 1), spacing)[1:-1, 1:-1, 1:-1]
        places = {f"innermost of {name}": np.unravel_index(int(depth.argmax()), inside.shape)}
        if model.predictor.label_manager.has_regions:
            margin = logits[head].abs()
        else:
            others = torch.cat([logits[:head], logits[head + 1 :]]).amax(0)
            margin = (logits[head] - others).abs()
        boundary = inside & ~binary_erosion(inside)
        doubtful = np.where(boundary, margin.numpy(), np.inf)
        places[f"most doubtful of {name}'s boundary"] = np.unravel_index(int(doubtful.argmin()), inside.shape)
        if case.truth is not None and (wrong := _error_depth(model, case, name, inside)) is not None:
            del places[f"most doubtful of {name}'s boundary"]
            places[f"worst error of {name}"] = wrong
        candidates = np.argwhere(inside)
        drawn = np.random.default_rng(0).choice(len(candidates), min(RANDOM_VOXELS, len(candidates)), replace=False)
        places |= {f"random {number}": candidates[index] for number, index in enumerate(drawn, start=1)}
    return tuple(_voxel(case, what, place) for what, place in places.items())


def _voxel(case: Case, name: str, place: Sequence[int]) -> Voxel:
    in_case = case.geometry.to_case(np.array(place))
    world = case.geometry.to_world(in_case)
    return Voxel(name, tuple(map(int, place)), tuple(in_case.tolist()), tuple(world.tolist()))


def _nearest(case: Case, voxel: Voxel) -> np.ndarray:
    """In the preprocessed data; another model may have cropped or resampled the case otherwise."""
    place = np.round(case.geometry.from_case(np.array(voxel.case))).astype(int)
    return np.clip(place, 0, np.array(case.geometry.resampled) - 1)


def _error_depth(model: Model, case: Case, name: str, inside: np.ndarray) -> tuple[int, ...] | None:
    """The voxel deepest inside what is wrong of a structure, None where all is right."""
    g = case.geometry
    truth = np.isin(case.truth, label_values(model, name)).transpose(g.transpose)
    if model.predictor.label_manager.has_ignore_label:
        ignored = (case.truth == model.predictor.label_manager.ignore_label).transpose(g.transpose)
    else:
        ignored = np.zeros_like(truth)
    axes = [
        np.clip(np.round((np.arange(r) + 0.5) * c / r - 0.5).astype(int), 0, c - 1) + corner
        for r, c, corner in zip(g.resampled, g.cropped, g.corner, strict=True)
    ]
    wrong = (truth[np.ix_(*axes)] != inside) & ~ignored[np.ix_(*axes)]
    if not wrong.any():
        return None
    depth = distance_transform_edt(np.pad(wrong, 1), g.resampled_spacing)[1:-1, 1:-1, 1:-1]
    return np.unravel_index(int(depth.argmax()), wrong.shape)


def _activation_maps(
    model: Model, case: Case, found: Windows, masks: dict[str, Tensor]
) -> tuple[list[Layer], dict[str, np.ndarray]]:
    device = model.predictor.device
    layers = levels(model.network, found.patch(found.slicers[0]).to(device))
    names = [layer.name for layer in layers]
    stitched = Stitched(found, model.patch_size, len(masks) * len(layers))
    padded = []
    for mask in masks.values():
        full = torch.zeros(found.image.shape[1:], dtype=torch.bool)
        full[found.inner[1:]] = mask
        padded.append(full)
    heads = [model.heads[name] for name in masks]
    for slicer in found.slicers:
        inside = [full[slicer[1:]] for full in padded]
        if any(mask.any() for mask in inside):
            scores = [(head, mask.to(device)) for head, mask in zip(heads, inside, strict=True)]
            maps = activation_maps(model.network, found.patch(slicer).to(device), scores, names).flatten(0, 1)
        else:
            maps = torch.zeros(len(heads) * len(layers), *model.patch_size)
        stitched.add(slicer, maps)
    on_grid = to_case_grid(model, case, stitched.result())
    keys = [f"activation of {name}, level {len(layers) - 1 - i}" for name in masks for i in range(len(layers))]
    return layers, dict(zip(keys, on_grid, strict=True))


def _field(
    model: Model, network: nn.Module, case: Case, voxels: Sequence[Voxel], head: int
) -> tuple[Field, np.ndarray]:
    """The mean field, and that of the first voxel at its place in the case."""
    ndim = len(model.patch_size)
    images = [case.data if ndim == 3 else case.data[:, voxel.place[0]] for voxel in voxels]
    places = [voxel.place[3 - ndim :] for voxel in voxels]
    found = [
        receptive_field(network, [patch_around(image, place, model.patch_size).to(model.predictor.device)], head)
        for image, place in zip(images, places, strict=True)
    ]
    values = np.mean([each.values for each in found], 0)
    spacing = case.geometry.resampled_spacing[3 - ndim :]
    channels = np.mean([each.channels for each in found], 0)
    # A patch about the opposite corner's place has the image's part of it.
    image = torch.zeros(case.data.shape[1:])
    target = image if ndim == 3 else image[voxels[0].place[0]]
    first = torch.from_numpy(found[0].values)
    cuts, sources = [], []
    for place, size, limit in zip(places[0], model.patch_size, target.shape, strict=True):
        start = place - size // 2
        cuts.append(slice(max(start, 0), min(start + size, limit)))
        sources.append(slice(max(-start, 0), min(limit - start, size)))
    target[tuple(cuts)] = first[tuple(sources)]
    radius = radius_of_share(values, spacing)
    return Field(values, tuple(spacing), radius, tuple(channels.tolist())), to_case_grid(model, case, image[None])[0]


class _Operators:
    """What the network's operators do in every patch."""

    def __init__(self, model: Model, case: Case, found: Windows, voxels: Sequence[Voxel]) -> None:
        self._model, self._case, self._found = model, case, found
        self._nearest = {voxel: self._window_about(voxel) for voxel in voxels[:2]}
        self.maps: dict[str, np.ndarray] = {}
        self.offsets: dict[str, OffsetLayer] = {}
        self.anchors: dict[str, np.ndarray] = {}
        self.mixing: dict[str, Mixing] = {}
        self.numbers: dict[str, float] = {}

    def _window_about(self, voxel: Voxel) -> int:
        """The patch whose centre is nearest to a voxel, of those that contain it."""
        size = np.array((1,) * (3 - self._found.ndim) + self._model.patch_size)
        place, corners = np.array(voxel.place), self._found.corners()
        holds = ((place >= corners) & (place < corners + size)).all(1)
        distance = np.linalg.norm(corners + (size - 1) / 2 - place, axis=1)
        return int(np.where(holds, distance, np.inf).argmin())

    def _full(self, maps: Tensor) -> Tensor:
        """[1, N, *coarse] -> [N, *patch size]."""
        return resample_linear(maps.float(), self._model.patch_size)[0].cpu()

    def _stitch(self, of_patch: Callable[[Tensor, int], dict[str, Tensor]]) -> None:
        """of_patch: from a patch and its number the maps by name, [1, *coarse] each."""
        stitched: Stitched | None = None
        names: list[str] = []
        for number, slicer in enumerate(self._found.slicers):
            maps = of_patch(self._found.patch(slicer).to(self._model.predictor.device), number)
            if not maps:
                continue
            full = torch.cat([self._full(each[:, None]) for each in maps.values()])
            if stitched is None:
                names = list(maps)
                stitched = Stitched(self._found, self._model.patch_size, len(names))
            stitched.add(slicer, full)
        if stitched is not None:
            on_grid = to_case_grid(self._model, self._case, stitched.result())
            self.maps |= dict(zip(names, on_grid, strict=True))

    def observe(self) -> None:
        small: list[Observations] = []
        count = len(self._found.slicers)

        def of_patch(patch: Tensor, number: int) -> dict[str, Tensor]:
            maps: dict[str, Tensor] = {}
            with torch.autocast("cuda") if patch.is_cuda else contextlib.nullcontext():
                observed = self._model.network.observe_operators(patch)
            for name, layer in observed.items():
                if isinstance(layer, Offsets):
                    maps[f"offset of {name}"] = self._offset(name, layer, number, count)
                elif isinstance(layer, Routing):
                    maps |= _by_channel(f"routing, {name.rpartition('.')[2]}", layer.values)
            small.append({n: layer for n, layer in observed.items() if not isinstance(layer, Offsets | Routing)})
            return maps

        self._stitch(of_patch)
        everything = joined(small)
        self.numbers, _ = summarise(everything) if everything else ({}, "")
        self.numbers = {name: value for name, value in self.numbers.items() if math.isfinite(value)}
        for name, layer in everything.items():
            if isinstance(layer, MixingWeights):
                self.mixing[name] = mixing(layer)
            elif isinstance(layer, Anchors):
                self.anchors[name] = layer.values.float().cpu().numpy()

    def map(self) -> None:
        def of_patch(patch: Tensor, _: int) -> dict[str, Tensor]:
            with torch.autocast("cuda") if patch.is_cuda else contextlib.nullcontext():
                observed = self._model.network.observe_maps(patch)
            return {key: each for name, maps in observed.items() for key, each in _by_channel(name, maps).items()}

        self._stitch(of_patch)

    def _offset(self, name: str, layer: Offsets, number: int, count: int) -> Tensor:
        """Adds a patch to a layer's numbers, and returns its mean |offset| in mm."""
        ndim = self._found.ndim
        strides = self._model.level_strides(layer.level, ndim)
        spacing = [s * step for s, step in zip(self._case.geometry.resampled_spacing[3 - ndim :], strides, strict=True)]
        length = offsets.lengths(layer, spacing)
        entry = self.offsets.setdefault(name, OffsetLayer(layer.level))
        entry.mean += float(length.mean()) / count
        entry.outside += layer.outside() / count
        entry.outside_undeformed += layer.outside_undeformed() / count
        counts = offsets.histograms(layer)
        entry.counts = counts if entry.counts is None else entry.counts + counts
        for voxel, window in self._nearest.items():
            if window == number:
                entry.arrows[voxel.name] = self._arrows(layer, voxel, number, strides)
        return length

    def _arrows(
        self, layer: Offsets, voxel: Voxel, number: int, strides: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        flat = 3 - self._found.ndim
        corner = self._found.corners()[number]
        inside = [p - c for p, c in zip(voxel.place[flat:], corner[flat:], strict=True)]
        pair = []
        for points in offsets.sampling_positions(layer, 0, inside, strides):
            whole = np.concatenate([np.zeros((len(points), flat)), points], 1) + corner
            pair.append(self._case.geometry.to_case(whole))
        return pair[0], pair[1]


def _by_channel(name: str, maps: Tensor) -> dict[str, Tensor]:
    """[1, N, *spatial] -> [1, *spatial] each, numbered from 1 where there are several."""
    if maps.shape[1] == 1:
        return {name: maps[:, 0]}
    return {f"{name}, {number}": each for number, each in enumerate(maps.unbind(1), start=1)}


def _prediction(model: Model, case: Case, logits: Tensor) -> np.ndarray:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    p = model.predictor
    found: Any = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, p.plans_manager, p.configuration_manager, p.label_manager, case.properties
    )
    return np.asarray(found)


def _compared(model: Model, case: Case, prediction: np.ndarray) -> tuple[np.ndarray | None, dict[str, float]]:
    """The error map and each class's Dice; None and nothing without truth."""
    if case.truth is None:
        return None, {}
    labels = model.predictor.label_manager
    counted = case.truth != labels.ignore_label if labels.has_ignore_label else np.ones(case.truth.shape, bool)
    errors = np.zeros(case.truth.shape, np.uint8)
    errors[(prediction != case.truth) & counted] = CONFUSED
    errors[(prediction == 0) & (case.truth != 0) & counted] = MISSED
    errors[(prediction != 0) & (case.truth == 0) & counted] = EXTRA
    dice = {}
    for name in model.heads:
        values = label_values(model, name)
        one, other = np.isin(prediction, values) & counted, np.isin(case.truth, values) & counted
        both = int(one.sum() + other.sum())
        dice[name] = 2 * int((one & other).sum()) / both if both else math.nan
    return errors, dice
