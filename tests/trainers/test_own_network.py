"""The example of docs/own_network.md, as it stands there."""

import os
import re
from pathlib import Path

import pytest
import torch

from nnunet_deform import activation
from nnunet_deform.diagnosis.lookup import lookup

PAGE = Path(__file__).parents[2] / "docs" / "own_network.md"


@pytest.mark.parametrize("size", [(16, 16), (8, 16, 16)], ids=["2d", "3d"])
def test_the_example_trains(make_trainer, tmp_path, monkeypatch, size):
    code = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    folder = tmp_path / "my_trainers"
    folder.mkdir()
    (folder / "nnUNetTrainerSmall.py").write_text(code)
    monkeypatch.setenv(activation.VARIABLE, os.pathsep.join([str(folder), activation.extension_folder()]))
    name = "nnUNetTrainerSmall_AdamW_lr4e-3_1epochs2iters"
    trainer_class = lookup(name)
    assert trainer_class.__name__ == name

    trainer = make_trainer(trainer_class, size, [[1] * len(size), [2] * len(size)])
    trainer.run_training()
    assert Path(trainer.output_folder, "checkpoint_final.pth").exists()
    offsets = [p for name, p in trainer.network.named_parameters() if "offset" in name]
    assert all(p.abs().max() > 0 for p in offsets)
    assert trainer.network(torch.zeros(1, 1, *size)).shape == (1, 3, *size)
