"""A trained model and a case, as nnU-Net's own predictor sees them."""

from __future__ import annotations

import contextlib
import glob
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_deform import activation
from nnunet_deform.inspection.geometry import Geometry

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


class InspectionError(RuntimeError):
    """The model or a case cannot be looked at; the message says why and what to do."""


@dataclass(frozen=True)
class Model:
    """One fold of a model folder.

    name: trainer and configuration; heads: index of each class's or region's logit, by name, without background.
    """

    name: str
    predictor: nnUNetPredictor
    heads: dict[str, int]

    @property
    def network(self) -> nn.Module:
        return self.predictor.network

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(self.predictor.configuration_manager.patch_size)

    def untrained(self) -> nn.Module:
        """The network as its trainer builds it, with new weights, in evaluation mode."""
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        p = self.predictor
        channels = determine_num_input_channels(p.plans_manager, p.configuration_manager, p.dataset_json)
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            trainer = recursive_find_trainer_class_by_name(p.trainer_name)
            network = trainer.build_network_architecture(
                *(p.plans_manager, p.configuration_manager, channels, p.label_manager.num_segmentation_heads),
                enable_deep_supervision=False,
            )
        return network.to(p.device).requires_grad_(False).eval()

    def level_strides(self, level: int, ndim: int) -> tuple[int, ...]:
        """How many voxels of the patch one of a level is, on each axis."""
        strides = self.predictor.configuration_manager.network_arch_init_kwargs["strides"]
        return tuple(int(s) for s in np.prod([np.broadcast_to(s, ndim) for s in strides[: level + 1]], axis=0))


def load_model(
    folder: Path,
    *,
    fold: str = "0",
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    mirroring: bool = True,
) -> Model:
    """
    Args:
        folder: nnU-Net's ``<trainer>__<plans>__<configuration>``; fold: a number or "all".
        mirroring: whether predictions average over mirrored images, as nnU-Net's do.

    Raises:
        InspectionError: a file is missing or no model.
    """
    for path in (folder / "plans.json", folder / "dataset.json"):
        if not path.is_file():
            raise InspectionError(
                f"{path} does not exist; give the folder of a trained model, <trainer>__<plans>__<configuration>."
            )
    weights = folder / f"fold_{fold}" / checkpoint
    if not weights.is_file():
        found = sorted(f"-f {p.parent.name[5:]} --checkpoint {p.name}" for p in folder.glob("fold_*/checkpoint_*.pth"))
        there = f"there is {', '.join(found)}" if found else "the folder has no checkpoint, so train the model first"
        raise InspectionError(f"{weights} does not exist; {there}.")
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    # The checkpoint names its trainer, which may be one of ours.
    activation.apply()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(folder), (fold,), checkpoint)
    except Exception as error:
        raise InspectionError(
            f"{weights} cannot be loaded ({_one_line(error)}); nnUNetv2_predict would fail alike."
        ) from error
    network = getattr(predictor.network, "_orig_mod", predictor.network)  # of torch.compile
    predictor.network = network.to(predictor.device).requires_grad_(False).eval()
    return Model(folder.name, predictor, _heads(predictor))


def _one_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])


def _heads(predictor: Any) -> dict[str, int]:
    labels = predictor.label_manager
    names = [name for name in predictor.dataset_json["labels"] if name not in ("background", "ignore")]
    if labels.has_regions:
        # In the order in which the label manager reads them.
        return {name: index for index, name in enumerate(names)}
    return {name: int(predictor.dataset_json["labels"][name]) for name in names}


def find_cases(source: Path, model: Model) -> dict[str, list[str]]:
    """The files of each case, one for each channel, by the case's name.

    Args:
        source: the first channel's file of a case, or a folder of cases.

    Raises:
        InspectionError: none is there, or one lacks a channel.
    """
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

    description = model.predictor.dataset_json
    ending = description["file_ending"]
    channels = description.get("channel_names", description.get("modality"))
    if source.is_dir():
        folder, names = source, sorted(get_identifiers_from_splitted_dataset_folder(str(source), ending))
    elif source.is_file() and source.name.endswith(f"_0000{ending}"):
        folder, names = source.parent, [source.name.removesuffix(f"_0000{ending}")]
    else:
        raise InspectionError(
            f"{source} is no folder and no file of a first channel; give one that ends in _0000{ending}, or a folder."
        )
    if not names:
        raise InspectionError(f"{folder} has no case; the model wants files that end in _0000{ending}.")
    cases = {}
    for name in names:
        files = sorted(str(f) for f in folder.glob(f"{glob.escape(name)}_[0-9][0-9][0-9][0-9]{ending}"))
        wanted = [str(folder / f"{name}_{number:04d}{ending}") for number in range(len(channels))]
        if files != wanted:
            raise InspectionError(
                f"case {name} in {folder} has {len(files)} channels, and the model wants {len(channels)} "
                f"({', '.join(channels.values())}): {', '.join(Path(f).name for f in wanted)}."
            )
        cases[name] = wanted
    return cases


@dataclass(frozen=True)
class Case:
    """A case as one model sees it.

    data: preprocessed, [C, *spatial]; image: the first channel as it is in its file, [Z, Y, X]; truth: labels alike,
    or None; properties: nnU-Net's; geometry: of preprocessing; reference: an image of SimpleITK with the geometry of
    the case, or None where its files have none.
    """

    name: str
    data: Tensor
    image: np.ndarray
    truth: np.ndarray | None
    properties: dict[str, Any]
    geometry: Geometry


def read_case(
    model: Model, name: str, files: Sequence[str], labels: Path | None = None, previous: Path | None = None
) -> Case:
    """
    Args:
        labels: the file of its truth; previous: the first stage's prediction of it, for the second stage of a cascade.

    Raises:
        InspectionError: a file is missing, damaged or of another shape, or has values that are no label.
    """
    p = model.predictor
    configuration = p.configuration_manager
    if configuration.previous_stage_name is not None and (previous is None or not previous.is_file()):
        raise InspectionError(
            f"{model.name} is the second stage of a cascade and needs the prediction of {name} by "
            f"{configuration.previous_stage_name}; make it with nnUNetv2_predict, and give its folder with --previous."
        )
    reader = p.plans_manager.image_reader_writer_class()
    if type(reader).__name__.endswith("Reorient"):
        raise InspectionError(
            f"{type(reader).__name__} reorients images; models that are read with it are not supported."
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            image, _ = reader.read_images(list(files))
            truth = None if labels is None else reader.read_seg(str(labels))[0][0].astype(int)
            before = previous if configuration.previous_stage_name is not None else None
            data, seg, properties = configuration.preprocessor_class(verbose=False).run_case(
                list(files), None if before is None else str(before), p.plans_manager, configuration, p.dataset_json
            )
    except Exception as error:
        raise InspectionError(
            f"case {name} cannot be read ({_one_line(error)}); look at its files with nnunet-deform check-images."
        ) from error
    if truth is not None:
        _check_truth(p, name, labels, truth, image.shape[1:])
    if before is not None:
        from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

        data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], p.label_manager.foreground_labels, data.dtype)))
    return Case(
        name=name,
        data=torch.from_numpy(np.ascontiguousarray(data)),
        image=image[0],
        truth=truth,
        properties=properties,
        geometry=_geometry(p, properties, data.shape[1:], files[0]),
    )


def _check_truth(predictor: Any, name: str, file: Path | None, truth: np.ndarray, shape: tuple[int, ...]) -> None:
    if truth.shape != shape:
        raise InspectionError(f"{file} has {truth.shape} voxels and the image of {name} {shape}; give labels that fit.")
    labels = predictor.label_manager
    known = set(labels.all_labels) | ({labels.ignore_label} if labels.has_ignore_label else set())
    if strange := sorted(set(np.unique(truth).tolist()) - known):
        raise InspectionError(
            f"{file} has the labels {strange}, which the model does not know; it knows {sorted(known)}."
        )


def _geometry(predictor: Any, properties: dict[str, Any], resampled: Sequence[int], file: str) -> Geometry:
    placed: dict[str, Any] = {}
    reference = reference_image(file)
    if reference is not None:
        placed = {"origin": reference.GetOrigin(), "direction": reference.GetDirection()}
    return Geometry(
        transpose=tuple(predictor.plans_manager.transpose_forward),
        corner=tuple(int(low) for low, _ in properties["bbox_used_for_cropping"]),
        cropped=tuple(properties["shape_after_cropping_and_before_resampling"]),
        resampled=tuple(resampled),
        spacing=tuple(float(s) for s in properties["spacing"]),
        **placed,
    )


def reference_image(file: str) -> Any:
    """The case's file as an image of SimpleITK with three axes, for its geometry; None of files that have none."""
    import SimpleITK as sitk

    if not file.endswith((".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")):
        return None
    image = sitk.ReadImage(file)
    if image.GetDimension() == 2:
        return sitk.JoinSeries(image)
    return image if image.GetDimension() == 3 else image[..., 0]
