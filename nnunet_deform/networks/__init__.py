"""The networks, one in a file, and their registry. They know no trainer."""

from nnunet_deform.networks.deformux import DeformUXNet
from nnunet_deform.networks.lightmedseg import LightMedSeg

NETWORKS = {"DeformUXNet": DeformUXNet, "LightMedSeg": LightMedSeg}

__all__ = ["NETWORKS", "DeformUXNet", "LightMedSeg"]
