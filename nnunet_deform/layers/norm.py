"""Normalisation of voxels, maps and groups of maps, and of vectors by what training has seen so far."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.ops import compiled_on_cpu, opaque_group_norm, opaque_layer_norm, standardize


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channel axis of [B, C, *spatial], at each voxel by itself.

    A channels-last input is normalised without a copy, and the result is channels last in memory.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        if compiled_on_cpu(x):
            return opaque_layer_norm(rows, self.weight, self.bias, self.eps).movedim(-1, 1)
        return F.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class RunningNorm(nn.Module):
    """Standardises each entry of [B, C] by its mean and variance over the samples of the training so far.

    It is the same function in training and evaluation, for any batch size: a training step first takes its batch into
    the statistics, without gradient, and is then standardised by them. The first ``cumulative_steps`` steps weigh the
    same; after that the newest weighs 1 / ``cumulative_steps``. The variance is that of all samples taken together, so
    a batch of one adds to it. A batch that is not finite is left out. There are no parameters.

    It is no BatchNorm by class, so that nothing converts it to SyncBatchNorm. Under DistributedDataParallel each
    process takes its own batch in, but buffers are broadcast from rank 0 before each forward pass (torch's default,
    which nnU-Net keeps): what is kept are the statistics of rank 0's samples.

    Args:
        channels: C.
        eps: added to the variance.
        cumulative_steps: see above.
        limit: standardised values are cut to [-limit, limit]. A variance near zero, as after one step with a batch of
            one, and an input unlike any of the training, as an empty patch, then have a bounded effect.

    Attributes:
        enabled: without it this is the identity and adds nothing to a state dict.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, cumulative_steps: int = 100, limit: float = 5.0) -> None:
        super().__init__()
        self.eps = eps
        self.cumulative_steps = cumulative_steps
        self.limit = limit
        self.enabled = True
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def reset_parameters(self) -> None:
        """Forget all samples: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if self.training:
            self._take_in(x.detach())
        standardised = (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        return standardised.clamp(-self.limit, self.limit)

    @torch.no_grad()
    def _take_in(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, 0, correction=0)
        finite = (mean.isfinite() & variance.isfinite()).all()
        steps = (self.num_batches_tracked + 1).clamp(max=self.cumulative_steps)
        weight = steps.to(self.running_mean.dtype).reciprocal()
        shift = mean - self.running_mean
        # Of two sets of samples with these weights, taken together.
        variance = (1 - weight) * (self.running_var + weight * shift.square()) + weight * variance
        self.running_mean.copy_(torch.where(finite, self.running_mean + weight * shift, self.running_mean))
        self.running_var.copy_(torch.where(finite, variance, self.running_var))
        self.num_batches_tracked.add_(finite)

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        if self.enabled:
            super()._save_to_state_dict(*args, **options)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        if self.enabled:
            super()._load_from_state_dict(*args, **options)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, enabled={self.enabled}"


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, which compiles to fewer operations."""

    def forward(self, x: Tensor) -> Tensor:
        if compiled_on_cpu(x):
            return opaque_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if not torch.compiler.is_dynamo_compiling():
            return super().forward(x)
        by_group = x.unflatten(1, (self.num_groups, -1))
        standardized = standardize(by_group, range(2, by_group.ndim), self.eps).flatten(1, 2)
        device = x.device.type
        # Under autocast torch's norm returns float32 everywhere but on a CPU.
        kept = device != "cpu" and torch.is_autocast_enabled(device)
        return _scaled(standardized, self.weight, self.bias).to(standardized.dtype if kept else x.dtype)


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def forward(self, x: Tensor) -> Tensor:
        if self.track_running_stats or not torch.compiler.is_dynamo_compiling():
            return super().forward(x)
        if compiled_on_cpu(x):
            return opaque_group_norm(x, self.num_features, self.weight, self.bias, self.eps)
        standardized = standardize(x, range(2, x.ndim), self.eps)
        return _scaled(standardized, self.weight, self.bias).to(x.dtype)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d``, which compiles to fewer operations."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d``, which compiles to fewer operations."""


def is_plain_instance_norm(norm: nn.Module) -> bool:
    """Whether a module is an instance norm and no more: no running statistics, no learned factors."""
    return isinstance(norm, nn.modules.instancenorm._InstanceNorm) and not norm.track_running_stats and not norm.affine


def normalized(norm: nn.Module, x: Tensor, activation: nn.Module, residual: Tensor | None = None) -> Tensor:
    """activation(norm(x) + residual), a residual of None being none."""
    known = isinstance(norm, _InstanceNorm) and not norm.track_running_stats and isinstance(activation, nn.LeakyReLU)
    if known and compiled_on_cpu(x):
        return opaque_group_norm(
            *(x, norm.num_features, norm.weight, norm.bias, norm.eps),
            residual=residual,
            activation="leaky_relu",
            negative_slope=activation.negative_slope,
        )
    return activation(norm(x) if residual is None else norm(x) + residual)


def _scaled(standardized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A learned factor and shift for each channel of [B, C, *spatial], if there are any."""
    if weight is None or bias is None:
        return standardized
    per_channel = (-1, *[1] * (standardized.ndim - 2))
    return torch.addcmul(bias.view(per_channel), standardized, weight.view(per_channel))
