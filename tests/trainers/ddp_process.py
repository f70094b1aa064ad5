"""Two processes that train networks side by side: python ddp_process.py FOLDER TRAINER...

Each wraps each trainer's network in DistributedDataParallel on a CPU and takes two steps with a batch of its own. The
trainer itself stays outside, because nnU-Net's knows only NCCL. FOLDER holds nnU-Net's folders; results go to
FOLDER/RANK.json. The processes are forked after the imports, which take longer and more memory than the training.
"""

import gc
import hashlib
import json
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import narrow_baselines
from torch._dynamo import OptimizedModule
from torch._dynamo.backends.common import aot_autograd
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


class Tiny(torch.nn.Module):
    """Takes a compiler a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Conv3d(1, 3, 3)
        self.decoder.deep_supervision = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)


def falling_back(trainer: nnUNetTrainer) -> dict:
    """Two steps of a network whose backward pass no rank can compile."""

    def raises(graph, inputs):
        raise RuntimeError("no compiler")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=raises)
    network = Tiny()
    trainer.network = DistributedDataParallel(torch.compile(network, backend=backend))
    trainer.optimizer = torch.optim.SGD(network.parameters(), 0.1)
    trainer.optimizer.register_step_pre_hook(trainer._before_optimizer_step)
    trainer._weights_before = None
    trainer._build_loss = lambda: lambda output, target: output.square().mean()
    trainer.loss = trainer._build_loss()
    trainer._all_ranks = dist.new_group(backend="gloo")
    start = digest(network)
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    return {"start": start, "end": digest(network), "compiled": isinstance(trainer.network.module, OptimizedModule)}


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
    results["falling back"] = falling_back(trainers[names[0]])
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    forked = multiprocessing.get_context("fork")
    gc.freeze()  # so that collections in the forks leave the pages shared
    ranks = [forked.Process(target=main, args=(rank, Path(sys.argv[1]), sys.argv[2:])) for rank in range(2)]
    for process in ranks:
        process.start()
    # When one fails, the other one would wait for it in vain.
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        time.sleep(0.05)
    for process in ranks:
        process.kill()
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
