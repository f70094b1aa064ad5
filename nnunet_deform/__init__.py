"""nnunet-deform: new segmentation networks for nnU-Net v2, trained and run with its stock commands."""

__version__ = "0.2.0"
