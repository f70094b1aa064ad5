"""One of two processes that train networks side by side: python ddp_process.py RANK FOLDER TRAINER...

It wraps each trainer's network in DistributedDataParallel on a CPU and takes two steps with a batch of its own. The
trainer itself stays outside, because nnU-Net's knows only NCCL. FOLDER holds nnU-Net's folders; results go to
FOLDER/RANK.json.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import narrow_baselines
from torch.nn.parallel import DistributedDataParallel

from nnunet_deform.plans import deformux
from nnunet_deform.trainers.variants import find_trainer


def digest(network: torch.nn.Module) -> str:
    # Statistics of each process's own last batch are replaced by rank 0's at the next forward pass only.
    weights = b"".join(value.detach().contiguous().numpy().tobytes() for value in network.parameters())
    return hashlib.sha256(weights).hexdigest()


def two_steps(trainer: nnUNetTrainer) -> dict:
    plain = trainer.network
    trainer.is_ddp = True  # the coarsest output then has a weight, so that its head has a gradient
    trainer.loss = trainer._build_loss()
    trainer.network = DistributedDataParallel(plain)
    own = digest(plain)
    batch = next(trainer.dataloader_train)
    losses = [float(nnUNetTrainer.train_step(trainer, batch)["loss"]) for _ in range(2)]
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        single = trainer.network(batch["data"])
    return {"start": own, "end": digest(plain), "losses": losses, "single": list(single.shape)}


def main(rank: int, folder: Path, names: list[str]) -> None:
    deformux.BASE_FEATURES = 8
    narrow_baselines(pytest.MonkeyPatch())
    nnUNetTrainer.plot_network_architecture = lambda self: None
    preprocessed = folder / "preprocessed" / "Dataset999_Phantom"
    trainers = {}
    for name in names:
        torch.manual_seed(rank)
        trainer = find_trainer(name)(
            plans=load_json(preprocessed / "nnUNetPlans.json") | {"continue_training": False},
            configuration="3d_fullres",
            fold=0,
            dataset_json=load_json(preprocessed / "dataset.json"),
            device=torch.device("cpu"),
        )
        trainer.initialize()
        trainer.dataloader_train, _ = trainer.get_dataloaders()
        trainer.network.train()
        trainers[name] = trainer
    # Only now: a trainer made in a process group would ask for a GPU.
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    results = {name: two_steps(trainer) for name, trainer in trainers.items()}
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
