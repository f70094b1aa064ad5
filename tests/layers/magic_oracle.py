"""The equations of MAGIC in float64, one sample and one kernel at a time, out of a layer's parameters by name."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {2: F.conv2d, 3: F.conv3d}
BATCH_NORM_EPS = LAYER_NORM_EPS = RUNNING_NORM_EPS = 1e-5


def fused(p: dict[str, Tensor], x: Tensor, *, spatial: bool, channel: bool, globe: bool) -> Tensor:
    """The C-vector of one sample, x [C, N] (eq. 3, 4 and 7)."""
    channels, voxels = x.shape
    total = x.new_zeros(channels)
    if channel:
        total = total + x.sum(1) / voxels
    if spatial:
        two_maps = torch.stack([x.sum(0) / channels, x.max(0).values])
        repeated = torch.stack([two_maps[c % 2] for c in range(channels)])
        total = total + repeated.sum(1) / voxels
    if globe:
        score = torch.stack([(p["attention.mask.weight"][0] * x[:, v]).sum() for v in range(voxels)])
        score = score + p["attention.mask.bias"]
        share = torch.exp(score - score.max())
        share = share / share.sum()
        pooled = (x * share).sum(1)
        hidden = p["attention.bottleneck.0.weight"] @ pooled + p["attention.bottleneck.0.bias"]
        hidden = (hidden - hidden.mean()) / torch.sqrt(((hidden - hidden.mean()) ** 2).mean() + LAYER_NORM_EPS)
        if "attention.bottleneck.1.weight" in p:
            hidden = hidden * p["attention.bottleneck.1.weight"] + p["attention.bottleneck.1.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        total = total + p["attention.bottleneck.3.weight"] @ hidden + p["attention.bottleneck.3.bias"]
    return total


def mixing_weights(
    p: dict[str, Tensor],
    x: Tensor,
    *,
    mixing: str = "paper",
    kr_norm: str = "none",
    temperature: float,
    use_spatial: bool = True,
    use_channel: bool = True,
    use_global: bool = True,
    use_kr: bool = True,
    attention_norm: str = "none",
) -> Tensor:
    """[B, K] of a layer in training that has seen this batch only (eq. 8 to 11)."""
    flat = x.flatten(2)
    vectors = [fused(p, sample, spatial=use_spatial, channel=use_channel, globe=use_global) for sample in flat]
    vectors = standardised(vectors, attention_norm)
    f1, f2 = p["attention.fusion.0.weight"], p["attention.fusion.2.weight"]
    beta = torch.stack([f2 @ (f1 @ vector).clamp(min=0) for vector in vectors])
    gate = torch.ones_like(beta)
    if use_kr and beta.shape[1] > 1:
        hidden = torch.stack([p["attention.recalculation.0.weight"] @ b for b in beta])
        if kr_norm == "batch":
            variance = ((hidden - hidden.mean(0)) ** 2).mean(0)
            hidden = (hidden - hidden.mean(0)) / torch.sqrt(variance + BATCH_NORM_EPS)
        hidden = hidden * p["attention.recalculation.1.weight"] + p["attention.recalculation.1.bias"]
        raw = torch.stack([p["attention.recalculation.3.weight"] @ h.clamp(min=0) for h in hidden])
        gate = 1 / (1 + torch.exp(-raw))
    if mixing == "paper":
        return gate * softmax(beta / temperature)
    return softmax(gate * beta / temperature)


def standardised(vectors: list[Tensor], norm: str) -> list[Tensor]:
    """C-vectors of a batch, each over its entries, or each entry by constants, the mean and variance of the batch."""
    if norm == "layer":
        means = [v.mean() for v in vectors]
        return [
            (v - m) / torch.sqrt(((v - m) ** 2).mean() + LAYER_NORM_EPS) for v, m in zip(vectors, means, strict=True)
        ]
    if norm == "running":
        mean = (sum(vectors) / len(vectors)).detach()
        variance = (sum((v - mean) ** 2 for v in vectors) / len(vectors)).detach()
        return [(v - mean) / torch.sqrt(variance + RUNNING_NORM_EPS) for v in vectors]
    return vectors


def softmax(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.exp(x).sum(1, keepdim=True)


def forward(p: dict[str, Tensor], x: Tensor, weights: Tensor, **geometry: Any) -> Tensor:
    """Each sample convolved with its own sum of kernels, the kernels stored one after another."""
    n_kernels = weights.shape[1]
    outputs = []
    for sample, a in zip(x, weights, strict=True):
        kernel = sum(a[i] * w for i, w in enumerate(p["weight"].chunk(n_kernels)))
        bias = sum(a[i] * b for i, b in enumerate(p["bias"].chunk(n_kernels))) if "bias" in p else None
        outputs.append(CONV[x.ndim - 2](sample.unsqueeze(0), kernel, bias, **geometry))
    return torch.cat(outputs)
