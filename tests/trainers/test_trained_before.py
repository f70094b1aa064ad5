"""Models that earlier versions trained load and predict what they did then; see ``data/trained_before/README.md``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stock_prediction import predictor_of

from nnunet_deform import activation
from nnunet_deform.plans import deformux

MODELS = sorted(path.parent for path in Path(__file__, "../data/trained_before").resolve().glob("*/prediction.npz"))


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name.split("__")[0])
def test_a_model_of_an_earlier_version_predicts_the_same(monkeypatch, folder: Path) -> None:
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv(activation.VARIABLE, activation.extension_folder())
    monkeypatch.setattr(deformux, "BASE_FEATURES", 4)
    predictor = predictor_of(folder, mirroring=False)
    with np.load(folder / "prediction.npz") as saved:
        image, logits = (torch.from_numpy(saved[name]) for name in ("image", "logits"))

    # In 2D, samples are the slices of one image. The sliding window accumulates them in half precision.
    predicted = predictor.predict_logits_from_preprocessed_data(image.transpose(0, 1))
    torch.testing.assert_close(predicted.float().transpose(0, 1), logits, atol=5e-3, rtol=2e-3)
    with torch.no_grad():
        network = predictor.network.eval()
        torch.testing.assert_close(network(image), logits, atol=1e-4, rtol=1e-4)


def test_the_models_are_all_there() -> None:
    names = {"DeformUX", "LightMedSeg", "MAGIC", "MAGIC_released", "MAGIC_DYConv"}
    assert {folder.name for folder in MODELS} == {f"nnUNetTrainer{name}__nnUNetPlans__2d" for name in names}
