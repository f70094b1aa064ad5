"""Functions on tensors: the operators the networks are made of. They know nothing of modules or of nnU-Net."""

from nnunet_deform.ops.backends import BACKEND_VARIABLE, Backend, backends_for, choose_backend
from nnunet_deform.ops.deform_conv import deform_conv2d, deform_conv3d
from nnunet_deform.ops.few_channels import CHANNELS_LAST, concatenate_channels, few_channel_conv

__all__ = [
    "BACKEND_VARIABLE",
    "CHANNELS_LAST",
    "Backend",
    "backends_for",
    "choose_backend",
    "concatenate_channels",
    "deform_conv2d",
    "deform_conv3d",
    "few_channel_conv",
]
