"""nnU-Net's own U-Nets with MAGIC's dynamic convolutions in the place of their encoder's.

Both networks are built as nnU-Net builds them; then convolutions are replaced by
:class:`nnunet_deform.layers.MagicConv`. What is not replaced keeps its parameters' names, so that pretrained weights,
deep supervision and nnU-Net's estimates work as before. See the layer's module for the equations, and for where paper
and released code differ.

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

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn

from nnunet_deform.layers import MagicConv, MagicConv2d, MagicConv3d
from nnunet_deform.networks.memory import STORED_PER_COUNTED
from nnunet_deform.networks.paired_start import drawn_by_name, paired_start
from nnunet_deform.networks.topology import crop_to_image, pad_to_levels, padded_size

_LAYER_OPTIONS = {
    name
    for name, parameter in inspect.signature(MagicConv.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}

_he_normal = partial(nn.init.kaiming_normal_, a=1e-2)


class MagicUNet(nn.Module):
    """What both networks share: the replacement, any input size, the memory estimate, a look at the mixing weights.

    Args:
        arguments: of nnU-Net's network.
        scope: "encoder" (paper) or "all", which adds the decoder's convolutions.
        stages: levels to replace convolutions at, 0 being full resolution; None for all.
        n_kernels: kernels of each convolution, by default 4, and 2 with a residual encoder.
        options: of nnU-Net's network, and keyword-only ones of :class:`nnunet_deform.layers.MagicConv`, of
            which ``attention_norm`` is "running" and ``attention_init`` "calibrated" by default.

    Raises:
        ValueError: an unknown scope or stage, no convolution to replace, or an option that the layer does not take.
    """

    default_kernels: ClassVar[int]

    @paired_start
    def __init__(
        self,
        *arguments: Any,
        scope: Literal["encoder", "all"] = "encoder",
        stages: Sequence[int] | None = None,
        n_kernels: int | None = None,
        **options: Any,
    ) -> None:
        of_layers = {name: options.pop(name) for name in _LAYER_OPTIONS & options.keys()}
        of_layers = {"attention_norm": "running", "attention_init": "calibrated", **of_layers}
        super().__init__(*arguments, **options)
        if scope not in ("encoder", "all"):
            raise ValueError(f"scope={scope!r} must be 'encoder' or 'all'.")
        levels = range(len(self.encoder.stages))
        if stages is not None and not set(stages) <= set(levels):
            raise ValueError(f"stages={list(stages)} must be among {list(levels)}, 0 being full resolution.")
        self.scope = scope
        of_layers["n_kernels"] = self.default_kernels if n_kernels is None else n_kernels
        self._replace_convolutions(levels if stages is None else stages, of_layers)
        for block in self.modules():
            # Without a projection these blocks hold a lambda, which cannot be pickled.
            if isinstance(block, (BasicBlockD, BottleneckD)) and not isinstance(block.skip, nn.Module):
                block.skip = nn.Identity()
        if not self.decoder.deep_supervision:
            self.decoder.seg_layers[:-1].requires_grad_(False)

    def _replace_convolutions(self, stages: Iterable[int], options: dict[str, Any]) -> None:
        reduction = options.get("reduction", inspect.signature(MagicConv.__init__).parameters["reduction"].default)
        first = {self.get_submodule(key) for key in self.keys_to_in_proj}
        replaced = 0
        for _, block, level in self._blocks():
            conv = block.conv
            pointwise = math.prod(conv.kernel_size) == 1
            if level not in stages or conv in first or pointwise or conv.in_channels <= reduction:
                continue
            layer = MagicConv2d if isinstance(conv, nn.Conv2d) else MagicConv3d
            block.conv = layer(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                conv.bias is not None,
                **options,
            )
            # The block holds its convolution under two names.
            block.all_modules[0] = block.conv
            replaced += 1
        if not replaced:
            raise ValueError(
                f"no convolution to replace: with scope={self.scope!r} and stages={list(stages)} none has more than "
                f"reduction={reduction} input channels and a kernel larger than 1 (the first is never replaced)."
            )

    def _blocks(self) -> Iterator[tuple[str, ConvDropoutNormReLU, int]]:
        """Name, block and level of the blocks in scope."""
        parts = [("encoder.stages", list(range(len(self.encoder.stages))))]
        if self.scope == "all":
            # The decoder's first stage is its coarsest.
            parts.append(("decoder.stages", list(range(len(self.decoder.stages)))[::-1]))
        for part, levels in parts:
            for index, level in enumerate(levels):
                prefix = f"{part}.{index}"
                for name, module in self.get_submodule(prefix).named_modules(prefix=prefix):
                    if isinstance(module, ConvDropoutNormReLU):
                        yield name, module, level

    def magic_convs(self) -> dict[str, MagicConv]:
        """The dynamic convolutions by name, in the order of the forward pass."""
        return {f"{name}.conv": b.conv for name, b, _ in self._blocks() if isinstance(b.conv, MagicConv)}

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """[B, input_channels, *spatial] of any size -> logits, or a list of them, finest first."""
        strides = self.encoder.strides
        return crop_to_image(super().forward(pad_to_levels(x, strides)), x.shape[2:], strides)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps for one sample, as nnU-Net counts its own networks, and what the dynamic
        convolutions keep at 1 / 1.85 of its elements. Their K-fold weights are not counted: they do not depend on the
        sample."""
        sizes = [padded_size(input_size, self.encoder.strides)]
        total = super().compute_conv_feature_map_size(sizes[0])
        for stride in self.encoder.strides:
            sizes.append([s // step for s, step in zip(sizes[-1], stride, strict=True)])
        kept = 0
        for _, block, level in self._blocks():
            if isinstance(block.conv, MagicConv):
                strided = any(step != 1 for step in block.conv.stride)
                kept += block.conv.kept_by_autograd(math.prod(sizes[level if strided else level + 1]))
        return round(float(total) + kept / STORED_PER_COUNTED)

    def mixing_weights(self, x: Tensor) -> dict[str, Tensor]:
        """The weight of each kernel for each sample, [B, K], by the name of the convolution, in evaluation mode."""
        seen: dict[str, Tensor] = {}

        def look(name: str, conv: MagicConv, inputs: tuple[Tensor]) -> None:
            seen[name] = conv.mixing_weights(inputs[0])

        hooks = [conv.register_forward_pre_hook(partial(look, name)) for name, conv in self.magic_convs().items()]
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                self(x)
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        return seen

    def freeze_kernels(self, calibration: Iterable[Tensor]) -> "MagicUNet":
        """A copy without dynamics for deployment: each dynamic convolution a plain one, its kernels mixed with their
        mean weights over the calibration set. Its weights load into the stock network.

        Args:
            calibration: batches of images, [B, input_channels, *spatial], as in training.

        Raises:
            ValueError: the calibration set is empty.
        """
        batches = [self.mixing_weights(batch) for batch in calibration]
        if not batches:
            raise ValueError("calibration holds no batch; give some images as in training.")
        frozen = copy.deepcopy(self)
        for name, block, _ in frozen._blocks():
            if isinstance(block.conv, MagicConv):
                weights = torch.cat([batch[f"{name}.conv"] for batch in batches]).mean(0)
                block.conv = block.conv.folded(weights)
                block.all_modules[0] = block.conv
        return frozen


class MagicPlainConvUNet(MagicUNet, PlainConvUNet):
    """nnU-Net's PlainConvUNet with dynamic convolutions; see :class:`MagicUNet` for the arguments."""

    default_kernels = 4

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """For ``network.apply``: nnU-Net's He initialisation, of each kernel by itself, and the attention's own. At the
        network, which ``apply`` visits last, each parameter is drawn by its name."""
        if isinstance(module, MagicPlainConvUNet):
            _initialize(module, PlainConvUNet.initialize)


class MagicResidualEncoderUNet(MagicUNet, ResidualEncoderUNet):
    """nnU-Net's ResidualEncoderUNet with dynamic convolutions; see :class:`MagicUNet` for the arguments."""

    default_kernels = 2

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """For ``network.apply``: nnU-Net's He initialisation, of each kernel by itself, and the attention's own. At the
        network, which ``apply`` visits last, each parameter is drawn by its name."""
        if isinstance(module, MagicResidualEncoderUNet):
            _initialize(module, ResidualEncoderUNet.initialize)


def _initialize(network: MagicUNet, stock: Callable[[nn.Module], None]) -> None:
    def initialize_part(module: nn.Module) -> None:
        if isinstance(module, MagicConv):
            module.reset_parameters(_he_normal)
        else:
            stock(module)

    with drawn_by_name(network):
        network.apply(initialize_part)
