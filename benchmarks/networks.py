"""DeformUX-Net beside its twin without deformation, itself with the portable operator, and nnU-Net's PlainConvUNet.

    python benchmarks/networks.py [--patch 40 56 40] [--batch 2] [--device cpu] [--threads 1] [--output FOLDER]

All have the topology of one nnU-Net plan, three classes and deep supervision. A training step is forward, loss,
backward and SGD (float32 on the CPU, bfloat16 autocast on CUDA); an inference patch is one forward pass. They take
turns in every round, and the fastest round counts: CPU time with one thread, else wall time. The peak memory is what a
training step holds at most beyond weights, momentum and gradients, each measured in a process of its own on the CPU.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from measuring import PeakMemory, can_measure_memory, clock_of, describe, fastest, in_own_process
from torch import Tensor, nn

from nnunet_deform.networks import DeformUXNet
from nnunet_deform.ops import BACKEND_VARIABLE

CLASSES = 3
OFFSET_SPREAD = 0.5  # voxels: about what training ends with; at zero every sample would be an exact voxel

# Network and backend of the operator; None chooses the fastest.
CONTENDERS = {
    "DeformUX-Net": ("deformable", None),
    "DeformUX-Net, torch backend": ("deformable", "torch"),
    "op-off twin": ("twin", None),
    "PlainConvUNet": ("stock", None),
}


def strides_of(patch: tuple[int, ...]) -> list[list[int]]:
    """Halved until an axis is shorter than 8 voxels, as nnU-Net's planner does for isotropic spacing."""
    size, strides = list(patch), [[1] * len(patch)]
    while len(strides) < 6 and any(s // 2 >= 4 for s in size):
        strides.append([2 if s // 2 >= 4 else 1 for s in size])
        size = [s // step for s, step in zip(size, strides[-1], strict=True)]
    return strides


def build(kind: str, patch: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    strides = strides_of(patch)
    levels = len(strides)
    topology = (nn.Conv3d, [[3, 3, 3]] * levels, strides)
    if kind == "stock":
        features = [min(32 * 2**level, 320) for level in range(levels)]
        norm_and_activation = {
            "conv_bias": True,
            "norm_op": nn.InstanceNorm3d,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
        }
        network = PlainConvUNet(
            1, levels, features, *topology, 2, CLASSES, 2, **norm_and_activation, deep_supervision=True
        )
        network.apply(PlainConvUNet.initialize)
        return network
    features = [min(48 * 2**level, 768) for level in range(levels)]
    network = DeformUXNet(
        1, levels, features, *topology, CLASSES, deep_supervision=True, deformable=kind == "deformable"
    )
    network.apply(DeformUXNet.initialize)
    for name, parameter in network.named_parameters():
        if name.endswith("offset.bias"):
            nn.init.normal_(parameter, std=OFFSET_SPREAD)
    return network


class Case:
    """One contender, ready to train on one batch."""

    def __init__(self, kind: str, backend: str | None, patch: tuple[int, ...], batch: int, device: str) -> None:
        self.backend = backend
        self.device = device
        self.network = build(kind, patch).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-3, momentum=0.99, nesterov=True)
        self.image = torch.randn(batch, 1, *patch, device=device)

    def forward(self, image: Tensor) -> list[Tensor] | Tensor:
        os.environ.pop(BACKEND_VARIABLE, None)
        if self.backend:
            os.environ[BACKEND_VARIABLE] = self.backend
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return self.network(image)

    def training_step(self) -> None:
        self.network.decoder.deep_supervision = True
        self.optimizer.zero_grad(set_to_none=True)
        sum(output.float().square().mean() for output in self.forward(self.image)).backward()
        self.optimizer.step()

    def inference(self) -> None:
        self.network.decoder.deep_supervision = False
        with torch.inference_mode():
            self.forward(self.image[:1])


def peak_memory(case_arguments: tuple) -> int:
    """Bytes that a training step holds at most beyond weights, momentum and gradients."""
    case = Case(*case_arguments)
    if case.device == "cuda":
        case.training_step()
        case.optimizer.zero_grad(set_to_none=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.training_step()
        return torch.cuda.max_memory_allocated() - before
    peak = PeakMemory()
    case.training_step()
    peak.start()
    case.training_step()
    return peak.bytes()


def measure(patch: tuple[int, ...], batch: int, device: str, threads: int, rounds: int) -> list[dict]:
    torch.set_num_threads(threads)
    clock = clock_of(device, threads)
    arguments = {name: (*options, patch, batch, device) for name, options in CONTENDERS.items()}
    cases = {name: Case(*options) for name, options in arguments.items()}
    times = {
        what: fastest(rounds, {name: getattr(case, what) for name, case in cases.items()}, clock)
        for what in ("training_step", "inference")
    }
    parameters = {name: sum(p.numel() for p in case.network.parameters()) for name, case in cases.items()}
    del cases
    memory_of = peak_memory if device == "cuda" else partial(in_own_process, threads, peak_memory)
    rows = []
    for name in CONTENDERS:
        row = {"name": name, "parameters": parameters[name]}
        for what, by_name in times.items():
            row |= {f"{what}_ms": by_name[name], f"{what}_ratio": by_name["DeformUX-Net"] / by_name[name]}
        row["peak_memory_bytes"] = memory_of(arguments[name]) if device == "cuda" or can_measure_memory() else None
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    print(
        f"{'':28} {'parameters':>11} {'training step':>14} {'ours/it':>9} {'inference':>12} {'ours/it':>9} {'peak':>9}"
    )
    for row in rows:
        peak = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f} MB"
        print(
            f"{row['name']:28} {row['parameters']:11,} {row['training_step_ms']:11.0f} ms"
            f" {row['training_step_ratio']:9.2f} {row['inference_ms']:9.0f} ms {row['inference_ratio']:9.2f} {peak:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch", type=int, nargs=3, default=(40, 56, 40))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for networks_DEVICE_THREADS.json")
    arguments = parser.parse_args()
    about = describe()
    rows = measure(tuple(arguments.patch), arguments.batch, arguments.device, arguments.threads, arguments.rounds)
    show(rows)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(arguments, name) for name in ("patch", "batch", "threads", "rounds")}
        name = "networks_cuda" if arguments.device == "cuda" else f"networks_cpu_{arguments.threads}"
        record = {**about, **settings, "results": rows}
        (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
