"""From a stock nnU-Net plan to our architectures: pure functions, no trainer and no file."""

from nnunet_deform.plans.deformux import deformux_architecture
from nnunet_deform.plans.dynamic import dynamic_architecture
from nnunet_deform.plans.lightmedseg import lightmedseg_architecture
from nnunet_deform.plans.magic import magic_architecture
from nnunet_deform.plans.memory import estimated_gigabytes

__all__ = [
    "deformux_architecture",
    "dynamic_architecture",
    "estimated_gigabytes",
    "lightmedseg_architecture",
    "magic_architecture",
]
