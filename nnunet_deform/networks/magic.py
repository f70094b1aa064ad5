"""MAGIC: nnU-Net's own U-Nets with MAGIC's dynamic convolutions in the place of their encoder's.

These are the networks of :mod:`nnunet_deform.networks.dynamic` with :class:`nnunet_deform.layers.MagicConv` and MAGIC's
defaults. See the layer's module for the equations, and for where paper and released code differ.

Differences from the paper:

- InstanceNorm follows each convolution, as in nnU-Net. It divides out any factor of a sample's whole output, so with
  one kernel the network is static, and of the paper's mixing weights only the ratios act. The paper has BatchNorm.
- KR has no BatchNorm by default: nnU-Net's 3D batch is 2, and BatchNorm over two values is their sign.
- The attention's vector is standardised by its statistics over the training's samples (``attention_norm="running"``),
  because InstanceNorm leaves hardly a difference between samples in it, and the last layer of the attention starts
  smaller than the released one (``attention_init="calibrated"``), which at the paper's temperature of 1 leaves kernels
  without weight or gradient. ``attention_norm="none", attention_init="released"`` is the letter of the paper.
- Convolutions of at most ``reduction`` channels, those with kernel 1 and the first one stay static.
"""

from collections.abc import Mapping
from typing import Any

from nnunet_deform.networks.dynamic import MIN_CHANNELS, DynamicPlainConvUNet, DynamicResidualEncoderUNet


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_norm": "running",
        "attention_init": "calibrated",
        "min_channels": options.get("reduction", MIN_CHANNELS - 1) + 1,
        **options,
        "layer": "magic",
    }


class MagicPlainConvUNet(DynamicPlainConvUNet):
    """nnU-Net's PlainConvUNet with MAGIC's convolutions, by default four kernels each.

    [B, C, *spatial] -> logits [B, classes, *spatial], or under deep supervision a list of them, finest first.

    Args:
        arguments, options: of :class:`nnunet_deform.networks.dynamic.DynamicUNet` but ``layer``; ``attention_norm`` is
            "running", ``attention_init`` "calibrated" and ``min_channels`` ``reduction + 1`` by default.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **_with_defaults(options))


class MagicResidualEncoderUNet(DynamicResidualEncoderUNet):
    """nnU-Net's ResidualEncoderUNet with MAGIC's convolutions, by default two kernels each.

    [B, C, *spatial] -> logits [B, classes, *spatial], or under deep supervision a list of them, finest first.
    Arguments are those of :class:`MagicPlainConvUNet`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **_with_defaults(options))
