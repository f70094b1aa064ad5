"""Prediction of one patch on a CPU: our networks beside nnU-Net's own U-Net of the same plan.

    python benchmarks/prediction.py [--size 96] [--channels 1] [--rounds 5] [--output benchmarks/results]

One thread, float32, one sample. All contenders run in turn in every round, and the fastest round counts; the time is
the process's own CPU time, so that other programs on the machine matter little. The memory is the peak of a process of
its own over what it held before the prediction, so it has the output in it but neither network nor image.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from measuring import PeakMemory, can_measure_memory, clock_of, describe, fastest, in_own_process
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_deform.plans import deformux_architecture, lightmedseg_architecture

STOCK = "PlainConvUNet"
CLASSES = 3


def architectures(size: int) -> dict[str, dict]:
    """By name: what nnU-Net plans for a cubic patch, and our networks on that plan."""
    levels = 6
    stock = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": [min(32 * 2**level, 320) for level in range(levels)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * levels,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * (levels - 1)],
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
    patch = (size,) * 3
    return {
        STOCK: stock,
        "LightMedSeg": lightmedseg_architecture(stock, patch),
        "LightMedSeg, standard convolutions": lightmedseg_architecture(stock, patch, ghost=False),
        "LightMedSeg, op-off twin": lightmedseg_architecture(stock, patch, op_off=True),
        "DeformUX-Net": deformux_architecture(stock, patch),
    }


def built(architecture: dict, channels: int) -> nn.Module:
    torch.manual_seed(0)
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        CLASSES,
        allow_init=True,
        deep_supervision=False,
    ).eval()


def image(size: int, channels: int) -> Tensor:
    return torch.randn(1, channels, size, size, size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def peak_memory(name: str, size: int, channels: int) -> int:
    """Bytes of this process at its peak over those before the prediction."""
    peak = PeakMemory()
    network, patch = built(architectures(size)[name], channels), image(size, channels)
    # A first prediction of the smallest patch, so that what the libraries set up is not counted.
    network(image(64, channels))
    peak.start()
    network(patch)
    return peak.bytes()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", type=int, default=96, help="voxels of the patch along each axis, a multiple of 32, at least 64"
    )
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"beside {STOCK}; default: all")
    parser.add_argument("--output", type=Path, help="folder for prediction_cpu.json")
    arguments = parser.parse_args()
    if arguments.size < 64 or arguments.size % 32:
        parser.error(f"--size {arguments.size} must be a multiple of 32, at least 64.")
    torch.set_num_threads(1)
    named = {
        name: built(architecture, arguments.channels)
        for name, architecture in architectures(arguments.size).items()
        if name == STOCK or arguments.only is None or name in arguments.only
    }
    patch = image(arguments.size, arguments.channels)
    runs = {name: partial(network, patch) for name, network in named.items()}
    milliseconds = fastest(arguments.rounds, runs, clock_of("cpu", 1))
    rows = []
    for name, network in named.items():
        memory = None
        if can_measure_memory():
            memory = in_own_process(1, peak_memory, name, arguments.size, arguments.channels)
        rows.append(
            {
                "name": name,
                "parameters": sum(p.numel() for p in network.parameters()),
                "seconds": milliseconds[name] / 1e3,
                "times_as_fast": milliseconds[STOCK] / milliseconds[name],
                "peak_megabytes": None if memory is None else memory / 1e6,
            }
        )
    stock_memory = rows[0]["peak_megabytes"]
    print(f"{arguments.channels} x {arguments.size}^3, one thread")
    for row in rows:
        line = f"{row['name']:36} {row['parameters'] / 1e6:6.2f} M"
        line += f" {row['seconds']:7.2f} s {row['times_as_fast']:6.1f}x as fast"
        if stock_memory is not None:
            line += f" {row['peak_megabytes']:7.0f} MB, {row['peak_megabytes'] / stock_memory:.2f} of {STOCK}'s"
        print(line)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        about = {"size": arguments.size, "channels": arguments.channels, "rounds": arguments.rounds}
        record = {**describe(), **about, "threads": 1, "results": rows}
        (arguments.output / "prediction_cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
