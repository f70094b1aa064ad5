r"""ODConv: omni-dimensional dynamic convolution. An attention for each dimension of the kernel.

C. Li, A. Zhou, A. Yao, "Omni-Dimensional Dynamic Convolution", ICLR 2022.

With m the mean over voxels of each of the C input channels, O outputs, k taps and K kernels,

    z = ReLU(norm(F m)),   F: C -> A without bias,   A = max(C // reduction, 16)
    c = sigmoid((Hc z + hc) / T)   for each input channel
    f = sigmoid((Hf z + hf) / T)   for each output; absent if depthwise (groups = C = O)
    s = sigmoid((Hs z + hs) / T)   for each tap; absent if there is one
    a = softmax((Ha z + ha) / T)   for each kernel; absent if there is one

.. math:: y_{bo} = f_{bo} \sum_t s_{bt} \sum_i a_{bi} \sum_c W_i[o, c, t] \, c_{bc} \, x_{bc}(v + t)

Differences from the released code: all four attentions are folded into one kernel for each sample, where the released
code scales the feature maps before and behind the convolution; three axes; the norm of z, see :class:`ODConv`; the
temperature is saved with the weights; biases, which it has none of, are mixed as kernels are and scaled by f.
The paper's formula has c, f and s of each kernel, the released code, as here, of the layer.

f is a factor of a channel of a sample, which a norm over each of these, InstanceNorm, divides out: behind such a norm
its head learns nothing, and of c, s and a only the ratios act.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from nnunet_deform.layers.dynamic import (
    ChannelAffine,
    DynamicConv,
    SoftmaxAttention,
    channel_means,
    mixed,
    require_choice,
)
from nnunet_deform.ops import ConvImpl, autocast_disabled

ODConvNorm = Literal["running", "batch", "layer", "none"]


class ODAttentions(NamedTuple):
    """c [B, C], f [B, O], s [B, taps] and a [B, K]; None for one that is absent, but a, which is then 1."""

    channel: Tensor | None
    filter: Tensor | None
    spatial: Tensor | None
    kernel: Tensor


class ODConvAttention(SoftmaxAttention):
    """The four attentions, [B, C, *spatial] -> :class:`ODAttentions`. Sizes of 0 leave c, f or s out, 1 kernel a."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        scaled_channels: int,
        filters: int,
        taps: int,
        n_kernels: int,
        temperature: float,
        norm: ODConvNorm,
    ) -> None:
        super().__init__(hidden, temperature, norm=norm)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.affine = ChannelAffine(hidden)
        self.channel = nn.Linear(hidden, scaled_channels) if scaled_channels else None
        self.filter = nn.Linear(hidden, filters) if filters else None
        self.spatial = nn.Linear(hidden, taps) if taps else None
        self.kernel = nn.Linear(hidden, n_kernels) if n_kernels > 1 else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> ODAttentions:
        if isinstance(self.norm, nn.BatchNorm1d) and self.training and len(x) == 1:
            raise ValueError(
                "attention_norm='batch' needs at least 2 samples in training, got a batch of 1; use "
                "attention_norm='running'."
            )
        with autocast_disabled(x.device.type):
            z = self.affine(self.norm(self.squeeze(channel_means(x, self.squeeze.weight)))).relu()
            channel, filter_, spatial, kernel = (
                None if head is None else head(z) / self.temperature
                for head in (self.channel, self.filter, self.spatial, self.kernel)
            )
            return ODAttentions(
                *(None if logits is None else logits.sigmoid() for logits in (channel, filter_, spatial)),
                z.new_ones(len(z), 1) if kernel is None else kernel.softmax(1),
            )

    def sigmoids(self) -> int:
        """How many of c, f and s there are."""
        return sum(head is not None for head in (self.channel, self.filter, self.spatial))

    def neutralise(self) -> float:
        for head in (self.channel, self.filter, self.spatial, self.kernel):
            if head is not None:
                nn.init.zeros_(head.weight)
        return 0.5 ** self.sigmoids()


class ODConv(DynamicConv):
    """Omni-dimensional dynamic convolution; see the module's docstring for the equations.

    [B, C, *spatial] -> [B, C_out, *out].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``nn.Conv3d``.
        n_kernels: K.
        reduction: C over the width of the squeezed vector z, which is at least 16.
        attention_norm: of z, each with a factor and an offset for each entry. "running" is BatchNorm's formula of
            evaluation in training as well: standardised by mean and variance over the samples of the training so far,
            and cut to five standard deviations (:class:`nnunet_deform.layers.RunningNorm`).
            "batch" is BatchNorm, as released: training needs two samples, and with two they are each other's
            complement. "layer" standardises each vector over its own entries, "none" nothing.
        temperature: T, of all four.
        use_channel, use_filter, use_spatial: whether there are c, f and s. A norm per channel and sample behind the
            layer divides f out.
        conv_impl: see :func:`nnunet_deform.ops.dynamic_conv3d`.

    Raises:
        ValueError: an option outside what is listed here; groups that do not divide the channels. In training, a batch
            of 1 with ``attention_norm="batch"``.
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
        reduction: int = 16,
        attention_norm: ODConvNorm = "running",
        temperature: float = 1.0,
        use_channel: bool = True,
        use_filter: bool = True,
        use_spatial: bool = True,
        conv_impl: ConvImpl = "auto",
    ) -> None:
        require_choice("attention_norm", attention_norm, ("running", "batch", "layer", "none"))
        if reduction < 1:
            raise ValueError(f"reduction={reduction} must be at least 1.")
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
        depthwise = groups == in_channels == out_channels
        taps = math.prod(self.kernel_size)
        self.attention = ODConvAttention(
            in_channels,
            max(in_channels // reduction, 16),
            scaled_channels=in_channels if use_channel else 0,
            filters=out_channels if use_filter and not depthwise else 0,
            taps=taps if use_spatial and taps > 1 else 0,
            n_kernels=n_kernels,
            temperature=temperature,
            norm=attention_norm,
        )
        self.reset_parameters()

    def reset_parameters(self, initialize: Callable[[Tensor], Any] | None = None) -> None:
        """The initial state: kernels by ``initialize``, by default normal by each kernel's fan-out as in the released
        code; biases zero; the attention's own for the attention."""
        fan_out = self.out_channels * math.prod(self.kernel_size)
        super().reset_parameters(initialize or (lambda weight: nn.init.normal_(weight, std=math.sqrt(2 / fan_out))))
        self.attention.reset_parameters()

    def neutralise(self) -> tuple[float, float]:
        return self.attention.neutralise(), 1.0 if self.attention.filter is None else 0.5

    def mixing_weights(self, x: Tensor) -> Tensor:
        """The weight of each kernel for each sample, [B, C, *spatial] -> [B, K].

        In training mode this is a part of a forward pass, see :meth:`kernels`."""
        return self.attention(x).kernel

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        channel, filter_, spatial, kernel = self.attention(x)
        batch, inputs = len(x), self.in_channels // self.groups
        ones = (1,) * self.ndim
        with autocast_disabled(x.device.type):
            kernels = mixed(kernel, self.weight)
            bias = None if self.bias is None else mixed(kernel, self.bias)
            if channel is not None:
                # The outputs of each group see its own channels.
                seen = channel.view(batch, self.groups, 1, inputs)
                seen = seen.expand(-1, -1, self.out_channels // self.groups, -1)
                scale = seen.reshape(batch, self.out_channels, inputs)
            else:
                scale = kernel.new_ones(batch, self.out_channels, 1)
            if filter_ is not None:
                scale = scale * filter_.unsqueeze(2)
                bias = None if bias is None else bias * filter_
            if channel is not None or filter_ is not None:
                kernels = kernels * scale.view(*scale.shape, *ones)
            if spatial is not None:
                kernels = kernels * spatial.view(batch, 1, 1, *self.kernel_size)
        return kernels, bias

    def kept_by_autograd(self, size: Sequence[int]) -> int:
        """Numbers kept for each sample of this size in training, beyond a static convolution's: the kernel, mixed and
        after each scaling."""
        return (1 + self._scalings()) * self.weight.numel() // self.n_kernels

    def autocast_surplus(self, size: Sequence[int]) -> int:
        """As of :class:`DynamicConv`: kernels before a scaling are float32."""
        return self._scalings() * self.weight.numel() // self.n_kernels

    def _scalings(self) -> int:
        attention = self.attention
        return (attention.channel is not None or attention.filter is not None) + (attention.spatial is not None)


class ODConv2d(ODConv):
    """As :class:`ODConv`, of images: [B, C, H, W] -> [B, C_out, H_out, W_out]."""

    ndim = 2


class ODConv3d(ODConv):
    """As :class:`ODConv`, of volumes: [B, C, D, H, W] -> [B, C_out, D_out, H_out, W_out]."""

    ndim = 3
