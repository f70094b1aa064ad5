"""What every trainer does: a new one is tested by being listed in ``trainers.__all__``."""

import numpy as np
import pytest
import torch

from nnunet_deform import trainers
from nnunet_deform.networks import NETWORKS
from nnunet_deform.trainers.variants import find_trainer


@pytest.mark.parametrize("name", trainers.__all__)
def test_it_builds_its_network_and_takes_a_step(make_trainer, name) -> None:
    trainer = make_trainer(find_trainer(name))
    trainer.initialize()
    assert type(trainer.network) in NETWORKS.values()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.on_train_epoch_start()
    loss = trainer.train_step(next(trainer.dataloader_train))["loss"]
    assert np.isfinite(loss)
    changed = {key for key, value in trainer.network.state_dict().items() if not torch.equal(value, before[key])}
    decoder = {key for key in before if key.startswith("decoder.") and not key.startswith("decoder.encoder.")}
    assert {key for key in decoder if "seg_layers.0" not in key} <= changed
