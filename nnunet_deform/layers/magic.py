r"""MAGIC: dynamic convolution. K kernels are mixed for each sample, by an attention to the layer's own input.

S. Li et al., "MAGIC: Rethinking Dynamic Convolution Design for Medical Image Segmentation", ACM Multimedia 2024,
doi:10.1145/3664647.3680754.

.. math:: y_b = \Big(\sum_{i=1}^K a_i(x_b) W_i\Big) * x_b

The attention has two parts. Dimensional-reciprocal fusion (DRF) turns the feature map into one C-vector,

    channel   bc = mean_v x(v)                                                                        (eq. 3)
    spatial   bs = (m1, m2, m1, m2, ...),  m1 = mean_v mean_c x_c(v),  m2 = mean_v max_c x_c(v)        (eq. 4)
    global    bg = V2 GELU(LN(V1 ctx + b1)) + b2,  ctx = sum_v softmax_v(w . x(v) + b) x(v)            (eq. 7)
    logits    beta = F2 ReLU(F1 (bc + bs + bg))                                                       (eq. 8)

and kernel recalculation (KR) gates its K logits, k = sigmoid(L2 ReLU(norm(L1 beta))) (eq. 11). Paper and released code
mix them differently:

    paper     a = k * softmax(beta / T), T = 1                                                        (eq. 9, 10)
    released  a = softmax(k * beta / T), T = 30

Neither was meant for InstanceNorm, which pins what the attention looks at: the mean of a channel behind it is nearly
the same for every sample, and so the kernels are. Hence two options that are not the paper's, for every attention:

    attention_norm   of the vector that enters the attention's first linear layer (MAGIC: bc + bs + bg), no parameters:
                     "running" standardises each entry by its mean and variance over the samples of the training so far,
                     "layer" each vector over its own entries.
    attention_init   "calibrated" draws the last linear layer so that, with a standardised vector and T = 1, the logits
                     vary over samples by about LOGIT_SPREAD, and KR's so that the gates' vary by half of it. The
                     released fan-out was meant for T = 30: at T = 1 nearly all goes to one kernel, and others get less
                     than 1 % and no gradient.

All of it is the same for every permutation of the voxels, so mirrored patches get the same kernels.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.layers.dynamic import (
    AttentionInit,
    ChannelAffine,
    DynamicConv,
    KernelAttention,
    SoftmaxAttention,
    channel_means,
    mixed,
    require_choice,
)
from nnunet_deform.layers.recomputation import may_keep_less
from nnunet_deform.ops import ConvImpl, autocast_disabled, mixed_conv, voxel_statistics

Attention = Literal["magic", "dyconv", "condconv", "uniform"]
AttentionNorm = Literal["none", "running", "layer"]

# Standard deviation over samples of the logits that "calibrated" aims at. Shares of a quarter then vary over samples by
# about a tenth, and only a constant of -3 in its logit, which is less than 0.7 at random, would leave a kernel 1 %.
LOGIT_SPREAD = 0.7

_CHOICES = {
    "attention": ("magic", "dyconv", "condconv", "uniform"),
    "mixing": ("paper", "released"),
    "kr_norm": ("none", "batch"),
    "attention_norm": ("none", "running", "layer"),
    "attention_init": ("released", "calibrated"),
    "init": ("released", "compensated"),
}


class _TwoLayerAttention(SoftmaxAttention):
    """Logits by ``fusion``: a linear layer without bias, ReLU, a linear layer."""

    fusion: nn.Sequential

    def calibrated_layers(self) -> dict[nn.Linear, float]:
        return {self.fusion[2]: _std_behind_relu(self.fusion[0].in_features, 1.0, LOGIT_SPREAD)}


class MagicAttention(_TwoLayerAttention):
    """DRF and KR; see the module's docstring for the equations and :class:`MagicConv` for the arguments."""

    def __init__(
        self,
        channels: int,
        n_kernels: int,
        *,
        reduction: int,
        bottleneck: float,
        bottleneck_norm_affine: bool,
        use_spatial: bool,
        use_channel: bool,
        use_global: bool,
        use_kr: bool,
        kr_norm: Literal["none", "batch"],
        mixing: Literal["paper", "released"],
        temperature: float,
        **options: Any,
    ) -> None:
        super().__init__(channels, temperature, **options)
        if not (use_spatial or use_channel or use_global):
            raise ValueError("use_spatial, use_channel and use_global are all False; the attention needs one of them.")
        hidden = _hidden(channels, reduction)
        self.use_spatial = use_spatial
        self.use_channel = use_channel
        self.mixing = mixing
        self.kept_per_voxel = use_spatial + use_global
        self.mask: nn.Linear | None = None
        if use_global:
            width = int(channels * bottleneck)
            if width < 1:
                raise ValueError(f"bottleneck={bottleneck} of {channels} channels leaves none; make it larger.")
            self.mask = nn.Linear(channels, 1)
            self.bottleneck = nn.Sequential(
                nn.Linear(channels, width),
                nn.LayerNorm(width, elementwise_affine=bottleneck_norm_affine),
                nn.GELU(),
                nn.Linear(width, channels),
            )
        self.fusion = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, n_kernels, bias=False)
        )
        self.recalculation: nn.Sequential | None = None
        if use_kr and n_kernels > 1:
            width = n_kernels // 2
            self.recalculation = nn.Sequential(
                nn.Linear(n_kernels, width, bias=False),
                nn.BatchNorm1d(width) if kr_norm == "batch" else ChannelAffine(width),
                nn.ReLU(),
                nn.Linear(width, n_kernels, bias=False),
            )
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x.device.type):
            logits = self.fusion(self.norm(self._fused(x)))
            gate = 1.0
            if self.recalculation is not None:
                if isinstance(self.recalculation[1], nn.BatchNorm1d) and self.training and len(x) == 1:
                    raise ValueError(
                        "kr_norm='batch' needs at least 2 samples in training, got a batch of 1; use kr_norm='none'."
                    )
                gate = self.recalculation(logits).sigmoid()
            if self.mixing == "paper":
                return gate * (logits / self.temperature).softmax(1)
            return (gate * logits / self.temperature).softmax(1)

    def _fused(self, x: Tensor) -> Tensor:
        """The sum of the DRF branches, [B, C]."""
        mask = (None, None) if self.mask is None else (self.mask.weight[0], self.mask.bias)
        statistics = voxel_statistics(x, *mask, with_peak=self.use_spatial, keep_maps=not may_keep_less())
        dtype = self.fusion[0].weight.dtype
        mean, peak, context = (s if s is None else s.to(dtype) for s in statistics)
        channels = x.shape[1]
        branches = []
        if self.use_channel:
            branches.append(mean)
        if self.use_spatial:
            # Pooling over space after repeating mean and maximum over channels C / 2 times leaves these two numbers.
            pair = torch.stack([mean.mean(1), peak], 1)
            branches.append(pair.repeat(1, (channels + 1) // 2)[:, :channels])
        if context is not None:
            branches.append(self.bottleneck(context))
        return sum(branches[1:], branches[0])

    def calibrated_layers(self) -> dict[nn.Linear, float]:
        layers = super().calibrated_layers()
        if self.recalculation is not None:
            # The gates multiply what the softmax gives: on top of it they start half as far apart.
            n_kernels = self.recalculation[0].in_features
            layers[self.recalculation[3]] = _std_behind_relu(n_kernels, LOGIT_SPREAD, LOGIT_SPREAD / 2)
        return layers

    def neutralise(self) -> float:
        if self.mixing == "released" or self.recalculation is None:
            # Equal kernels weighted by a softmax are that kernel, whatever the weights.
            return 1.0
        nn.init.zeros_(self.recalculation[3].weight)
        return 0.5


class DyConvAttention(_TwoLayerAttention):
    """DYConv's (Chen et al., CVPR 2020): softmax(F2 ReLU(F1 mean_v x(v)) / T), F2 with a bias."""

    def __init__(self, channels: int, n_kernels: int, *, reduction: int, temperature: float, **options: Any) -> None:
        super().__init__(channels, temperature, **options)
        hidden = _hidden(channels, reduction)
        self.fusion = nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, n_kernels))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x.device.type):
            means = self.norm(channel_means(x, self.fusion[0].weight))
            return (self.fusion(means) / self.temperature).softmax(1)

    def neutralise(self) -> float:
        return 1.0


class CondConvAttention(KernelAttention):
    """CondConv's (Yang et al., NeurIPS 2019): sigmoid(R mean_v x(v) + r). The weights do not compete."""

    def __init__(self, channels: int, n_kernels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.routing = nn.Linear(channels, n_kernels)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x.device.type):
            return self.routing(self.norm(channel_means(x, self.routing.weight))).sigmoid()

    def calibrated_layers(self) -> dict[nn.Linear, float]:
        return {self.routing: LOGIT_SPREAD / math.sqrt(self.routing.in_features)}

    def neutralise(self) -> float:
        nn.init.zeros_(self.routing.weight)
        return self.routing.out_features / 2


class MagicConv(DynamicConv):
    """Dynamic convolution in the place of ``nn.Conv2d`` or ``nn.Conv3d``; see the module's docstring for the equations.

    Differences from the released code: any odd number of channels (the repetition of the spatial branch is cut to C),
    rectangular kernels, biases at zero, no BatchNorm in KR unless asked for. nnU-Net's 3D batch is 2, and BatchNorm
    over two values is their sign.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``nn.Conv3d``.
        n_kernels: K. One kernel is a plain convolution, with a warning: its softmax is 1, and a gate of the whole
            output would be divided out by the norm that follows.
        attention: "magic"; "dyconv" or "condconv", which differ from it in attention and mixing only; or "uniform",
            static weights 1/K, the control.
        mixing: "paper" or "released", see the module's docstring. Of "magic" only, as are the options down to
            ``use_kr``.
        kr_norm: "none" for a factor and an offset only, or "batch" for BatchNorm, as in the paper.
        bottleneck: width of the global branch's hidden layer over C: 0.5 as released, 2 to get the parameters of the
            paper's Table 5.
        bottleneck_norm_affine: whether the LayerNorm there has parameters.
        use_spatial, use_channel, use_global: the branches of DRF (Table 6).
        use_kr: kernel recalculation (Table 7).
        temperature: T; by default 1 for "paper" and 30 for "released" and "dyconv".
        reduction: C over the width of the attention's hidden layer.
        attention_norm, attention_init: of every attention, see the module's docstring. The defaults, "none" and
            "released", are the paper's and the released code's; the networks have others.
        init: "released" keeps the scale of each kernel, so their mean is smaller by sqrt(K); "compensated" multiplies
            each by sqrt(K).
        conv_impl: see :func:`nnunet_deform.ops.dynamic_conv3d`.
        keep_dead_attention: give the layer its attention's parameters where they do nothing, for one kernel and for
            "uniform": for equal numbers of parameters. Their gradients are zero.

    Raises:
        ValueError: an option outside what is listed here; no more input channels than ``reduction``; groups that do not
            divide the channels. In training, a batch of 1 with ``kr_norm="batch"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        n_kernels: int = 4,
        attention: Attention = "magic",
        mixing: Literal["paper", "released"] = "paper",
        kr_norm: Literal["none", "batch"] = "none",
        bottleneck: float = 0.5,
        bottleneck_norm_affine: bool = True,
        use_spatial: bool = True,
        use_channel: bool = True,
        use_global: bool = True,
        use_kr: bool = True,
        temperature: float | None = None,
        reduction: int = 8,
        attention_norm: AttentionNorm = "none",
        attention_init: AttentionInit = "released",
        init: Literal["released", "compensated"] = "released",
        conv_impl: ConvImpl = "auto",
        keep_dead_attention: bool = False,
    ) -> None:
        chosen = {
            "attention": attention,
            "mixing": mixing,
            "kr_norm": kr_norm,
            "attention_norm": attention_norm,
            "attention_init": attention_init,
            "init": init,
        }
        for name, value in chosen.items():
            require_choice(name, value, _CHOICES[name])
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            n_kernels=n_kernels,
            n_biases=n_kernels,
            conv_impl=conv_impl,
        )
        self.init = init
        self.dynamic = n_kernels > 1 and attention != "uniform"
        if n_kernels == 1 and not keep_dead_attention:
            warnings.warn(
                "n_kernels=1 is built as a plain convolution: a softmax over one kernel is 1, and a gate of the whole "
                "output would be divided out by the norm that follows.",
                stacklevel=2,
            )
        self.attention: KernelAttention | None = None
        if self.dynamic or keep_dead_attention:
            if temperature is None:
                temperature = 30.0 if attention == "dyconv" or mixing == "released" else 1.0
            start = {"norm": attention_norm, "init": attention_init}
            if attention == "condconv":
                self.attention = CondConvAttention(in_channels, n_kernels, **start)
            elif attention == "dyconv":
                self.attention = DyConvAttention(
                    in_channels, n_kernels, reduction=reduction, temperature=temperature, **start
                )
            else:
                self.attention = MagicAttention(
                    in_channels,
                    n_kernels,
                    reduction=reduction,
                    bottleneck=bottleneck,
                    bottleneck_norm_affine=bottleneck_norm_affine,
                    use_spatial=use_spatial,
                    use_channel=use_channel,
                    use_global=use_global,
                    use_kr=use_kr,
                    kr_norm=kr_norm,
                    mixing=mixing,
                    temperature=temperature,
                    **start,
                )
        self.reset_parameters()

    def neutralise(self) -> tuple[float, float]:
        total = self.attention.neutralise() if self.dynamic else 1.0
        return total, total

    def reset_parameters(self, initialize: Callable[[Tensor], Any] = nn.init.kaiming_uniform_) -> None:
        """The initial state: kernels by ``initialize``, biases zero, the attention's own for the attention."""
        super().reset_parameters(initialize)
        if self.init == "compensated":
            with torch.no_grad():
                self.weight.mul_(math.sqrt(self.n_kernels))
        if self.attention is not None:
            self.attention.reset_parameters()

    def mixing_weights(self, x: Tensor) -> Tensor:
        """The weight of each kernel for each sample, [B, C, *spatial] -> [B, K].

        In training mode this is a part of a forward pass: with ``attention_norm="running"`` it takes the samples in."""
        if self.dynamic:
            return self.attention(x)
        return self.weight.new_full((len(x), self.n_kernels), 1 / self.n_kernels)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._mixed(self.mixing_weights(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] -> [B, C_out, *spatial']. A training step mixes the kernels again."""
        if self.dynamic:
            return super().forward(x)
        conv = F.conv2d if self.ndim == 2 else F.conv3d
        weight, bias = self._mixed(self.weight.new_full((1, self.n_kernels), 1 / self.n_kernels))
        weight = weight[0]
        if self.attention is not None:
            # Gradients of zero, where distributed training would stop at none.
            weight = weight + 0 * sum(parameter.sum() for parameter in self.attention.parameters())
        bias = None if bias is None else bias[0]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def divided(self, x: Tensor) -> tuple[tuple[Tensor | None, ...], Callable[..., Tensor]]:
        if may_keep_less(self):
            return (self.mixing_weights(x),), self._mixed_conv
        return super().divided(x)

    def _mixed_conv(self, x: Tensor, mixing: Tensor) -> Tensor:
        shape = (self.n_kernels, self.out_channels)
        kernels = self.weight.unflatten(0, shape)
        biases = None if self.bias is None else self.bias.unflatten(0, shape)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return mixed_conv(x, mixing, kernels, biases, *geometry, self.conv_impl)

    def _mixed(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels [B, C_out, C/groups, *kernel] and biases [B, C_out] of mixing weights [B, K]."""
        with autocast_disabled(weights.device.type):
            return mixed(weights, self.weight), None if self.bias is None else mixed(weights, self.bias)

    def kept_by_autograd(self, size: Sequence[int]) -> int:
        """Numbers that the plain form keeps of each sample of this size, beyond a static convolution's: the mixed
        kernels and what the attention keeps."""
        kernels = self.weight.numel() // self.n_kernels
        return kernels + (self.attention.kept_per_voxel * math.prod(size) if self.dynamic else 0)


class MagicConv2d(MagicConv):
    """As :class:`MagicConv`, of images: [B, C, H, W] -> [B, C_out, H_out, W_out]."""

    ndim = 2


class MagicConv3d(MagicConv):
    """As :class:`MagicConv`, of volumes: [B, C, D, H, W] -> [B, C_out, D_out, H_out, W_out]."""

    ndim = 3


def _hidden(channels: int, reduction: int) -> int:
    if reduction < 1 or channels <= reduction:
        raise ValueError(
            f"in_channels={channels} must be more than reduction={reduction}; use a plain convolution here, or a "
            "smaller reduction."
        )
    return channels // reduction


def _std_behind_relu(channels: int, spread_of_input: float, spread_of_output: float) -> float:
    """Of the weights of the second of two linear layers with a ReLU between them, the first drawn by fan-out, so that
    outputs vary over samples by ``spread_of_output``.

    With h hidden units the first layer's weights have the variance 2 / h, so the units vary by 2 C / h times the
    variance of the input; max(0, g) has (1 - 1 / pi) / 2 times the variance of a normal g, and the sum has h terms.
    """
    return spread_of_output / (spread_of_input * math.sqrt(channels * (1 - 1 / math.pi)))
