"""Token grids and windows of the rivals, from plans' strides alone."""

import pytest

from nnunet_deform.networks.rivals.geometry import token_grids, total_stride
from nnunet_deform.plans.rivals import rival_architecture

TWOS = [2, 2, 2]


def arguments(patch, poolings, network="NnFormer", kernels=None):
    strides = [[1] * len(patch), *poolings]
    kernels = kernels or [[3] * len(patch)] * len(strides)
    base = {"network_class_name": "a U-Net", "arch_kwargs": {"strides": strides, "kernel_sizes": kernels}}
    return rival_architecture(base, patch, network=network)["arch_kwargs"]


@pytest.mark.parametrize(
    ("patch", "poolings", "grids", "windows"),
    [
        (
            (40, 56, 40),
            [TWOS] * 3,
            [[10, 14, 10], [5, 7, 5], [3, 4, 3], [2, 2, 2]],
            [[3, 3, 3], [3, 3, 3], [3, 4, 3], [2, 2, 2]],
        ),
        ((32,) * 3, [TWOS] * 3, [[8] * 3, [4] * 3, [2] * 3, [2] * 3], [[3] * 3, [3] * 3, [2] * 3, [2] * 3]),
        (
            (20, 80, 64),
            [[1, 2, 2], [1, 2, 2], TWOS, [1, 2, 2]],
            [[20, 20, 16], [10, 10, 8], [10, 5, 4], [5, 3, 2]],
            [[5, 3, 3], [5, 3, 3], [10, 5, 4], [5, 3, 2]],
        ),
        (
            (20, 320, 256),
            [[1, 2, 2], [1, 2, 2], TWOS, TWOS, [1, 2, 2], [1, 2, 2]],
            [[20, 80, 64], [10, 40, 32], [5, 20, 16], [5, 10, 8]],
            [[5, 5, 5], [5, 5, 5], [5, 10, 16], [5, 10, 8]],
        ),
        # The windows that the authors set by hand: Synapse, and ACDC but for its slices, where 7 became 3.
        ((64, 128, 128), [[1, 2, 2], TWOS, TWOS, TWOS, TWOS], None, [[4] * 3, [4] * 3, [8] * 3, [4] * 3]),
        (
            (14, 160, 160),
            [[1, 2, 2], [1, 2, 2], [1, 2, 2], TWOS, TWOS],
            None,
            [[4, 5, 5], [4, 5, 5], [7, 10, 10], [4, 5, 5]],
        ),
    ],
    ids=["40x56x40", "32", "20x80x64", "20x320x256", "synapse", "acdc"],
)
def test_grids_and_windows(patch, poolings, grids, windows) -> None:
    planned = arguments(patch, poolings)
    found = token_grids(patch, [total_stride(planned["embed_strides"]), *planned["down_strides"]])
    assert grids is None or found == grids
    assert planned["window_sizes"] == windows


@pytest.mark.parametrize(
    ("network", "outputs"),
    [
        ("NnFormer", [[1, 1, 1], [2, 2, 2], [1, 2, 2]]),
        ("UNETRPlusPlus", [[1, 1, 1], [1, 4, 4], [2, 2, 2]]),
        ("SegFormer3D", [[1, 1, 1]]),
        ("UNesT_B", [[1, 1, 1]]),
        ("TransBTS", [[1, 1, 1]]),
        ("CoTr", [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]),
    ],
)
def test_strides_of_the_logits(network, outputs) -> None:
    planned = arguments((20, 80, 64), [[1, 2, 2], [1, 2, 2], TWOS, [1, 2, 2]], network)
    assert planned["output_strides"] == outputs


def test_kernels_of_the_steps_are_the_plans_and_three_beyond_it() -> None:
    kernels = [[1, 3, 3]] * 4 + [[3, 3, 3]]
    poolings = [[1, 2, 2], [1, 2, 2], [1, 2, 2], TWOS]
    assert arguments((20, 80, 64), poolings, kernels=kernels)["down_kernels"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert arguments((20, 80, 64), poolings, "UNesT_B", kernels)["bottleneck_kernel"] == [3, 3, 3]


def test_sizes_that_bind_the_weights_are_among_the_arguments() -> None:
    poolings = [TWOS] * 4
    bound = {name: "patch_size" in arguments((32,) * 3, poolings, name) for name in ("UNesT_B", "TransBTS", "NnFormer")}
    free = {name: "patch_size" in arguments((32,) * 3, poolings, name) for name in ("SegFormer3D", "CoTr")}
    assert all(bound.values())
    assert not any(free.values())
