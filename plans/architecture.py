"""A plan's ``architecture`` entry: which network, with which arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm

Architecture = dict[str, Any]


def dotted_name(cls: type) -> str:
    """As plans name classes: the module and the name."""
    return f"{cls.__module__}.{cls.__name__}"


@dataclass(frozen=True)
class Topology:
    """What our networks take from a plan: levels, strides, kernels, and the number of axes."""

    strides: list[list[int]]
    kernel_sizes: list[list[int]]

    @property
    def ndim(self) -> int:
        return len(self.strides[0])

    def conv_arguments(self) -> dict[str, Any]:
        """The arguments that every network of ours takes from here, in the plan's JSON form."""
        return {
            "n_stages": len(self.strides),
            "conv_op": dotted_name(convert_dim_to_conv_op(self.ndim)),
            "kernel_sizes": self.kernel_sizes,
            "strides": self.strides,
        }

    def plain_instance_norm(self) -> dict[str, Any]:
        """InstanceNorm without affine and LeakyReLU, in the plan's JSON form."""
        return {
            "norm_op": dotted_name(get_matching_instancenorm(dimension=self.ndim)),
            "norm_op_kwargs": {"eps": 1e-5, "affine": False},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
        }


def topology_of(architecture: Mapping[str, Any], patch_size: Sequence[int], max_levels: int | None = None) -> Topology:
    """The topology of a plan's architecture, cut to its first ``max_levels`` levels if that is given.

    Raises:
        ValueError: fewer than two levels, or levels without strides or kernels.
    """
    arguments = architecture["arch_kwargs"]
    missing = [key for key in ("strides", "kernel_sizes") if key not in arguments]
    if missing:
        raise ValueError(
            f"the plan's architecture {architecture['network_class_name']} has no {' and no '.join(missing)}; "
            "start from a plan of nnU-Net's own U-Nets (nnUNetPlans or a ResEnc plan)."
        )
    ndim = len(patch_size)
    strides = [_per_axis(stride, ndim) for stride in arguments["strides"]][:max_levels]
    kernel_sizes = [_per_axis(kernel, ndim) for kernel in arguments["kernel_sizes"]][:max_levels]
    if len(strides) < 2:
        raise ValueError(
            f"the plan has {len(strides)} level (strides {strides}), but at least 2 are needed; plan with a larger "
            f"patch than {list(patch_size)}."
        )
    return Topology(strides, kernel_sizes)


def require_extent(topology: Topology, patch_size: Sequence[int]) -> None:
    """Raises ValueError if the coarsest level is a single voxel, which InstanceNorm cannot normalise."""
    coarsest = list(patch_size)
    for stride in topology.strides:
        coarsest = [-(-size // step) for size, step in zip(coarsest, stride, strict=True)]
    if all(size == 1 for size in coarsest):
        raise ValueError(
            f"the patch {list(patch_size)} shrinks to a single voxel over the strides {topology.strides}, which "
            "InstanceNorm cannot normalise; plan with a larger patch or fewer levels."
        )


def _per_axis(value: int | Sequence[int], ndim: int) -> list[int]:
    return [value] * ndim if isinstance(value, int) else list(value)
