"""The architectures of MONAI's networks for a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from packaging.version import Version

from nnunet_deform.plans.architecture import Architecture, Topology, require_extent, topology_of

_MODULE = "nnunet_deform.networks.baselines"
_OLDEST_MONAI = Version("1.5")  # the first with MedNeXt
# These halve every axis this often, whatever the plan's strides are; DynUNet is the one that follows them.
_HALVINGS = {"SwinUNETR": 5, "UNETR": 4, "SegResNet": 3, "UNetPlusPlus": 4, "MedNeXt": 4}
# At their coarsest level each channel is normalised over its voxels, of which one is too few.
_NORMALISED_OVER_VOXELS = ("SwinUNETR", "UNetPlusPlus", "MedNeXt")
# The widths of the papers, or MONAI's own where those are meant for MONAI's version.
_OPTIONS: dict[str, dict[str, Any]] = {
    "SwinUNETR": {"feature_size": 48},
    "UNETR": {"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12},
    "SegResNet": {"init_filters": 32},
    "DynUNet": {},
    "UNetPlusPlus": {"features": [32, 32, 64, 128, 256, 32]},
    "MedNeXt": {"variant": "S", "kernel_size": 3},
}


def _require_monai(network: str) -> None:
    try:
        import monai
    except ModuleNotFoundError:
        installed = "none"
    else:
        installed = monai.__version__
    if installed == "none" or Version(installed) < _OLDEST_MONAI:
        raise ImportError(
            f"{network} needs MONAI {_OLDEST_MONAI} or newer, and {installed} is installed: "
            "pip install 'nnunet-deform[baselines]'."
        )


def baseline_architecture(
    base: Mapping[str, Any], patch_size: Sequence[int], *, network: str, **network_options: Any
) -> Architecture:
    """The ``architecture`` entry that puts one of MONAI's networks in the place of a plan's.

    DynUNet takes strides, kernels and widths from the plan. The others halve every axis a fixed number of times, so of
    a plan they take the number of axes, and its patch is padded inside of them.

    Args:
        base: the plan's ``architecture``, a stock U-Net's.
        patch_size: the plan's patch, in voxels.
        network: "SwinUNETR", "UNETR", "SegResNet", "DynUNet", "UNetPlusPlus" or "MedNeXt".
        network_options: further arguments of this class of :mod:`nnunet_deform.networks.baselines`.

    Raises:
        ImportError: MONAI is not installed, or too old.
        NotImplementedError: the patch is too small for the network's levels, or the plan has fewer than three levels
            for DynUNet.
        ValueError: the plan has no strides or widths for DynUNet, or its patch shrinks to a single voxel over them.
    """
    _require_monai(network)
    ndim = len(patch_size)
    options = {**_OPTIONS[network], **network_options}
    if network == "DynUNet":
        topology = topology_of(base, patch_size)
        if len(topology.strides) < 3:
            raise NotImplementedError(
                f"MONAI's DynUNet needs at least three levels, and the plan has {len(topology.strides)} (strides "
                f"{topology.strides}); plan with a larger patch than {list(patch_size)}."
            )
        if "features_per_stage" not in base["arch_kwargs"]:
            raise ValueError(
                f"the plan's architecture {base['network_class_name']} has no features_per_stage for DynUNet; start "
                "from a plan of nnU-Net's own U-Nets (nnUNetPlans or a ResEnc plan)."
            )
        require_extent(topology, patch_size)
        options = {
            "kernel_sizes": topology.kernel_sizes,
            "features_per_stage": list(base["arch_kwargs"]["features_per_stage"]),
            **options,
        }
    else:
        halvings = _HALVINGS[network]
        topology = Topology([[1] * ndim] + [[2] * ndim] * halvings, [[3] * ndim] * (halvings + 1))
        if network in _NORMALISED_OVER_VOXELS and max(patch_size) <= 2**halvings:
            raise NotImplementedError(
                f"{network} halves every axis {halvings} times, and the patch {list(patch_size)} would shrink to a "
                f"single voxel, which it cannot normalise; plan with a patch of more than {2**halvings} voxels on an "
                "axis."
            )
    if network == "UNETR":
        options["patch_size"] = list(patch_size)
    full_resolution = [1] * ndim
    output_strides = {
        "DynUNet": topology.strides[:-1],
        "UNetPlusPlus": [full_resolution] * 4,
        "MedNeXt": topology.strides,
    }.get(network, [full_resolution])
    return {
        "network_class_name": f"{_MODULE}.{network}",
        "arch_kwargs": {"strides": topology.strides, "output_strides": output_strides, **options},
        "_kw_requires_import": [],
    }
