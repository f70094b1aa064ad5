"""LightMedSeg's loss: Dice, cross-entropy and a band around each boundary."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTH = 1e-5
PROBABILITY_MARGIN = 1e-6
WEIGHT_BOUNDS = (0.1, 10.0)


class BoundaryWeightedLoss(nn.Module):
    """LightMedSeg's loss (eq. 22): Dice + cross-entropy + 0.5 boundary, with inverse-frequency weights.

    For each class c, n_c voxels of the |V| that are not ignored belong to it. Its weight w_c is proportional to
    |V| / n_c, with mean 1 over the classes present and bounded by 0.1 and 10; that of an absent class is 1. With y the
    one-hot target and p the softmax (regions: sigmoid) of the logits,

        L_ce   = sum_v w_y(v) (-log p_y(v)(v)) / sum_v w_y(v)
                 (regions: binary cross-entropy, its mean over the voxels of each region averaged with the weights)
        L_dice = sum_c w_c (1 - (2 sum p_c y_c + 1e-5) / (sum p_c + sum y_c + 1e-5)) / sum_c w_c, without background
        L_bdry = sum_c w_c sum_{v in B_c} BCE(p_c, y_c) / sum_c w_c |B_c|

    where the band B_c is the dilation of y_c less its erosion, voxels that touch an ignored one left out. All are 0,
    and connected to the logits, where no voxel counts. Weights carry no gradient and come from this process's batch.

    Args:
        regions: the target has a channel for each region instead of one channel of labels.
        ignore_label: label of voxels that do not count, None for none. With regions the target's last channel marks
            these voxels, and the value itself is not used.
        batch_dice: sums of the Dice over the whole batch instead of each sample.
        boundary_kernel: box of the dilation and erosion, odd, for each axis.
        scale_weights: for deep supervision, the weight of each output, finest first: cross-entropy and Dice at every
            scale, the boundary at the finest only, because coarse bands are as wide as the objects. None for a single
            output.
    """

    def __init__(
        self,
        *,
        regions: bool,
        ignore_label: int | None,
        batch_dice: bool,
        boundary_kernel: Sequence[int],
        scale_weights: Sequence[float] | None = None,
        boundary_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if any(k < 1 or k % 2 == 0 for k in boundary_kernel):
            raise ValueError(f"boundary_kernel={tuple(boundary_kernel)} must be odd and positive on every axis.")
        self.regions = regions
        self.ignore_label = ignore_label
        self.batch_dice = batch_dice
        self.boundary_kernel = tuple(boundary_kernel)
        self.scale_weights = scale_weights
        self.boundary_weight = boundary_weight

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """[B, classes, *spatial] and [B, 1, *spatial] labels, or [B, regions (+ 1), *spatial], or a list of each.

        Raises:
            ValueError: the shapes do not fit.
        """
        if self.scale_weights is None:
            return self._at_one_scale(logits, target, self.boundary_weight)
        terms = [
            weight * self._at_one_scale(*pair, self.boundary_weight if scale == 0 else 0.0)
            for scale, (weight, *pair) in enumerate(zip(self.scale_weights, logits, target, strict=True))
            if weight != 0
        ]
        return sum(terms[1:], terms[0])

    def _at_one_scale(self, logits: Tensor, target: Tensor, boundary_weight: float) -> Tensor:
        # Sums over a whole batch and logarithms of probabilities near 0 and 1 need float32.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        one_hot, valid = self._one_hot(target, logits)
        weights = class_weights(one_hot, valid)
        if self.regions:
            probabilities = torch.sigmoid(logits)
            # Sums over all but the channels.
            total = (F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none") * valid).transpose(0, 1)
            per_region = total.flatten(1).sum(1) / valid.sum().clamp(min=1)
            cross_entropy = (weights * per_region).sum() / weights.sum()
        else:
            log_probabilities = F.log_softmax(logits, dim=1)
            probabilities = log_probabilities.exp()
            weight_map = weights.view(1, -1, *[1] * (logits.ndim - 2)) * one_hot
            cross_entropy = -(weight_map * log_probabilities).sum() / weight_map.sum().clamp(min=SMOOTH)
        foreground = slice(None) if self.regions else slice(1, None)
        loss = cross_entropy + self._dice(
            probabilities[:, foreground] * valid, one_hot[:, foreground], weights[foreground]
        )
        if boundary_weight == 0:
            return loss
        return loss + boundary_weight * self._boundary(probabilities, one_hot, valid, weights)

    def _one_hot(self, target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The target for each class or region, zero where ignored, and 1 where voxels count, [B, 1, *spatial]."""
        channels = logits.shape[1] + (self.ignore_label is not None) if self.regions else 1
        expected = (len(logits), channels, *logits.shape[2:])
        if target.shape != expected:
            raise ValueError(
                f"the target has shape {tuple(target.shape)}, but logits of shape {tuple(logits.shape)} need "
                f"{expected}."
            )
        if self.regions:
            target = target.to(logits.dtype)
            if self.ignore_label is None:
                return target, torch.ones_like(target[:, :1])
            valid = 1 - target[:, -1:]
            return target[:, :-1] * valid, valid
        valid = torch.ones_like(target, dtype=torch.bool) if self.ignore_label is None else target != self.ignore_label
        labels = torch.where(valid, target, 0).long()
        valid = valid.to(logits.dtype)
        return torch.zeros_like(logits).scatter_(1, labels, valid), valid

    def _dice(self, probabilities: Tensor, one_hot: Tensor, weights: Tensor) -> Tensor:
        def total(x: Tensor) -> Tensor:
            sums = x.flatten(2).sum(2)
            return sums.sum(0, keepdim=True) if self.batch_dice else sums

        overlap = (2 * total(probabilities * one_hot) + SMOOTH) / (total(probabilities) + total(one_hot) + SMOOTH)
        return (weights * (1 - overlap)).sum(1).mean() / weights.sum().clamp(min=SMOOTH)

    def _boundary(self, probabilities: Tensor, one_hot: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            band = self._dilated(one_hot) + self._dilated(1 - one_hot) - 1
            if self.ignore_label is not None:
                band = band * (1 - self._dilated(1 - valid))
            band = band * weights.view(1, -1, *[1] * (one_hot.ndim - 2))
        probabilities = probabilities.clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
        # Written out, because torch refuses its own form of it under autocast.
        surprise = -(one_hot * probabilities.log() + (1 - one_hot) * (1 - probabilities).log())
        return (band * surprise).sum() / (band.sum() + SMOOTH)

    def _dilated(self, mask: Tensor) -> Tensor:
        pool = F.max_pool2d if len(self.boundary_kernel) == 2 else F.max_pool3d
        return pool(mask, self.boundary_kernel, 1, tuple(k // 2 for k in self.boundary_kernel))


@torch.no_grad()
def class_weights(one_hot: Tensor, valid: Tensor) -> Tensor:
    """Inverse frequencies, [B, C, *spatial] and [B, 1, *spatial] -> [C]; see :class:`BoundaryWeightedLoss`."""
    counts = one_hot.transpose(0, 1).flatten(1).sum(1)
    present = counts > 0
    inverse = torch.where(present, valid.sum() / counts.clamp(min=1), 0)
    normalised = inverse * present.sum() / inverse.sum().clamp(min=SMOOTH)
    return torch.where(present, normalised, 1).clamp(*WEIGHT_BOUNDS)
