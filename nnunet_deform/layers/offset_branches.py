"""What steers the samples of a network."""

from torch import nn

from nnunet_deform.layers.ddconv import DDConv
from nnunet_deform.layers.deform import DeformConv


def offset_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of every offset branch in ``network``, in its order; empty where it has none.

    Each branch's last convolution has a weight [taps * axes, C, *kernel], whose output is in voxels. DDConv's has K of
    them, [K * taps * axes, C, *kernel], and their gates belong to the branch.
    """
    found = []
    for module in network.modules():
        if isinstance(module, DeformConv) and module.offset is not None:
            found += module.offset.parameters()
        elif isinstance(module, DDConv):
            found += [module.offset_weight, module.offset_bias]
            found += [] if module.offset_gates is None else module.offset_gates.parameters()
    return found
