"""DeformUX-Net and its op-off twin from equal weights: what the deformable convolution does to the loss of short runs.

    python benchmarks/paired_starts.py [--steps 100] [--seeds 0 1 2] [--features 8 16 32 64 128] [--output FILE.json]

Both networks are trained on the same batches of two phantoms of 32^3 voxels, a bright and a dark ball on noise, with
nnU-Net's loss under deep supervision, in float32, by nnU-Net's SGD (0.01, momentum 0.99, weight decay 3e-5, polynomial
decay, gradients clipped to a norm of 12) and by AdamW at a constant 1e-3. At one seed they start from equal weights, so
the difference of their losses is the operator's. The loss is the one on 8 phantoms that no step has seen, beside it the
mean absolute offset there, in voxels of each level.
"""

import argparse
import json
from pathlib import Path

import torch
from networks import CLASSES
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn

from nnunet_deform.layers import DeformConv
from nnunet_deform.networks import DeformUXNet
from nnunet_deform.selftest.measuring import describe

PATCH = 32
LEVELS = 5
BATCH = 2
HELD_OUT = 8
RECIPES = ("SGD", "AdamW")


def phantoms(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, [count, 1, 32, 32, 32], and labels of the same shape: 1 in the bright ball, 2 in the dark one."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(PATCH, dtype=torch.float32)] * 3, indexing="ij"))
    labels = torch.zeros(count, 1, *[PATCH] * 3)
    for sample in labels[:, 0]:
        for label in (1, 2):
            centre = PATCH * (0.25 + 0.5 * torch.rand(3, 1, 1, 1, generator=generator))
            radius = PATCH * (0.1 + 0.15 * torch.rand((), generator=generator))
            sample[(grid - centre).square().sum(0) < radius.square()] = label
    noise = torch.randn(labels.shape, generator=generator)
    return noise + (labels == 1).float() - (labels == 2).float(), labels


def network_of(seed: int, features: list[int], deformable: bool) -> DeformUXNet:
    torch.manual_seed(seed)
    network = DeformUXNet(
        1,
        LEVELS,
        features,
        nn.Conv3d,
        [[3, 3, 3]] * LEVELS,
        [[1, 1, 1], *[[2, 2, 2]] * (LEVELS - 1)],
        CLASSES,
        deep_supervision=True,
        deformable=deformable,
    )
    return network.apply(network.initialize)


def loss_function() -> nn.Module:
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    # As nnU-Net weights its outputs: halved at each level, and none for the coarsest.
    weights = [2.0**-level for level in range(LEVELS - 2)]
    weights = [weight / sum(weights) for weight in weights] + [0.0]
    return DeepSupervisionWrapper(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss), weights)


def targets(labels: Tensor) -> list[Tensor]:
    return [labels[:, :, :: 2**level, :: 2**level, :: 2**level] for level in range(LEVELS - 1)]


def trained(network: DeformUXNet, recipe: str, steps: int, seed: int) -> DeformUXNet:
    parameters = network.parameters()
    if recipe == "SGD":
        optimizer = torch.optim.SGD(parameters, 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
        schedule = PolyLRScheduler(optimizer, 1e-2, steps)
    else:
        optimizer, schedule = torch.optim.AdamW(parameters, 1e-3, weight_decay=1e-4), None
    loss = loss_function()
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(steps):
        if schedule is not None:
            schedule.step(step)
        images, labels = phantoms(BATCH, generator)
        optimizer.zero_grad(set_to_none=True)
        loss(network(images), targets(labels)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
    return network


@torch.no_grad()
def held_out_loss(network: DeformUXNet) -> float:
    images, labels = phantoms(HELD_OUT, torch.Generator().manual_seed(0))
    return loss_function()(network.eval()(images), targets(labels)).item()


@torch.no_grad()
def mean_offset(network: DeformUXNet) -> float:
    """Mean over the deformable convolutions of the mean |offset| on the held-out phantoms."""
    found = []
    hooks = [
        module.register_forward_pre_hook(lambda conv, inputs: found.append(conv.offset(inputs[0]).abs().mean().item()))
        for module in network.modules()
        if isinstance(module, DeformConv)
    ]
    network.eval()(phantoms(HELD_OUT, torch.Generator().manual_seed(0))[0])
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--features", type=int, nargs=LEVELS, default=[8, 16, 32, 64, 128])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, with machine and versions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = describe()
    results = []
    for recipe in RECIPES:
        for seed in arguments.seeds:
            network, twin = (network_of(seed, arguments.features, deformable) for deformable in (True, False))
            before = [held_out_loss(network), held_out_loss(twin)]
            for one in (network, twin):
                trained(one, recipe, arguments.steps, seed)
            losses = [held_out_loss(network), held_out_loss(twin)]
            result = {
                "recipe": recipe,
                "seed": seed,
                "loss_before": before[0],
                "twin_loss_before": before[1],
                "loss": losses[0],
                "twin_loss": losses[1],
                "difference": losses[0] - losses[1],
                "mean_offset_voxels": mean_offset(network),
            }
            results.append(result)
            print(
                f"{recipe:5} seed {seed}: DeformUX-Net {losses[0]:+.4f}, twin {losses[1]:+.4f}, difference "
                f"{result['difference']:+.4f}, mean |offset| {result['mean_offset_voxels']:.4f} voxels",
                flush=True,
            )
    if arguments.output:
        settings = {"patch": [PATCH] * 3, "batch": BATCH, "steps": arguments.steps, "features": arguments.features}
        arguments.output.write_text(json.dumps({**about, **settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
