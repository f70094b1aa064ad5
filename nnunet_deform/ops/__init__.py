"""Functions on tensors: the operators the networks are made of. They know nothing of modules or of nnU-Net."""

from nnunet_deform.ops.autocast import autocast_as_now, autocast_disabled, autocast_dtype, autocast_to
from nnunet_deform.ops.backends import BACKEND_VARIABLE, Backend, backends_for, choose_backend
from nnunet_deform.ops.compiling import compiled_on_cpu
from nnunet_deform.ops.deform_conv import deform_conv2d, deform_conv3d
from nnunet_deform.ops.dynamic_conv import ConvImpl, dynamic_conv2d, dynamic_conv3d, mixed_conv
from nnunet_deform.ops.few_channels import concatenate_channels, few_channel_conv
from nnunet_deform.ops.ghost import opaque_ghost_features
from nnunet_deform.ops.group_norm import group_norm_silu, opaque_group_norm
from nnunet_deform.ops.layer_norm import opaque_layer_norm
from nnunet_deform.ops.layouts import CHANNELS_LAST
from nnunet_deform.ops.mixture import mixture_behind_norms, opaque_mixture
from nnunet_deform.ops.mlp import mlp
from nnunet_deform.ops.pooling import voxel_statistics
from nnunet_deform.ops.resampling import resample_linear
from nnunet_deform.ops.residual import residual_block
from nnunet_deform.ops.squeeze_excite import opaque_squeeze_excite
from nnunet_deform.ops.standardize import standardize
from nnunet_deform.ops.steered_conv import steered_deform_conv

__all__ = [
    "BACKEND_VARIABLE",
    "CHANNELS_LAST",
    "Backend",
    "ConvImpl",
    "autocast_as_now",
    "autocast_disabled",
    "autocast_dtype",
    "autocast_to",
    "backends_for",
    "choose_backend",
    "compiled_on_cpu",
    "concatenate_channels",
    "deform_conv2d",
    "deform_conv3d",
    "dynamic_conv2d",
    "dynamic_conv3d",
    "few_channel_conv",
    "group_norm_silu",
    "mixed_conv",
    "mixture_behind_norms",
    "mlp",
    "opaque_ghost_features",
    "opaque_group_norm",
    "opaque_layer_norm",
    "opaque_mixture",
    "opaque_squeeze_excite",
    "resample_linear",
    "residual_block",
    "standardize",
    "steered_deform_conv",
    "voxel_statistics",
]
