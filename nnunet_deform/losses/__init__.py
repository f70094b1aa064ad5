"""Losses on logits and targets, as nnU-Net hands them over."""

from nnunet_deform.losses.boundary_weighted import BoundaryWeightedLoss, class_weights

__all__ = ["BoundaryWeightedLoss", "class_weights"]
