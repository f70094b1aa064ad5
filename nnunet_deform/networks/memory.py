"""What training a network keeps in memory."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# What autograd keeps of nnU-Net's PlainConvUNet, in elements, for each element that nnU-Net's memory estimate counts.
STORED_PER_COUNTED = 1.85


def kept_by_autograd(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Elements of the tensors that autograd keeps of a forward pass, parameters left out.

    The pass is made on the meta device, by a copy of the network, so it costs neither memory nor time.
    """
    network = copy.deepcopy(network).to("meta")
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Views of one storage are kept once.
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The output holds the graph, and with it the storages, so that none is freed and its address used again.
        output = network(torch.empty(tuple(input_shape), device="meta"))
    sizes = [t.untyped_storage().nbytes() // t.element_size() for key, t in kept.items() if key not in own]
    del output
    return sum(sizes)
