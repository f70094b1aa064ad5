r"""DeformUX-Net: a hierarchical encoder of depthwise deformable convolutions under a convolutional U-Net decoder.

H. H. Lee et al., "DeformUX-Net: Exploring a 3D Foundation Backbone for Medical Image Segmentation with Depthwise
Deformable Convolution", 2023, arXiv:2310.00199. 3D UX-Net (H. H. Lee et al., ICLR 2023, arXiv:2209.15076) is the same
network with other arguments, ``UX_NET_OPTIONS``.

Block (eq. 3):  z <- z + DDC(LN(z));  z <- z + MLP(LN(z))

with DDC the depthwise deformable convolution of :class:`nnunet_deform.layers.DeformConv` and MLP two 1x1x1 convolutions
C -> 4C -> C around a GELU.

Differences from the paper:

- The topology follows nnU-Net's plan: any number of levels from two, any stride and kernel on each axis, 2D and 3D.
- Deep supervision: a head at every level but the coarsest. The paper has the full-resolution head only.
- The offset branch is a 1x1x1 convolution without padding. The released code pads it, so that its operator reads
  offsets of other voxels and channels; we implement what the paper says.
- An axis with kernel size 1 has no offsets by default (``offset_axes="auto"``); "all" is the paper's tri-planar form.
- LayerScale is off for the eq. 3 block; the block of the released training code (``block="convnext"``) has it at 1e-6.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_convtransp,
    get_matching_instancenorm,
)
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_deform.layers import ChannelLayerNorm, ConvStyle, DeformConv, ResidualBlock, UpBlock
from nnunet_deform.layers.deform import OffsetAxes
from nnunet_deform.layers.recomputation import (
    Recompute,
    check_recompute,
    may_keep_less_compiled,
    recomputed,
    recomputed_block,
)
from nnunet_deform.networks.memory import STORED_PER_COUNTED
from nnunet_deform.networks.observation import Offsets, recorded
from nnunet_deform.networks.paired_start import drawn_by_name, paired_start
from nnunet_deform.networks.topology import check_topology, crop_to_image, pad_to_levels
from nnunet_deform.ops import CHANNELS_LAST, mlp

UX_NET_OPTIONS: dict[str, Any] = {
    "block": "convnext",
    "deformable": False,
    "kernel_size": 7,
    "scaling": "depthwise",
}

LEAKY_RELU_SLOPE = 0.01


class Mlp(nn.Module):
    """Two 1x1x1 convolutions C -> ratio*C -> C around a GELU, as matrix products on a channels-last view."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, ratio * channels)
        self.reduce = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        return mlp(rows, self.expand.weight, self.expand.bias, self.reduce.weight, self.reduce.bias).movedim(-1, 1)


class DepthwiseScaling(nn.Module):
    """3D UX-Net's place-holder for the MLP: C -> ratio*C -> C around a GELU, each channel by itself."""

    def __init__(self, conv_op: type[nn.Module], channels: int, ratio: int) -> None:
        super().__init__()
        self.expand = conv_op(channels, ratio * channels, 1, groups=channels)
        self.reduce = conv_op(ratio * channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(F.gelu(self.expand(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, *[1] * (x.ndim - 2))


class DeformUXBlock(nn.Module):
    """One encoder block, [B, C, *spatial] -> [B, C, *spatial].

    "eq3":      z <- z + gamma1 * conv(LN(z));  z <- z + gamma2 * scaling(LN(z))
    "convnext": z <- z + gamma * scaling(LN(conv(z)))

    without the gammas where ``layer_scale_init`` is None, and without the scaling where it is "none".
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        conv: DeformConv,
        channels: int,
        *,
        block: Literal["eq3", "convnext"],
        scaling: Literal["mlp", "depthwise", "none"],
        ratio: int,
        layer_scale_init: float | None,
    ) -> None:
        super().__init__()

        def layer_scale() -> list[nn.Module]:
            return [] if layer_scale_init is None else [LayerScale(channels, layer_scale_init)]

        mixing: list[nn.Module] = []
        if scaling == "mlp":
            mixing = [Mlp(channels, ratio)]
        elif scaling == "depthwise":
            mixing = [DepthwiseScaling(conv_op, channels, ratio)]
        if block == "eq3":
            branches = [
                nn.Sequential(ChannelLayerNorm(channels), operator, *layer_scale()) for operator in (conv, *mixing)
            ]
        else:
            branches = [nn.Sequential(conv, ChannelLayerNorm(channels), *mixing, *layer_scale())]
        self.branches = nn.ModuleList(branches)
        # What the plain form keeps for each voxel: the inputs of each norm and operator, in the scaling the hidden
        # layer before and after the GELU, the branch before LayerScale, and the offsets.
        maps = 2 * len(branches) + 2 * ratio * len(mixing)
        if block == "convnext":
            maps += len(mixing)
        maps += len(branches) * (layer_scale_init is not None)
        self.kept_per_voxel = maps * channels + conv.offset_channels

    def forward(self, z: Tensor) -> Tensor:
        for branch in self.branches:
            z = z + self._branch(branch, z)
        return z

    def _branch(self, branch: nn.Sequential, z: Tensor) -> Tensor:
        """branch(z). A training step keeps z, of "convnext" the convolution as well, and computes norms, offsets and
        what the scaling holds again."""
        if not may_keep_less_compiled(z, self):
            return branch(z)
        first, second = branch[:2]
        if isinstance(second, DeformConv):
            return branch[2:](second.behind(first, z))
        if isinstance(first, DeformConv):
            return recomputed(branch[1:], first(z))
        return recomputed(branch, z)


class DeformUXEncoder(nn.Module):
    """Stem and stages: an image to one normalised feature map for each level from 1 on, finest first."""

    def __init__(
        self,
        input_channels: int,
        conv_op: type[nn.Module],
        stem_kernel: Sequence[int],
        strides: Sequence[Sequence[int]],
        widths: Sequence[int],
        stages: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_op(input_channels, widths[0], tuple(stem_kernel), tuple(strides[0]), [k // 2 for k in stem_kernel]),
            ChannelLayerNorm(widths[0]),
        )
        self.stages = nn.ModuleList(stages)
        self.downsamplings = nn.ModuleList(
            nn.Sequential(ChannelLayerNorm(fine), conv_op(fine, coarse, tuple(stride), tuple(stride)))
            for fine, coarse, stride in zip(widths[:-1], widths[1:], strides[1:], strict=True)
        )
        self.norms = nn.ModuleList(ChannelLayerNorm(width) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.stem(x)
        outputs = []
        for level, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            if level > 0:
                z = self.downsamplings[level - 1](z)
            # Norms, matrix products and sampling all read whole voxels: channels last, they need no copies.
            z = stage(z.contiguous(memory_format=CHANNELS_LAST[z.ndim - 2]))
            outputs.append(norm(z).contiguous())
        return outputs


class DeformUXDecoder(nn.Module):
    """From the skip features, finest first, to logits: a list, finest first, under deep supervision, else one tensor.

    ``seg_layers[0]`` is the coarsest head, as in nnU-Net's decoders. All heads are always built, so a checkpoint loads
    whether or not deep supervision is on; a network built without it does not train the coarser ones.
    """

    def __init__(
        self,
        style: ConvStyle,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        num_classes: int,
        deep_supervision: bool,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.recompute = recompute
        transposed_conv_op = get_matching_convtransp(style.conv_op)
        finer = list(reversed(range(len(features) - 1)))
        self.ups = nn.ModuleList(
            UpBlock(
                style, transposed_conv_op, features[level + 1], features[level], strides[level + 1], kernel_sizes[level]
            )
            for level in finer
        )
        self.last = ResidualBlock(style, features[0], features[0], kernel_sizes[0])
        self.seg_layers = nn.ModuleList(style.conv_op(features[level], num_classes, 1, bias=True) for level in finer)
        if not deep_supervision:
            self.seg_layers[:-1].requires_grad_(False)

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        *finer, z = skips
        logits = []
        for index, (up, head) in enumerate(zip(self.ups, self.seg_layers, strict=True)):
            finest = index == len(self.ups) - 1
            again = finest and self.recompute == "blocks"
            z = recomputed_block(up, z, finer[-1 - index]) if again else up(z, finer[-1 - index])
            if finest:
                z = recomputed_block(self.last, z) if again else self.last(z)
            if finest or self.deep_supervision:
                logits.append(head(z))
        return logits[::-1] if self.deep_supervision else logits[0]


class DeformUXNet(nn.Module):
    """DeformUX-Net in nnU-Net's terms; see the module's docstring for the paper and the differences from it.

    [B, input_channels, *spatial] -> logits [B, num_classes, *spatial], or with deep supervision a list of n_stages - 1
    of them, finest first, at levels 0 to n_stages - 2. Any spatial size: inputs are padded with zeros at the end of
    each axis to a multiple of the total stride, and logits cropped.

    Args:
        input_channels: channels of the image.
        n_stages: levels including full resolution, at least 2.
        features_per_stage: width of the decoder at each level. The encoder stage at level s has width
            ``features_per_stage[s - 1]``. The paper's are 48, 96, 192, 384, 768.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_sizes: kernel at each level and axis. The stem has 7 where level 0 has more than 1.
        strides: stride of each level to the one before; the first is all ones.
        num_classes: channels of the logits.
        n_blocks_per_stage: blocks of each encoder stage, one number or one for each of the n_stages - 1 stages.
        conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs: of the skip encoders
            and the decoder. By default, as in the paper: no bias, InstanceNorm without affine, LeakyReLU 0.01.
        deep_supervision: may be switched later through ``.decoder.deep_supervision``.
        block: "eq3", the paper's equation, or "convnext", the block of the released training code.
        layer_scale_init: initial LayerScale; None for none; "auto" for 1e-6 in "convnext" and none in "eq3".
        deformable: False replaces each deformable convolution by a plain one of the same kernel: the op-off twin.
        depthwise, offset_kernel, offset_axes, offset_clamp: see :class:`nnunet_deform.layers.DeformConv`.
        scaling: "mlp" (paper), "depthwise" (3D UX-Net) or "none".
        mlp_ratio: hidden width of the scaling over its input's.
        kernel_size: kernel of the encoder's convolutions on the axes where the level's kernel is more than 1; None
            takes the level's own.
        recompute: what the backward pass computes again instead of keeping it: "cheap" for norms, offsets and hidden
            layers, "blocks" for the convolutional blocks at full resolution as well.

    Raises:
        ValueError: arguments that do not describe such a network; the message names the value.
    """

    @paired_start
    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[nn.Conv2d] | type[nn.Conv3d],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        num_classes: int,
        n_blocks_per_stage: int | Sequence[int] = 2,
        conv_bias: bool = False,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        *,
        block: Literal["eq3", "convnext"] = "eq3",
        layer_scale_init: float | Literal["auto"] | None = "auto",
        deformable: bool = True,
        depthwise: bool = True,
        offset_kernel: int = 1,
        offset_axes: OffsetAxes = "auto",
        offset_clamp: float | None = None,
        scaling: Literal["mlp", "depthwise", "none"] = "mlp",
        mlp_ratio: int = 4,
        kernel_size: int | None = None,
        recompute: Recompute = "cheap",
    ) -> None:
        super().__init__()
        check_recompute(recompute)
        ndim = convert_conv_op_to_dim(conv_op)
        check_topology("DeformUX-Net", n_stages, features_per_stage, kernel_sizes, strides, ndim)
        if block not in ("eq3", "convnext"):
            raise ValueError(f"block={block!r} must be 'eq3' or 'convnext'.")
        if scaling not in ("mlp", "depthwise", "none"):
            raise ValueError(f"scaling={scaling!r} must be 'mlp', 'depthwise' or 'none'.")
        n_blocks = [n_blocks_per_stage] * (n_stages - 1) if isinstance(n_blocks_per_stage, int) else n_blocks_per_stage
        if len(n_blocks) != n_stages - 1:
            raise ValueError(
                f"n_blocks_per_stage={n_blocks_per_stage} has {len(n_blocks)} values for {n_stages - 1} encoder stages."
            )
        if min(n_blocks) < 0 or mlp_ratio < 1:
            raise ValueError(
                f"n_blocks_per_stage={n_blocks_per_stage} must be at least 0, mlp_ratio={mlp_ratio} at least 1."
            )
        if nonlin is None:
            nonlin = nn.LeakyReLU
            nonlin_kwargs = nonlin_kwargs or {"negative_slope": LEAKY_RELU_SLOPE, "inplace": True}
        if layer_scale_init == "auto":
            layer_scale_init = 1e-6 if block == "convnext" else None

        style = ConvStyle(
            conv_op=conv_op,
            conv_bias=conv_bias,
            norm_op=norm_op or get_matching_instancenorm(conv_op),
            norm_op_kwargs=norm_op_kwargs or {},
            dropout_op=dropout_op,
            dropout_op_kwargs=dropout_op_kwargs or {},
            nonlin=nonlin,
            nonlin_kwargs=nonlin_kwargs or {},
        )

        def encoder_block(width: int, kernel: Sequence[int]) -> DeformUXBlock:
            if kernel_size is not None:
                kernel = [1 if k == 1 else kernel_size for k in kernel]
            conv = DeformConv(
                conv_op,
                width,
                kernel,
                depthwise=depthwise,
                deformable=deformable,
                offset_kernel=offset_kernel,
                offset_axes=offset_axes,
                offset_clamp=offset_clamp,
            )
            return DeformUXBlock(
                conv_op, conv, width, block=block, scaling=scaling, ratio=mlp_ratio, layer_scale_init=layer_scale_init
            )

        widths = list(features_per_stage[:-1])
        self.encoder = DeformUXEncoder(
            input_channels,
            conv_op,
            [1 if k == 1 else 7 for k in kernel_sizes[0]],
            strides[1:],
            widths,
            [
                nn.Sequential(*(encoder_block(width, kernel) for _ in range(n)))
                for width, kernel, n in zip(widths, kernel_sizes[1:], n_blocks, strict=True)
            ],
        )
        self.skip_encoders = nn.ModuleList(
            ResidualBlock(style, i, o, kernel)
            for i, o, kernel in zip([input_channels, *widths], features_per_stage, kernel_sizes, strict=True)
        )
        self.decoder = DeformUXDecoder(
            style, features_per_stage, strides, kernel_sizes, num_classes, deep_supervision, recompute
        )
        self.recompute = recompute
        self.strides = [tuple(stride) for stride in strides]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        padded = pad_to_levels(x, self.strides)
        finest, *coarser = self.skip_encoders
        skips = [recomputed_block(finest, padded) if self.recompute == "blocks" else finest(padded)]
        skips += [encode(features) for encode, features in zip(coarser, self.encoder(padded), strict=True)]
        return crop_to_image(self.decoder(skips), x.shape[2:], self.strides)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps for one sample of this spatial size, counted as nnU-Net counts its own networks:
        the outputs of the convolutions, and other kept tensors at 1 / 1.85 of their elements. In the plain form, which
        compilers get."""
        voxels, size = [], list(input_size)
        for stride in self.strides:
            size = [math.ceil(s / step) for s, step in zip(size, stride, strict=True)]
            voxels.append(math.prod(size))
        total = sum(block.conv_outputs_per_voxel * v for block, v in zip(self.skip_encoders, voxels, strict=True))
        total += self.decoder.last.conv_outputs_per_voxel * voxels[0]
        for up, head, v in zip(self.decoder.ups, self.decoder.seg_layers, voxels[-2::-1], strict=True):
            total += (up.conv_outputs_per_voxel + head.out_channels) * v
        for stage, norm, v in zip(self.encoder.stages, self.encoder.norms, voxels[1:], strict=True):
            kept = sum(block.kept_per_voxel for block in stage)
            total += (norm.normalized_shape[0] + kept / STORED_PER_COUNTED) * v
        return round(total)

    def observe_operators(self, x: Tensor) -> dict[str, Offsets]:
        """The offsets of each deformable convolution, for images [B, C, *spatial], in evaluation mode."""
        levels = {
            name: level
            for level, stage in enumerate(self.encoder.stages, start=1)
            for name, layer in stage.named_modules(prefix=f"encoder.stages.{level - 1}")
            if isinstance(layer, DeformConv) and layer.offset is not None
        }

        def look(name: str, layer: DeformConv, features: Tensor, _: Tensor) -> Offsets:
            offsets = layer.offsets(features).unflatten(1, (layer.taps, layer.ndim))
            return Offsets(offsets, levels[name], layer.kernel_size)

        return recorded(self, x, {name: self.get_submodule(name) for name in levels}, look) if levels else {}

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """For ``network.apply``: nnU-Net's He initialisation for the convolutions of the skip encoders, the decoder and
        the heads; offsets at zero; torch's default, as in the authors' code, elsewhere in the encoder. At the network,
        which ``apply`` visits last, each parameter is drawn by its name."""
        if isinstance(module, DeformUXNet):
            with drawn_by_name(module):
                for part in module.encoder.modules():
                    if isinstance(part, DeformConv):
                        part.reset_parameters()
                module.skip_encoders.apply(InitWeights_He(LEAKY_RELU_SLOPE))
                module.decoder.apply(InitWeights_He(LEAKY_RELU_SLOPE))
