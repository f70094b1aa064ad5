"""The architectures of the rivals for a plan."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_deform.networks.rivals.geometry import token_grids, total_stride
from nnunet_deform.plans.architecture import Architecture, Topology, require_extent, topology_of

_MODULE = "nnunet_deform.networks.rivals"
# The networks' widths, by the names that ``network`` may have.
_OPTIONS: dict[str, dict[str, Any]] = {
    "NnFormer": {"width": 192},
    "NnFormer_96": {"width": 96},
    "UNETRPlusPlus": {"widths": [32, 64, 128, 256]},
    "SegFormer3D": {"widths": [32, 64, 160, 256], "heads": [1, 2, 5, 8], "decoder_width": 256},
    "UNesT_B": {"token_widths": [128, 256, 512], "heads": [4, 8, 16], "depths": [2, 2, 8]},
    "UNesT_L": {"token_widths": [192, 384, 768], "heads": [6, 12, 24], "depths": [2, 2, 20]},
    "TransBTS": {"base_width": 16, "token_width": 512, "heads": 8, "mlp_width": 4096},
    "CoTr": {"widths": [64, 192, 384], "heads": 6},
}
_POOLINGS = {"CoTr": 4}
_FEWEST_POOLINGS = 2
_SMALLEST_WINDOW, _LARGEST_WINDOW = 3, 5  # of nnFormer's two fine levels
_LARGEST_WINDOW_TOKENS = 1024
_TRANSBTS_LEVELS = 4
# Of TransBTS where a plan has fewer poolings than its three: time grows with the square.
_MOST_TOKENS = 16_384


def rival_architecture(
    base: Mapping[str, Any], patch_size: Sequence[int], *, network: str, **network_options: Any
) -> Architecture:
    """The ``architecture`` entry that puts a rival in the place of a plan's network.

    A token stands for the plan's first two poolings, [s_1, s_2]. The three steps after that are the plan's next ones;
    beyond its last one they halve each axis that still has more than two tokens. TransBTS has the plan's first three
    poolings, CoTr its first four.

    Args:
        base: the plan's ``architecture``, a stock U-Net's.
        patch_size: the plan's patch, in voxels.
        network: "NnFormer", "NnFormer_96", "UNETRPlusPlus", "SegFormer3D", "UNesT_B", "UNesT_L", "TransBTS" or "CoTr".
        network_options: further arguments of its class in :mod:`nnunet_deform.networks.rivals`.

    Raises:
        NotImplementedError: the plan has too few poolings or strides other than 1 and 2, or TransBTS would have too
            many tokens.
        ValueError: the plan has no strides or kernels, or a single level, or its patch shrinks to a single token.
    """
    topology = topology_of(base, patch_size)
    patch_size, strides, kernel_sizes = list(patch_size), topology.strides, topology.kernel_sizes
    name = network.partition("_")[0]
    needed = _POOLINGS.get(name, _FEWEST_POOLINGS)
    if len(strides) - 1 < needed:
        raise NotImplementedError(
            f"{name} needs at least {needed} poolings, and the plan has {len(strides) - 1} (strides {strides}); plan "
            f"with a larger patch than {patch_size}."
        )
    if any(step not in (1, 2) for stride in strides for step in stride):
        raise NotImplementedError(
            f"{name} takes strides of 1 and 2, and the plan has {strides} for the patch {patch_size}; plan with "
            "strides of 1 and 2."
        )
    ndim = len(patch_size)
    full_resolution = [1] * ndim
    embed_strides = strides[1:3]
    token = total_stride(embed_strides)
    down_strides, down_kernels = _steps(patch_size, strides, kernel_sizes)
    geometry: dict[str, Any] = {"embed_strides": embed_strides, "down_strides": down_strides}
    output_strides = [full_resolution]
    if name == "NnFormer":
        geometry["down_kernels"] = down_kernels
        geometry["window_sizes"] = _windows(token_grids(patch_size, [token, *down_strides]))
        output_strides = [full_resolution, *down_strides[:2]]
    elif name == "UNETRPlusPlus":
        output_strides = [full_resolution, token, down_strides[0]]
    elif name == "SegFormer3D":
        geometry["down_kernels"] = down_kernels
    elif name == "UNesT":
        geometry["bottleneck_kernel"] = down_kernels[2]
    elif name == "TransBTS":
        geometry = {"strides": _transbts_strides(patch_size, strides)}
    else:
        geometry = {"strides": strides[:5]}
        output_strides = strides[:4]
    levels = geometry.get("strides", [full_resolution, token, *down_strides])
    require_extent(Topology(levels, kernel_sizes), patch_size)
    if name not in ("SegFormer3D", "CoTr"):
        geometry["patch_size"] = patch_size
    return {
        "network_class_name": f"{_MODULE}.{name}",
        "arch_kwargs": {"output_strides": output_strides, **geometry, **_OPTIONS[network], **network_options},
        "_kw_requires_import": [],
    }


def _steps(
    patch_size: Sequence[int], strides: list[list[int]], kernel_sizes: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels of the three steps below the tokens."""
    (grid,) = token_grids(patch_size, [total_stride(strides[1:3])])
    steps, kernels = [], []
    for level in (3, 4, 5):
        planned = level < len(strides)
        steps.append(strides[level] if planned else [2 if size > 2 else 1 for size in grid])
        kernels.append(kernel_sizes[level] if planned else [3] * len(grid))
        (grid,) = token_grids(grid, [steps[-1]])
    return steps, kernels


def _windows(grids: Sequence[Sequence[int]]) -> list[list[int]]:
    """nnFormer's windows: small at the two fine levels, the whole map at the two coarse ones, as far as it fits."""
    small = [min(max(size, _SMALLEST_WINDOW), _LARGEST_WINDOW) for size in grids[3]]
    windows = []
    for level, grid in enumerate(grids):
        window = [min(pair) for pair in zip(grid, small, strict=True)] if level < 2 else list(grid)
        while math.prod(window) > _LARGEST_WINDOW_TOKENS:
            longest = window.index(max(window))
            window[longest] = -(-window[longest] // 2)
        windows.append(window)
    return windows


def _transbts_strides(patch_size: Sequence[int], strides: list[list[int]]) -> list[list[int]]:
    missing = max(_TRANSBTS_LEVELS - len(strides), 0)
    levels = [*strides[:_TRANSBTS_LEVELS], *([[1] * len(patch_size)] * missing)]
    tokens = math.prod(token_grids(patch_size, levels)[-1])
    if missing and tokens > _MOST_TOKENS:
        raise NotImplementedError(
            f"TransBTS pools three times, and over the strides {strides} of the plan its transformer would have "
            f"{tokens} tokens, more than {_MOST_TOKENS}; plan with more poolings or a smaller patch than "
            f"{list(patch_size)}."
        )
    return levels
