"""What all dynamic convolutions share: kernels that are computed for each sample, and an attention that says how.

A layer is a :class:`DynamicConv`: it has the arguments of ``nn.Conv3d``, computes a kernel and a bias for each sample
and convolves once with them; whatever a paper scales feature maps by is folded into the kernel. What it reads of its
input for that are means over voxels, taken in float32 or better, as is all arithmetic up to the finished kernel.

nnU-Net's InstanceNorm has a part in what such a layer can do. Behind the layer it divides out every factor that is
constant over a channel of a sample. In front of it, it gives each channel of each sample the same mean before the
nonlinearity, so that an attention to channel means sees hardly a difference between samples.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnunet_deform.layers.norm import RunningNorm
from nnunet_deform.ops import ConvImpl, dynamic_conv2d, dynamic_conv3d, voxel_statistics
from nnunet_deform.ops.checks import convolved_size, spatial_argument

AttentionInit = Literal["released", "calibrated"]


def require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def channel_means(x: Tensor, like: Tensor) -> Tensor:
    """The mean over voxels, [B, C, *spatial] -> [B, C], accumulated in float32 or better, in the dtype of ``like``."""
    return voxel_statistics(x, with_peak=False)[0].to(like.dtype)


class ChannelAffine(nn.Module):
    """A factor and an offset for each channel of [B, C]: a norm's parameters without the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class KernelAttention(nn.Module):
    """The weights of K kernels for each sample, [B, C, *spatial] -> [B, K] unless a subclass says more, computed in
    float32 or better.

    Args:
        channels: of the vector that is standardised.
        norm: "running" standardises each entry by its mean and variance over the samples of the training so far,
            "layer" each vector over its own entries, "batch" is BatchNorm's, "none" nothing; no parameters. A state
            dict with an attention's weights but without the statistics of "running" is one of a network without the
            norm: loading it turns the norm off, and loading one with statistics on again.
        init: "calibrated" draws :meth:`calibrated_layers` otherwise than "released".
    """

    # Numbers that autograd keeps for each voxel, beside the input.
    kept_per_voxel = 0

    def __init__(
        self,
        channels: int,
        *,
        norm: Literal["none", "running", "layer", "batch"] = "none",
        init: AttentionInit = "released",
    ) -> None:
        super().__init__()
        self.init = init
        if norm == "running":
            self.norm = RunningNorm(channels)
        elif norm == "layer":
            self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        elif norm == "batch":
            self.norm = nn.BatchNorm1d(channels, affine=False)
        else:
            self.norm = nn.Identity()

    def calibrated_layers(self) -> dict[nn.Linear, float]:
        """The layers that ``init="calibrated"`` draws otherwise, and the standard deviation of their weights."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Kaiming normal by fan-out but for what ``init`` calibrates, biases zero, norms the identity."""
        calibrated = self.calibrated_layers() if self.init == "calibrated" else {}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module in calibrated:
                    nn.init.normal_(module.weight, std=calibrated[module])
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(self.norm, RunningNorm):
            ours = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
            if ours:
                self.norm.enabled = any(key.startswith("norm.") for key in ours)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def neutralise(self) -> float:
        """Change the last layer so that all kernels get the same weight for every input whatever comes before it;
        returns the sum of the weights then. It must be possible to train on from there."""
        raise NotImplementedError


class SoftmaxAttention(KernelAttention):
    """Kernel attention with a temperature, which is saved with the weights."""

    def __init__(self, channels: int, temperature: float, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("temperature", torch.tensor(1.0))
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        """The higher, the more even the weights."""
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        self.temperature.fill_(temperature)


def set_temperature(network: nn.Module, temperature: float) -> None:
    """Set the temperature of every attention in ``network`` that has one.

    Args:
        network: any module; others are left alone.
        temperature: what the logits [B, K] are divided by, without a unit.

    Raises:
        ValueError: it is not positive.
    """
    for module in network.modules():
        if isinstance(module, SoftmaxAttention):
            module.set_temperature(temperature)


class DynamicConv(nn.Module):
    """Convolution with kernels of each sample's own, in the place of ``nn.Conv2d`` or ``nn.Conv3d``.

    Kernels are stored folded, ``weight`` [n_kernels * C_out, C/groups, *kernel_size], so that an initialisation for
    ordinary convolutions sees the right fan-in, and so are biases, ``bias`` [n_biases * C_out].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``nn.Conv3d``.
        n_kernels: kernels that are mixed.
        n_biases: biases that are mixed, or 1.

    Raises:
        ValueError: no kernel, or groups that do not divide the channels.
    """

    ndim: ClassVar[int]
    # Whether the kernels depend on the sample.
    dynamic = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        *,
        n_kernels: int = 1,
        n_biases: int = 1,
        conv_impl: ConvImpl = "auto",
    ) -> None:
        super().__init__()
        require_choice("conv_impl", conv_impl, ("auto", "grouped", "loop"))
        if n_kernels < 1:
            raise ValueError(f"n_kernels={n_kernels} must be at least 1.")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(spatial_argument("kernel_size", kernel_size, self.ndim, 1))
        self.stride = tuple(spatial_argument("stride", stride, self.ndim, 1))
        self.padding = tuple(spatial_argument("padding", padding, self.ndim, 0))
        self.dilation = tuple(spatial_argument("dilation", dilation, self.ndim, 1))
        self.groups = groups
        self.n_kernels = n_kernels
        self.conv_impl = conv_impl
        self.weight = nn.Parameter(torch.empty(n_kernels * out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(n_biases * out_channels)) if bias else None

    def _require_centred_kernel(self) -> None:
        """Raises ValueError unless the kernel is odd and padded so that it is centred on the voxel it is for."""
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size={self.kernel_size} must be odd on every axis for {type(self).__name__}.")
        centred = tuple((k - 1) // 2 * d for k, d in zip(self.kernel_size, self.dilation, strict=True))
        if self.padding != centred:
            raise ValueError(
                f"padding={self.padding} must be {centred} for {type(self).__name__} with kernel_size="
                f"{self.kernel_size} and dilation={self.dilation}."
            )

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d | nn.Conv3d, n_kernels: int | None = None, *, noise: float = 0.01, **options: Any
    ) -> "DynamicConv":
        """A layer that starts as a trained convolution and can be trained on.

        Where there are several kernels each is a copy, with noise so that there is something to choose between, and
        scaled so that the mix is the original.

        Args:
            conv: the convolution.
            n_kernels: of a layer that mixes kernels; None for its default.
            noise: standard deviation of the noise over that of the kernel; its mean over the kernels is zero. With 0
                the layer gives exactly what the convolution does.
            options: further arguments of the layer.

        Raises:
            ValueError: another number of axes, padding that is not zeros of a given width, or a convolution that the
                layer cannot be.
        """
        if conv.weight.ndim != cls.ndim + 2:
            raise ValueError(f"{conv} does not have the {cls.ndim} axes of {cls.__name__}.")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"{conv} must be padded with zeros, and by a number of voxels.")
        if n_kernels is not None:
            options["n_kernels"] = n_kernels
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            **options,
        ).to(conv.weight)
        of_kernels, of_biases = layer.neutralise()
        with torch.no_grad():
            disturbance = torch.randn(layer.n_kernels, *conv.weight.shape).to(conv.weight) * conv.weight.std() * noise
            disturbance -= disturbance.mean(0)
            layer.weight.copy_((conv.weight + disturbance).flatten(0, 1) / of_kernels)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias.repeat(len(layer.bias) // len(conv.bias)) / of_biases)
        return layer

    def neutralise(self) -> tuple[float, float]:
        """Take away what depends on the sample, so that the layer is a convolution but can be trained on.

        Returns:
            What a kernel, the same for all of ``weight``, is then multiplied by in all, and what a bias is.
        """
        raise NotImplementedError

    def reset_parameters(self, initialize: Callable[[Tensor], Any]) -> None:
        """The initial state: kernels by ``initialize``, biases zero; a subclass adds its own parts'."""
        initialize(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is convolved with, for each sample of [B, C, *spatial].

        In training mode this is a part of a forward pass: running statistics take the samples in.

        Returns:
            Kernels [B, C_out, C/groups, *kernel_size] and biases [B, C_out], float32 or better.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] -> [B, C_out, *spatial']."""
        once, convolved = self.divided(x)
        return convolved(x, *once)

    def divided(self, x: Tensor) -> tuple[tuple[Tensor | None, ...], Callable[..., Tensor]] | None:
        """The forward pass in two parts, for [B, C, *spatial]: a few numbers of each sample, which the attention gives
        and for which statistics take the samples in; and a function of x and of them that may be called twice. None
        where it has no such parts."""
        return self.kernels(x), self._convolved

    def _convolved(self, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        op = dynamic_conv2d if self.ndim == 2 else dynamic_conv3d
        return op(x, kernels, bias, self.stride, self.padding, self.dilation, self.groups, self.conv_impl)

    @torch.no_grad()
    def folded(self, kernel: Tensor, bias: Tensor | None) -> nn.Module:
        """The layer with one kernel and bias for every sample, such as means over samples of :meth:`kernels`."""
        conv = (nn.Conv2d if self.ndim == 2 else nn.Conv3d)(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias is not None,
        ).to(self.weight)
        conv.weight.copy_(kernel)
        if bias is not None:
            conv.bias.copy_(bias)
        return conv

    def kept_by_autograd(self, size: Sequence[int]) -> int:
        """Numbers kept for each sample of this size in training, beyond a static convolution's."""
        raise NotImplementedError

    def autocast_surplus(self, size: Sequence[int]) -> int:
        """How many numbers of half precision autocast keeps for each sample of this size beyond as many as
        :meth:`kept_by_autograd` counts: one for each that stays in float32, two for each of a copy in float32."""
        return 0

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Of an input of this size."""
        return convolved_size(size, self.kernel_size, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"n_kernels={self.n_kernels}"
        )


def mixed(weights: Tensor, folded: Tensor) -> Tensor:
    """Sums of the K parts of a parameter [K * C_out, ...] with weights [B, K]: [B, C_out, ...], in the parameter's
    dtype. To be called with autocast disabled."""
    n_kernels = weights.shape[1]
    parts = weights.to(folded.dtype) @ folded.view(n_kernels, -1)
    return parts.view(len(weights), len(folded) // n_kernels, *folded.shape[1:])
