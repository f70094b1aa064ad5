"""A network on nnU-Net's terms: images of any size, and a list of logits under deep supervision."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nnunet_deform.networks.topology import crop_to_image, pad_to_levels

Strides = Sequence[Sequence[int]]


class _Decoder(nn.Module):
    """Where nnU-Net's trainer switches deep supervision; the layers of the decoder are elsewhere."""

    def __init__(self, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision


class SegmentationHead(nn.Module):
    """The layers that depend on the number of classes, under the name by which nnU-Net's ``-pretrained_weights`` leaves
    them out, so that weights go over to other labels."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList([head])

    def forward(self, x: Tensor) -> Tensor:
        return self.seg_layers[0](x)


class AnySizeNetwork(nn.Module):
    """A network that takes images of any size, [B, C, *spatial], padded with zeros at the end of each axis.

    A subclass returns the logits of a padded image from ``logits``, and calls ``freeze_unused`` once it is built.

    Args:
        strides: of each level to the one before; their product on an axis is what sizes are padded to.
        output_strides: of each of the logits to the one before. With a single one there is no deep supervision.
        deep_supervision: return all logits instead of the finest. ``decoder.deep_supervision`` changes it.
    """

    def __init__(self, strides: Strides, output_strides: Strides, deep_supervision: bool) -> None:
        super().__init__()
        self.strides = strides
        self.output_strides = output_strides
        self.decoder = _Decoder(deep_supervision)

    def freeze_unused(self, coarse_heads: Iterable[nn.Module]) -> None:
        """Without deep supervision, let the layers that only it needs not be trained. They are always built, so that
        weights load either way."""
        if not self.decoder.deep_supervision:
            for head in coarse_heads:
                head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        size = x.shape[2:]
        logits = self.logits(pad_to_levels(x, self.strides))
        if not self.decoder.deep_supervision or len(self.output_strides) == 1:
            return crop_to_image(logits[0], size, self.output_strides)
        step = [1] * len(size)
        aligned = []
        for cropped, stride in zip(crop_to_image(logits, size, self.output_strides), self.output_strides, strict=True):
            step = [one * other for one, other in zip(step, stride, strict=True)]
            aligned.append(_equal_parts(cropped, size, step))
        return aligned

    def logits(self, x: Tensor) -> list[Tensor]:
        """Of a padded image, finest first; the coarse ones may be left out where deep supervision is off."""
        raise NotImplementedError


class PaddedNetwork(AnySizeNetwork):
    """A library's network for images of any size, as in :class:`AnySizeNetwork`.

    Args:
        network: returns the logits, [B, C, *spatial].
        strides, output_strides, deep_supervision: as in :class:`AnySizeNetwork`.
        coarse_heads: the layers that only deep supervision needs.
    """

    def __init__(
        self,
        network: nn.Module,
        strides: Strides,
        output_strides: Strides,
        coarse_heads: Sequence[nn.Module],
        deep_supervision: bool,
    ) -> None:
        super().__init__(strides, output_strides, deep_supervision)
        self.network = network
        self.freeze_unused(coarse_heads)

    def logits(self, x: Tensor) -> list[Tensor]:
        return [self.network(x)]


def _equal_parts(logits: Tensor, size: Sequence[int], step: Sequence[int]) -> Tensor:
    """The logits of voxels ``step`` wide, interpolated at the centres of as many equal parts of the image.

    A level's stride need not divide the image, because it need not be one of the plan's. The last voxel then reaches
    beyond the image, while nnU-Net scales its segmentation to the same number of voxels, all of them inside.
    """
    for axis, (s, along) in enumerate(zip(size, step, strict=True), start=2):
        parts = logits.shape[axis]
        if parts * along == s:
            continue
        centres = (torch.arange(parts, device=logits.device) + 0.5) * (s / (parts * along)) - 0.5
        before = centres.clamp(min=0).long()
        after = (before + 1).clamp(max=parts - 1)
        weight = (centres - before).clamp(min=0).view(-1, *[1] * (logits.ndim - 1 - axis))
        logits = torch.lerp(
            logits.index_select(axis, before), logits.index_select(axis, after), weight.to(logits.dtype)
        )
    return logits
