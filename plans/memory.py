"""How much memory training a plan takes, by nnU-Net's own yardstick."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_deform.layers.recomputation import plain_forms
from nnunet_deform.networks.memory import StepBytes, bytes_kept_on_cuda, bytes_of_step_on_cuda
from nnunet_deform.networks.without_values import without_values
from nnunet_deform.plans.deformux import NETWORK as DEFORMUX
from nnunet_deform.plans.lightmedseg import NETWORK as LIGHTMEDSEG
from nnunet_deform.plans.magic import NETWORKS as MAGIC

_T = TypeVar("_T")


class Held(NamedTuple):
    """Bytes of a sample that an eager training step holds at most, at one time of its backward pass."""

    # What is kept for the backward pass, for each element that the network counts and does not make again,
    per_element: float
    # and what is in flight at the finest level, gradients and what is made again, for each element of a feature map
    # there; with recompute="blocks" less what is not kept there.
    per_finest: float


class Step(NamedTuple):
    """What a training step takes of a sample: an eager one in either precision, and a compiled one in mixed precision,
    of which the bytes are known that it keeps for each element that the network counts and does not make again."""

    float32: Held
    mixed: Held
    compiled: float


# Held: what step_bytes measures on patches of 64^3, 16x128x128 and 256x192, means; tests/plans/test_memory.py measures
# it again, and other patches. Compiled: what compiled_kept_bytes traces at 128^3. MAGIC in the residual encoder was not
# traced, and has what its plain form keeps, as MAGIC in the plain U-Net turned out to; LightMedSeg was not with
# recomputed blocks, and has what it keeps without, which is no less.
_NNUNETS_OWN = Step(Held(7.95, 15.62), Held(3.98, 7.81), 3.95)
_OURS = {
    (DEFORMUX, "cheap"): Step(Held(2.79, 23.75), Held(1.57, 11.87), 2.10),
    (DEFORMUX, "blocks"): Step(Held(2.79, 11.75), Held(1.57, 5.83), 0.67),
    (LIGHTMEDSEG, "cheap"): Step(Held(4.29, 21.50), Held(2.53, 26.25), 2.30),
    (LIGHTMEDSEG, "blocks"): Step(Held(4.29, 21.50), Held(2.53, 27.97), 2.30),
    (MAGIC["plain"], "cheap"): Step(Held(7.95, 15.62), Held(3.98, 7.81), 3.95),
    (MAGIC["plain"], "blocks"): Step(Held(7.95, 3.62), Held(3.98, 1.67), 1.88),
    (MAGIC["residual"], "cheap"): Step(Held(7.88, 15.62), Held(3.94, 7.81), 3.87),
    (MAGIC["residual"], "blocks"): Step(Held(7.88, 3.62), Held(3.94, 1.67), 3.87),
}
# What an eager step of nnU-Net's own U-Net holds for each counted element on the patches that its references are for,
# 512^2 and 128^3.
_REFERENCE_HELD = {2: 4.77, 3: 5.13}

# nnU-Net's planners say how many elements of one sample, at which batch, a GPU of so many GB has room for:
# ExperimentPlanner for 8, nnUNetPlannerResEncL for 24, nnUNetPlannerResEncXL for 40. Its authors report 7.7, 22.7 and
# 36.6 GB in use by such plans (documentation/resenc_presets.md).
_GIGABYTES = (0, 8, 24, 40)
_ELEMENTS = {2: (0, 85e6, 380e6, 560e6), 3: (0, 560e6, 2100e6, 3600e6)}
_REFERENCE_BATCH = {2: 12, 3: 2}


def elements_for(gigabytes: float, ndim: int) -> float:
    """The elements that a GPU of so many GB has room for, in one step, counted as by :func:`estimated_elements`.

    Between nnU-Net's own references it is interpolated; beyond the last it is proportional, as in nnU-Net.
    """
    beyond = max(1.0, gigabytes / _GIGABYTES[-1])
    return _REFERENCE_BATCH[ndim] * beyond * float(np.interp(gigabytes, _GIGABYTES, _ELEMENTS[ndim]))


def gigabytes_for(elements: float, ndim: int) -> float:
    """The inverse of :func:`elements_for`."""
    of_reference = elements / _REFERENCE_BATCH[ndim]
    beyond = max(1.0, of_reference / _ELEMENTS[ndim][-1])
    return beyond * float(np.interp(of_reference, _ELEMENTS[ndim], _GIGABYTES))


def estimated_gigabytes(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    batch_size: int,
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> float | None:
    """Memory of a training step in GB, as nnU-Net's planners mean it: the GPU for which they would plan a network of
    nnU-Net's own whose training step holds as many bytes at most. Three quarters of it are these bytes.

    Args:
        architecture: a plan's ``architecture`` entry.
        patch_size: in voxels.
        batch_size: samples in a step on one device.
        input_channels, num_classes: of the network.
        mixed_precision: whether training runs under autocast, as nnU-Net does on CUDA and only there.

    Returns:
        None if the network gives no estimate of its own (``compute_conv_feature_map_size``).
    """
    elements = estimated_elements(
        architecture, patch_size, input_channels, num_classes, mixed_precision=mixed_precision
    )
    return None if elements is None else gigabytes_for(elements * batch_size, len(patch_size))


def estimated_elements(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> float | None:
    """The elements that nnU-Net's own network would count where its training step holds as many bytes of one sample, in
    mixed precision; what a step holds in float32 counts twice.

    In mixed precision, as on a GPU, steps may be compiled, and it is no fewer than those of which a compiled step of
    its own keeps as many bytes. A network that is none of ours is taken to hold as much of each element as nnU-Net's
    own. None as in :func:`estimated_gigabytes`.
    """
    count = _count(architecture, patch_size, input_channels, num_classes)
    if count is None:
        return None
    own = _NNUNETS_OWN.compiled
    ours = _OURS.get(_network_and_mode(architecture))
    if ours is None:
        return count.elements + 2 * count.autocast_surplus / own if mixed_precision else 2 * count.elements
    held = _held(count, architecture, patch_size, mixed_precision) / _REFERENCE_HELD[len(patch_size)]
    # A compiled step keeps what an eager one makes again.
    compiled = (count.elements - count.made_again) * ours.compiled / own + count.made_again
    return max(held, compiled) if mixed_precision else held


def estimated_bytes(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> float:
    """Bytes that an eager training step holds of one sample at most, from the network's own count; of nnU-Net's U-Nets
    and ours. :func:`step_bytes` measures them."""
    count = _count(architecture, patch_size, input_channels, num_classes)
    return _held(count, architecture, patch_size, mixed_precision)


class _Count(NamedTuple):
    """What a network counts of one sample."""

    elements: float
    # Of these, what an eager step makes again.
    made_again: float
    # Numbers of half precision that autocast keeps beyond as many.
    autocast_surplus: float


_counts: dict[tuple[str, tuple[int, ...], int, int], _Count | None] = {}


def _count(
    architecture: Mapping[str, Any], patch_size: Sequence[int], input_channels: int, num_classes: int
) -> _Count | None:
    """None if the network does not count. Kept, because a search for the largest patch asks for each several times, and
    for both modes, in which the count is the same."""
    options = {key: value for key, value in architecture["arch_kwargs"].items() if key != "recompute"}
    key = repr({**architecture, "arch_kwargs": options}), tuple(patch_size), input_channels, num_classes
    if key not in _counts:
        with without_values():
            network = _build(architecture, input_channels, num_classes)
        if hasattr(network, "compute_conv_feature_map_size"):
            _counts[key] = _Count(
                float(network.compute_conv_feature_map_size(patch_size)),
                network.made_again(patch_size) if hasattr(network, "made_again") else 0,
                network.autocast_surplus(patch_size) if hasattr(network, "autocast_surplus") else 0,
            )
        else:
            _counts[key] = None
    return _counts[key]


def _held(count: _Count, architecture: Mapping[str, Any], patch_size: Sequence[int], mixed_precision: bool) -> float:
    step = _OURS.get(_network_and_mode(architecture), _NNUNETS_OWN)
    held = step.mixed if mixed_precision else step.float32
    finest = architecture["arch_kwargs"]["features_per_stage"][0] * math.prod(patch_size)
    return held.per_element * (count.elements - count.made_again) + held.per_finest * finest


def _network_and_mode(architecture: Mapping[str, Any]) -> tuple[str, str]:
    return architecture["network_class_name"], architecture["arch_kwargs"].get("recompute", "cheap")


def kept_bytes(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
    eager: bool = False,
) -> int:
    """Bytes that autograd keeps of one sample on a CUDA device, measured as by :func:`bytes_kept_on_cuda`.

    Of the plain form, in which nothing is computed again, or of an ``eager`` training step. What does not grow with the
    batch, such as half-precision copies of the weights, is left out.
    """
    measure = partial(bytes_kept_on_cuda, mixed_precision=mixed_precision)
    with nullcontext() if eager else plain_forms():
        one, two = _of_two_batches(measure, architecture, patch_size, input_channels, num_classes)
    return two - one


def step_bytes(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> StepBytes:
    """What an eager training step holds of one sample on a CUDA device, measured as by :func:`bytes_of_step_on_cuda`,
    without what does not grow with the batch."""
    measure = partial(bytes_of_step_on_cuda, mixed_precision=mixed_precision)
    one, two = _of_two_batches(measure, architecture, patch_size, input_channels, num_classes)
    return StepBytes(*(b - a for a, b in zip(one, two, strict=True)))


def compiled_kept_bytes(
    architecture: Mapping[str, Any], patch_size: Sequence[int], input_channels: int, num_classes: int
) -> int:
    """Bytes that a compiled training step under float16 autocast keeps of one sample on a CUDA device, without what
    does not grow with the batch, measured as by
    :func:`nnunet_deform.networks.compiled_memory.bytes_kept_by_compiled_step`. It takes minutes."""
    # Importing the compiler takes seconds, and few ask.
    from nnunet_deform.networks.compiled_memory import bytes_kept_by_compiled_step

    one, two = _of_two_batches(bytes_kept_by_compiled_step, architecture, patch_size, input_channels, num_classes)
    return two - one


def _of_two_batches(
    measure: Callable[[Callable[[], nn.Module], Sequence[int]], _T],
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
) -> tuple[_T, _T]:
    """What is measured with one sample and with two: their difference leaves out what does not grow with the batch."""
    build = partial(_build, architecture, input_channels, num_classes)
    return measure(build, (1, input_channels, *patch_size)), measure(build, (2, input_channels, *patch_size))


def _build(architecture: Mapping[str, Any], input_channels: int, num_classes: int) -> nn.Module:
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        input_channels,
        num_classes,
        allow_init=False,
        deep_supervision=True,
    )
