r"""Class activation maps of any network that gives logits for each voxel, at every resolution that it works at.

Grad-CAM++ (A. Chattopadhay et al., WACV 2018, arXiv:1710.11063), which MAGIC's figure 3 shows, for segmentation: the
score is the sum of a class's logits over voxels of choice. With A the activation of a layer, g the score's gradient by
it, and S_k the sum of channel k:

    alpha = g^2 / (2 g^2 + S g^3),   w_k = sum alpha relu(g),   map = relu(sum_k w_k A_k)

Where g is not 0, alpha is 1 / (2 + S g), which needs no small constant against division by zero, and so does not depend
on the gradient's scale as the usual implementations do. The derivation takes A for not negative; for LeakyReLU and
GELU, S here sums the positive part, without which the denominator may vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_deform.ops import resample_linear


@dataclass(frozen=True)
class Layer:
    """name: of the module; size: of its output, [*spatial]."""

    name: str
    size: tuple[int, ...]


def grad_cam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """The map of one layer, [B, C, *spatial] twice -> [B, *spatial], not negative."""
    activation, gradient = activation.float(), gradient.float()
    spatial = tuple(range(2, activation.ndim))
    total = activation.clamp_min(0).sum(spatial, keepdim=True)
    positive = gradient.clamp_min(0)
    weights = (positive / (2 + total * positive)).sum(spatial, keepdim=True)
    return (weights * activation).sum(1).clamp_min(0)


def levels(network: nn.Module, x: Tensor) -> list[Layer]:
    """The last block at each resolution, coarsest first. A block is a module of several; a single layer stands in where
    a resolution has no block. Modules that give the logits themselves are not among them.

    Args:
        x: an image, [1, C, *spatial].
    """
    seen: list[tuple[nn.Module, Tensor]] = []
    names = {module: name for name, module in network.named_modules()}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == x.ndim and output.shape[0] == x.shape[0]:
            seen.append((module, output))

    with torch.no_grad(), hooked(list(names), record):
        logits = network(x)
    storage = logits.untyped_storage().data_ptr()
    before = [(m, output) for m, output in seen if names[m] and output.untyped_storage().data_ptr() != storage]
    last: dict[tuple[int, ...], str] = {}
    for blocks in (False, True):
        last |= {tuple(o.shape[2:]): names[m] for m, o in before if any(True for _ in m.children()) == blocks}
    return [Layer(name, size) for size, name in sorted(last.items(), key=lambda item: torch.Size(item[0]).numel())]


def activation_maps(
    network: nn.Module, x: Tensor, scores: Sequence[tuple[int, Tensor]], layers: Sequence[str]
) -> Tensor:
    """Maps of several classes and layers from one forward pass and a backward pass for each class.

    Args:
        network: [1, C, *spatial] -> logits [1, heads, *spatial]; in the mode it is in.
        x: an image, [1, C, *spatial].
        scores: for each map the head, and the voxels whose logits are summed, a mask [*spatial].
        layers: names of modules that run once in a forward pass.

    Returns:
        [scores, layers, *spatial], interpolated to the image's size; zeros of an empty mask.
    """
    kept: dict[str, Tensor] = {}
    modules = {network.get_submodule(name): name for name in layers}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        kept[modules[module]] = output

    maps = torch.zeros(len(scores), len(layers), *x.shape[2:])
    image = x.detach().clone().requires_grad_(True)
    with torch.enable_grad(), torch.autocast("cuda") if x.is_cuda else nullcontext(), hooked(list(modules), keep):
        logits = network(image)[0]
    activations = [kept[name] for name in layers]
    for number, (head, mask) in enumerate(scores):
        if not mask.any():
            continue
        score = logits[head][mask].float().sum()
        gradients = torch.autograd.grad(score, activations, retain_graph=True, allow_unused=True)
        for position, (activation, gradient) in enumerate(zip(activations, gradients, strict=True)):
            if gradient is None:  # the score does not depend on this layer
                continue
            small = grad_cam_plus_plus(activation.detach(), gradient)
            maps[number, position] = resample_linear(small[None], x.shape[2:])[0, 0].cpu()
    return maps


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Within, the modules' forward passes call the hook."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
