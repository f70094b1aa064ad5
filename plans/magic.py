"""MAGIC's architectures for a plan."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nnunet_deform.plans.architecture import Architecture, topology_of

NETWORKS = {
    "plain": "nnunet_deform.networks.MagicPlainConvUNet",
    "residual": "nnunet_deform.networks.MagicResidualEncoderUNet",
}
STOCK = {
    "plain": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "residual": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}
# nnU-Net's planner gives these to the levels of a residual encoder, and the last number to all further ones.
RESIDUAL_BLOCKS = (1, 3, 4, 6)


def magic_architecture(
    base: Mapping[str, Any],
    patch_size: Sequence[int],
    *,
    encoder: Literal["plain", "residual"] = "plain",
    **network_options: Any,
) -> Architecture:
    """The ``architecture`` entry that puts dynamic convolutions into a plan's U-Net.

    Everything is the plan's, widths included; only where its encoder is of the other kind, the numbers of convolutions
    and blocks are those that nnU-Net's planner gives to this kind.

    Args:
        base: the plan's ``architecture``: a stock U-Net's, or one this function made, which keeps its arguments.
        patch_size: the plan's patch, in voxels.
        encoder: "plain" for PlainConvUNet, "residual" for ResidualEncoderUNet.
        network_options: further arguments of the network, see :class:`nnunet_deform.networks.magic.MagicUNet`.

    Raises:
        ValueError: an unknown encoder; a plan for another network, or with fewer than two levels.
    """
    if encoder not in NETWORKS:
        raise ValueError(f"encoder={encoder!r} must be 'plain' or 'residual'.")
    levels = len(topology_of(base, patch_size).strides)
    if base["network_class_name"] not in {*NETWORKS.values(), *STOCK.values()}:
        raise ValueError(
            f"the plan's network {base['network_class_name']} is none of nnU-Net's own U-Nets; start from nnUNetPlans "
            "or a ResEnc plan."
        )
    numbers = {
        "plain": {"n_conv_per_stage": [2] * levels, "n_conv_per_stage_decoder": [2] * (levels - 1)},
        "residual": {
            "n_blocks_per_stage": [*RESIDUAL_BLOCKS, *RESIDUAL_BLOCKS[-1:] * levels][:levels],
            "n_conv_per_stage_decoder": [1] * (levels - 1),
        },
    }
    arguments = dict(base["arch_kwargs"])
    if base["network_class_name"] not in (NETWORKS[encoder], STOCK[encoder]):
        for other in numbers.values():
            for key in other:
                arguments.pop(key, None)
        arguments |= numbers[encoder]
    return {**base, "network_class_name": NETWORKS[encoder], "arch_kwargs": {**arguments, **network_options}}
