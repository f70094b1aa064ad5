"""nnU-Net's own U-Nets with dynamic convolutions in the place of their encoder's.

The networks are built as nnU-Net builds them; then convolutions are replaced by layers of one of these kinds:

    magic     :class:`nnunet_deform.layers.MagicConv`, with DYConv's and CondConv's attention as options of it
    odconv    :class:`nnunet_deform.layers.ODConv`
    dcd       :class:`nnunet_deform.layers.DCD`
    ddconv    :class:`nnunet_deform.layers.DDConv`

What is not replaced keeps its parameters' names, so that pretrained weights, deep supervision and nnU-Net's estimates
work as before. All kinds replace the same convolutions; those with kernel 1, with few channels and the first one stay
static. See the layers' modules for the equations, for where papers and released codes differ, and for what nnU-Net's
InstanceNorm, behind and in front of each convolution, does to an attention. ``norm_op`` may be BatchNorm, which the
papers have.
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

from nnunet_deform.layers import (
    DCD,
    DCD2d,
    DCD3d,
    DDConv,
    DDConv2d,
    DDConv3d,
    DynamicConv,
    MagicConv2d,
    MagicConv3d,
    ODConv2d,
    ODConv3d,
)
from nnunet_deform.layers.recomputation import Recompute, check_recompute, may_recompute, recomputed
from nnunet_deform.networks.memory import STORED_PER_COUNTED
from nnunet_deform.networks.observation import ChannelFusion, MixingWeights, Observations, Offsets, recorded
from nnunet_deform.networks.paired_start import drawn_by_name, paired_start
from nnunet_deform.networks.topology import crop_to_image, pad_to_levels, padded_size

Layer = Literal["magic", "odconv", "dcd", "ddconv"]

LAYERS: dict[str, dict[int, type[DynamicConv]]] = {
    "magic": {2: MagicConv2d, 3: MagicConv3d},
    "odconv": {2: ODConv2d, 3: ODConv3d},
    "dcd": {2: DCD2d, 3: DCD3d},
    "ddconv": {2: DDConv2d, 3: DDConv3d},
}
# By default a convolution needs one input channel more than MAGIC's attention divides them by.
MIN_CHANNELS = 9

_he_normal = partial(nn.init.kaiming_normal_, a=1e-2)


def _options_of(layer: Layer) -> set[str]:
    """The names of its keyword-only arguments."""
    parameters = inspect.signature(LAYERS[layer][2].__init__).parameters
    return {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


class _RecomputedBlock(ConvDropoutNormReLU):
    """A block of which a training step keeps the input alone, and what an attention made of it."""

    def forward(self, x: Tensor) -> Tensor:
        if not may_recompute(self):
            return super().forward(x)
        conv, rest = self.conv, self.all_modules[1:]
        if not (isinstance(conv, DynamicConv) and conv.dynamic):
            return recomputed(self.all_modules, x)
        parts = conv.divided(x)
        if parts is None:
            return super().forward(x)
        once, convolved = parts
        return recomputed(lambda x, *once: rest(convolved(x, *once)), x, *once)


class DynamicUNet(nn.Module):
    """What all these networks share: the replacement, any input size, the memory estimate, a look at the layers.

    [B, C, *spatial] -> logits [B, classes, *spatial], of any spatial size; with deep supervision a list of them, finest
    first.

    Args:
        arguments: of nnU-Net's network.
        layer: "odconv", "dcd", "ddconv" or "magic".
        scope: "encoder" or "all", which adds the decoder's convolutions.
        stages: levels to replace convolutions at, 0 being full resolution; None for all. DDConv in 3D needs them said:
            it takes some 25 times as long as a convolution, and is for coarse levels.
        n_kernels: kernels of each convolution. None for 4, or 2 with a residual encoder; for DDConv 8. DCD has one.
        min_channels: convolutions with fewer input channels stay static.
        recompute: what the backward pass computes again instead of keeping it: "cheap" for MAGIC's mixed kernels,
            "blocks" for all convolutions and norms at full resolution as well, but for DDConv's.
        options: of nnU-Net's network, and keyword-only ones of the layer.

    Raises:
        ValueError: an unknown layer, scope or stage, DDConv in 3D without stages, no convolution to replace, or an
            option that the layer does not take.
    """

    default_kernels: ClassVar[int]

    @paired_start
    def __init__(
        self,
        *arguments: Any,
        layer: Layer,
        scope: Literal["encoder", "all"] = "encoder",
        stages: Sequence[int] | None = None,
        n_kernels: int | None = None,
        min_channels: int = MIN_CHANNELS,
        recompute: Recompute = "cheap",
        **options: Any,
    ) -> None:
        check_recompute(recompute)
        if layer not in LAYERS:
            raise ValueError(f"layer={layer!r} must be one of {', '.join(map(repr, LAYERS))}.")
        takes = _options_of(layer)
        of_layers = {name: options.pop(name) for name in takes & options.keys()}
        super().__init__(*arguments, **options)
        if scope not in ("encoder", "all"):
            raise ValueError(f"scope={scope!r} must be 'encoder' or 'all'.")
        levels = range(len(self.encoder.stages))
        if stages is not None and not set(stages) <= set(levels):
            raise ValueError(f"stages={list(stages)} must be among {list(levels)}, 0 being full resolution.")
        if layer == "ddconv" and stages is None and self.encoder.conv_op is nn.Conv3d:
            raise ValueError(
                "layer='ddconv' needs stages in 3D, where it takes some 25 times as long as a convolution; give the "
                f"coarsest of {list(levels)}, such as those from 3 on."
            )
        if n_kernels is not None and "n_kernels" not in takes:
            raise ValueError(f"n_kernels={n_kernels} is no option of layer={layer!r}, which has one kernel.")
        if n_kernels is None and layer in ("magic", "odconv"):
            n_kernels = self.default_kernels
        if n_kernels is not None:
            of_layers["n_kernels"] = n_kernels
        self.layer = layer
        self.scope = scope
        self._replace_convolutions(levels if stages is None else stages, min_channels, of_layers)
        for block in self.modules():
            # Without a projection these blocks hold a lambda, which cannot be pickled.
            if isinstance(block, (BasicBlockD, BottleneckD)) and not isinstance(block.skip, nn.Module):
                block.skip = nn.Identity()
        if not self.decoder.deep_supervision:
            self.decoder.seg_layers[:-1].requires_grad_(False)
        if recompute == "blocks":
            self._recompute_blocks()

    def _recompute_blocks(self) -> None:
        finest = [self.encoder.stages[0], self.decoder.stages[-1]]
        if getattr(self.encoder, "stem", None) is not None:
            finest.append(self.encoder.stem)
        for block in [block for part in finest for block in part.modules() if type(block) is ConvDropoutNormReLU]:
            # It stays the block that it is in the eyes of those who hold it.
            block.__class__ = _RecomputedBlock

    def _replace_convolutions(self, stages: Iterable[int], min_channels: int, options: dict[str, Any]) -> None:
        first = {self.get_submodule(key) for key in self.keys_to_in_proj}
        replaced = 0
        for _, block, level in self._blocks():
            conv = block.conv
            pointwise = math.prod(conv.kernel_size) == 1
            if level not in stages or conv in first or pointwise or conv.in_channels < min_channels:
                continue
            block.conv = LAYERS[self.layer][len(conv.kernel_size)](
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
                f"no convolution to replace: with scope={self.scope!r} and stages={list(stages)} none has "
                f"{min_channels} or more input channels and a kernel larger than 1 (the first is never replaced)."
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

    def dynamic_convs(self) -> dict[str, DynamicConv]:
        """The dynamic convolutions by name, in the order of the forward pass."""
        return {f"{name}.conv": b.conv for name, b, _ in self._blocks() if isinstance(b.conv, DynamicConv)}

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """[B, input_channels, *spatial] of any size -> logits, or a list of them, finest first."""
        strides = self.encoder.strides
        return crop_to_image(super().forward(pad_to_levels(x, strides)), x.shape[2:], strides)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps for one sample, as nnU-Net counts its own networks, and what the dynamic
        convolutions keep at 1 / 1.85 of its elements. Their K-fold weights are not counted: they do not depend on the
        sample."""
        total = super().compute_conv_feature_map_size(padded_size(input_size, self.encoder.strides))
        kept = sum(conv.kept_by_autograd(size) for conv, size in self._inputs(input_size))
        return round(float(total) + kept / STORED_PER_COUNTED)

    def made_again(self, input_size: Sequence[int]) -> float:
        """Of the elements that ``compute_conv_feature_map_size`` counts, those that an eager training step does not
        keep but makes again: what MAGIC's convolutions keep beyond static ones."""
        if self.layer != "magic":
            return 0
        return sum(conv.kept_by_autograd(size) for conv, size in self._inputs(input_size)) / STORED_PER_COUNTED

    def autocast_surplus(self, input_size: Sequence[int]) -> int:
        """How many numbers of half precision autocast keeps for one sample beyond as many as are counted, because some
        of what the dynamic convolutions keep stays in float32."""
        return sum(conv.autocast_surplus(size) for conv, size in self._inputs(input_size))

    def _inputs(self, input_size: Sequence[int]) -> Iterator[tuple[DynamicConv, list[int]]]:
        """Each dynamic convolution and the size of its input."""
        sizes = [padded_size(input_size, self.encoder.strides)]
        for stride in self.encoder.strides:
            sizes.append([s // step for s, step in zip(sizes[-1], stride, strict=True)])
        for _, block, level in self._blocks():
            if isinstance(block.conv, DynamicConv):
                strided = any(step != 1 for step in block.conv.stride)
                yield block.conv, sizes[level if strided else level + 1]

    def mixing_weights(self, x: Tensor) -> dict[str, Tensor]:
        """The weight of each kernel for each sample, [B, K], by the name of the convolution, in evaluation mode; empty
        where the layers mix no kernels, as DCD's."""
        mixing = {name: conv for name, conv in self.dynamic_convs().items() if not isinstance(conv, DCD)}
        return recorded(self, x, mixing, lambda _, conv, features, output: conv.mixing_weights(features))

    def observe_operators(self, x: Tensor) -> Observations:
        """What depends on the sample: :class:`MixingWeights` of the convolutions, or of DCD :class:`ChannelFusion`;
        of DDConv :class:`Offsets`, and under the name of its gates :class:`MixingWeights`."""
        levels = {f"{name}.conv": level for name, _, level in self._blocks()}

        def look(name: str, conv: DynamicConv, features: Tensor, output: Tensor) -> Observations:
            if isinstance(conv, DCD):
                scale, phi = conv.fusion(features)
                return {name: ChannelFusion(torch.cat([scale, phi.flatten(1)], 1), outputs=conv.out_channels)}
            if not isinstance(conv, DDConv):
                return {name: MixingWeights(conv.mixing_weights(features))}
            strided = any(step != 1 for step in conv.stride)
            offsets = Offsets(
                conv.offsets(features).unflatten(1, (-1, conv.ndim)),
                level=levels[name] - strided,
                kernel_size=conv.kernel_size,
                stride=conv.stride,
                size=tuple(features.shape[2:]),
            )
            gates = {f"{name}.kernel_gates": MixingWeights(conv.mixing_weights(features))} if conv.dynamic else {}
            return {name: offsets, **gates}

        convs = {name: conv for name, conv in self.dynamic_convs().items() if conv.dynamic or isinstance(conv, DDConv)}
        seen = recorded(self, x, convs, look) if convs else {}
        return {name: observation for of_conv in seen.values() for name, observation in of_conv.items()}

    def freeze_kernels(self, calibration: Iterable[Tensor]) -> "DynamicUNet":
        """A copy without dynamics for deployment: each dynamic convolution a plain one, its kernel and bias their means
        over the samples of the calibration set. Its weights load into the stock network. Of DDConv's layers, which
        move their samples, the plain one is a deformable convolution.

        Args:
            calibration: batches of images, [B, input_channels, *spatial], as in training.

        Raises:
            ValueError: the calibration set is empty.
        """
        totals: dict[str, tuple[Tensor | None, ...]] = {}
        samples = 0
        for batch in calibration:
            of_batch = recorded(self, batch, self.dynamic_convs(), _sum_of_kernels)
            for name, sums in of_batch.items():
                before = totals.get(name, (None,) * len(sums))
                totals[name] = tuple(
                    one if other is None else one + other for one, other in zip(sums, before, strict=True)
                )
            samples += len(batch)
        if not samples:
            raise ValueError("calibration holds no batch; give some images as in training.")
        frozen = copy.deepcopy(self)
        for name, block, _ in frozen._blocks():
            if isinstance(block.conv, DynamicConv):
                means = (None if total is None else total / samples for total in totals[f"{name}.conv"])
                block.conv = block.conv.folded(*means)
                block.all_modules[0] = block.conv
        return frozen


def _sum_of_kernels(name: str, conv: DynamicConv, features: Tensor, output: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if of_samples is None else of_samples.sum(0) for of_samples in conv.kernels(features))


class DynamicPlainConvUNet(DynamicUNet, PlainConvUNet):
    """nnU-Net's PlainConvUNet with dynamic convolutions; see :class:`DynamicUNet` for the arguments.

    [B, C, *spatial] -> logits [B, classes, *spatial], or under deep supervision a list of them, finest first.
    """

    default_kernels = 4

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """For ``network.apply``: nnU-Net's He initialisation, of each kernel by itself, and the layers' own for all
        else of them. At the network, which ``apply`` visits last, each parameter is drawn by its name."""
        if isinstance(module, DynamicPlainConvUNet):
            _initialize(module, PlainConvUNet.initialize)


class DynamicResidualEncoderUNet(DynamicUNet, ResidualEncoderUNet):
    """nnU-Net's ResidualEncoderUNet with dynamic convolutions; see :class:`DynamicUNet` for the arguments.

    [B, C, *spatial] -> logits [B, classes, *spatial], or under deep supervision a list of them, finest first.
    """

    default_kernels = 2

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """For ``network.apply``: nnU-Net's He initialisation, of each kernel by itself, and the layers' own for all
        else of them. At the network, which ``apply`` visits last, each parameter is drawn by its name."""
        if isinstance(module, DynamicResidualEncoderUNet):
            _initialize(module, ResidualEncoderUNet.initialize)


def _initialize(network: DynamicUNet, stock: Callable[[nn.Module], None]) -> None:
    def initialize_part(module: nn.Module) -> None:
        if isinstance(module, DynamicConv):
            module.reset_parameters(_he_normal)
        else:
            stock(module)

    with drawn_by_name(network):
        network.apply(initialize_part)
