"""What the planner estimates, beside what autograd keeps: the table of docs/planning.md.

    python benchmarks/memory.py

For the patches that nnU-Net plans, each network in the place of its U-Net, one channel and three classes, float16
autocast on fake CUDA tensors, so no GPU is needed, but a torch for CUDA, from 2.11 on. Kept bytes are of the tensors
saved for the backward pass, of one sample: of the plain form, which compilers get and which the planner estimates, and
of an eager training step, which computes cheap things again. GB are the planner's for a step of batch 2 (12 in 2D).
"""

import sys

import torch
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_deform.networks.memory import unable_to_follow_autocast
from nnunet_deform.plans import estimated_gigabytes
from nnunet_deform.plans.architecture import Architecture
from nnunet_deform.plans.memory import estimated_bytes, kept_bytes
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


def main() -> None:
    if unable_to_follow_autocast() is not None:
        sys.exit(unable_to_follow_autocast())
    print(f"torch {torch.__version__}, {describe()['date']}")
    print("| patch | network | levels | kept, estimated (MB) | kept, measured (MB) | error | kept, eager (MB) | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for label, (patch, spacing, batch) in PATCHES.items():
        unet = planned_unet(patch, spacing)
        networks = {"PlainConvUNet": unet} | {
            planner.label: planner.architecture(unet, patch) for planner in PLANNERS.values()
        }
        for name, architecture in networks.items():
            arguments = (architecture, patch, CHANNELS, CLASSES)
            estimate = estimated_bytes(*arguments, mixed_precision=True)
            measured = kept_bytes(*arguments, mixed_precision=True)
            eager = kept_bytes(*arguments, mixed_precision=True, eager=True)
            gigabytes = estimated_gigabytes(architecture, patch, batch, CHANNELS, CLASSES, mixed_precision=True)
            print(
                f"| {label} | {name} | {len(architecture['arch_kwargs']['strides'])} | {estimate / 1e6:.0f} | "
                f"{measured / 1e6:.0f} | {100 * (estimate / measured - 1):+.1f} % | {eager / 1e6:.0f} | "
                f"{gigabytes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
