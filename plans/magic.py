"""MAGIC's architectures for a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_deform.plans.architecture import Architecture
from nnunet_deform.plans.dynamic import Encoder, Norm, unet_architecture

NETWORKS = {
    "plain": "nnunet_deform.networks.MagicPlainConvUNet",
    "residual": "nnunet_deform.networks.MagicResidualEncoderUNet",
}


def magic_architecture(
    base: Mapping[str, Any],
    patch_size: Sequence[int],
    *,
    encoder: Encoder = "plain",
    norm: Norm = "plan",
    **network_options: Any,
) -> Architecture:
    """The ``architecture`` entry that puts MAGIC's convolutions into a plan's U-Net.

    Args, Raises: as of :func:`nnunet_deform.plans.dynamic_architecture`, but for ``layer``; further arguments are those
    of :class:`nnunet_deform.networks.MagicPlainConvUNet`.
    """
    return unet_architecture(base, patch_size, NETWORKS, encoder=encoder, norm=norm, **network_options)
