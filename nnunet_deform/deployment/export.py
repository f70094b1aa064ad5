"""A trained model as an ONNX file, with all that :mod:`nnunet_deform.deployment.scans` needs to predict whole scans."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nnunet_deform import __version__
from nnunet_deform.deployment.exported import DATASET_JSON, INPUT, OUTPUT, PLANS
from nnunet_deform.inspection.model import InspectionError, load_model
from nnunet_deform.ops.deform_conv_onnx import translation_table

OPSET = 20  # the first with GridSample in 3D
# Relative to the largest logit. Sums are taken in another order by the other runtime.
TOLERANCE = 1e-3


class ExportError(RuntimeError):
    """The model cannot be exported; the message says why and what to do."""


def export_onnx(
    model_folder: Path, output: Path, *, fold: str = "0", checkpoint: str = "checkpoint_final.pth"
) -> dict[str, str]:
    """Write the network of one fold as ONNX, and check it with ONNX Runtime.

    The file takes ``image`` [1, channels, *patch_size], preprocessed as the metadata says, and gives ``logits``
    [1, classes, *patch_size]. The metadata hold plans.json and dataset.json, which ``nnunet-deform predict-onnx`` needs
    for sliding window, mirroring and resampling, and what others need of them by name.

    Args:
        model_folder: nnU-Net's ``<trainer>__<plans>__<configuration>``.
        output: the file to write; it appears only when it is complete and checked.
        fold: a number or "all".
        checkpoint: name of the checkpoint in the fold's folder.

    Returns:
        The metadata in the file, JSON by name.

    Raises:
        ExportError: a file or package is missing, or ONNX Runtime disagrees.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    _check_packages()
    try:
        model = load_model(model_folder, fold=fold, checkpoint=checkpoint)
    except InspectionError as error:
        raise ExportError(str(error)) from error
    predictor, network = model.predictor, model.network
    configuration = predictor.configuration_manager
    channels = determine_num_input_channels(predictor.plans_manager, configuration, predictor.dataset_json)
    image = torch.randn(1, channels, *configuration.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            (image,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table=translation_table(),
            verbose=False,
        )
        expected = network(image)
    from nnunet_deform.deployment.convolutions import use_2d_convolutions

    use_2d_convolutions(program.model)
    metadata = _metadata(predictor, fold, _configuration(model_folder / f"fold_{fold}" / checkpoint))
    program.model.metadata_props.update(metadata)

    partial = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        program.save(partial, external_data=False)
        _check_result(partial, image, expected)
        os.replace(partial, output)
    except OSError as error:
        raise ExportError(f"cannot write {output} ({error.strerror}).") from error
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)
    return metadata


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed; run: pip install 'nnunet-deform[export]'") from error


def _configuration(weights: Path) -> str:
    """Its name, which nnU-Net's predictor reads and forgets."""
    return torch.load(weights, map_location="cpu", weights_only=False, mmap=True)["init_args"]["configuration"]


def _metadata(predictor: Any, fold: str, configuration_name: str) -> dict[str, str]:
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    dataset, labels = predictor.dataset_json, predictor.label_manager
    values = {
        "nnunet_deform": __version__,
        PLANS: plans.plans,
        DATASET_JSON: dataset,
        "configuration": configuration_name,
        "trainer": predictor.trainer_name,
        "dataset": plans.dataset_name,
        "plans": plans.plans_name,
        "fold": fold,
        "channel_names": dataset.get("channel_names", dataset.get("modality")),
        "patch_size": configuration.patch_size,
        "spacing": configuration.spacing,
        "transpose_forward": plans.transpose_forward,
        "transpose_backward": plans.transpose_backward,
        "normalization_schemes": configuration.normalization_schemes,
        "use_mask_for_norm": configuration.use_mask_for_norm,
        "foreground_intensity_properties_per_channel": plans.foreground_intensity_properties_per_channel,
        "labels": dataset["labels"],
        "regions_class_order": dataset.get("regions_class_order"),
        "activation": "sigmoid" if labels.has_regions else "softmax",
        "mirror_axes": predictor.allowed_mirroring_axes,
    }
    return {name: json.dumps(value) for name, value in values.items()}


def _check_result(path: Path, image: torch.Tensor, expected: torch.Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {INPUT: image.numpy()})
    error = (torch.from_numpy(logits) - expected).abs().max() / expected.abs().max().clamp(min=1)
    if not error <= TOLERANCE:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} gives logits that differ by {error:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}; nothing was written."
        )
