r"""LightMedSeg: a U-Net of half a million parameters, steered by learned anchors, a structural prior and a skip router.

K. Tyagi, V. Rathi, P. Goyal, "LightMedSeg: Lightweight 3D Medical Image Segmentation with Learned Spatial Anchors",
2026, arXiv:2603.07228. There is no official code; this is a reconstruction that meets the paper's figures: 0.48 M
parameters (0.66 M with standard in the place of ghost convolutions), 8.6 K of them in the anchor detector and 11.7 K in
the structural prior, and 14.5 G multiplications at 4 x 128^3.

With F0 the stem's features at level 1, X the image, s the sigmoid, GN a GroupNorm of four groups, || concatenation:

    A   = s(W2 silu(W1 v + b1) + b2), v the mean of three strided convolutions of X                      (1)
    R   = |F0 - GN(DW5(F0))|                                                                             (2)
    T   = s(conv1(R))                                                                                    (3)
    g   = s(conv1(silu GN conv3(silu GN conv3(F0)))), (a1, a2) = softmax(conv1(g))                       (4)
    F0' = a1 E1(F0) + a2 E2(F0)                                                                          (5)
    F   = (1 + gamma(A)) ghost(h) + beta(A)                                                              (6)
    Zd  = silu GN DW3(F),  Zs = silu GN conv1(F),  Z = T Zd + (1 - T) Zs                              (7, 8, 9)
    E   = Z s(V2 silu(V1 mean(Z)))                                                                      (10)
    E^j = conv1(E_j)                                                                                    (11)
    w   = softmax_j(conv1(silu(conv1(E^1 || ... || E^N))))                                              (12)
    S   = conv1(sum_j w_j E^j)                                                                          (13)
    M_k = (z - a_kz) + (y - a_ky) + (x - a_kx),  P = conv1(M)                                       (14, 15)
    F   = gate((U + P) || S), the gate of (10)                                                          (16)
    pi  = softmax(conv1(F)),  Y = pi1 f1(F) + pi2 f2(F) + pi3 f3(F)                                 (17, 18)
    f1  = silu GN (the two halves of DW3(F), added),  f2 = ghost(F),  f3 = silu GN conv1(F)     (19, 20, 21)

Anchors are relative to the patch, not to the scan, and through (14) the decoder sees only the sum of each anchor's
coordinates, as in the paper.

Differences from the paper:

- The topology follows nnU-Net's plan: any number of levels from two, any stride and kernel on each axis, 2D and 3D.
- The head has no transposed convolution: the four of the decoder stages already restore full resolution.
- Deep supervision: a head at every level but the coarsest. The paper has the full-resolution head only.
- (14) and (15) are computed in closed form, and maps are resampled before they are projected: the same functions.
- What the paper's text leaves open, such as norms in (2) and (8), is chosen so that its figures are met.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_convtransp,
    get_matching_pool_op,
)
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_deform.layers import (
    AnchorDetector,
    ChannelAffine,
    FiLM,
    LocalStructuralPrior,
    PositionBias,
    SqueezeExcite,
)
from nnunet_deform.layers.few_channels import (
    NORM_GROUPS,
    FewChannelConv2d,
    FewChannelConv3d,
    NormAct,
    mixture,
    pointwise_conv,
    resampled,
    same_conv,
)
from nnunet_deform.layers.lightmed import ghost_or_standard
from nnunet_deform.layers.norm import GroupNorm
from nnunet_deform.layers.recomputation import (
    Recompute,
    check_recompute,
    may_keep_less,
    may_recompute,
    recomputed,
)
from nnunet_deform.networks.memory import STORED_PER_COUNTED, kept_by_autograd
from nnunet_deform.networks.observation import Anchors, Observation, Routing, recorded
from nnunet_deform.networks.paired_start import drawn_by_name, paired_start
from nnunet_deform.networks.topology import check_topology, crop_to_image, pad_to_levels
from nnunet_deform.ops import CHANNELS_LAST, autocast_dtype, autocast_to, concatenate_channels, mixture_behind_norms

LEAKY_RELU_SLOPE = 0.01
DETECTOR_DEPTH = 3
SKIP_WIDTH = 64
PRIOR_WIDTH = 16
# Hidden channels of the convolutions that stand in for the structural prior in the op-off twin.
PLAIN_PRIOR_WIDTH = 24


class PlainPrior(nn.Module):
    """Two convolutions in the place of the structural prior: features, and no texture."""

    def __init__(self, channels: int, kernel_size: Sequence[int], width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            same_conv(channels, width, kernel_size, bias=False),
            NormAct(width),
            same_conv(width, channels, kernel_size),
        )

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.convs(x)


class EncoderStage(nn.Module):
    """Eqs. 6-10: [B, in, *spatial], anchors and the texture of any size, or none -> [B, out, *spatial].

    Training keeps these alone and computes the stage again: it is on coarser levels, and the fewest of its maps are
    those of convolutions.
    """

    def __init__(
        self, ghost: bool, in_channels: int, out_channels: int, kernel_size: Sequence[int], modulation: nn.Module | None
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ghost_or_standard(ghost, in_channels, out_channels, kernel_size), NormAct(out_channels)
        )
        self.modulation = modulation
        self.detail = nn.Sequential(
            same_conv(out_channels, out_channels, kernel_size, groups=out_channels, bias=False), NormAct(out_channels)
        )
        self.smooth = nn.Sequential(
            pointwise_conv(len(kernel_size), out_channels, out_channels, bias=False), NormAct(out_channels)
        )
        self.gate = SqueezeExcite(out_channels)

    def forward(self, h: Tensor, anchors: Tensor | None, texture: Tensor | None) -> Tensor:
        return (
            recomputed(self._output, h, anchors, texture) if may_keep_less(self) else self._output(h, anchors, texture)
        )

    def _output(self, h: Tensor, anchors: Tensor | None, texture: Tensor | None) -> Tensor:
        features = self.features(h)
        if isinstance(self.modulation, FiLM):
            features = self.modulation(features, anchors)
        elif self.modulation is not None:
            features = self.modulation(features)
        detail, smooth = self.detail(features), self.smooth(features)
        if texture is None:
            return self.gate((detail + smooth) / 2)
        return self.gate(torch.lerp(smooth, detail, resampled(texture, h.shape[2:]).to(smooth.dtype)))


class LightMedEncoder(nn.Module):
    """The stages with max pooling between them: features at level 1 to a list of features, finest first."""

    def __init__(self, stages: Sequence[nn.Module], pools: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.pools = nn.ModuleList(pools)

    def forward(self, h: Tensor, anchors: Tensor | None, texture: Tensor | None) -> list[Tensor]:
        outputs = [self.stages[0](h, anchors, texture)]
        for pool, stage in zip(self.pools, self.stages[1:], strict=True):
            outputs.append(stage(pool(outputs[-1]), anchors, texture))
        return outputs


class SkipRouter(nn.Module):
    """Eqs. 11-13: a skip for one of the coarser decoder stages out of the features of all encoder stages.

    Args:
        widths: channels of the encoder's features.
        common: channels they are projected to.
        outputs: channels of the skip, for each routed decoder stage.
        learned: False weighs all encoder stages alike, without a controller.
    """

    def __init__(self, ndim: int, widths: Sequence[int], common: int, outputs: Sequence[int], learned: bool) -> None:
        super().__init__()
        n = len(widths)
        self.projections = nn.ModuleList(pointwise_conv(ndim, width, common) for width in widths)
        self.controllers: nn.ModuleList | None = None
        if learned:
            self.controllers = nn.ModuleList(
                nn.Sequential(pointwise_conv(ndim, n * common, common), nn.SiLU(), pointwise_conv(ndim, common, n))
                for _ in outputs
            )
        self.outputs = nn.ModuleList(pointwise_conv(ndim, common, width) for width in outputs)

    def forward(self, features: Sequence[Tensor], size: Sequence[int], stage: int) -> Tensor:
        # Resampling weights sum to one, so it commutes with the projection, and these maps are narrower.
        projected = [
            project(resampled(feature, size)) for project, feature in zip(self.projections, features, strict=True)
        ]
        if self.controllers is None:
            return self.outputs[stage](sum(projected) / len(projected))
        logits = self.controllers[stage](torch.cat(projected, dim=1))
        return self.outputs[stage](mixture(logits, projected))


class PairSum(nn.Module):
    """Eq. 19 before its norm: a depthwise convolution of the concatenated channels, whose two halves are added.

    It is a convolution of C groups with two inputs each, which is slower in that form.
    """

    def __init__(self, channels: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.depthwise = same_conv(2 * channels, 2 * channels, kernel_size, groups=2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.depthwise(x).chunk(2, dim=1)
        return first + second


class SkipFusion(nn.Module):
    """Eqs. 14-16: [B, in, *coarse], [B, out, *fine] and the anchors -> [B, 2 * out, *fine]."""

    def __init__(
        self,
        transposed_conv_op: type[nn.Module],
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        num_anchors: int | None,
    ) -> None:
        super().__init__()
        self.up = transposed_conv_op(in_channels, out_channels, tuple(stride), tuple(stride))
        self.position_bias = None if num_anchors is None else PositionBias(num_anchors, out_channels)
        self.recalibration = SqueezeExcite(2 * out_channels)

    def forward(self, coarse: Tensor, skip: Tensor, anchors: Tensor | None) -> Tensor:
        up = self.up(coarse)
        if self.position_bias is not None:
            up = self.position_bias(up, anchors)
        if may_keep_less(self):
            # Resampling leaves autocast's precision, and with it the concatenation would, to be kept in both.
            skip = autocast_to(skip, autocast_dtype(skip.device.type))
        return self.recalibration(concatenate_channels(up, skip))


class BranchMixture(nn.Module):
    """Eqs. 17-21: [B, 2 * C, *spatial] -> [B, C, *spatial]. Training keeps what the branches' norms are given."""

    def __init__(self, ghost: bool, channels: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        ndim, both = len(kernel_size), 2 * channels
        self.selector = pointwise_conv(ndim, both, 3)
        self.branches = nn.ModuleList(
            nn.Sequential(features, NormAct(channels))
            for features in (
                PairSum(channels, kernel_size),
                ghost_or_standard(ghost, both, channels, kernel_size),
                pointwise_conv(ndim, both, channels, bias=False),
            )
        )
        self.recalibration = SqueezeExcite(channels)

    def forward(self, fused: Tensor) -> Tensor:
        logits = self.selector(fused)
        if not may_keep_less(self):
            return self.recalibration(mixture(logits, (branch(fused) for branch in self.branches)))
        norms = [activation[0] for _, activation in self.branches]
        mixed = mixture_behind_norms(
            *(logits, [features(fused) for features, _ in self.branches]),
            *([norm.weight for norm in norms], [norm.bias for norm in norms]),
            *(NORM_GROUPS, [norm.eps for norm in norms]),
        )
        return self.recalibration(mixed)


class LightMedDecoder(nn.Module):
    """From the stem's and the encoder's features to logits: a list, finest first, under deep supervision, else one.

    A stage is a fusion and a mixture. The last ``len(skips)`` stages take the features of their own level as skip,
    level 0 the stem's; those before them ask the router. ``seg_layers[0]`` is the coarsest head, as in nnU-Net's
    decoders. All heads are always built, so a checkpoint loads whether or not deep supervision is on; a network built
    without it does not train the coarser ones.
    """

    def __init__(
        self,
        fusions: Sequence[nn.Module],
        mixtures: Sequence[nn.Module],
        router: SkipRouter | None,
        skips: Sequence[nn.Module],
        seg_layers: Sequence[nn.Module],
        deep_supervision: bool,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.recompute = recompute
        self.fusions = nn.ModuleList(fusions)
        self.mixtures = nn.ModuleList(mixtures)
        self.router = router
        self.skips = nn.ModuleList(skips)
        self.seg_layers = nn.ModuleList(seg_layers)
        if not deep_supervision:
            self.seg_layers[:-1].requires_grad_(False)

    def forward(
        self,
        z: Tensor,
        image_size: Sequence[int],
        stem: Tensor,
        features: Sequence[Tensor],
        anchors: Tensor | None,
    ) -> Tensor | list[Tensor]:
        logits = []
        for index, (fusion, mix, head) in enumerate(zip(self.fusions, self.mixtures, self.seg_layers, strict=True)):
            level = len(self.fusions) - 1 - index
            size = image_size if level == 0 else features[level - 1].shape[2:]
            inputs = index, level, size, z, stem, features, anchors
            again = level == 0 and self.recompute == "blocks" and may_recompute(fusion, mix, *self.skips[-1:])
            z = recomputed(self._stage, *inputs) if again else self._stage(*inputs)
            if level == 0 or self.deep_supervision:
                logits.append(head(z))
        return logits[::-1] if self.deep_supervision else logits[0]

    def _stage(
        self,
        index: int,
        level: int,
        size: Sequence[int],
        z: Tensor,
        stem: Tensor,
        features: Sequence[Tensor],
        anchors: Tensor | None,
    ) -> Tensor:
        # No name holds the skip or what it is fused to: at full resolution they would be kept beside the mixture.
        return self.mixtures[index](self.fusions[index](z, self._skip(index, level, size, stem, features), anchors))

    def _skip(self, index: int, level: int, size: Sequence[int], stem: Tensor, features: Sequence[Tensor]) -> Tensor:
        routed = len(self.fusions) - len(self.skips)
        if index < routed:
            return self.router(features, size, index)
        source = stem if level == 0 else features[level - 1]
        return resampled(self.skips[index - routed](source), size)


class LightMedSeg(nn.Module):
    """LightMedSeg in nnU-Net's terms; see the module's docstring for the paper and the differences from it.

    [B, input_channels, *spatial] -> logits [B, num_classes, *spatial], or with deep supervision a list of n_stages - 1
    of them, finest first, at levels 0 to n_stages - 2. Any spatial size: inputs are padded with zeros at the end of
    each axis to a multiple of the total stride, and logits cropped.

    Args:
        input_channels: channels of the image.
        n_stages: levels including full resolution, at least 2. The paper's network has 5.
        features_per_stage: width of the decoder at each level. The encoder stage at level s has width
            ``features_per_stage[s - 1]``, as the stem at level 1. Multiples of 4, the paper's are 8, 16, 32, 64, 64.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_sizes: kernel at each level and axis.
        strides: stride of each level to the one before; the first is all ones.
        num_classes: channels of the logits.
        deep_supervision: may be switched later through ``.decoder.deep_supervision``.
        ghost: False replaces each ghost convolution by a standard one.
        num_anchors: K.
        anchors: "film" (paper): they steer the encoder's channels and bias the decoder's positions. "affine": a learned
            affine of each channel in the place of FiLM. "none": no detector, no FiLM and no position bias.
        prior: the structural prior: "lspm" (paper), "conv" for two plain convolutions in its place, or "none". Without
            it there is no texture, and each encoder stage is the even mean of its two branches.
        router: skips of the coarser decoder stages: "learned" (paper), "mean" for equal weights, or "none" for the
            encoder's features at the same level.
        width: factor of the hidden widths that ``features_per_stage`` does not give: the anchor detector's, 8 and 128,
            the prior's, 16 (24 of "conv"), and ``skip_channels``.
        skip_channels: width to which the router projects all features; by default 64 times ``width``.
        bottleneck_channels: hidden width of the bottleneck; by default the coarsest of ``features_per_stage``.
        recompute: what the backward pass computes again instead of keeping it: "cheap" for norms, mixtures, structural
            prior and encoder stages, "blocks" for the decoder's stage at full resolution as well.

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
        deep_supervision: bool = False,
        *,
        ghost: bool = True,
        num_anchors: int = 8,
        anchors: Literal["film", "affine", "none"] = "film",
        prior: Literal["lspm", "conv", "none"] = "lspm",
        router: Literal["learned", "mean", "none"] = "learned",
        width: int = 1,
        skip_channels: int | None = None,
        bottleneck_channels: int | None = None,
        recompute: Recompute = "cheap",
    ) -> None:
        super().__init__()
        check_recompute(recompute)
        ndim = convert_conv_op_to_dim(conv_op)
        check_topology("LightMedSeg", n_stages, features_per_stage, kernel_sizes, strides, ndim)
        check_width(width)
        if skip_channels is None:
            skip_channels = SKIP_WIDTH * width
        if bottleneck_channels is None:
            bottleneck_channels = features_per_stage[-1]
        _check_options(
            input_channels=input_channels,
            num_classes=num_classes,
            features_per_stage=features_per_stage,
            num_anchors=num_anchors,
            anchors=anchors,
            prior=prior,
            router=router,
            skip_channels=skip_channels,
            bottleneck_channels=bottleneck_channels,
        )
        self.input_channels = input_channels
        self.strides = [tuple(stride) for stride in strides]
        n = n_stages - 1
        widths, coarsest = list(features_per_stage[:-1]), features_per_stage[-1]

        self.stem = nn.Sequential(
            ghost_or_standard(ghost, input_channels, widths[0], kernel_sizes[1], strides[1]),
            GroupNorm(NORM_GROUPS, widths[0]),
        )
        self.anchor_detector = None
        if anchors != "none":
            levels = [min(level, n) for level in range(1, DETECTOR_DEPTH + 1)]
            self.anchor_detector = AnchorDetector(
                input_channels,
                num_anchors,
                [kernel_sizes[level] for level in levels],
                [strides[level] for level in levels],
                width,
            )
        self.prior: nn.Module | None = None
        if prior == "lspm":
            self.prior = LocalStructuralPrior(widths[0], kernel_sizes[1], PRIOR_WIDTH * width)
        elif prior == "conv":
            self.prior = PlainPrior(widths[0], kernel_sizes[1], PLAIN_PRIOR_WIDTH * width)

        def modulation(channels: int) -> nn.Module | None:
            if anchors == "film":
                return FiLM(channels, ndim * num_anchors)
            return ChannelAffine(channels) if anchors == "affine" else None

        max_pool = get_matching_pool_op(conv_op, pool_type="max")
        self.encoder = LightMedEncoder(
            [
                EncoderStage(ghost, i, o, kernel, modulation(o))
                for i, o, kernel in zip([widths[0], *widths[:-1]], widths, kernel_sizes[1:], strict=True)
            ],
            [max_pool(tuple(stride), tuple(stride)) for stride in strides[2:]],
        )
        self.bottleneck = nn.Sequential(
            same_conv(widths[-1], bottleneck_channels, kernel_sizes[-1], bias=False),
            NormAct(bottleneck_channels),
            pointwise_conv(ndim, bottleneck_channels, coarsest),
        )

        transposed_conv_op = get_matching_convtransp(conv_op)
        coarse_to_fine = list(reversed(range(n)))
        # With one level below full resolution there is one encoder stage, and nothing to choose from.
        n_routed = 0 if router == "none" or n == 1 else max(n - 2, 1)
        self.decoder = LightMedDecoder(
            [
                SkipFusion(
                    transposed_conv_op,
                    features_per_stage[level + 1],
                    widths[level],
                    strides[level + 1],
                    None if anchors == "none" else num_anchors,
                )
                for level in coarse_to_fine
            ],
            [BranchMixture(ghost, widths[level], kernel_sizes[level]) for level in coarse_to_fine],
            SkipRouter(
                ndim, widths, skip_channels, [widths[level] for level in coarse_to_fine[:n_routed]], router == "learned"
            )
            if n_routed
            else None,
            # The features of level s have the width of level s - 1, the stem's features that of level 0.
            [pointwise_conv(ndim, widths[max(level - 1, 0)], widths[level]) for level in coarse_to_fine[n_routed:]],
            [pointwise_conv(ndim, widths[level], num_classes) for level in coarse_to_fine],
            deep_supervision,
            recompute,
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        image = pad_to_levels(x, self.strides)
        if image.device.type == "cpu":
            # torch's convolutions of few channels are several times faster in this layout there.
            image = image.contiguous(memory_format=CHANNELS_LAST[image.ndim - 2])
        stem = self.stem(image)
        if image.device.type == "cpu":
            # With one channel, the image's layout says nothing.
            stem = stem.contiguous(memory_format=CHANNELS_LAST[image.ndim - 2])
        anchors = None if self.anchor_detector is None else self.anchor_detector(image)
        texture, h = (None, stem) if self.prior is None else self.prior(stem)
        features = self.encoder(h, anchors, texture)
        logits = self.decoder(self.bottleneck(features[-1]), image.shape[2:], stem, features, anchors)
        if image.shape == x.shape:
            return logits
        return crop_to_image(logits, x.shape[2:], self.strides)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps for one sample of this spatial size, in nnU-Net's count of its own networks:
        what autograd keeps, divided by 1.85."""
        return round(kept_by_autograd(self, (1, self.input_channels, *input_size)) / STORED_PER_COUNTED)

    def observe_operators(self, x: Tensor) -> dict[str, Observation]:
        """The anchors, where they steer the encoder, and the weights of the learned router at each decoder stage that
        asks it, for images [B, C, *spatial], in evaluation mode."""
        layers: dict[str, nn.Module] = {}
        if any(isinstance(stage.modulation, FiLM) for stage in self.encoder.stages):
            layers["anchor_detector"] = self.anchor_detector
        if self.decoder.router is not None and self.decoder.router.controllers is not None:
            routed = enumerate(self.decoder.router.controllers)
            layers |= {f"decoder.router.controllers.{stage}": controller for stage, controller in routed}

        def look(_: str, layer: nn.Module, __: Tensor, output: Tensor) -> Observation:
            return Anchors(output) if isinstance(layer, AnchorDetector) else Routing(output.softmax(1))

        return recorded(self, x, layers, look) if layers else {}

    def observe_maps(self, x: Tensor) -> dict[str, Tensor]:
        """For images [B, C, *spatial], in evaluation mode: where there is the structural prior its texture (eq. 3),
        its gate g and the weights of its two experts (4); of each decoder level the weights of the three branches
        (17). The router's weights are among ``observe_operators``."""
        layers: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}
        if isinstance(self.prior, LocalStructuralPrior):
            layers["texture"] = (self.prior.texture, torch.sigmoid)
            layers["gate"] = (self.prior.spatial_gate, lambda gate: gate)
            layers["experts"] = (self.prior.weights, lambda logits: logits.softmax(1))
        for stage, mix in enumerate(self.decoder.mixtures):
            level = len(self.decoder.mixtures) - 1 - stage
            layers[f"branches, level {level}"] = (mix.selector, lambda logits: logits.softmax(1))
        named = {name: layer for name, (layer, _) in layers.items()}
        return recorded(self, x, named, lambda name, _, __, output: layers[name][1](output))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """For ``network.apply``: nnU-Net's He initialisation for the convolutions; FiLM near the identity, anchors
        spread out, the texture a high-pass; torch's default for linear and transposed convolutions. At the network,
        which ``apply`` visits last, each parameter is drawn by its name."""
        if isinstance(module, LightMedSeg):
            with drawn_by_name(module):
                module.apply(_initialize_part)


def _initialize_part(module: nn.Module) -> None:
    if isinstance(module, FewChannelConv2d | FewChannelConv3d):
        InitWeights_He(LEAKY_RELU_SLOPE)(module)
    # After the convolutions inside them, which ``apply`` reaches first.
    elif isinstance(module, AnchorDetector | FiLM | LocalStructuralPrior):
        module.reset_parameters()


def check_width(width: int) -> None:
    """Raises ValueError, naming the value, unless widths times this factor keep the norms' groups whole."""
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width={width!r} must be a whole number of at least 1.")


def _check_options(
    *,
    input_channels: int,
    num_classes: int,
    features_per_stage: Sequence[int],
    num_anchors: int,
    anchors: str,
    prior: str,
    router: str,
    skip_channels: int,
    bottleneck_channels: int,
) -> None:
    for name, value in (
        ("input_channels", input_channels),
        ("num_classes", num_classes),
        ("num_anchors", num_anchors),
        ("skip_channels", skip_channels),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    for name, widths in (
        ("features_per_stage", features_per_stage),
        ("bottleneck_channels", [bottleneck_channels]),
    ):
        if any(width < NORM_GROUPS or width % NORM_GROUPS for width in widths):
            raise ValueError(
                f"{name}={widths if len(widths) > 1 else widths[0]} must be multiples of {NORM_GROUPS}, the groups of "
                "the norms."
            )
    for name, value, choices in (
        ("anchors", anchors, ("film", "affine", "none")),
        ("prior", prior, ("lspm", "conv", "none")),
        ("router", router, ("learned", "mean", "none")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
