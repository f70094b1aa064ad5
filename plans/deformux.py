"""DeformUX-Net's architecture for a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_deform.plans.architecture import Architecture, require_extent, topology_of

NETWORK = "nnunet_deform.networks.DeformUXNet"
BASE_FEATURES = 48
MAX_FEATURES = 768


def deformux_architecture(
    base: Mapping[str, Any],
    patch_size: Sequence[int],
    *,
    max_levels: int = 5,
    features_per_stage: Sequence[int] | None = None,
    **network_options: Any,
) -> Architecture:
    """The ``architecture`` entry that puts DeformUX-Net in the place of a plan's network.

    Only the number of axes, strides and kernels are taken from the plan; widths, norms and biases are the paper's.

    Args:
        base: the plan's ``architecture``: a stock U-Net's, or one this function made, which keeps its arguments.
        patch_size: the plan's patch, in voxels.
        max_levels: levels to keep, full resolution included; the paper's network has 5.
        features_per_stage: width at each level; by default 48 doubled at each level, at most 768.
        network_options: further arguments of :class:`nnunet_deform.networks.DeformUXNet`.

    Raises:
        ValueError: the plan has fewer than two levels, its architecture no strides, or the patch is too small.
        NotImplementedError: ``offset_axes`` names axes, which are a plane of three, and the configuration has two.
    """
    axes = network_options.get("offset_axes", ())
    if axes and not isinstance(axes, str) and len(patch_size) < 3:
        raise NotImplementedError(
            f"offset_axes={tuple(axes)} is a choice among three axes, but the patch {list(patch_size)} has "
            f"{len(patch_size)}; use a 3D configuration, or the trainer without this option."
        )
    if base["network_class_name"] == NETWORK:
        given = {} if features_per_stage is None else {"features_per_stage": list(features_per_stage)}
        return {**base, "arch_kwargs": {**base["arch_kwargs"], **given, **network_options}}

    topology = topology_of(base, patch_size, max_levels)
    require_extent(topology, patch_size)
    if features_per_stage is None:
        features_per_stage = [min(BASE_FEATURES * 2**level, MAX_FEATURES) for level in range(len(topology.strides))]
    return {
        "network_class_name": NETWORK,
        "arch_kwargs": {
            **topology.conv_arguments(),
            "features_per_stage": list(features_per_stage),
            "n_blocks_per_stage": [2] * (len(topology.strides) - 1),
            "conv_bias": False,
            **topology.plain_instance_norm(),
            "dropout_op": None,
            "dropout_op_kwargs": None,
            **network_options,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
