"""Architectures for a plan with dynamic convolutions in its U-Net."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nnunet_deform.plans.architecture import Architecture, topology_of

NETWORKS = {
    "plain": "nnunet_deform.networks.DynamicPlainConvUNet",
    "residual": "nnunet_deform.networks.DynamicResidualEncoderUNet",
}
STOCK = {
    "plain": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "residual": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}
# nnU-Net's planner gives these to the levels of a residual encoder, and the last number to all further ones.
RESIDUAL_BLOCKS = (1, 3, 4, 6)
# DDConv's first level in 3D, of plans that have it; on finer ones it takes longer than all the rest of the network.
DDCONV_LEVEL = 3

Encoder = Literal["plain", "residual"]
Norm = Literal["plan", "batch"]


def dynamic_architecture(
    base: Mapping[str, Any],
    patch_size: Sequence[int],
    *,
    layer: Literal["odconv", "dcd", "ddconv"],
    encoder: Encoder = "plain",
    norm: Norm = "plan",
    **network_options: Any,
) -> Architecture:
    """The ``architecture`` entry that puts ODConv, DCD or DDConv into a plan's U-Net.

    Everything is the plan's, widths included; only where its encoder is of the other kind, the numbers of convolutions
    and blocks are those that nnU-Net's planner gives to this kind.

    Args:
        base: the plan's ``architecture``: a stock U-Net's, or one this function made, which keeps its arguments.
        patch_size: the plan's patch, in voxels.
        layer: the dynamic convolution. "ddconv" in 3D by default replaces convolutions from level 3 on, or on the
            coarsest level of plans that have fewer.
        encoder: "plain" for PlainConvUNet, "residual" for ResidualEncoderUNet.
        norm: "batch" for BatchNorm in the place of the plan's norm, in 2D.
        network_options: further arguments of the network, see :class:`nnunet_deform.networks.dynamic.DynamicUNet`.

    Raises:
        ValueError: an unknown encoder or norm; a plan for another network, or with fewer than two levels.
        NotImplementedError: BatchNorm in 3D.
    """
    levels = len(topology_of(base, patch_size).strides)
    options = {"layer": layer, **network_options}
    if layer == "ddconv" and len(patch_size) == 3:
        options = {"stages": list(range(min(DDCONV_LEVEL, levels - 1), levels)), **options}
    return unet_architecture(base, patch_size, NETWORKS, encoder=encoder, norm=norm, **options)


def unet_architecture(
    base: Mapping[str, Any],
    patch_size: Sequence[int],
    networks: Mapping[str, str],
    *,
    encoder: Encoder = "plain",
    norm: Norm = "plan",
    **network_options: Any,
) -> Architecture:
    """:func:`dynamic_architecture` with the networks, by encoder, that are to be put in the place of nnU-Net's."""
    for name, value, choices in (("encoder", encoder, tuple(networks)), ("norm", norm, ("plan", "batch"))):
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, choices))}.")
    levels = len(topology_of(base, patch_size).strides)
    if base["network_class_name"] not in {*networks.values(), *STOCK.values()}:
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
    if base["network_class_name"] not in (networks[encoder], STOCK[encoder]):
        for other in numbers.values():
            for key in other:
                arguments.pop(key, None)
        arguments |= numbers[encoder]
    if norm == "batch":
        arguments |= _batch_norm(patch_size)
    return {**base, "network_class_name": networks[encoder], "arch_kwargs": {**arguments, **network_options}}


def _batch_norm(patch_size: Sequence[int]) -> dict[str, Any]:
    if len(patch_size) != 2:
        raise NotImplementedError(
            f"norm='batch' is for 2D, where nnU-Net's batches are large enough, and the patch {list(patch_size)} has "
            "three axes; use the 2d configuration, or the trainer without _BN."
        )
    return {
        "norm_op": "torch.nn.modules.batchnorm.BatchNorm2d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    }
