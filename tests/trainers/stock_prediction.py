"""nnU-Net's own prediction from a fold's folder, and the network's logits that it must give."""

from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor


def predictor_of(folder: str | Path, *, mirroring: bool = True) -> nnUNetPredictor:
    """Of the final checkpoint of fold 0 of a model folder."""
    predictor = nnUNetPredictor(use_mirroring=mirroring, use_gaussian=False, device=torch.device("cpu"), verbose=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    return predictor


def assert_the_networks_logits(predicted: Tensor, trainer: nnUNetTrainer, patch: Tensor) -> None:
    """
    Args:
        predicted: [classes, *spatial]; in 2D of one slice, [classes, 1, *spatial]. patch: [1, channels, *spatial].
    """
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.no_grad():
        expected = trainer.network(patch)[0]
    of_patch = predicted if patch.ndim == 5 else predicted.squeeze(1)
    # The sliding window accumulates logits in half precision.
    torch.testing.assert_close(of_patch.float(), expected, atol=5e-3, rtol=2e-3)
