r"""SegFormer3D: a small hierarchical transformer with an all-linear decoder at a quarter of the resolution.

S. Perera, P. Navard, A. Yilmaz, "SegFormer3D: an Efficient Transformer for 3D Medical Image Segmentation", CVPR
workshops 2024, arXiv:2404.10156. Written from the published method and figures alone.

With x the tokens of a level, of which the next finer one's last LN makes the map that is embedded:

    x = LN conv(map), overlapping                                                           embedding
    x <- x + W softmax(q k^T / sqrt(d)) v,  (k, v) = W LN conv(LN x), kernel = stride       attention
    x <- x + W2 GELU BN DW3 W1 LN x                                                         in the place of positions
    y = conv1 ReLU BN conv1 (||_l up(LN W x_l))                                             decoder, upsampled linearly

Keys and values of every level live on the grid of the third.

Differences from the published network:

- The token grid, the strides and the reductions follow nnU-Net's plan, in 3D and 2D, and halve with ceil; any size is
  taken by one set of weights. The released code takes cubes only. In 2D it is our generalisation.
- Where a token is of one or two voxels, the first embedding's kernel is 1 or 3 instead of 7.
- The published 4.51 M parameters are those of a smaller network than the released configuration: ``reduced``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_batchnorm
from torch import Tensor, nn

from nnunet_deform.layers.transformer import channels_first, channels_last, padded_at_end
from nnunet_deform.networks.padding import AnySizeNetwork, SegmentationHead, Strides
from nnunet_deform.networks.rivals.geometry import (
    Sizes,
    halving_conv,
    patch_conv,
    total_stride,
    truncated_normal_linears,
)

DEPTH = 2
MLP_RATIO = 4


class ReducedAttention(nn.Module):
    """Attention of all tokens to those of a reduced map, [B, *grid, C] -> the same; fused.

    Args:
        channels: C, a multiple of ``heads``.
        heads: of the attention.
        reduction: kernel and stride of the convolution that keys and values are made from; all ones leave it out.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, channels: int, heads: int, reduction: Sequence[int], *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = tuple(reduction)
        self.query = nn.Linear(channels, channels, bias=qkv_bias)
        self.key_value = nn.Linear(channels, 2 * channels, bias=qkv_bias)
        self.output = nn.Linear(channels, channels)
        self.reduce = None
        if any(r > 1 for r in reduction):
            self.reduce = patch_conv(channels, channels, reduction, bias=True)
            self.norm = nn.LayerNorm(channels)

    def keys_and_values(self, x: Tensor) -> Tensor:
        """[B, *grid, C] -> [2, B, heads, keys, C / heads]."""
        if self.reduce is not None:
            size = [s + -s % r for s, r in zip(x.shape[1:-1], self.reduction, strict=True)]
            x = self.norm(channels_last(self.reduce(channels_first(padded_at_end(x, size)))))
        return self.key_value(x.flatten(1, -2)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x.flatten(1, -2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.keys_and_values(x)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.output(attended.transpose(1, 2).reshape(x.shape))


class MixMLP(nn.Module):
    """The MLP with a depthwise convolution, [B, *grid, C] -> the same."""

    def __init__(self, channels: int, ndim: int, *, batch_norm: bool) -> None:
        super().__init__()
        hidden = MLP_RATIO * channels
        self.expand = nn.Linear(channels, hidden)
        self.conv = convert_dim_to_conv_op(ndim)(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = get_matching_batchnorm(dimension=ndim)(hidden) if batch_norm else nn.Identity()
        self.contract = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(channels_first(self.expand(x))))
        return self.contract(F.gelu(channels_last(x)))


class Block(nn.Module):
    """Attention and MLP, [B, *grid, C] -> the same."""

    def __init__(self, channels: int, heads: int, reduction: Sequence[int], *, reduced: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = ReducedAttention(channels, heads, reduction, qkv_bias=not reduced)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = MixMLP(channels, len(reduction), batch_norm=not reduced)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Level(nn.Module):
    """Embedding and blocks of a level: a map [B, in, *spatial] -> its features [B, *spatial / stride, C]."""

    def __init__(self, embedding: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        channels = embedding.out_channels
        self.embedding = embedding
        self.embedding_norm = nn.LayerNorm(channels)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding_norm(channels_last(self.embedding(x)))
        return self.norm(self.blocks(x))


class LinearDecoder(nn.Module):
    """Features [B, *grid, C], finest first, -> logits at the finest one's resolution."""

    def __init__(self, widths: Sequence[int], width: int, num_classes: int, ndim: int, *, norm: bool) -> None:
        super().__init__()
        conv_op = convert_dim_to_conv_op(ndim)
        self.mode = "trilinear" if ndim == 3 else "bilinear"
        self.linears = nn.ModuleList(nn.Linear(channels, width) for channels in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in widths)
        self.fuse = conv_op(len(widths) * width, width, 1, bias=False)
        self.norm = get_matching_batchnorm(dimension=ndim)(width)
        self.head = SegmentationHead(conv_op(width, num_classes, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[1:-1]
        maps = []
        for feature, linear, norm in zip(features, self.linears, self.norms, strict=True):
            x = channels_first(norm(linear(feature)))
            maps.insert(0, F.interpolate(x, size, mode=self.mode, align_corners=False))
        return self.head(F.relu(self.norm(self.fuse(torch.cat(maps, dim=1)))))


class SegFormer3D(AnySizeNetwork):
    """SegFormer3D for images of any size, [B, input_channels, *spatial] -> logits [B, num_classes, *spatial].

    There is no deep supervision.

    Args:
        embed_strides: the two strides whose product is what a token stands for.
        down_strides: of the three steps between levels.
        down_kernels: of their convolutions, odd.
        output_strides: of each of the logits to the one before.
        widths: of the four levels.
        heads: of the four levels, divisors of the widths.
        decoder_width: of the decoder.
        reduced: without BatchNorm in the MLP, LayerNorm in the decoder and biases of queries, keys and values: the
            network whose 4,511,939 parameters the paper states.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        embed_strides: Strides,
        down_strides: Strides,
        down_kernels: Sizes,
        output_strides: Strides,
        widths: Sequence[int] = (32, 64, 160, 256),
        heads: Sequence[int] = (1, 2, 5, 8),
        decoder_width: int = 256,
        reduced: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        ndim = len(embed_strides[0])
        super().__init__([[1] * ndim, *embed_strides], output_strides, deep_supervision)
        token = total_stride(embed_strides)
        unreduced = [1] * ndim
        reductions = [total_stride(down_strides[:2]), down_strides[1], unreduced, unreduced]
        inputs = [input_channels, *widths[:-1]]
        kernels = [[2 * step - 1 for step in token], *down_kernels]
        strides = [token, *down_strides]
        self.levels = nn.ModuleList(
            Level(
                halving_conv(inputs[level], widths[level], kernels[level], strides[level]),
                [Block(widths[level], heads[level], reductions[level], reduced=reduced) for _ in range(DEPTH)],
            )
            for level in range(4)
        )
        self.linear_decoder = LinearDecoder(widths, decoder_width, num_classes, ndim, norm=not reduced)
        self.apply(truncated_normal_linears)
        self.apply(_normal_convolutions)

    def logits(self, x: Tensor) -> list[Tensor]:
        size = x.shape[2:]
        features = []
        for level in self.levels:
            features.append(level(channels_first(features[-1]) if features else x))
        coarse = self.linear_decoder(features)
        return [F.interpolate(coarse, size, mode=self.linear_decoder.mode, align_corners=False)]


def _normal_convolutions(module: nn.Module) -> None:
    """For ``apply``: weights from a normal distribution of sqrt(2 / fan out), biases 0."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
