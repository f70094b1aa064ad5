"""What ``nnunet-deform inspect`` does: reads, looks, and writes a folder for each case."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_deform.inspection import anchors
from nnunet_deform.inspection.examination import ERRORS, Field, Findings, chosen_classes, examine, passes
from nnunet_deform.inspection.model import InspectionError, Model, find_cases, read_case, reference_image
from nnunet_deform.inspection.page import render
from nnunet_deform.inspection.pictures import Album

Progress = Callable[[str, int, int], None]
"""Of a case: its name, passes of the networks that are done, and at most to do."""


def inspect_cases(
    models: Sequence[Model],
    source: Path,
    output: Path,
    *,
    classes: Sequence[str] = (),
    labels: Path | None = None,
    previous: Path | None = None,
    on_progress: Progress = lambda *_: None,
) -> list[Path]:
    """Look at each case, and write ``output/<case>/``, which appears complete or not at all.

    Args:
        models: one, or two of which the second is what the first is compared with.
        source: the first channel's file of a case, or a folder of cases.
        classes: to look at; none: the largest of the first model's prediction.
        labels: a folder of true segmentations, of all or some cases.
        previous: a folder of a cascade's first stage's predictions.

    Returns:
        Each case's page.

    Raises:
        InspectionError: the input is wrong, or the output cannot be written; cases before stay.
    """
    for model in models:
        chosen_classes(model, classes)
    cases = find_cases(source, models[0])
    ending = models[0].predictor.dataset_json["file_ending"]
    for folder, option in ((labels, "--labels"), (previous, "--previous")):
        if folder is not None and not folder.is_dir():
            raise InspectionError(f"{option} {folder} is no folder.")
    if labels is not None and not any((labels / f"{name}{ending}").is_file() for name in cases):
        raise InspectionError(f"--labels {labels} has no file of these cases, such as {next(iter(cases))}{ending}.")
    for other in models[1:]:
        # The same files must fit both.
        find_cases(source, other)
    for name in cases:
        if (output / name).exists():
            raise InspectionError(f"{output / name} exists; give another folder with -o, or move it away.")
    _check_writable(output)
    pages, looked_at = [], []
    for name, paths in cases.items():
        truth = None if labels is None or not (labels / f"{name}{ending}").is_file() else labels / f"{name}{ending}"
        before = None if previous is None else previous / f"{name}{ending}"
        read = [read_case(model, name, paths, truth, before) for model in models]
        total = sum(passes(model, case) for model, case in zip(models, read, strict=True))
        done = 0

        def advance(name: str = name, total: int = total) -> None:
            nonlocal done
            done += 1
            on_progress(name, done, total)

        found: list[Findings] = []
        for model, case in zip(models, read, strict=True):
            found.append(
                # The second model is looked at where the first one was.
                examine(model, case, found[0].classes, advance, found[0].voxels)
                if found
                else examine(model, case, classes, advance)
            )
        pages.append(_write(output, name, found, paths[0]))
        mixing = {key: layer.shares.mean(0) for key, layer in found[0].mixing.items()}
        looked_at.append(_Kept(name, read[0].geometry.resampled_spacing, found[0].anchors, mixing))
    if len(cases) > 1:
        _write_together(output, looked_at, models[0].patch_size)
    return pages


def _check_writable(output: Path) -> None:
    """Before minutes of work."""
    created = not output.exists()
    trial = output / f".{os.getpid()}.partial"
    try:
        trial.mkdir(parents=True)
        trial.rmdir()
        if created:
            output.rmdir()
    except OSError as error:
        raise InspectionError(f"cannot write into {output} ({error.strerror}); give another folder with -o.") from error


def _write(output: Path, name: str, found: Sequence[Findings], file: str) -> Path:
    partial = output / f".{name}.{os.getpid()}.partial"
    created = not output.exists()
    try:
        (partial / "png").mkdir(parents=True)
        (partial / "maps").mkdir()
        reference = reference_image(file)
        page = render(found, Album(partial / "png"))
        (partial / "inspect.html").write_text(page, encoding="utf-8")
        (partial / "numbers.json").write_text(json.dumps(numbers(found), indent=2) + "\n", encoding="utf-8")
        for position, findings in enumerate(found, start=1):
            prefix = f"{position} " if len(found) > 1 else ""
            maps: dict[str, np.ndarray] = {"prediction": findings.prediction, **findings.maps}
            if findings.errors is not None:
                maps["errors"] = findings.errors
            for key, values in maps.items():
                write_map(partial / "maps" / f"{_file_name(prefix + key)}.nii.gz", values, findings, reference)
        partial.rename(output / name)
    except OSError as error:
        raise InspectionError(
            f"cannot write {output / name} ({error.strerror}); give another folder with -o."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if created and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    return output / name / "inspect.html"


def _file_name(key: str) -> str:
    return re.sub(r"[^\w.]+", "_", key)


def write_map(path: Path, values: np.ndarray, findings: Findings, reference: Any) -> None:
    """As NIfTI in the case's geometry. values: [Z, Y, X]; reference: from :func:`reference_image`."""
    import SimpleITK as sitk

    kind = np.float32 if values.dtype.kind == "f" else np.uint16 if values.max(initial=0) > 255 else np.uint8
    image = sitk.GetImageFromArray(values.astype(kind))
    if reference is not None:
        image.CopyInformation(reference)
    else:
        image.SetSpacing(findings.case.geometry.spacing[::-1])
    sitk.WriteImage(image, str(path), True)


def numbers(found: Sequence[Findings]) -> list[dict[str, Any]]:
    """Of each model what the page has in numbers; None for what does not exist."""
    return [_finite(_numbers(findings)) for findings in found]


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _numbers(findings: Findings) -> dict[str, Any]:
    def field(one: Field) -> dict[str, Any]:
        return {"radius_of_half_mm": one.radius, "channel_shares": one.channels}

    size = findings.model.patch_size
    return {
        "model": findings.model.name,
        "case": findings.case.name,
        "classes": findings.classes,
        "dice": findings.dice,
        "error_voxels": {}
        if findings.errors is None
        else {what: int((findings.errors == value).sum()) for what, value in ERRORS.items()},
        "activation_layers": [{"name": layer.name, "size": layer.size} for layer in findings.layers],
        "receptive_field": {"trained": field(findings.trained), "untrained": field(findings.untrained)},
        "voxels": [{"name": v.name, "index_zyx": v.case, "position_mm_xyz": v.world} for v in findings.voxels],
        "patch_size": size,
        "patch_corners": findings.corners,
        "offsets": {
            key: {
                "level": layer.level,
                "mean_mm": layer.mean,
                "outside": layer.outside,
                "outside_undeformed": layer.outside_undeformed,
                "histogram_by_axis": layer.counts,
                "sampling": {
                    voxel: {"regular_zyx": regular, "moved_zyx": moved}
                    for voxel, (regular, moved) in layer.arrows.items()
                },
            }
            for key, layer in findings.offsets.items()
        },
        "anchors": {
            key: {
                "in_patch": found,
                "index_zyx": findings.anchor_places(key),
                "movement_mm": anchors.movement(
                    [found], size, findings.case.geometry.resampled_spacing[3 - len(size) :]
                ).within,
            }
            for key, found in findings.anchors.items()
        },
        "mixing": {
            key: {"shares": layer.shares, "entropy": layer.entropy, "spread": layer.spread, "dead": layer.dead}
            for key, layer in findings.mixing.items()
        },
        "operators": findings.operators,
        "seconds": findings.seconds,
    }


class _Kept(NamedTuple):
    """Of a case whose maps are written: what cases are compared by."""

    name: str
    spacing: Sequence[float]
    anchors: Mapping[str, np.ndarray]
    mixing: Mapping[str, np.ndarray]


def _write_together(output: Path, found: Sequence[_Kept], size: Sequence[int]) -> None:
    """cases.json: how anchors and mixing weights of the first model differ between cases."""
    spacing = found[0].spacing[3 - len(size) :]
    together: dict[str, Any] = {"cases": [case.name for case in found], "anchors": {}, "mixing": {}}
    for key in found[0].anchors:
        moved = anchors.movement([case.anchors[key] for case in found], size, spacing)
        together["anchors"][key] = {"within_mm": moved.within, "between_mm": moved.between}
    for key in found[0].mixing:
        means = np.stack([case.mixing[key] for case in found])
        together["mixing"][key] = {"mean_shares": means, "spread_between_cases": float(means.std(0, ddof=1).mean())}
    partial = output / f".cases.{os.getpid()}.partial"
    try:
        partial.write_text(json.dumps(_finite(together), indent=2) + "\n", encoding="utf-8")
        partial.replace(output / "cases.json")
    except OSError as error:
        raise InspectionError(f"cannot write {output / 'cases.json'} ({error.strerror}).") from error
    finally:
        partial.unlink(missing_ok=True)
