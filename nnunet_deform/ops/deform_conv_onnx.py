"""The deformable convolution in ONNX's own operators, for torch's exporter; opset 20 or later, for GridSample in 3D.

With o the offsets, each tap t samples the volume at q_t = v * stride - padding + t * dilation + o_t. GridSample's
coordinates run from -1 to 1 over the voxels' outer edges, g = (2 q + 1) / size - 1, and it takes a corner outside the
volume as zero, as we do. The sum over taps is taken one by one, so memory holds one tap's samples at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def translation_table() -> dict[Any, Callable]:
    """For the ``custom_translation_table`` of ``torch.onnx.export``. Needs onnxscript."""
    operators = torch.ops.nnunet_deform
    # Up to torch 2.7 the exporter looks into the first and finds the second.
    return {operators.deform_conv.default: _deform_conv, operators.deform_conv_opaque.default: _deform_conv}


def _deform_conv(input, offset, weight, bias, stride, padding, dilation):
    from onnxscript import ir
    from onnxscript import opset20 as op

    def constant(values) -> Any:
        return op.Constant(value=ir.tensor(np.asarray(values)))

    def reshaped(tensor, *shape: int) -> Any:
        return op.Reshape(tensor, constant(np.array(shape, dtype=np.int64)))

    batch, channels, *size = map(int, input.shape)
    out_channels, group_channels, *kernel = map(int, weight.shape)
    out_size = list(map(int, offset.shape))[2:]
    ndim, taps = len(kernel), math.prod(kernel)
    deformable_groups = int(offset.shape[1]) // (taps * ndim)

    def along_axes(values) -> np.ndarray:
        return np.array(values, dtype=np.float32).reshape(-1, ndim, *[1] * ndim)

    voxels = np.indices(out_size, dtype=np.float32) * along_axes(stride) - along_axes(padding)
    shifts = along_axes(list(np.ndindex(*kernel))) * along_axes(dilation)
    # [B * G, taps, ndim, *out] -> [B * G, taps, *out, ndim], the last axis in GridSample's order x, y, z
    position = reshaped(offset, batch * deformable_groups, taps, ndim, *out_size)
    position = op.Add(op.Add(position, constant(voxels)), constant(shifts))
    scale, start = 2 / along_axes(size), 1 / along_axes(size) - 1
    grid = op.Add(op.Mul(position, constant(scale)), constant(start))
    grid = op.Gather(grid, constant(np.arange(ndim - 1, -1, -1, dtype=np.int64)), axis=2)
    grid = op.Transpose(grid, perm=[0, 1, *range(3, ndim + 3), 2])

    volume = reshaped(input, batch * deformable_groups, channels // deformable_groups, *size)
    tap_weights = reshaped(weight, out_channels, group_channels, taps, *[1] * ndim)
    output = None
    for tap in range(taps):
        index = constant(np.int64(tap))
        sample = op.GridSample(
            volume, op.Gather(grid, index, axis=1), mode="linear", padding_mode="zeros", align_corners=0
        )
        sample = reshaped(sample, batch, channels, *out_size)
        term = op.Conv(sample, op.Gather(tap_weights, index, axis=2), group=channels // group_channels)
        output = term if output is None else op.Add(output, term)
    if bias is not None:
        output = op.Add(output, reshaped(bias, 1, out_channels, *[1] * ndim))
    return output
