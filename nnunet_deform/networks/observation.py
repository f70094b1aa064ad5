"""What a network's operators do with given images, as tensors, as a few numbers, and as one line.

A network takes part by a method ``observe_operators``, see :class:`ObservableNetwork`. It returns one
:class:`Observation` for each layer; :func:`summarise` makes the numbers that a training log and a comparison need.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

# A kernel with less than this mean share of the mixture has no part in it.
DEAD_SHARE = 0.01
# In the folder of a fold: the numbers of each epoch.
EPOCHS_FILE = "operators.jsonl"

Values = dict[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Observation(ABC):
    """What one layer did.

    values: a tensor whose first axis is that of the samples.
    """

    values: Tensor

    @classmethod
    @abstractmethod
    def summarise(cls, layers: Mapping[str, Any]) -> Values:
        """Numbers of all of a network's layers of this kind, by name; NaN where there are too few samples for one."""

    @classmethod
    @abstractmethod
    def describe(cls, values: Values) -> str:
        """Those numbers in words."""


@dataclass(frozen=True)
class Offsets(Observation):
    """Of a deformable convolution whose kernel is centred.

    values: [B, taps, ndim, *spatial], in voxels of the layer's input, taps and axes in the kernel's order; level: of
    the input, 0 is full resolution; kernel_size: one value for each axis; stride: the same, None for 1; size: of the
    input, None for that of the output.
    """

    level: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None

    def outside(self) -> float:
        """The share of samples, one for each tap at each voxel, that lie beyond the volume's outer faces, half a voxel
        from the centres of its outermost voxels, along some axis. Half a voxel further the operator reads zeros only;
        a limit there would be crossed by the slightest offset of a padded kernel's outermost taps."""
        outside = torch.zeros_like(self.values[:, :, 0], dtype=torch.bool)
        for axis, (output, size, step, taps) in enumerate(zip(*self._axes(), self._taps(), strict=True)):
            voxels = step * torch.arange(output, device=self.values.device)
            voxels = voxels.view([output if a == axis else 1 for a in range(len(self.kernel_size))])
            position = self.values[:, :, axis] + (taps.view(-1, *[1] * len(self.kernel_size)) + voxels)
            outside |= (position < -0.5) | (position > size - 0.5)
        return float(outside.float().mean())

    def outside_undeformed(self) -> float:
        """The same share without offsets, by which a kernel that is padded lies outside anyway."""
        inside = 1.0
        for output, size, step, kernel in zip(*self._axes(), self.kernel_size, strict=True):
            positions = torch.arange(output).unsqueeze(1) * step + torch.arange(kernel) - kernel // 2
            inside *= float(((positions >= 0) & (positions < size)).float().mean())
        return 1 - inside

    def _axes(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """For each axis the size of output and input, and the stride."""
        output = self.values.shape[3:]
        return output, self.size or output, self.stride or (1,) * len(output)

    def _taps(self) -> Iterator[Tensor]:
        """For each axis the position of each tap, [taps], the centre at 0."""
        steps = [torch.arange(kernel, device=self.values.device) - kernel // 2 for kernel in self.kernel_size]
        return (grid.flatten() for grid in torch.meshgrid(*steps, indexing="ij"))

    @classmethod
    def summarise(cls, layers: "Mapping[str, Offsets]") -> Values:
        """For each level: mean and largest Euclidean length over samples, taps and voxels, the share of samples
        outside, and that without offsets."""
        values: Values = {}
        for level in sorted({layer.level for layer in layers.values()}):
            found = [layer for layer in layers.values() if layer.level == level]
            lengths = [torch.linalg.vector_norm(layer.values.float(), dim=2) for layer in found]
            values[f"offset_mean_level{level}"] = _mean([float(length.mean()) for length in lengths])
            values[f"offset_max_level{level}"] = max(float(length.max()) for length in lengths)
            values[f"outside_level{level}"] = _mean([layer.outside() for layer in found])
            values[f"outside_undeformed_level{level}"] = _mean([layer.outside_undeformed() for layer in found])
        return values

    @classmethod
    def describe(cls, values: Values) -> str:
        levels = [key.removeprefix("offset_mean_level") for key in values if key.startswith("offset_mean_level")]
        return "; ".join(
            f"level {level} |offset| mean {values[f'offset_mean_level{level}']:.4f}, largest "
            f"{values[f'offset_max_level{level}']:.3f} voxels, samples outside {values[f'outside_level{level}']:.2%} "
            f"({values[f'outside_undeformed_level{level}']:.2%} undeformed)"
            for level in levels
        )


@dataclass(frozen=True)
class MixingWeights(Observation):
    """Of a dynamic convolution.

    values: [B, K], the weight of each kernel, not negative. Shares are weights over their sum.
    """

    def shares(self) -> Tensor:
        """[B, K]."""
        weights = self.values.float()
        return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

    @classmethod
    def summarise(cls, layers: "Mapping[str, MixingWeights]") -> Values:
        """Median and minimum over layers of the shares' entropy (1: uniform, 0: one kernel; mean over samples) and
        spread (standard deviation over samples, mean over kernels), and how many of all kernels have a mean share
        below ``DEAD_SHARE``."""
        shares = [layer.shares() for layer in layers.values()]
        entropies = torch.tensor([float(normalised_entropy(share).mean()) for share in shares])
        spreads = torch.tensor([_spread(share) for share in shares])
        return {
            "mixing_entropy_median": float(entropies.quantile(0.5)),
            "mixing_entropy_min": float(entropies.min()),
            "mixing_spread_median": float(spreads.quantile(0.5)),
            "mixing_spread_min": float(spreads.min()),
            "mixing_dead": float(sum(int((share.mean(0) < DEAD_SHARE).sum()) for share in shares)),
            "mixing_kernels": float(sum(share.shape[1] for share in shares)),
        }

    @classmethod
    def describe(cls, values: Values) -> str:
        return (
            f"mixing entropy median {values['mixing_entropy_median']:.3f}, least {values['mixing_entropy_min']:.3f}; "
            f"{values['mixing_dead']:.0f} of {values['mixing_kernels']:.0f} kernels below {DEAD_SHARE:.0%}; "
            f"spread over samples median {values['mixing_spread_median']:.4f}, least {values['mixing_spread_min']:.4f}"
        )


@dataclass(frozen=True)
class ChannelFusion(Observation):
    """Of a dynamic convolution decomposition.

    values: [B, C_out + L^2], for each sample lambda, 1 where the static kernel is as it is, and then the entries of
    Phi, 0 where the residual is static, too; outputs: C_out.
    """

    outputs: int

    @classmethod
    def summarise(cls, layers: "Mapping[str, ChannelFusion]") -> Values:
        """Median and minimum over layers of the spread (standard deviation over samples, mean over entries) of lambda
        and of Phi, and the median of the mean of lambda and of the root mean square of Phi."""
        values = [layer.values.float() for layer in layers.values()]
        parts = [
            (v[:, : layer.outputs], v[:, layer.outputs :]) for v, layer in zip(values, layers.values(), strict=True)
        ]
        spreads = torch.tensor([[_spread(scale), _spread(phi)] for scale, phi in parts])
        sizes = torch.tensor([[float(scale.mean()), float(phi.square().mean().sqrt())] for scale, phi in parts])
        median, least, size = spreads.quantile(0.5, 0), spreads.amin(0), sizes.quantile(0.5, 0)
        return {
            "lambda_mean": float(size[0]),
            "lambda_spread_median": float(median[0]),
            "lambda_spread_min": float(least[0]),
            "phi_rms": float(size[1]),
            "phi_spread_median": float(median[1]),
            "phi_spread_min": float(least[1]),
        }

    @classmethod
    def describe(cls, values: Values) -> str:
        return (
            f"lambda mean {values['lambda_mean']:.3f}, spread over samples median "
            f"{values['lambda_spread_median']:.4f}, least {values['lambda_spread_min']:.4f}; |Phi| "
            f"{values['phi_rms']:.3f}, spread over samples median {values['phi_spread_median']:.4f}, least "
            f"{values['phi_spread_min']:.4f}"
        )


@dataclass(frozen=True)
class Anchors(Observation):
    """Of an anchor detector. values: [B, K, ndim], coordinates in (0, 1) relative to the patch."""

    @classmethod
    def summarise(cls, layers: "Mapping[str, Anchors]") -> Values:
        """Mean distance between two anchors of a sample, and spread (standard deviation over samples, mean over anchors
        and axes), both in sides of the patch."""
        anchors = [layer.values.float() for layer in layers.values()]
        distances = []
        for points in anchors:
            count = points.shape[1]
            total = torch.linalg.vector_norm(points.unsqueeze(1) - points.unsqueeze(2), dim=-1).sum((1, 2)).mean()
            distances.append(float(total) / (count * (count - 1)) if count > 1 else math.nan)
        return {"anchor_distance": _mean(distances), "anchor_spread": _mean([_spread(points) for points in anchors])}

    @classmethod
    def describe(cls, values: Values) -> str:
        return (
            f"anchors' mean distance {values['anchor_distance']:.3f}, spread over samples "
            f"{values['anchor_spread']:.4f} (sides of the patch)"
        )


@dataclass(frozen=True)
class Routing(Observation):
    """Of a router. values: [B, N, *spatial], the weight of each of N inputs at each voxel, which sum to one."""

    @classmethod
    def summarise(cls, layers: "Mapping[str, Routing]") -> Values:
        """Entropy (1: all inputs alike, 0: one input), mean over samples, voxels and layers."""
        entropies = [float(normalised_entropy(layer.values.float()).mean()) for layer in layers.values()]
        return {"routing_entropy": _mean(entropies)}

    @classmethod
    def describe(cls, values: Values) -> str:
        return f"routing entropy {values['routing_entropy']:.3f}"


Observations = dict[str, Observation]


@runtime_checkable
class ObservableNetwork(Protocol):
    """A network that can say what its operators do."""

    def observe_operators(self, x: Tensor) -> Observations:
        """What each layer does with images [B, C, *spatial], by the layer's name, in evaluation mode and without
        gradients; the network is afterwards as it was. Empty where it has no such operator, as in an op-off twin."""
        ...


@runtime_checkable
class MappedNetwork(Protocol):
    """A network that has more to show than its log needs: maps that weigh or gate its features, for ``inspection``."""

    def observe_maps(self, x: Tensor) -> dict[str, Tensor]:
        """By name what it makes of images [B, C, *spatial], each map [B, N, *coarser or as fine], in [0, 1], in
        evaluation mode and without gradients; the network is afterwards as it was."""
        ...


def recorded(
    network: nn.Module, x: Tensor, layers: Mapping[str, nn.Module], look: Callable[[str, nn.Module, Tensor, Any], T]
) -> dict[str, T]:
    """Run a network in evaluation mode without gradients, and look at some of its layers on the way.

    Args:
        network: left as it was, each module in its own mode.
        x: images, [B, C, *spatial].
        layers: by name; each runs once in a forward pass.
        look: of a layer's name, the layer, its first input and its output makes what is returned of it.
    """
    seen: dict[str, T] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = look(name, layer, inputs[0], output)

        return record

    with _evaluating(network):
        handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
        try:
            network(x)
        finally:
            for handle in handles:
                handle.remove()
    return seen


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def joined(parts: Sequence[Observations]) -> Observations:
    """One batch out of several, each with the same layers."""
    return {
        name: replace(first, values=torch.cat([part[name].values for part in parts]))
        for name, first in parts[0].items()
    }


def summarise(observations: Observations) -> tuple[Values, str]:
    """The numbers of each kind of operator, and the same in one line; both empty where there is nothing observed."""
    values: Values = {}
    words = []
    for kind in dict.fromkeys(type(observation) for observation in observations.values()):
        of_kind = kind.summarise({name: layer for name, layer in observations.items() if type(layer) is kind})
        words.append(kind.describe(of_kind))
        values |= of_kind
    return values, "; ".join(words)


def normalised_entropy(shares: Tensor) -> Tensor:
    """Entropy over axis 1, [B, K, ...] -> [B, ...]: 1 where all are 1 / K, 0 where one is 1. With one there is none
    to choose from: 1."""
    if shares.shape[1] == 1:
        return torch.ones_like(shares[:, 0])
    return torch.special.entr(shares).sum(1) / math.log(shares.shape[1])


def _spread(values: Tensor) -> float:
    """Standard deviation over axis 0, mean over all others; NaN of one sample."""
    return float(values.std(0).mean()) if len(values) > 1 else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_epoch(file: Path, epoch: int, values: Values) -> None:
    """Add an epoch's numbers to a file with one JSON object a line, in the place of this and later epochs that a run
    wrote before it was stopped. The file is replaced in one step.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    epochs = {number: earlier for number, earlier in read_epochs(file).items() if number < epoch}
    epochs[epoch] = values
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text("".join(f"{_line(*item)}\n" for item in epochs.items()), encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _line(epoch: int, values: Values) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps({"epoch": epoch, **finite})


def read_epochs(file: Path) -> dict[int, Values]:
    """What :func:`write_epoch` wrote, by epoch; empty where there is no file. A line that an incomplete copy has cut
    off is left out."""
    epochs: dict[int, Values] = {}
    if not file.is_file():
        return epochs
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        epoch = content.pop("epoch")
        epochs[epoch] = {key: math.nan if value is None else value for key, value in content.items()}
    return epochs
