"""One training step of each main network against the same step in float64 on the CPU with the torch backend."""

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_deform.ops import BACKEND_VARIABLE
from nnunet_deform.plans import deformux_architecture, lightmedseg_architecture, magic_architecture
from nnunet_deform.selftest.operators import exact_float32

PATCH, BATCH, CLASSES = (12, 20, 16), 2, 3
FEATURES = [16, 32, 48]
ARCHITECTURES = {
    "DeformUX-Net": lambda base: deformux_architecture(base, PATCH, features_per_stage=FEATURES),
    "LightMedSeg": lambda base: lightmedseg_architecture(base, PATCH),
    "MAGIC": lambda base: magic_architecture(base, PATCH),
    "MAGIC, residual encoder": lambda base: magic_architecture(base, PATCH, encoder="residual"),
}
# "compiled" is nnU-Net's default on a GPU.
MODES = ("float32", "autocast", "compiled")

# Error of the loss over the loss, and norm of the error of all gradients over their norm. In float32 on a CPU the
# latter is 1e-6, for MAGIC 2e-4; in bfloat16 0.13 (DeformUX-Net), 0.04 (LightMedSeg) and 0.44 (MAGIC, whose attention
# is standardised). Gradients that are zero are off by 1, those that have nothing to do with the step by more.
TOLERANCE = {"float32": (1e-5, 2e-3), "autocast": (1e-2, 0.6), "compiled": (1e-5, 2e-3)}


# What a GradScaler does: gradients that float16 would round to zero.
SCALE = 2.0**10


def _stock_plan() -> dict[str, Any]:
    levels = len(FEATURES)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": FEATURES,
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


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name](_stock_plan())
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        CLASSES,
        allow_init=True,
        deep_supervision=True,
    )
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("offset.bias"):
            # As training moves them; at zero every sample would be an exact voxel.
            nn.init.normal_(parameter, std=0.5)
    return network.train()


def check_step(device: str, name: str, mode: str) -> dict[str, Any]:
    """The errors of loss and gradients, and a "fault" where they are too large or a weight is not finite."""
    network = _network(name)
    expected = copy.deepcopy(network).double()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(BATCH, 1, *PATCH, generator=generator)
    target = torch.randint(CLASSES, (BATCH, 1, *PATCH), generator=generator).float()
    before = os.environ.pop(BACKEND_VARIABLE, None)
    try:
        os.environ[BACKEND_VARIABLE] = "torch"
        true_loss, true_gradients = _step(expected, image.double(), target, nullcontext())
        del os.environ[BACKEND_VARIABLE]
        network = network.to(device)
        kind = device.split(":")[0]
        # As in nnU-Net: torch's own choice of dtype.
        context = torch.autocast(kind) if mode == "autocast" else nullcontext()
        stepping = torch.compile(network) if mode == "compiled" else network
        with exact_float32():
            scale = SCALE if mode == "autocast" else 1
            loss, gradients = _step(stepping, image.to(device), target.to(device), context, scale)
    finally:
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before
    errors = {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "gradients": float(torch.linalg.vector_norm(gradients - true_gradients) / true_gradients.norm()),
    }
    result: dict[str, Any] = {"errors": errors}
    for (what, error), allowed in zip(errors.items(), TOLERANCE[mode], strict=True):
        if not error <= allowed:
            result["fault"] = f"the error of the {what} is {error:.1e} of the norm, where {allowed:.0e} is allowed"
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        result["fault"] = "a weight is not finite after the step"
    return result


def _step(
    network: nn.Module, image: Tensor, target: Tensor, context: AbstractContextManager[Any], scale: float = 1
) -> tuple[float, Tensor]:
    """Forward, nnU-Net's loss under deep supervision, backward and SGD; loss and gradients in float64."""
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss_of = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True)
    with context:
        outputs = network(image)
        weights = [1 / 2**level for level in range(len(outputs))]
        targets = [F.interpolate(target, output.shape[2:]) for output in outputs]
        loss = DeepSupervisionWrapper(loss_of, weights)(outputs, targets)
    (scale * loss).backward()
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale
    gradients = torch.cat([p.grad.cpu().double().flatten() for p in network.parameters() if p.grad is not None])
    optimizer.step()
    return float(loss.detach()), gradients
