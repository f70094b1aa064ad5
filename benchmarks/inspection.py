"""Time and memory of ``nnunet-deform inspect``'s passes beside a mirrored prediction and a training step.

    python benchmarks/inspection.py [--patch 128 128 128] [--classes 3] [--voxels 4] [--threads 1]

nnU-Net's PlainConvUNet of the widths that it plans for such a patch, random weights and image, one case of one patch,
float32 on a CPU. Prints seconds of each part and its peak of resident memory above what the process held before; each
part runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from nnunet_deform.processes.memory import most_resident

WIDTHS = (32, 64, 128, 256, 320, 320)


def network(classes: int) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    torch.manual_seed(0)
    levels = len(WIDTHS)
    return PlainConvUNet(
        *(1, levels, WIDTHS, nn.Conv3d, 3, [1] + [2] * (levels - 1), 2, classes + 1, 2),
        **{"conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}},
        **{"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}},
    )


def prediction(net: nn.Module, image: torch.Tensor, _: Any) -> None:
    """Mirrored, as nnU-Net does: eight passes."""
    with torch.inference_mode():
        for axes in ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)):
            net(image.flip(axes))


def activation(net: nn.Module, image: torch.Tensor, options: argparse.Namespace) -> None:
    from nnunet_deform.inspection.activation_maps import activation_maps, levels

    everywhere = torch.ones(image.shape[2:], dtype=torch.bool)
    scores = [(head, everywhere) for head in range(1, options.classes + 1)]
    activation_maps(net, image, scores, [layer.name for layer in levels(net, image)])


def receptive(net: nn.Module, image: torch.Tensor, options: argparse.Namespace) -> None:
    from nnunet_deform.inspection.receptive_field import receptive_field

    receptive_field(net, [image[0]] * options.voxels, 1)


def training(net: nn.Module, image: torch.Tensor, _: Any) -> None:
    net.train().requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99, nesterov=True)
    net(image).logsumexp(1).mean().backward()
    optimizer.step()


PARTS = {
    "mirrored prediction": prediction,
    "activation maps": activation,
    "receptive field": receptive,
    "training step, batch 1": training,
}


def measure(part: str, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    run: Callable[..., None] = PARTS[part]
    net = network(options.classes).eval().requires_grad_(False)
    image = torch.randn(1, 1, *options.patch)
    before = most_resident()
    started, used = time.perf_counter(), time.process_time()
    run(net, image, options)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    peak = most_resident() - before
    return {"seconds": round(seconds, 1), "processor": round(processor, 1), "GB": round(peak / 1e9, 2)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[128, 128, 128])
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--voxels", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    context = multiprocessing.get_context("spawn")
    for part in PARTS:
        with ProcessPoolExecutor(1, context) as pool:
            result = pool.submit(measure, part, options).result()
        print(json.dumps({"part": part, **result}), flush=True)


if __name__ == "__main__":
    main()
