"""What training a network keeps in memory."""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_deform.layers.recomputation import plain_forms
from nnunet_deform.networks.fake_backward import without_engine
from nnunet_deform.networks.without_values import without_values

# What autograd keeps of nnU-Net's PlainConvUNet, in elements, for each element that nnU-Net's memory estimate counts.
STORED_PER_COUNTED = 1.85


def kept_by_autograd(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Elements of the tensors that autograd keeps of a forward pass in the plain form, parameters left out.

    The pass is made on the meta device, by a copy of the network, so it costs neither memory nor time.
    """
    network = copy.deepcopy(network).to("meta")
    with plain_forms():
        kept = _kept(network, torch.empty(tuple(input_shape), device="meta"))
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept)


def bytes_kept_on_cuda(build: Callable[[], nn.Module], input_shape: Sequence[int], *, mixed_precision: bool) -> int:
    """Bytes of the tensors that autograd keeps of a forward pass on a CUDA device, parameters left out.

    The pass costs neither memory nor time: it is made on the meta device, or in mixed precision by fake tensors.

    Args:
        build: makes the network.
        input_shape: [B, C, *spatial].
        mixed_precision: float16 autocast, as nnU-Net trains.

    Raises:
        RuntimeError: mixed precision, which this torch cannot follow without a CUDA device.
    """
    if not mixed_precision:
        with without_values():
            network, image = build(), torch.empty(tuple(input_shape))
        return sum(tensor.untyped_storage().nbytes() for tensor in _kept(network, image))
    with on_fake_cuda(build, input_shape) as (network, image), float16_autocast():
        return sum(tensor.untyped_storage().nbytes() for tensor in _kept(network, image))


class StepBytes(NamedTuple):
    """Bytes of tensors after the forward pass of an eager training step, and at most at one time of its backward pass;
    without parameters and their gradients, image and loss."""

    kept: int
    peak: int


def bytes_of_step_on_cuda(
    build: Callable[[], nn.Module], input_shape: Sequence[int], *, mixed_precision: bool
) -> StepBytes:
    """What an eager training step holds on a CUDA device; arguments and errors as of :func:`bytes_kept_on_cuda`, and
    in float32 as well the errors of mixed precision."""
    with on_fake_cuda(build, input_shape) as (network, image):
        held = _Held([*network.parameters(), *network.buffers(), image])
        with without_engine(), held:
            with float16_autocast() if mixed_precision else nullcontext():
                outputs = list(network(image))
            kept = held.now
            gradients = [torch.ones_like(output) for output in outputs]
            held.peak = held.now
            # Emptied on the way, as nothing holds them in a training step.
            torch.autograd.grad(outputs, [], gradients)
        return StepBytes(kept, held.peak)


class _Held(TorchDispatchMode):
    """Bytes of the storages made within that are still held, now and at most."""

    def __init__(self, others: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def on_fake_cuda(build: Callable[[], nn.Module], input_shape: Sequence[int]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Network and image on a CUDA device that need not be there."""
    unable = unable_to_follow_autocast()
    if unable is not None:
        raise RuntimeError(unable)
    with without_values():
        network = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move_to_cuda(network)
        yield network, torch.empty(tuple(input_shape), device="cuda")


@contextmanager
def float16_autocast() -> Iterator[None]:
    """Under nnU-Net's autocast on CUDA."""
    # torch.autocast would find no device and stay off.
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def _move_to_cuda(network: nn.Module) -> None:
    """Put empty tensors into the places of parameters and buffers."""
    # Not by to_empty, which fails where a module stands under two names, as nnU-Net's convolutions do.
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            moved = torch.empty_like(parameter, device="cuda")
            setattr(module, key, nn.Parameter(moved, requires_grad=parameter.requires_grad))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, torch.empty_like(buffer, device="cuda"))


def unable_to_follow_autocast() -> str | None:
    """Why mixed precision cannot be measured here, in one sentence with what to do; None where it can."""
    if torch.cuda.is_available() or (torch.backends.cuda.is_built() and Version(torch.__version__) >= Version("2.11")):
        return None
    # Asked here, because torch would end the process.
    return (
        f"torch {torch.__version__} cannot follow mixed precision without a CUDA device; measure in float32, or with a "
        "build of torch 2.11 or later for CUDA."
    )


def _kept(network: nn.Module, image: Tensor) -> list[Tensor]:
    """One tensor of each storage that autograd keeps of a forward pass, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Detached, because an operation that holds its own output with its history is never freed.
        tensor = tensor.detach()
        # Views of one storage are kept once. Held here, no storage is freed and its address used again.
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image)
    return [tensor for key, tensor in kept.items() if key not in own]
