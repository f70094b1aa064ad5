"""Made-up tasks of which it is known whether a network's operator helps, each beside the same task without the reason.

Distortion, for the deformable convolution. Discs are seen through a scanner that shifts every row by a known number
of pixels, as an echo-planar image is distorted along its phase-encoding axis; the shift is the image's second channel,
as a field map is. What is to be segmented are the discs where they truly are, so a pixel's label stands in the image
as many pixels away as the map says there. The plain twin's convolutions do not reach that far.

Changing contrast, for dynamic kernels. Of twelve structures six are bright and six dark. Which of them are diseased
changes from scan to scan, and a small tube at the edge of the image tells: the diseased ones are as bright or dark as
the tube. No structure is near enough to the tube for the static twin's convolutions to see both; what looks at the
whole scan can.

Networks are DeformUX-Net and MAGIC with their control, small enough for minutes on one core. What came out is in
docs/evidence/phantoms.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from nnunet_deform.layers import DeformConv, MagicConv
from nnunet_deform.networks import DeformUXNet, MagicPlainConvUNet

CLASSES = 2


@dataclass(frozen=True)
class Phantoms:
    """images: [n, channels, height, width]; labels: [n, 1, height, width], 1 in what is to be segmented; cause: what
    the operator should find out, of a :class:`Distortion` the shift [n, height, width] in pixels, of a
    :class:`ChangingContrast` 1 or -1 for each scan, [n], the tube being bright or dark."""

    images: Tensor
    labels: Tensor
    cause: Tensor


@dataclass(frozen=True)
class Task(ABC):
    """needed: whether the task has the property that the operator is for.

    seeds: of the trainings that are judged, not those that the task was designed with; reach: pixels along an axis
    beyond which nothing but a norm's statistics enters the twin's output; steps, rate,
    offset_rate: of the recipe, the last being that of the offset branches as a multiple of the rate.
    """

    needed: bool = True
    steps: int = 200
    rate: float = 1e-2
    offset_rate: float = 1
    reach: int = 4

    seeds: ClassVar[tuple[int, ...]]

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Phantoms:
        """``count`` phantoms at random."""

    @abstractmethod
    def network(self, seed: int, *, operator: bool = True, norms: bool = True) -> nn.Module:
        """The network or, without its operator, the twin, which at a seed starts from the same weights.

        Without norms, which carry something of the whole image to every pixel, one can measure how far convolutions
        reach."""

    @staticmethod
    @abstractmethod
    def switched_off() -> Iterator[None]:
        """Within this context the operator's code is broken so that it does nothing."""


@dataclass(frozen=True)
class Distortion(Task):
    """Discs in images of 24 x 64 pixels; ``needed``: the image is distorted."""

    rate: float = 5e-3
    offset_rate: float = 10
    reach: int = 3

    seeds = (1, 2, 3, 4, 5, 6, 7)
    size = (24, 64)
    largest_shift = 14.0
    discs = 4
    noise = 0.1

    def draw(self, count: int, generator: torch.Generator) -> Phantoms:
        height, width = self.size
        wavelength = 40 + 20 * torch.rand(count, 1, 1, generator=generator)
        phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
        rows = torch.arange(height, dtype=torch.float32).view(1, -1, 1)
        shift = (self.largest_shift * torch.sin(2 * math.pi * rows / wavelength + phase)).expand(-1, -1, width)
        # So far from the sides that what is shifted stays in the image.
        margin = self.largest_shift + 4
        room = torch.tensor([height, width - 2 * margin])
        centres = torch.rand(count, self.discs, 2, generator=generator) * room + torch.tensor([0, margin])
        radii = 2.5 + 1.5 * torch.rand(count, self.discs, generator=generator)
        noise = self.noise * torch.randn(count, height, width, generator=generator)
        return self.rendered(centres, radii, shift, noise)

    def rendered(self, centres: Tensor, radii: Tensor, shift: Tensor, noise: Tensor) -> Phantoms:
        """Of discs [n, discs, 2] and [n, discs], the shift and the noise, both [n, height, width]."""
        columns = torch.arange(self.size[1], dtype=torch.float32).expand_as(shift)
        seen = self._depth(centres, radii, columns - shift if self.needed else columns)
        # An edge of two pixels.
        image = seen.clamp(-1, 1) + noise
        labels = (self._depth(centres, radii, columns) > 0).float()
        return Phantoms(torch.stack([image, shift / self.largest_shift], 1), labels.unsqueeze(1), shift)

    def _depth(self, centres: Tensor, radii: Tensor, columns: Tensor) -> Tensor:
        """How deep inside a disc the anatomy's point in each row at this column is; negative outside."""
        rows = torch.arange(self.size[0], dtype=torch.float32).view(1, 1, -1, 1)
        down = rows - centres[..., 0, None, None]
        right = columns.unsqueeze(1) - centres[..., 1, None, None]
        return (radii[..., None, None] - (down.square() + right.square()).sqrt()).amax(1)

    def network(self, seed: int, *, operator: bool = True, norms: bool = True) -> DeformUXNet:
        """Two levels of the same resolution; convolutions larger than a point are at the second only, where there is
        one deformable convolution."""
        torch.manual_seed(seed)
        network = DeformUXNet(
            2,
            2,
            [8, 16],
            nn.Conv2d,
            [[1, 1], [3, 3]],
            [[1, 1], [1, 1]],
            CLASSES,
            n_blocks_per_stage=1,
            norm_op=nn.InstanceNorm2d if norms else nn.Identity,
            norm_op_kwargs={"affine": True},
            deformable=operator,
        )
        return network.apply(network.initialize)

    @staticmethod
    @contextmanager
    def switched_off() -> Iterator[None]:
        """Offsets are multiplied by zero."""
        offsets = DeformConv.offsets
        with mock.patch.object(DeformConv, "offsets", lambda layer, x: 0 * offsets(layer, x)):
            yield


@dataclass(frozen=True)
class ChangingContrast(Task):
    """Structures in images of 48 x 64 pixels; ``needed``: the tube says which are diseased, otherwise the bright ones
    always are; tube: its radius in pixels."""

    tube: float = 1.8

    seeds = (31, 32, 33, 34, 35, 36, 37)
    size = (48, 64)
    tube_brightness = 2.5
    tube_centre = (6, 6)
    noise = 0.3
    norm = nn.InstanceNorm2d
    # Rows and columns of structures, which do not touch, and what is left free of them at the side of the tube.
    grid = (3, 4)
    free = 18

    def draw(self, count: int, generator: torch.Generator) -> Phantoms:
        number = math.prod(self.grid)
        tube = 2.0 * torch.randint(2, (count,), generator=generator) - 1
        order = torch.rand(count, number, generator=generator).argsort(1)
        structures = torch.where(order < number // 2, 1.0, -1.0)
        jitter = 3 * torch.rand(count, number, 2, generator=generator) - 1.5
        radii = 3 + torch.rand(count, number, generator=generator)
        noise = self.noise * torch.randn(count, *self.size, generator=generator)
        return self.rendered(tube, structures, jitter, radii, noise)

    def rendered(self, tube: Tensor, structures: Tensor, jitter: Tensor, radii: Tensor, noise: Tensor) -> Phantoms:
        """Of the tube [n] and the structures [n, number], each 1 where bright and -1 where dark, the latter's distance
        from the middle of their cell [n, number, 2] and radii [n, number], and the noise [n, height, width]."""
        height, width = self.size
        cell = torch.tensor([height / self.grid[0], (width - self.free) / self.grid[1]])
        numbers = torch.cartesian_prod(*(torch.arange(cells) for cells in self.grid))
        centres = (numbers + 0.5) * cell + torch.tensor([0, self.free]) + jitter
        depth = self._depth(centres, radii)
        # An edge of one pixel.
        image = (structures[..., None, None] * (depth + 0.5).clamp(0, 1)).sum(1)
        in_tube = self._depth(torch.tensor([[self.tube_centre]]), torch.tensor([[self.tube]]))[:, 0]
        image += self.tube_brightness * tube[:, None, None] * (in_tube + 0.5).clamp(0, 1)
        diseased = structures == tube[:, None] if self.needed else structures > 0
        labels = ((depth > 0) & diseased[..., None, None]).any(1, keepdim=True).float()
        return Phantoms((image + noise).unsqueeze(1), labels, tube)

    def _depth(self, centres: Tensor, radii: Tensor) -> Tensor:
        rows = torch.arange(self.size[0], dtype=torch.float32).view(-1, 1) - centres[..., 0, None, None]
        columns = torch.arange(self.size[1], dtype=torch.float32) - centres[..., 1, None, None]
        return radii[..., None, None] - (rows.square() + columns.square()).sqrt()

    def network(self, seed: int, *, operator: bool = True, norms: bool = True) -> MagicPlainConvUNet:
        """nnU-Net's U-Net of two levels with one convolution at each; that of the second level is dynamic."""
        torch.manual_seed(seed)
        control = {} if operator else {"attention": "uniform", "keep_dead_attention": True}
        network = MagicPlainConvUNet(
            1,
            2,
            [8, 16],
            nn.Conv2d,
            [[3, 3], [3, 3]],
            [[1, 1], [2, 2]],
            [1, 1],
            CLASSES,
            [1],
            conv_bias=True,
            norm_op=self.norm if norms else None,
            norm_op_kwargs={"affine": True, "eps": 1e-5} if norms else None,
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            reduction=1,
            **control,
        )
        return network.apply(network.initialize)

    @staticmethod
    @contextmanager
    def switched_off() -> Iterator[None]:
        """Every kernel gets the mean of all kernels' weights."""
        weights = MagicConv.mixing_weights

        def mean(layer: MagicConv, x: Tensor) -> Tensor:
            return weights(layer, x).mean(1, keepdim=True).expand(-1, layer.n_kernels)

        with mock.patch.object(MagicConv, "mixing_weights", mean):
            yield


class ChangingContrastWithBatchNorm(ChangingContrast):
    """With the norm of MAGIC's paper, which once trained does not look at the image."""

    norm = nn.BatchNorm2d


TASKS: dict[str, Task] = {
    "distortion": Distortion(),
    "no distortion": Distortion(needed=False),
    "contrast changes": ChangingContrast(),
    "contrast stays": ChangingContrast(needed=False),
    # InstanceNorm tells every pixel of the static twin which tube there is, if it is large. BatchNorm does not.
    "large tube": ChangingContrast(tube=4.0),
    "large tube, BatchNorm": ChangingContrastWithBatchNorm(tube=4.0),
}
