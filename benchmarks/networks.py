"""Training step and prediction of our networks, their controls and nnU-Net's PlainConvUNet on one plan.

    python benchmarks/networks.py [--patch 40 56 40] [--batch 2] [--channels 1] [--device cpu] [--threads 1]
                                  [--rivals | --modes] [--only NAME ...] [--skip-training]
                                  [--skip-times | --skip-memory] [--output FILE.json]

With --rivals the networks of the papers' tables take the place of ours, those that take the plan. With --modes it is
training steps of ours by default, with recompute="blocks", and in the plain form, which computes nothing again.
The plan is nnU-Net's for this patch at isotropic spacing, with three classes. A training step is forward, Dice and
cross-entropy under deep supervision, backward and SGD (float32 on the CPU, bfloat16 autocast on CUDA); prediction is
one forward pass of one sample. The networks take turns in every round, and the fastest round counts: CPU time with one
thread, else wall time. The peak memory of a training step is what it holds at most beyond weights, gradients and
momentum, that of prediction beyond network and image; each is measured in a process of its own on the CPU.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_deform.layers.recomputation import plain_forms
from nnunet_deform.ops import BACKEND_VARIABLE
from nnunet_deform.plans import (
    deformux_architecture,
    dynamic_architecture,
    lightmedseg_architecture,
    magic_architecture,
)
from nnunet_deform.plans.rivals import rival_architecture
from nnunet_deform.selftest.measuring import PeakMemory, can_measure_memory, clock_of, describe, fastest, in_own_process

CLASSES = 3
STOCK = "PlainConvUNet"
OFFSET_SPREAD = 0.5  # voxels: about what training ends with; at zero every sample would be an exact voxel


@dataclass(frozen=True)
class Contender:
    """How a network comes from the plan's own ``architecture`` and patch, the operator's backend (None: the fastest),
    and whether a training step computes nothing again."""

    architecture: Callable[..., dict[str, Any]]
    backend: str | None = None
    plain: bool = False


CONTENDERS = {
    STOCK: Contender(lambda base, patch: base),
    "DeformUX-Net": Contender(deformux_architecture),
    "DeformUX-Net, torch backend": Contender(deformux_architecture, "torch"),
    "DeformUX-Net, op-off twin": Contender(partial(deformux_architecture, deformable=False)),
    "LightMedSeg": Contender(lightmedseg_architecture),
    "LightMedSeg, standard convolutions": Contender(partial(lightmedseg_architecture, ghost=False)),
    "LightMedSeg, op-off twin": Contender(partial(lightmedseg_architecture, op_off=True)),
    "MAGIC 4x": Contender(magic_architecture),
    "ODConv 4x": Contender(partial(dynamic_architecture, layer="odconv")),
    "DCD": Contender(partial(dynamic_architecture, layer="dcd")),
    "DDConv 8x, from level 3": Contender(partial(dynamic_architecture, layer="ddconv")),
    "MAGIC, static twin": Contender(partial(magic_architecture, attention="uniform", keep_dead_attention=True)),
}
RIVALS = {
    name: Contender(partial(rival_architecture, network=name))
    for name in ("NnFormer", "NnFormer_96", "UNETRPlusPlus", "SegFormer3D", "UNesT_B", "UNesT_L", "TransBTS", "CoTr")
}
MODES = {
    f"{name}{mode}": contender
    for name in ("DeformUX-Net", "LightMedSeg", "MAGIC 4x")
    for mode, contender in (
        ("", CONTENDERS[name]),
        (", blocks", Contender(partial(CONTENDERS[name].architecture, recompute="blocks"))),
        (", plain form", Contender(CONTENDERS[name].architecture, plain=True)),
    )
}
ALL = {**CONTENDERS, **RIVALS, **MODES}


def planned(patch: Sequence[int]) -> dict[str, Any]:
    """The ``architecture`` that nnU-Net plans: axes halved while 4 voxels remain, at most six levels."""
    size, strides = list(patch), [[1] * len(patch)]
    while len(strides) < 6 and any(s // 2 >= 4 for s in size):
        strides.append([2 if s // 2 >= 4 else 1 for s in size])
        size = [s // step for s, step in zip(size, strides[-1], strict=True)]
    levels = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": [min(32 * 2**level, 320) for level in range(levels)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * levels,
            "strides": strides,
            "n_conv_per_stage": [2] * levels,
            "n_conv_per_stage_decoder": [2] * (levels - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def build(name: str, patch: Sequence[int], channels: int) -> nn.Module:
    torch.manual_seed(0)
    architecture = ALL[name].architecture(planned(patch), patch)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        CLASSES,
        allow_init=True,
        deep_supervision=True,
    )
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("offset.bias"):
            nn.init.normal_(parameter, std=OFFSET_SPREAD)
    return network


class Case:
    """One contender, ready to train on one batch and to predict its first sample."""

    def __init__(self, name: str, patch: Sequence[int], batch: int, channels: int, device: str) -> None:
        self.backend, self.plain = ALL[name].backend, ALL[name].plain
        self.device = device
        self.network = build(name, patch, channels).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-3, momentum=0.99, nesterov=True)
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(batch, channels, *patch, generator=generator).to(device)
        self.target = torch.randint(CLASSES, (batch, 1, *patch), generator=generator).float().to(device)
        dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)

    def forward(self, image: Tensor) -> list[Tensor] | Tensor:
        os.environ.pop(BACKEND_VARIABLE, None)
        if self.backend:
            os.environ[BACKEND_VARIABLE] = self.backend
        with (
            torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"),
            plain_forms() if self.plain else nullcontext(),
        ):
            return self.network(image)

    def training_step(self) -> None:
        self.network.train().decoder.deep_supervision = True
        self.optimizer.zero_grad(set_to_none=False)
        outputs = self.forward(self.image)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        weights = [1 / 2**level for level in range(len(outputs))]
        targets = [nn.functional.interpolate(self.target, output.shape[2:]) for output in outputs]
        DeepSupervisionWrapper(self.loss, weights)([output.float() for output in outputs], targets).backward()
        self.optimizer.step()

    def prediction(self) -> None:
        self.network.eval().decoder.deep_supervision = False
        with torch.inference_mode():
            self.forward(self.image[:1])


def peak_memory(what: str, case_arguments: tuple) -> int:
    """Bytes that a training step or a prediction holds at most beyond what is there before it."""
    case = Case(*case_arguments)
    run = getattr(case, what)
    if case.device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    peak = PeakMemory()
    run()
    peak.start()
    run()
    return peak.bytes()


def measure(
    names: Sequence[str],
    whats: Sequence[str],
    case_arguments: tuple,
    device: str,
    threads: int,
    rounds: int,
    times: bool,
    memory: bool,
) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    clock = clock_of(device, threads)
    cases = {name: Case(name, *case_arguments) for name in names}
    rows = {
        name: {"name": name, "parameters": sum(p.numel() for p in case.network.parameters())}
        for name, case in cases.items()
    }
    for what in whats if times else ():
        best = fastest(rounds, {name: getattr(case, what) for name, case in cases.items()}, clock)
        for name, row in rows.items():
            row[f"{what}_ms"] = best[name]
            row[f"{what}_time_ratio"] = best[name] / best[STOCK]
    del cases
    memory_of = peak_memory if device == "cuda" else partial(in_own_process, threads, peak_memory)
    for what in whats if memory else ():
        for name, row in rows.items():
            row[f"{what}_peak_bytes"] = peak = memory_of(what, (name, *case_arguments))
            row[f"{what}_peak_ratio"] = peak / rows[STOCK][f"{what}_peak_bytes"]
    return list(rows.values())


def show(rows: Sequence[dict[str, Any]], whats: Sequence[str]) -> None:
    for what in whats:
        print(f"{what.replace('_', ' '):36}{'parameters':>11}{'time':>13}{'of stock':>10}{'peak':>11}{'of stock':>10}")
        for row in rows:
            line = f"{row['name']:36}{row['parameters']:11,}"
            timed = f"{what}_ms" in row
            line += f"{row[f'{what}_ms']:10.0f} ms{row[f'{what}_time_ratio']:10.3f}" if timed else f"{'-':>13}{'-':>10}"
            if f"{what}_peak_bytes" in row:
                line += f"{row[f'{what}_peak_bytes'] / 1e6:8.0f} MB{row[f'{what}_peak_ratio']:10.2f}"
            print(line)


def _that_take(patch: Sequence[int]) -> list[str]:
    """The rivals but for those that refuse the plan, who say why."""
    names = []
    for name, contender in RIVALS.items():
        try:
            contender.architecture(planned(patch), patch)
        except NotImplementedError as error:
            print(error)
        else:
            names.append(name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch", type=int, nargs=3, default=(40, 56, 40))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--rivals", action="store_true", help="the networks of the papers' tables")
    instead.add_argument("--modes", action="store_true", help="training steps that compute more or nothing again")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ALL), help=f"beside {STOCK}")
    parser.add_argument("--skip-training", action="store_true")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--skip-times", action="store_true")
    either.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.modes and arguments.skip_training:
        parser.error("--modes compares training steps; leave out --skip-training.")
    about = describe()
    contenders = [STOCK, *MODES] if arguments.modes else list(CONTENDERS)
    if arguments.rivals:
        contenders = [STOCK, *_that_take(arguments.patch)]
    names = [name for name in contenders if name == STOCK or arguments.only is None or name in arguments.only]
    whats = [] if arguments.skip_training else ["training_step"]
    if not arguments.modes:
        whats.append("prediction")
    settings = {name: getattr(arguments, name) for name in ("patch", "batch", "channels", "threads", "rounds")}
    case_arguments = (tuple(arguments.patch), arguments.batch, arguments.channels, arguments.device)
    memory = not arguments.skip_memory and (arguments.device == "cuda" or can_measure_memory())
    rows = measure(
        *(names, whats, case_arguments, arguments.device, arguments.threads, arguments.rounds),
        *(not arguments.skip_times, memory),
    )
    show(rows, whats)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**about, **settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
