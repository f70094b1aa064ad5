"""Small networks on nnU-Net's terms, nnU-Net's own arithmetic for deep supervision, and what autograd keeps."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunet_deform.layers.recomputation import plain_forms
from nnunet_deform.networks import NETWORKS

CONV_OP = {2: nn.Conv2d, 3: nn.Conv3d}
# Networks by name, and what a name does not say behind a dash. Each name in NETWORKS has at least one.
CASES = [
    "DeformUXNet",
    "LightMedSeg",
    "MagicPlainConvUNet",
    "MagicResidualEncoderUNet",
    "DynamicPlainConvUNet-odconv",
    "DynamicPlainConvUNet-dcd",
    "DynamicPlainConvUNet-ddconv",
    "DynamicResidualEncoderUNet-odconv",
]
# The last differs from others in what each of them tests.
every_case = pytest.mark.parametrize("name", [*CASES[:-1], pytest.param(CASES[-1], marks=pytest.mark.slow)])


def network_class(name: str) -> type[nn.Module]:
    return NETWORKS[name.partition("-")[0]]


@dataclass(frozen=True)
class Plan:
    """What a plan says of a network, and the patch."""

    id: str
    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]

    def __str__(self) -> str:
        return self.id

    @property
    def ndim(self) -> int:
        return len(self.patch)

    def arguments(self, name: str) -> dict[str, Any]:
        """What a plan would give the network of this name, which is kept small."""
        levels = len(self.strides)
        arguments = {
            "n_stages": levels,
            "features_per_stage": list(self.features),
            "conv_op": CONV_OP[self.ndim],
            "kernel_sizes": [list(kernel) for kernel in self.kernel_sizes],
            "strides": [list(stride) for stride in self.strides],
        }
        if name.startswith("Magic"):
            # An attention with enough hidden units that not all are dead.
            return {**arguments, **unet_arguments(name, levels, self.ndim), "reduction": 2, "temperature": 30.0}
        if name.startswith("Dynamic"):
            layer = name.partition("-")[2]
            options = {"layer": layer, "min_channels": 3, "stages": list(range(levels))}
            if layer == "ddconv":
                # Few, as offsets of stirred kernels add up, and a norm of noise sampled far away amplifies rounding.
                options["n_kernels"] = 2
            return {**arguments, **unet_arguments(name, levels, self.ndim), **options}
        if name == "DeformUXNet":
            return {**arguments, "n_blocks_per_stage": [1] * (levels - 1)}
        return arguments

    def network(
        self, name: str = "DeformUXNet", *, input_channels: int = 1, num_classes: int = 3, **options: Any
    ) -> nn.Module:
        return network_class(name)(
            **{"input_channels": input_channels, "num_classes": num_classes, **self.arguments(name), **options}
        )

    def image(self, batch: int = 1, channels: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(batch, channels, *self.patch, dtype=dtype)


def unet_arguments(name: str, levels: int, ndim: int) -> dict[str, Any]:
    """The further arguments of nnU-Net's own U-Nets."""
    encoder = {"n_blocks_per_stage": [1] * levels}
    if "Residual" not in name:
        encoder = {"n_conv_per_stage": [2] + [1] * (levels - 1)}
    return {
        **encoder,
        "n_conv_per_stage_decoder": [1] * (levels - 1),
        "conv_bias": True,
        "norm_op": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[ndim],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def plan(id: str, patch: Sequence[int], steps: Sequence[Sequence[int]], features: Sequence[int], flat: int = 0) -> Plan:
    """A plan of ``len(steps) + 1`` levels whose first ``flat`` levels have kernel 1 along the first axis."""
    ndim, n_stages = len(patch), len(steps) + 1
    strides = ((1,) * ndim, *(tuple(step) for step in steps))
    kernel_sizes = tuple((1 if level < flat else 3, *[3] * (ndim - 1)) for level in range(n_stages))
    return Plan(id, tuple(patch), strides, kernel_sizes, tuple(features))


# Widths are multiples of 8 for networks with heads or groups. Every bottleneck has more than one voxel.
ISOTROPIC = plan("3d", (8, 12, 8), [(2, 2, 2)] * 2, (8, 16, 24))
ANISOTROPIC = plan("anisotropic", (4, 12, 16), [(1, 2, 2), (2, 2, 2)], (8, 16, 24), flat=1)
TWO_DIMENSIONAL = plan("2d", (24, 16), [(2, 2)] * 3, (8, 16, 24, 32))
TWO_LEVELS = plan("two-levels", (6, 8, 6), [(2, 2, 2)], (8, 16))
TWO_LEVELS_2D = plan("2d-two-levels", (12, 8), [(2, 2)], (8, 16))
SMALL_PLANS = [ISOTROPIC, ANISOTROPIC, TWO_DIMENSIONAL]

PAPER_WIDTHS = (48, 96, 192, 384, 768)
PAPER = plan("96^3", (96, 96, 96), [(2, 2, 2)] * 4, PAPER_WIDTHS)
# The plans that nnU-Net makes for patches of these sizes, cut to five levels.
LARGE_PLANS = [
    PAPER,
    plan("128^3", (128, 128, 128), [(2, 2, 2)] * 4, PAPER_WIDTHS),
    plan("20x320x256", (20, 320, 256), [(1, 2, 2)] * 2 + [(2, 2, 2)] * 2, PAPER_WIDTHS, flat=2),
    plan("40x56x40", (40, 56, 40), [(2, 2, 2)] * 3, PAPER_WIDTHS[:4]),
    plan("2d-320x256", (320, 256), [(2, 2)] * 4, PAPER_WIDTHS),
]


def deep_supervision_shapes(plan: Plan) -> list[tuple[int, ...]]:
    """The targets' sizes, as nnU-Net's trainer scales and its augmentation rounds them."""
    scales = 1 / np.cumprod(np.vstack(plan.strides), axis=0)[:-1]
    return [tuple(round(size * factor) for size, factor in zip(plan.patch, scale, strict=True)) for scale in scales]


def cropped_sizes(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Voxels of each level but the coarsest that an image of this size reaches into."""
    cumulative = np.cumprod(np.vstack(strides), axis=0)[:-1]
    return [tuple(math.ceil(s / step) for s, step in zip(size, level, strict=True)) for level in cumulative]


def crop(tensor: Tensor, size: Sequence[int]) -> Tensor:
    return tensor[(..., *(slice(s) for s in size))]


def as_list(output: Tensor | list[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else output


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def kept_by_autograd(module: nn.Module) -> Iterator[list[int]]:
    """Collects the elements of each tensor, counted by its memory, that autograd keeps of the plain form."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    seen: dict[int, Tensor] = {}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        # Detached, because an operation that holds its own output with its history is never freed.
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            # Held, so that its memory is not given to another tensor and taken for the same one.
            seen[storage.data_ptr()] = tensor
            sizes.append(storage.nbytes() // tensor.element_size())
        return tensor

    with plain_forms(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@torch.no_grad()
def stir(network: nn.Module, scale: float = 0.3) -> nn.Module:
    """Adds noise to every parameter, so that nothing stays at an initial zero or one. For offsets it is voxels."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=scale * min(1.0, 4 / math.sqrt(parameter[0].numel())))
    return network
