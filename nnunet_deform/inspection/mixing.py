"""Which kernels dynamic convolutions mix for each patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_deform.networks.observation import DEAD_SHARE, MixingWeights, normalised_entropy


@dataclass(frozen=True)
class Mixing:
    """Of one layer, over patches. shares: [patches, K]; entropy: 1 where all kernels have the same share, 0 where one
    has all, mean over patches; spread: standard deviation over patches, mean over kernels, 0 of one patch; dead:
    kernels with a mean share below ``DEAD_SHARE``."""

    shares: np.ndarray
    entropy: float
    spread: float
    dead: int


def mixing(observation: MixingWeights) -> Mixing:
    """
    Args:
        observation: whose samples are the patches.
    """
    shares = observation.shares().cpu()
    return Mixing(
        shares=shares.numpy(),
        entropy=float(normalised_entropy(shares).mean()),
        spread=float(shares.std(0).mean()) if len(shares) > 1 else 0.0,
        dead=int((shares.mean(0) < DEAD_SHARE).sum()),
    )


def most_different(layers: Mapping[str, Mixing]) -> tuple[int, int]:
    """The two patches whose shares differ most: half the sum of absolute differences, mean over layers. (0, 0) of one
    patch."""
    shares = [torch.from_numpy(layer.shares) for layer in layers.values()]
    distance = sum(torch.cdist(one, one, p=1) / 2 for one in shares) / len(shares)
    first, second = divmod(int(distance.argmax()), len(distance))
    return min(first, second), max(first, second)
