"""The networks, one in a file, and their registry. They know no trainer."""

from nnunet_deform.networks.deformux import DeformUXNet

NETWORKS = {"DeformUXNet": DeformUXNet}

__all__ = ["NETWORKS", "DeformUXNet"]
