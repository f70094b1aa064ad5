"""Model folders of nnU-Net, made without training, and a case for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from test_geometry import rotated
from torch import nn

EARLIER = Path(__file__).parents[1] / "trainers" / "data" / "trained_before"
PATCH = (8, 16, 16)
WIDTHS, STRIDES, KERNELS = [4, 8], [[1, 1, 1], [1, 2, 2]], [[1, 3, 3], [3, 3, 3]]
DESCRIPTION = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "front": 1, "back": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
REGIONS = {
    **DESCRIPTION,
    "labels": {"background": 0, "whole": [1, 2], "back": 2},
    "regions_class_order": [1, 2],
}


def network(channels: int, heads: int) -> PlainConvUNet:
    torch.manual_seed(3)
    return PlainConvUNet(
        *(channels, 2, WIDTHS, nn.Conv3d, KERNELS, STRIDES, [1, 1], heads, [1]),
        **{"conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}},
        **{"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}, "deep_supervision": False},
    )


def plans(previous: str | None = None) -> dict[str, Any]:
    earlier = json.loads((EARLIER / "nnUNetTrainerMAGIC__nnUNetPlans__2d" / "plans.json").read_text())
    configuration = {
        **earlier["configurations"]["2d"],
        "patch_size": list(PATCH),
        "spacing": [1.5, 0.8, 0.5],
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [False] * 2,
        # Linear along every axis, so that positions come back exactly.
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": WIDTHS,
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": KERNELS,
                "strides": STRIDES,
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    if previous is not None:
        configuration["previous_stage"] = previous
    # The case's axes (z, y, x) are preprocessed as (z, x, y).
    return {
        **earlier,
        "transpose_forward": [0, 2, 1],
        "transpose_backward": [0, 2, 1],
        "foreground_intensity_properties_per_channel": dict.fromkeys(
            "01", earlier["foreground_intensity_properties_per_channel"]["0"]
        ),
        "configurations": {"3d_fullres": configuration},
    }


def stock_model(folder: Path, description: dict[str, Any] = DESCRIPTION, previous: str | None = None) -> Path:
    """nnU-Net's own U-Net with the weights that it starts from."""
    model = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans(previous)))
    (model / "dataset.json").write_text(json.dumps(description))
    heads = 2 if "regions_class_order" in description else 3
    channels = 2 if previous is None else 4
    checkpoint = {
        "network_weights": network(channels, heads).state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return model


def write_case(folder: Path, name: str, size: tuple[int, int, int], channels: int) -> sitk.Image:
    """Rotated, anisotropic, noise with a bright box, surrounded by zeros that nnU-Net crops; returns its geometry."""
    geometry = rotated()
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for channel in range(channels):
        array = rng.normal(5, 1, size).astype(np.float32)
        array[tuple(slice(s // 3, 2 * s // 3) for s in size)] += 5
        array[:, :2] = 0
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(geometry.GetSpacing())
        image.SetOrigin(geometry.GetOrigin())
        image.SetDirection(geometry.GetDirection())
        sitk.WriteImage(image, folder / f"{name}_{channel:04d}.nii.gz")
    return image


def write_labels(folder: Path, name: str, like: sitk.Image, array: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.CopyInformation(like)
    sitk.WriteImage(image, folder / f"{name}.nii.gz")
