"""The deformable convolution and its gradients as scalar loops in double precision, written from the equation.

Interpolation is a sum of hat functions over the voxels, X(q) = sum_p x[p] prod_a hat(q_a - p_a), rather than the cell,
corner and flat-index arithmetic of the code under test, so that a mistake there is not repeated here.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    """The output, and the gradients of sum(grad_output * output)."""

    output: np.ndarray
    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def deform_conv_truth(
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    grad_output: np.ndarray,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Truth:
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    out_size = offset.shape[2:]
    axes = range(len(size))
    taps = list(itertools.product(*map(range, kernel)))
    offset_groups = offset.shape[1] // (len(taps) * len(size))
    group_outputs = out_channels * group_channels // channels

    truth = Truth(
        np.zeros((batch, out_channels, *out_size)),
        *(np.zeros(array.shape) for array in (input, offset, weight, bias)),
    )
    for b, *v in itertools.product(range(batch), *map(range, out_size)):
        for o in range(out_channels):
            truth.output[(b, o, *v)] += bias[o]
            truth.bias[o] += grad_output[(b, o, *v)]
        for g, (k, tap) in itertools.product(range(offset_groups), enumerate(taps)):
            moved = [(g * len(taps) + k) * len(size) + a for a in axes]
            q = [v[a] * stride[a] - padding[a] + tap[a] * dilation[a] + float(offset[(b, moved[a], *v)]) for a in axes]
            near = _voxels_near(q, size)
            for c in range(g * channels // offset_groups, (g + 1) * channels // offset_groups):
                sample = sum(input[(b, c, *p)] * value for p, value, _ in near)
                group, place = divmod(c, group_channels)
                for o in range(group * group_outputs, (group + 1) * group_outputs):
                    truth.output[(b, o, *v)] += weight[(o, place, *tap)] * sample
                    truth.weight[(o, place, *tap)] += grad_output[(b, o, *v)] * sample
                    pull = grad_output[(b, o, *v)] * weight[(o, place, *tap)]
                    for p, value, slopes in near:
                        truth.input[(b, c, *p)] += pull * value
                        for a in axes:
                            truth.offset[(b, moved[a], *v)] += pull * input[(b, c, *p)] * slopes[a]
    return truth


def _voxels_near(q: Sequence[float], size: Sequence[int]) -> list[tuple[tuple[int, ...], float, list[float]]]:
    """The voxels that X(q) depends on, each with its weight and that weight's right derivative along every axis."""
    # Written so that a position that is not a number is outside.
    if not all(-1 < x < s for x, s in zip(q, size, strict=True)):
        return []
    near = []
    for p in itertools.product(*([i for i in range(s) if -1 <= x - i < 1] for x, s in zip(q, size, strict=True))):
        hats = [1 - abs(x - i) for x, i in zip(q, p, strict=True)]
        slopes = []
        for a, (x, i) in enumerate(zip(q, p, strict=True)):
            others = float(np.prod([hat for other, hat in enumerate(hats) if other != a]))
            slopes.append(others if x < i else -others)
        near.append((p, float(np.prod(hats)), slopes))
    return near
