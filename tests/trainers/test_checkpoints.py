import pytest
import torch
from torch import nn

from nnunet_deform.trainers import nnUNetTrainerLightMedSeg


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_loading_makes_one_state_dict(make_trainer, monkeypatch, compiled) -> None:
    saved = make_trainer(nnUNetTrainerLightMedSeg)
    saved.initialize()
    path = f"{saved.output_folder}/checkpoint_latest.pth"
    saved.save_checkpoint(path)
    trainer = make_trainer(nnUNetTrainerLightMedSeg, results="again")
    trainer.initialize()
    plain = trainer.network
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    if compiled:
        trainer.network = torch.compile(plain, backend="eager")
    made = []
    state_dict = nn.Module.state_dict

    def counted(module: nn.Module, *arguments, **options) -> dict:
        # Its parts are asked with where to put their weights.
        if module is trainer.network and "destination" not in options:
            made.append(module)
        return state_dict(module, *arguments, **options)

    monkeypatch.setattr(nn.Module, "state_dict", counted)
    trainer.load_checkpoint(path)
    assert len(made) == 1
    assert "state_dict" not in vars(trainer.network)
    expected = saved.network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())
