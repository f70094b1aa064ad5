"""LightMedSeg's architecture for a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_deform.networks.lightmedseg import check_width
from nnunet_deform.networks.without_values import without_values
from nnunet_deform.plans.architecture import Architecture, topology_of

NETWORK = "nnunet_deform.networks.LightMedSeg"
BASE_FEATURES = 8
MAX_FEATURES = 64
OP_OFF = {"prior": "conv", "anchors": "affine", "router": "mean"}


def lightmedseg_architecture(
    base: Mapping[str, Any],
    patch_size: Sequence[int],
    *,
    max_levels: int = 5,
    features_per_stage: Sequence[int] | None = None,
    width: int | None = None,
    op_off: bool = False,
    **network_options: Any,
) -> Architecture:
    """The ``architecture`` entry that puts LightMedSeg in the place of a plan's network.

    Only the number of axes, strides and kernels are taken from the plan; widths, norms and biases are the paper's.

    Args:
        base: the plan's ``architecture``: a stock U-Net's, or one this function made, which keeps its arguments.
        patch_size: the plan's patch, in voxels.
        max_levels: levels to keep, full resolution included; the paper's network has 5.
        features_per_stage: width at each level; by default 8 doubled at each level, at most 64, and the coarsest as
            wide as the one before it; times ``width``.
        width: factor of all widths: those at each level, where they are not given, and the hidden ones of router,
            structural prior and anchor detector; by default 1, the paper's, or what a plan of ours has. Gates have
            max(4, C / 4) hidden units for C channels at every factor, and the number of anchors stays.
        op_off: the twin without the paper's operators: two convolutions in the place of the structural prior, a
            learned affine of each channel in that of FiLM, and equal weights in that of the learned router. Its
            bottleneck is as wide as brings the number of parameters nearest to the full network's.
        network_options: further arguments of :class:`nnunet_deform.networks.LightMedSeg`.

    Raises:
        ValueError: the plan has fewer than two levels, or its architecture no strides; ``width`` is no whole number.
    """
    if width is not None:
        check_width(width)
        network_options["width"] = width
    if base["network_class_name"] == NETWORK:
        planned = base["arch_kwargs"]
        if features_per_stage is None:
            old = planned.get("width", 1)
            features_per_stage = [features * (width or old) // old for features in planned["features_per_stage"]]
        arguments = {**planned, "features_per_stage": list(features_per_stage), **network_options}
        architecture = {**base, "arch_kwargs": arguments}
    else:
        topology = topology_of(base, patch_size, max_levels)
        if features_per_stage is None:
            widths = [min(BASE_FEATURES * 2**level, MAX_FEATURES) for level in range(len(topology.strides) - 1)]
            features_per_stage = [features * (width or 1) for features in [*widths, widths[-1]]]
        architecture = {
            "network_class_name": NETWORK,
            "arch_kwargs": {
                **topology.conv_arguments(),
                "features_per_stage": list(features_per_stage),
                **network_options,
            },
            "_kw_requires_import": ["conv_op"],
        }
    return _op_off_twin(architecture) if op_off else architecture


def _op_off_twin(full: Architecture) -> Architecture:
    def with_bottleneck(width: int) -> Architecture:
        return {**full, "arch_kwargs": {**full["arch_kwargs"], **OP_OFF, "bottleneck_channels": width}}

    # The number of parameters is linear in this width, a multiple of 4 for the norm's groups.
    wanted = _parameters(full)
    first, second = _parameters(with_bottleneck(4)), _parameters(with_bottleneck(8))
    return with_bottleneck(4 * max(1, 1 + round((wanted - first) / (second - first))))


def _parameters(architecture: Architecture) -> int:
    """Parameters with one input channel and one class, which are the same for a network and its twin."""
    with without_values():
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            1,
            1,
            allow_init=False,
        )
    return sum(parameter.numel() for parameter in network.parameters())
