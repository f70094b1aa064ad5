"""The grid of shapes, the inputs made for it, and the accuracy asked of every backend."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from deform_conv_oracle import deform_conv_truth
from torch import Tensor

from nnunet_deform.ops import BACKEND_VARIABLE, backends_for, deform_conv2d, deform_conv3d

# Every registered backend, so that a new one is tested by being listed.
BACKENDS = list(backends_for(*(torch.zeros(1, n, 1, 1) for n in (1, 2, 1))))

# Norm of the error over the norm of the truth, by the dtype of the result. Sums are float32 for half-precision values,
# so their error is the rounding of the result alone: at most 2^-8 and 2^-11.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

NAMES = ("input", "offset", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One shape of the problem; ``groups`` are the weight's, ``offset_groups`` the deformable ones.

    In 2D only the first two values of stride, padding and dilation count.
    """

    id: str
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    channels: tuple[int, int] = (3, 3)
    groups: int = 1
    offset_groups: int = 1
    batch: int = 1
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)

    def __str__(self) -> str:
        return self.id

    @property
    def spatial(self) -> dict[str, list[int]]:
        ndim = len(self.size)
        return {name: list(getattr(self, name)[:ndim]) for name in ("stride", "padding", "dilation")}

    @property
    def out_size(self) -> list[int]:
        plain = torch.nn.functional.conv2d if len(self.size) == 2 else torch.nn.functional.conv3d
        output = plain(
            torch.zeros(1, 1, *self.size, device="meta"),
            torch.zeros(1, 1, *self.kernel, device="meta"),
            **self.spatial,
        )
        return list(output.shape[2:])


CASES = [
    Case("2d-depthwise", (5, 7), (3, 3), groups=3, batch=2, padding=(1, 1)),
    Case("2d-dense", (6, 5), (3, 3), (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    Case("2d-grouped", (5, 4), (3, 2), (4, 6), groups=2, offset_groups=2, batch=3, padding=(1, 0)),
    Case("2d-multiplier", (5, 5), (2, 3), (3, 6), groups=3, offset_groups=3, padding=(2, 1), dilation=(2, 1)),
    Case("2d-kernel1", (3, 5), (1, 1), (2, 3)),
    Case("2d-thin", (1, 6), (3, 3), (2, 2), groups=2, padding=(1, 1), stride=(1, 2)),
    Case("3d-depthwise", (3, 5, 4), (3, 3, 3), (2, 2), groups=2, padding=(1, 1, 1)),
    Case("3d-dense", (4, 5, 5), (2, 3, 3), (2, 3), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(2, 1, 2)),
    Case("3d-grouped", (3, 3, 4), (2, 2, 3), (4, 6), groups=2, offset_groups=2, batch=2, padding=(1, 0, 1)),
    # Neither kind of group nests in the other.
    Case("3d-crossed-groups", (3, 2, 4), (1, 2, 3), (6, 3), groups=3, offset_groups=2, padding=(0, 1, 1)),
    Case("3d-dense-by-channel", (3, 3, 2), (3, 1, 2), (3, 2), offset_groups=3, padding=(2, 1, 0), dilation=(2, 1, 1)),
    Case("3d-multiplier", (2, 3, 3), (2, 2, 2), (2, 4), groups=2, offset_groups=2, batch=2, padding=(1, 1, 0)),
    Case("3d-anisotropic", (3, 5, 7), (1, 3, 3), groups=3, batch=2, stride=(1, 2, 2), padding=(0, 1, 1)),
    Case("3d-kernel1", (2, 3, 5), (1, 1, 1), (3, 3), groups=3, batch=3),
    Case("3d-thin", (1, 4, 1), (3, 3, 3), (2, 2), batch=3, padding=(1, 1, 1)),
    Case("3d-one-voxel", (1, 1, 1), (1, 1, 1), (1, 1)),
]


def one_case(id: str) -> Case:
    return next(case for case in CASES if case.id == id)


class Problem(NamedTuple):
    """Arguments, upstream gradient and truth, all float64; the offsets are multiples of ``offset_grid``."""

    arguments: tuple[Tensor, Tensor, Tensor, Tensor]
    grad_output: Tensor
    output: Tensor
    gradients: tuple[Tensor, Tensor, Tensor, Tensor]


@functools.cache
def problem(case: Case, coarse_values: bool = False, offset_grid: float | None = None) -> Problem:
    """Random arguments that float32 represents exactly, offsets with standard deviation 1.5.

    Coarse values are multiples of 1/32 that bfloat16 and float16 represent too.
    """
    generator = np.random.default_rng(sum(map(ord, case.id)))

    def values(*shape: int) -> np.ndarray:
        drawn = generator.normal(size=shape)
        return on_grid(drawn, 1 / 32).clip(-4, 4) if coarse_values else drawn.astype(np.float32).astype(np.float64)

    offset_channels = case.offset_groups * len(case.size) * math.prod(case.kernel)
    offset = generator.normal(scale=1.5, size=(case.batch, offset_channels, *case.out_size))
    offset = offset.astype(np.float32).astype(np.float64) if offset_grid is None else on_grid(offset, offset_grid)
    arguments = (
        values(case.batch, case.channels[0], *case.size),
        offset,
        values(case.channels[1], case.channels[0] // case.groups, *case.kernel),
        values(case.channels[1]),
    )
    grad_output = values(case.batch, case.channels[1], *case.out_size)
    truth = deform_conv_truth(*arguments, grad_output, **case.spatial)
    output, *gradients = (torch.from_numpy(array) for array in truth)
    return Problem(tuple(map(torch.from_numpy, arguments)), torch.from_numpy(grad_output), output, tuple(gradients))


def on_grid(values: np.ndarray, step: float) -> np.ndarray:
    return np.round(values / step) * step


def leaves(tensors: Sequence[Tensor], device: str, dtype: torch.dtype, offset_dtype: torch.dtype | None = None):
    """Copies of (input, offset, weight[, bias]) that ask for gradients."""
    dtypes = [offset_dtype or dtype if i == 1 else dtype for i in range(len(tensors))]
    return [t.detach().clone().to(device, d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


def draw(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Random input, offset (standard deviation 1.5), weight and bias of a case, asking for gradients."""
    generator = torch.Generator().manual_seed(seed)
    offset_channels = case.offset_groups * len(case.size) * math.prod(case.kernel)
    shapes = (
        (case.batch, case.channels[0], *case.size),
        (case.batch, offset_channels, *case.out_size),
        (case.channels[1], case.channels[0] // case.groups, *case.kernel),
        (case.channels[1],),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= 1.5
    return leaves(tensors, device, dtype)


def skip_if_unable(input: Tensor, offset: Tensor, weight: Tensor) -> None:
    """Skip, with the backend's own reason, where the one under test cannot run."""
    name = os.environ.get(BACKEND_VARIABLE)
    reason = backends_for(input, offset, weight).get(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def conv(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, **spatial) -> Tensor:
    """The public function for the input's dimension, run by the backend under test."""
    skip_if_unable(input, offset, weight)
    return plain_conv(input, offset, weight, bias, **spatial)


def plain_conv(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, **spatial) -> Tensor:
    return (deform_conv2d if input.ndim == 4 else deform_conv3d)(input, offset, weight, bias, **spatial)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    expected = expected.detach().double().cpu()
    error = (actual.detach().double().cpu() - expected).norm().item()
    scale = expected.norm().item()
    return error / scale if scale else error


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Relative error norm within the tolerance of the actual tensor's dtype; NaN fails."""
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"
