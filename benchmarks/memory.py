"""What the planner estimates, beside what a training step holds: the tables of docs/planning.md.

    python benchmarks/memory.py [--patch NAME ...] [--only NAME ...] [--compiled] [--output FILE.json]

For the patches that nnU-Net plans, each network in the place of its U-Net, one channel and three classes, float16
autocast on fake CUDA tensors, so no GPU is needed, but a torch for CUDA, from 2.11 on. Bytes are of one sample, in
eager training steps, which compute cheap things again, and with recompute="blocks" whole blocks. Kept are tensors
saved for the backward pass. The peak is the most that a step holds at one time of its backward pass: what is kept and
made again, and the gradients of feature maps; the planner estimates it. Of a compiled step it is what inductor's
partition keeps (--compiled; minutes for each network). GB are the planner's for a step of batch 2 (12 in 2D). What a
file has of other patches, networks and compiled steps stays.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_deform.networks.memory import unable_to_follow_autocast
from nnunet_deform.plans import estimated_gigabytes
from nnunet_deform.plans.architecture import Architecture
from nnunet_deform.plans.memory import compiled_kept_bytes, estimated_bytes, kept_bytes, step_bytes
from nnunet_deform.plans.planners import PLANNERS
from nnunet_deform.selftest.measuring import describe

PATCHES = {  # patch, spacing, batch
    "Hippocampus, 40 x 56 x 40": ((40, 56, 40), (1, 1, 1), 2),
    "20 x 320 x 256": ((20, 320, 256), (3.6, 0.6125, 0.6125), 2),
    "10 x 256 x 224": ((10, 256, 224), (10, 1.56, 1.56), 2),
    "128 x 128 x 128": ((128, 128, 128), (1, 1, 1), 2),
    "512 x 512": ((512, 512), (1, 1), 12),
}
CHANNELS, CLASSES = 1, 3


def planned_unet(patch: tuple[int, ...], spacing: tuple[float, ...]) -> Architecture:
    """The U-Net of nnU-Net's ExperimentPlanner."""
    ndim = len(patch)
    _, strides, kernel_sizes, _, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    levels = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": [min(32 * 2**level, 512 if ndim == 2 else 320) for level in range(levels)],
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [list(kernel) for kernel in kernel_sizes],
            "strides": [[int(step) for step in stride] for stride in strides],
            "n_conv_per_stage": [2] * levels,
            "n_conv_per_stage_decoder": [2] * (levels - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def contenders(unet: Architecture, patch: tuple[int, ...]) -> dict[str, Architecture]:
    """The networks by name, ours in both modes."""
    found = {"PlainConvUNet": unet}
    for planner in PLANNERS.values():
        found[planner.label] = planner.architecture(unet, patch)
        found[f"{planner.label}, blocks"] = planner.architecture(unet, patch, recompute="blocks")
    return found


def measured(architecture: Architecture, patch: tuple[int, ...], batch: int, compiled: bool) -> dict[str, Any]:
    """Bytes, and the planner's GB."""
    arguments = (architecture, patch, CHANNELS, CLASSES)
    traced = {"compiled": compiled_kept_bytes(*arguments)} if compiled else {}
    return {
        **traced,
        "levels": len(architecture["arch_kwargs"]["strides"]),
        "kept": kept_bytes(*arguments, mixed_precision=True, eager=True),
        "peak": step_bytes(*arguments, mixed_precision=True).peak,
        "estimated": round(estimated_bytes(*arguments, mixed_precision=True)),
        "gigabytes": round(estimated_gigabytes(architecture, patch, batch, CHANNELS, CLASSES, mixed_precision=True), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", nargs="+", choices=PATCHES, default=list(PATCHES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks, such as 'DeformUX, blocks'")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if unable_to_follow_autocast() is not None:
        sys.exit(unable_to_follow_autocast())
    record = {"about": describe(), "batch": 1, "bytes": {}}
    if options.output is not None and options.output.exists():
        record["bytes"] = json.loads(options.output.read_text())["bytes"]
    print(f"torch {torch.__version__}, {record['about']['date']}")
    print("| patch | network | levels | kept (MB) | peak (MB) | estimated (MB) | error | compiled (MB) | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for label in options.patch:
        patch, spacing, batch = PATCHES[label]
        rows = record["bytes"].setdefault(label, {})
        for name, architecture in contenders(planned_unet(patch, spacing), patch).items():
            if options.only is not None and name not in options.only:
                continue
            rows[name] = row = {**rows.get(name, {}), **measured(architecture, patch, batch, options.compiled)}
            compiled = f"{row['compiled'] / 1e6:.0f}" if "compiled" in row else "-"
            print(
                f"| {label} | {name} | {row['levels']} | {row['kept'] / 1e6:.0f} | {row['peak'] / 1e6:.0f} | "
                f"{row['estimated'] / 1e6:.0f} | {100 * (row['estimated'] / row['peak'] - 1):+.1f} % | {compiled} | "
                f"{row['gigabytes']:.1f} |",
                flush=True,
            )
            if options.output is not None:
                options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
