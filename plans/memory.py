"""How much memory training a plan takes, by nnU-Net's own yardstick."""

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


class BytesPerElement(NamedTuple):
    """Bytes that autograd keeps of a sample for each element that the network counts."""

    float32: float
    mixed_2d: float
    mixed_3d: float

    def of(self, ndim: int, mixed_precision: bool) -> float:
        return self.float32 if not mixed_precision else self.mixed_2d if ndim == 2 else self.mixed_3d


# Measured by kept_bytes on patches of 64^3, 16x128x128 and 256x192, means; tests/plans/test_memory.py measures them
# again, and other patches. Norms and attention stay in float32 under autocast, so a network's half precision may be
# far from half the bytes.
_NNUNETS_OWN = BytesPerElement(7.90, 3.95, 3.95)
_OURS = {
    DEFORMUX: BytesPerElement(7.24, 4.14, 4.04),
    LIGHTMEDSEG: BytesPerElement(7.41, 6.60, 6.93),
    MAGIC["plain"]: BytesPerElement(7.82, 3.91, 3.95),
    MAGIC["residual"]: BytesPerElement(7.64, 3.80, 3.87),
}

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


def _gigabytes_for(elements: float, ndim: int) -> float:
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
    nnU-Net's own that keeps as many bytes for the backward pass. Half to two thirds of it are these bytes.

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
    return None if elements is None else _gigabytes_for(elements * batch_size, len(patch_size))


def estimated_elements(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> float | None:
    """The elements that nnU-Net's own network would count where this one keeps as many bytes of one sample.

    They are in mixed precision; what a network keeps in float32 counts twice. None as in :func:`estimated_gigabytes`.
    """
    estimate = estimated_bytes(architecture, patch_size, input_channels, num_classes, mixed_precision=mixed_precision)
    return None if estimate is None else estimate / _NNUNETS_OWN.of(len(patch_size), mixed_precision=True)


def estimated_bytes(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    *,
    mixed_precision: bool,
) -> float | None:
    """Bytes that autograd keeps of one sample, from the network's own count. None as in :func:`estimated_gigabytes`."""
    count = _count(architecture, patch_size, input_channels, num_classes)
    if count is None:
        return None
    per_element = _OURS.get(architecture["network_class_name"], _NNUNETS_OWN).of(len(patch_size), mixed_precision)
    return count.elements * per_element + (2 * count.autocast_surplus if mixed_precision else 0)


class _Count(NamedTuple):
    """What a network counts of one sample."""

    elements: float
    # Numbers of half precision that autocast keeps beyond as many.
    autocast_surplus: float


_counts: dict[tuple[str, tuple[int, ...], int, int], _Count | None] = {}


def _count(
    architecture: Mapping[str, Any], patch_size: Sequence[int], input_channels: int, num_classes: int
) -> _Count | None:
    """None if the network does not count. Kept, because a search for the largest patch asks for each several times."""
    key = repr(architecture), tuple(patch_size), input_channels, num_classes
    if key not in _counts:
        with without_values():
            network = _build(architecture, input_channels, num_classes)
        if hasattr(network, "compute_conv_feature_map_size"):
            surplus = network.autocast_surplus(patch_size) if hasattr(network, "autocast_surplus") else 0
            _counts[key] = _Count(float(network.compute_conv_feature_map_size(patch_size)), surplus)
        else:
            _counts[key] = None
    return _counts[key]


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

    Of the plain form, which the estimates are for, or of an ``eager`` training step. What does not grow with the batch,
    such as half-precision copies of the weights, is left out.
    """
    measure = partial(bytes_kept_on_cuda, mixed_precision=mixed_precision)
    with nullcontext() if eager else plain_forms():
        one, two = _of_two_batches(measure, architecture, patch_size, input_channels, num_classes)
    return two - one


def step_bytes(
    architecture: Mapping[str, Any], patch_size: Sequence[int], input_channels: int, num_classes: int
) -> StepBytes:
    """What an eager training step under float16 autocast holds of one sample on a CUDA device, measured as by
    :func:`bytes_of_step_on_cuda`, without what does not grow with the batch."""
    one, two = _of_two_batches(bytes_of_step_on_cuda, architecture, patch_size, input_channels, num_classes)
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
