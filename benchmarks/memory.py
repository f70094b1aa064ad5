"""What the planner estimates, beside what autograd keeps: the table of docs/planning.md.

    python benchmarks/memory.py [--patch NAME ...] [--compiled] [--output FILE.json]

For the patches that nnU-Net plans, each network in the place of its U-Net, one channel and three classes, float16
autocast on fake CUDA tensors, so no GPU is needed, but a torch for CUDA, from 2.11 on. Kept bytes are of the tensors
saved for the backward pass, of one sample: of the plain form, which the planner estimates; of an eager training step,
which computes cheap things again, and with recompute="blocks" whole blocks; and of a compiled one, as inductor's
partition has it (--compiled; minutes for each network). The peak is the most that an eager step holds at one time of
its backward pass: what is kept and made again, and the gradients of feature maps. GB are the planner's for a step of
batch 2 (12 in 2D).
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
    """Bytes, and the planner's GB; what is estimated and the plain form do not depend on the mode."""
    arguments = (architecture, patch, CHANNELS, CLASSES)
    step = step_bytes(*arguments)
    return {
        "levels": len(architecture["arch_kwargs"]["strides"]),
        "estimated": round(estimated_bytes(*arguments, mixed_precision=True)),
        "plain": kept_bytes(*arguments, mixed_precision=True),
        "eager": kept_bytes(*arguments, mixed_precision=True, eager=True),
        "peak": step.peak,
        "compiled": compiled_kept_bytes(*arguments) if compiled else None,
        "gigabytes": round(estimated_gigabytes(architecture, patch, batch, CHANNELS, CLASSES, mixed_precision=True), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", nargs="+", choices=PATCHES, default=list(PATCHES))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if unable_to_follow_autocast() is not None:
        sys.exit(unable_to_follow_autocast())
    record = {"about": describe(), "batch": 1, "bytes": {}}
    print(f"torch {torch.__version__}, {record['about']['date']}")
    print("| patch | network | levels | estimated (MB) | plain form (MB) | error | eager | peak | compiled | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for label in options.patch:
        patch, spacing, batch = PATCHES[label]
        rows = record["bytes"].setdefault(label, {})
        for name, architecture in contenders(planned_unet(patch, spacing), patch).items():
            rows[name] = row = measured(architecture, patch, batch, options.compiled)
            mega = {key: "-" if row[key] is None else f"{row[key] / 1e6:.0f}" for key in ("eager", "peak", "compiled")}
            print(
                f"| {label} | {name} | {row['levels']} | {row['estimated'] / 1e6:.0f} | {row['plain'] / 1e6:.0f} | "
                f"{100 * (row['estimated'] / row['plain'] - 1):+.1f} % | {mega['eager']} | {mega['peak']} | "
                f"{mega['compiled']} | {row['gigabytes']:.1f} |",
                flush=True,
            )
            if options.output is not None:
                options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
