"""Model folders as nnU-Net leaves them, without a training, and scans for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

LABELS = {"background": 0, "bright": 1, "dark": 2}
REGIONS = {"background": 0, "both": [1, 2], "dark": 2, "ignore": 3}


def dataset_json(labels: dict[str, Any] = LABELS, channels: int = 1, ending: str = ".nii.gz") -> dict[str, Any]:
    return {
        "channel_names": {str(channel): f"T{channel + 1}" for channel in range(channels)},
        "labels": labels,
        **({"regions_class_order": [1, 2]} if labels is REGIONS else {}),
        "numTraining": 2,
        "file_ending": ending,
    }


def plans(patch_size: tuple[int, ...], channels: int = 1) -> dict[str, Any]:
    """For a U-Net of two levels. In 3D the axes of the images are swapped, and voxels are flat."""
    ndim = len(patch_size)
    spacing = [1.0, 1.0] if ndim == 2 else [2.0, 1.0, 1.0]
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    intensities = dict.fromkeys(("max", "mean", "median", "min", "std", "percentile_00_5", "percentile_99_5"), 1.0)
    name = "2d" if ndim == 2 else "3d_fullres"
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": list(patch_size),
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [8, 24],
                "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
                "kernel_sizes": [[3] * ndim] * 2,
                "strides": [[1] * ndim, [2] * ndim],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    axes = ([0, 1, 2], [0, 1, 2]) if ndim == 2 else ([2, 0, 1], [1, 2, 0])
    return {
        "dataset_name": "Dataset998_Scans",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.0, 1.0],
        "original_median_shape_after_transp": [16, 16, 16],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": axes[0],
        "transpose_backward": axes[1],
        "configurations": {name: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): intensities for channel in range(channels)},
    }


def write_model(folder: Path, plans: dict[str, Any], dataset: dict[str, Any], folds: int = 1) -> Path:
    """Of nnU-Net's own trainer, with weights that were not trained."""
    (configuration,) = plans["configurations"]
    manager = PlansManager(plans)
    folder.mkdir()
    for name, content in (("plans.json", plans), ("dataset.json", dataset)):
        (folder / name).write_text(json.dumps(content))
    heads = manager.get_label_manager(dataset).num_segmentation_heads
    for fold in range(folds):
        torch.manual_seed(fold)
        network = nnUNetTrainer.build_network_architecture(
            manager, manager.get_configuration(configuration), len(dataset["channel_names"]), heads, False
        )
        head = network.decoder.seg_layers[-1]
        with torch.no_grad():
            # Logits on both sides of zero, so that every label is predicted.
            head.weight.sub_(head.weight.mean(1, keepdim=True)).mul_(4)
            head.bias.zero_()
        checkpoint = {
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": (0, 1),
            "network_weights": network.state_dict(),
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def write_scan(folder: Path, name: str, channels: int = 1, ending: str = ".nii.gz", seed: int = 0) -> None:
    """Boxes in noise, of (13, 22, 30) voxels of (1, 1.3, 0.8) mm, in an orientation of its own."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for channel in range(channels):
        voxels = rng.normal(0, 0.5, (13, 22, 30))
        voxels[3:9, 5:15, 4:20] += 2
        image = sitk.GetImageFromArray(voxels.astype(np.float32))
        image.SetSpacing((0.8, 1.3, 1.0))
        image.SetOrigin((3.0, -7.0, 11.0))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(folder / f"{name}_{channel:04d}{ending}"))
