"""A training step of MAGIC on the CPU beside that of nnU-Net's PlainConvUNet and, on demand, of MAGIC's static twin.

    python benchmarks/magic.py [--patch 64] [--rounds 3] [--threads 1] [--twin] [--output benchmarks/results]

Forward, loss under deep supervision, backward and an SGD step at batch 2, float32, on the network that nnU-Net plans
for a 3D patch of this size. The networks run in turn in every round, and the fastest round counts. With one thread the
time is the process's own CPU time, so that other programs on the machine matter little; with more it is wall time. The
memory is the peak over forward and backward beyond weights, gradients and momentum, each in a process of its own.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from measuring import PeakMemory, can_measure_memory, clock_of, describe, fastest, in_own_process
from torch import nn

from nnunet_deform.networks import MagicPlainConvUNet

BATCH = 2
CLASSES = 3


def contenders(levels: int, twin: bool) -> dict[str, nn.Module]:
    """The network as nnU-Net plans it, first, and its variants."""
    arguments = {
        "input_channels": 1,
        "num_classes": CLASSES,
        "n_stages": levels,
        "features_per_stage": [min(32 * 2**level, 320) for level in range(levels)],
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3]] * levels,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (levels - 1)],
        "n_conv_per_stage": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    networks = {"PlainConvUNet": PlainConvUNet(**arguments), "MAGIC 4x": MagicPlainConvUNet(**arguments)}
    if twin:
        networks["static twin"] = MagicPlainConvUNet(**arguments, attention="uniform", keep_dead_attention=True)
    return networks


class Training:
    """A network, its optimiser as in nnU-Net, and a batch."""

    def __init__(self, network: nn.Module, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        network.apply(network.initialize)
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
        self.image = torch.randn(BATCH, 1, side, side, side, generator=generator)
        self.target = torch.randint(CLASSES, (BATCH, side, side, side), generator=generator)

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        loss = torch.zeros(())
        for level, logits in enumerate(self.network(self.image)):
            step = 2**level
            loss = loss + F.cross_entropy(logits, self.target[:, ::step, ::step, ::step]) / step
        loss.backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()


def levels_of(side: int) -> int:
    """As nnU-Net's planner: halved while at least 4 voxels remain, at most six levels."""
    return min(6, side.bit_length() - 2)


def peak_memory(name: str, side: int, twin: bool) -> int:
    peak = PeakMemory()
    training = Training(contenders(levels_of(side), twin)[name], side)
    training.step()
    peak.start()
    training.forward_backward()
    return peak.bytes()


def measure(side: int, rounds: int, threads: int, twin: bool) -> list[dict]:
    torch.set_num_threads(threads)
    trainings = {name: Training(network, side) for name, network in contenders(levels_of(side), twin).items()}
    times = fastest(rounds, {name: training.step for name, training in trainings.items()}, clock_of("cpu", threads))
    peaks = {
        name: in_own_process(threads, peak_memory, name, side, twin) if can_measure_memory() else None
        for name in trainings
    }
    reference = next(iter(trainings))
    return [
        {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in training.network.parameters()),
            "step_ms": times[name],
            "step_ratio": times[name] / times[reference],
            "peak_bytes": peaks[name],
            "peak_ratio": None if peaks[name] is None else peaks[name] / peaks[reference],
        }
        for name, training in trainings.items()
    ]


def show(rows: list[dict]) -> None:
    print(f"{'':16} {'parameters':>14} {'step':>10} {'ratio':>6} {'peak memory':>12} {'ratio':>6}")
    for row in rows:
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:8.0f} MiB {row['peak_ratio']:6.2f}"
        print(
            f"{row['name']:16} {row['parameters']:14,} {row['step_ms']:7.0f} ms {row['step_ratio']:6.2f} {memory:>19}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch", type=int, default=64, help="voxels along each axis, a power of two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--twin", action="store_true", help="also the static network of equal parameters")
    parser.add_argument("--output", type=Path, help="folder for magic_cpu.json")
    arguments = parser.parse_args()
    about = describe()
    rows = measure(arguments.patch, arguments.rounds, arguments.threads, arguments.twin)
    show(rows)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        record = {
            **about,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "patch": [arguments.patch] * 3,
            "batch": BATCH,
            "results": rows,
        }
        (arguments.output / "magic_cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
