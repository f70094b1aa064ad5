"""The rivals from plans, as published or narrow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_deform.networks.rivals import RIVALS, cotr, segformer3d, transbts, unetrpp
from nnunet_deform.plans.rivals import rival_architecture

# Widths that cost nothing.
NARROW: dict[str, dict[str, Any]] = {
    "NnFormer": {"width": 16, "head_width": 8},
    "UNETRPlusPlus": {"widths": [8, 8, 16, 16]},
    "SegFormer3D": {"widths": [8, 8, 16, 16], "heads": [1, 2, 2, 4], "decoder_width": 16},
    "UNesT_B": {"token_widths": [16, 32, 64], "heads": [2, 2, 4], "depths": [1, 1, 2]},
    "TransBTS": {"base_width": 8, "token_width": 32, "heads": 2, "mlp_width": 32, "layers": 1},
    "CoTr": {"widths": [8, 12, 24], "heads": 6, "layers": 1},
}
# Numbers of equal blocks in a row that the constructors have no arguments for.
SHALLOW = (
    (unetrpp, "DEPTH", 1),
    (segformer3d, "DEPTH", 1),
    (transbts, "DEPTHS", (1,) * 4),
    (cotr, "DEPTHS", (1, 2, 1)),
)


@dataclass(frozen=True)
class Plan:
    """What a plan says, kernels of 3 unless given."""

    id: str
    patch: tuple[int, ...]
    poolings: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        return self.id

    @property
    def base(self) -> dict[str, Any]:
        ndim = len(self.patch)
        strides = [[1] * ndim, *map(list, self.poolings)]
        kernels = [[3] * ndim] * len(strides) if self.kernel_sizes is None else list(map(list, self.kernel_sizes))
        return {"network_class_name": "a U-Net", "arch_kwargs": {"strides": strides, "kernel_sizes": kernels}}

    def arguments(self, name: str, **options: Any) -> dict[str, Any]:
        return rival_architecture(self.base, self.patch, network=name, **options)["arch_kwargs"]

    def network(self, name: str, inputs: int = 1, classes: int = 3, *, deep_supervision: bool = False) -> nn.Module:
        """A narrow and shallow one."""
        network = RIVALS[name.partition("_")[0]]
        arguments = self.arguments(name, **NARROW[name])
        with pytest.MonkeyPatch.context() as patch:
            for module, constant, value in SHALLOW:
                patch.setattr(module, constant, value)
            return network(inputs, classes, **arguments, deep_supervision=deep_supervision)

    def image(self, batch: int = 1, channels: int = 1) -> Tensor:
        return torch.randn(batch, channels, *self.patch)


TWOS = (2, 2, 2)
# Grids of tokens that halve with a remainder: 3x5x4, 2x3x2, 2x2x2, 2x2x2; 5x4x6, 3x2x3, 2x2x2, 2x2x2; 6x10, 3x5, 2x3,
# 2x2.
SMALL = [
    Plan("isotropic", (12, 20, 16), (TWOS,) * 3),
    Plan("anisotropic", (5, 16, 24), ((1, 2, 2), (1, 2, 2), TWOS), ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))),
    Plan("2d", (24, 40), ((2, 2),) * 3),
]
# CoTr pools four times.
DEEP = [
    Plan("isotropic", (16, 24, 20), (TWOS,) * 4),
    Plan(
        "anisotropic",
        (6, 16, 40),
        ((1, 2, 2), (1, 2, 2), TWOS, (1, 2, 2)),
        ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    ),
    Plan("2d", (24, 40), ((2, 2),) * 4),
]
CASES = [(name, plan) for name in NARROW for plan in (DEEP if name == "CoTr" else SMALL)]
IDS = [f"{name}-{plan}" for name, plan in CASES]
PATCH_BOUND = [name for name in NARROW if name not in ("SegFormer3D", "CoTr")]


def first_plan(name: str) -> Plan:
    return next(plan for one, plan in CASES if one == name)


def parameters(module: nn.Module | Sequence[nn.Module]) -> int:
    modules = [module] if isinstance(module, nn.Module) else module
    return sum(parameter.numel() for one in modules for parameter in one.parameters())


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def stirred(network: nn.Module) -> nn.Module:
    """Tables that start at zero, and factors near it, would hide what they scale."""
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.endswith(("position", "positions", "gamma", "offset.weight", "weight.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return network
