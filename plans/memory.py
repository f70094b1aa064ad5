"""How much memory training a plan takes, by nnU-Net's own yardstick."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

# ExperimentPlanner's reference: a network that counts so many feature map elements for one sample needs 8 GB in mixed
# precision at this batch size.
_REFERENCE_GIGABYTES = 8
_REFERENCE_ELEMENTS = {2: 85_000_000, 3: 560_000_000}
_REFERENCE_BATCH = {2: 12, 3: 2}


def estimated_gigabytes(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    batch_size: int,
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> float | None:
    """Memory of a training step in GB, as nnU-Net's planner estimates it.

    The planner's figure is for mixed precision; float32 is counted as twice that.

    Args:
        architecture: a plan's ``architecture`` entry.
        patch_size: in voxels.
        batch_size: samples in a step on one device.
        input_channels, num_classes: of the network.
        mixed_precision: whether training runs under autocast, as nnU-Net does on CUDA and only there.

    Returns:
        None if the network gives no estimate of its own (``compute_conv_feature_map_size``).
    """
    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            input_channels,
            num_classes,
            allow_init=False,
            deep_supervision=True,
        )
    if not hasattr(network, "compute_conv_feature_map_size"):
        return None
    elements = float(network.compute_conv_feature_map_size(patch_size))
    ndim = len(patch_size)
    gigabytes = _REFERENCE_GIGABYTES * elements * batch_size / (_REFERENCE_ELEMENTS[ndim] * _REFERENCE_BATCH[ndim])
    return gigabytes if mixed_precision else 2 * gigabytes
