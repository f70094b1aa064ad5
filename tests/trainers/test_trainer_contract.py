"""What holds for every trainer: a new one is tested by being listed in ``trainers.__all__``."""

import numpy as np
import pytest
import torch

from nnunet_deform import networks, trainers
from nnunet_deform.trainers.variants import find_trainer


@pytest.mark.parametrize("name", trainers.__all__)
def test_it_builds_its_network_and_takes_a_step(make_trainer, name) -> None:
    trainer = make_trainer(find_trainer(name))
    trainer.initialize()
    planned = trainer.planned_architecture(trainer.configuration_manager)["network_class_name"]
    assert type(trainer.network) is networks.NETWORKS[planned.removeprefix("nnunet_deform.networks.")]
    trained = {key for key, parameter in trainer.network.named_parameters() if parameter.requires_grad}
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.network.train()
    loss = trainer.train_step(next(trainer.dataloader_train))["loss"]
    assert np.isfinite(loss)
    changed = {key for key, value in trainer.network.state_dict().items() if not torch.equal(value, before[key])}
    # nnU-Net gives the coarsest output weight zero.
    assert {key for key in trained if "decoder" in key and "seg_layers.0" not in key} <= changed
