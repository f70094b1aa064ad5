"""What the tests of the dynamic convolutions share."""

import torch
from torch import Tensor, nn

CONV = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
SIZE = {2: (5, 6), 3: (3, 4, 5)}

# The 3x3 convolutions of ResNet18, on which the papers' tables count.
RESNET18 = [*[(64, 64)] * 4, (64, 128), *[(128, 128)] * 3, (128, 256), *[(256, 256)] * 3, (256, 512), *[(512, 512)] * 3]
RESNET18_STATIC = 10_985_472


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def volume(ndim: int, channels: int = 8, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, *SIZE[ndim], dtype=torch.float64)


def stirred(layer: nn.Module, scale: float = 0.5) -> nn.Module:
    """Noise on every parameter: nothing stays at an initial zero or one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return layer


def assert_same_gradients(ours: Tensor, theirs: Tensor, leaves: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Of two outputs with respect to the same leaves."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    grad_output = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, list(leaves.values()), grad_output)
    found = torch.autograd.grad(ours, list(leaves.values()), grad_output)
    for name, one, other in zip(leaves, found, expected, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale, msg=lambda t, name=name: f"{name}: {t}")
        assert other.count_nonzero() > 0, name


def normalised(x: Tensor, eps: float = 1e-14) -> Tensor:
    """InstanceNorm behind a layer."""
    return torch.nn.functional.instance_norm(x, eps=eps)


def behind_a_norm(batch: int, channels: int, size: tuple[int, ...]) -> Tensor:
    """What a layer sees in nnU-Net's networks, of features of different shapes of histogram."""
    features = torch.randn(batch, channels, *size, dtype=torch.float64)
    features = features.sign() * features.abs() ** (0.5 + 2 * torch.rand(batch, channels, *[1] * len(size)))
    return torch.nn.functional.leaky_relu(torch.nn.functional.instance_norm(features), 0.01)
