"""What training a network keeps in memory."""

import copy
from collections.abc import Callable, Sequence

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_deform.layers.recomputation import plain_forms

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
    with torch.device("meta"):
        network, image = build(), torch.empty(tuple(input_shape))
    if not mixed_precision:
        return sum(tensor.untyped_storage().nbytes() for tensor in _kept(network, image))
    unable = unable_to_follow_autocast()
    if unable is not None:
        raise RuntimeError(unable)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move_to_cuda(network)
        image = torch.empty(tuple(input_shape), device="cuda")
        # torch.autocast would find no device and stay off.
        torch.set_autocast_dtype("cuda", torch.float16)
        torch.set_autocast_enabled("cuda", True)
        try:
            kept = _kept(network, image)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)


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
