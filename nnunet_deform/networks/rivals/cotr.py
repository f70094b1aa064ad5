r"""CoTr: a residual CNN whose two coarsest maps become tokens of a deformable transformer, and a convolutional decoder.

Y. Xie, J. Zhang, C. Shen, Y. Xia, "CoTr: Efficiently Bridging CNN and Transformer for 3D Medical Image Segmentation",
MICCAI 2021, arXiv:2103.03024. Written from the published method and figures alone.

With x the tokens of both maps together, s their sines of positions and e a learnt vector for each of the two levels:

    MSDA(x) = W ||_heads sum_{level, point} a (V x)_level(c + o),  a = softmax(W_a (x + s + e)),  o = W_o (x + s + e)
    x <- LN(x + MSDA(x)),  x <- LN(x + MLP(x))                                              six layers
    y = R(up(tokens_2) + tokens_1),  y <- R(up(y) + skip)                                   decoder

c is a token's own centre relative to the image and o in voxels of the sampled level, which is read trilinearly and zero
outside. R is a residual block of two convolutions.

Differences from the published network:

- The strides follow nnU-Net's plan, in 3D and 2D, and halve with ceil; the plan needs four poolings. In 2D it is our
  generalisation.
- A token without offsets reads its own voxel. The released code builds positions in another order of axes than its
  sampler reads them in.
- Offsets start along both directions of each axis, one to four voxels long.
- Sampling needs no compiled operator; positions are float32 also under autocast.
- Coarse heads are always built, and not trained without deep supervision.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from torch import Tensor, nn

from nnunet_deform.layers.transformer import TransformerMLP
from nnunet_deform.networks.padding import AnySizeNetwork, SegmentationHead, Strides
from nnunet_deform.networks.rivals.geometry import LEAKY_RELU_SLOPE, cropped_to, expanding_conv
from nnunet_deform.ops.autocast import autocast_disabled

DEPTHS = (3, 3, 2)
LEVELS = 2
POINTS = 4
DROPOUT = 0.1
LONGEST_PERIOD = 10_000


class NormedConv(nn.Sequential):
    """Convolution without bias that rounds up, InstanceNorm, and LeakyReLU if wanted."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: Sequence[int], *, activation: bool = True
    ) -> None:
        ndim = len(stride)
        conv_op, norm_op = convert_dim_to_conv_op(ndim), get_matching_instancenorm(dimension=ndim)
        super().__init__(
            conv_op(in_channels, out_channels, kernel, tuple(stride), kernel // 2, bias=False),
            norm_op(out_channels, affine=True),
            *([nn.LeakyReLU(LEAKY_RELU_SLOPE, inplace=True)] if activation else []),
        )


class BackboneBlock(nn.Module):
    """[B, in, *spatial] -> [B, out, *ceil(spatial / stride)]."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.body = NormedConv(in_channels, out_channels, 3, stride, activation=False)
        same = in_channels == out_channels and all(step == 1 for step in stride)
        self.shortcut = nn.Identity() if same else NormedConv(in_channels, out_channels, 1, stride, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.body(x) + self.shortcut(x), LEAKY_RELU_SLOPE, inplace=True)


class DecoderBlock(nn.Module):
    """R of the equations, [B, C, *spatial] -> the same."""

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(NormedConv(channels, channels, 3, [1] * ndim) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DeformableAttention(nn.Module):
    """MSDA of the equations: the tokens of all levels, [B, N, C], and their queries -> [B, N, C].

    Args:
        channels: C, a multiple of ``heads``.
        heads: each with ``POINTS`` samples at each level.
        ndim: number of spatial axes.
    """

    def __init__(self, channels: int, heads: int, ndim: int) -> None:
        super().__init__()
        self.heads = heads
        self.ndim = ndim
        self.value = nn.Linear(channels, channels)
        self.offset = nn.Linear(channels, heads * LEVELS * POINTS * ndim)
        self.weight = nn.Linear(channels, heads * LEVELS * POINTS)
        self.output = nn.Linear(channels, channels)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)
        directions = torch.zeros(heads, 1, 1, ndim)
        for head in range(heads):
            directions[head, ..., head // 2 % ndim] = -1.0 if head % 2 else 1.0
        lengths = torch.arange(1.0, POINTS + 1)[:, None]
        with torch.no_grad():
            self.offset.bias.copy_((directions * lengths).expand(-1, LEVELS, -1, -1).flatten())

    def forward(self, x: Tensor, queries: Tensor, centres: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """
        Args:
            x: tokens of the levels, one level after the other.
            queries: of the same shape.
            centres: [N, ndim], of each token, from 0 to 1 on each axis.
            sizes: of the levels' maps.
        """
        batch = x.shape[0]
        values = self.value(x).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        weights = self.weight(queries).unflatten(-1, (self.heads, LEVELS * POINTS)).float().softmax(dim=-1)
        weights = weights.unflatten(-1, (LEVELS, POINTS)).permute(3, 0, 2, 1, 4).flatten(1, 2)
        offsets = self.offset(queries).unflatten(-1, (self.heads, LEVELS, POINTS, self.ndim)).float()
        # Both with the level first, then samples and heads together.
        offsets = offsets.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
        attended = []
        with autocast_disabled(x.device.type):
            for level, (size, tokens) in enumerate(zip(sizes, _by_level(values.float(), sizes), strict=True)):
                # The sampler's coordinates go from -1 to 1, the last axis first.
                along = [
                    2 * (centre[:, None] + offset / s) - 1
                    for centre, offset, s in zip(centres.unbind(-1), offsets[level].unbind(-1), size, strict=True)
                ]
                grid = torch.stack(along[::-1], dim=-1)
                grid = grid if self.ndim == 2 else grid[:, :, :, None]
                sampled = F.grid_sample(tokens, grid, "bilinear", "zeros", align_corners=False).flatten(3)
                attended.append((sampled * weights[level][:, None]).sum(dim=-1))
        joined = sum(attended).unflatten(0, (batch, self.heads)).flatten(1, 2).transpose(1, 2)
        return self.output(joined.to(x.dtype))


def _by_level(tokens: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """[B, C, N] -> of each level [B, C, *size]."""
    levels = tokens.split([math.prod(size) for size in sizes], dim=-1)
    return [level.unflatten(-1, list(size)) for level, size in zip(levels, sizes, strict=True)]


class TransformerLayer(nn.Module):
    """A layer of the equations, [B, N, C] -> the same."""

    def __init__(self, channels: int, heads: int, ndim: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, heads, ndim)
        self.dropout = nn.Dropout(DROPOUT)
        self.norm = nn.LayerNorm(channels)
        self.mlp = TransformerMLP(channels, 4 * channels, DROPOUT)
        self.mlp_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        x = self.norm(x + self.dropout(self.attention(x, x + positions, centres, sizes)))
        return self.mlp_norm(x + self.mlp(x))


def _centres(size: Sequence[int], device: torch.device) -> Tensor:
    """[tokens, ndim]: of each voxel of a map, from 0 to 1 on each axis."""
    along = [(torch.arange(s, device=device, dtype=torch.float32) + 0.5) / s for s in size]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), dim=-1).flatten(0, -2)


def _sines(centres: Tensor, channels: int) -> Tensor:
    """[tokens, ndim] -> [tokens, channels]: sines and cosines of each axis, an equal share of the channels for each."""
    ndim = centres.shape[1]
    share = channels // ndim
    feature = torch.arange(share, device=centres.device)
    angles = 2 * math.pi * centres[..., None] / LONGEST_PERIOD ** (ndim * (feature // ndim) / share)
    return torch.where(feature % 2 == 0, angles.sin(), angles.cos()).flatten(1)


class CoTr(AnySizeNetwork):
    """CoTr for images of any size, [B, input_channels, *spatial] -> logits [B, num_classes, *spatial].

    With deep supervision a list: at full resolution and at the three levels below.

    Args:
        strides: of the five levels, the first all ones.
        output_strides: of each of the logits to the one before.
        widths: of the maps below full resolution, finest first; the two coarsest share the last, a multiple of
            ``heads`` and of the number of axes, with the tokens.
        heads: of the attention.
        layers: of the transformer.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        widths: Sequence[int] = (64, 192, 384),
        heads: int = 6,
        layers: int = 6,
        deep_supervision: bool = False,
    ) -> None:
        ndim = len(strides[0])
        super().__init__(strides[:2], output_strides, deep_supervision)
        conv_op = convert_dim_to_conv_op(ndim)
        self.mode = "trilinear" if ndim == 3 else "bilinear"
        channels = [*widths, widths[-1]]
        self.stem = NormedConv(input_channels, channels[0], 7, strides[1])
        self.backbone = nn.ModuleList(
            nn.Sequential(
                BackboneBlock(channels[level], channels[level + 1], strides[level + 2]),
                *(BackboneBlock(channels[level + 1], channels[level + 1], [1] * ndim) for _ in range(depth - 1)),
            )
            for level, depth in enumerate(DEPTHS)
        )
        self.level_vectors = nn.Parameter(torch.empty(LEVELS, widths[-1]))
        nn.init.normal_(self.level_vectors)
        self.transformer = nn.ModuleList(TransformerLayer(widths[-1], heads, ndim) for _ in range(layers))
        self.up = nn.ModuleList(
            expanding_conv(channels[level + 1], channels[level], strides[level + 2], bias=False) for level in range(3)
        )
        self.blocks = nn.ModuleList(DecoderBlock(width, ndim) for width in channels[:3])
        self.heads = nn.ModuleList(
            SegmentationHead(conv_op(width, num_classes, 1)) for width in (channels[0], *channels[:3])
        )
        self.apply(_kaiming_convolutions)
        self.freeze_unused(self.heads[1:])

    def tokens(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The transformer: two maps [B, C, *size] -> the same."""
        sizes = [tuple(one.shape[2:]) for one in maps]
        x = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)
        centres = [_centres(size, x.device) for size in sizes]
        positions = torch.cat(
            [_sines(one, x.shape[-1]) + vector for one, vector in zip(centres, self.level_vectors, strict=True)]
        )
        for layer in self.transformer:
            x = layer(x, positions, torch.cat(centres), sizes)
        return _by_level(x.transpose(1, 2), sizes)

    def logits(self, x: Tensor) -> list[Tensor]:
        size = x.shape[2:]
        maps = [self.stem(x)]
        for stage in self.backbone:
            maps.append(stage(maps[-1]))
        fine, coarse = self.tokens(maps[2:])
        x = coarse
        decoded = []
        for level, skip in ((2, fine), (1, maps[1]), (0, maps[0])):
            x = self.blocks[level](cropped_to(self.up[level](x), skip.shape[2:]) + skip)
            decoded.insert(0, x)
        finest = F.interpolate(x, size, mode=self.mode, align_corners=False)
        wanted = [finest, *(decoded if self.decoder.deep_supervision else [])]
        return [head(one) for head, one in zip(self.heads, wanted, strict=False)]


def _kaiming_convolutions(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=LEAKY_RELU_SLOPE, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
