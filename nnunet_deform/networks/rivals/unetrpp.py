r"""UNETR++: a hierarchical encoder and decoder, of blocks whose channel and spatial attention share queries and keys.

A. Shaker, M. Maaz, H. Rasheed, S. Khan, M.-H. Yang, F. S. Khan, "UNETR++: Delving into Efficient and Accurate 3D
Medical Image Segmentation", IEEE TMI 2024, arXiv:2212.04497. Written from the paper and from what the released code
does.

A block takes the N tokens of a level, X (N x C), with d = C / heads channels in each head, and a learnt P (N x C):

    X <- X + P,  X <- X + gamma EPA(LN X),  Y the map of X,  out = Y + conv1(dropout(RB(Y)))
    q, k, v_c, v_s = W X  (d x N),  k' = k E,  v' = v_s E,  E: N -> p
    x_c = softmax_d(q^ k^^T t1) v_c,  x_s = softmax_p(q^^T k' t2) v'^T,  EPA = (W_s x_s || W_c x_c)

q^ and k^ have unit norm over the tokens, RB is a residual block with BatchNorm, || concatenation. Skips are added.

Differences from the released code:

- The token grid and the strides follow nnU-Net's plan, in 3D and 2D, and halve with ceil; any number of input channels.
  In 2D it is our generalisation.
- The output of the spatial attention keeps its order. The released code reads (d, heads, N) as (N, C), which mixes
  tokens and channels; its authors agree, and report 87.1 instead of 87.2 Dice with the order repaired.
- All linear layers start from a truncated normal distribution; the released decoder's initialisation is never called.
- Of the four released blocks this is Synapse's for every data set; ``block`` has the others, for their counts.
- Coarse heads are always built, and not trained without deep supervision.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_dropout
from torch import Tensor, nn

from nnunet_deform.layers.residual import ResidualBlock
from nnunet_deform.layers.transformer import channels_first, channels_last, padded_at_end
from nnunet_deform.networks.padding import AnySizeNetwork, SegmentationHead, Strides
from nnunet_deform.networks.rivals.geometry import (
    cropped_to,
    expanding_conv,
    patch_conv,
    residual_style,
    token_grids,
    total_stride,
    truncated_normal_linears,
)
from nnunet_deform.networks.topology import require_patch

Block = Literal["synapse", "brats", "acdc"]

HEADS = 4
DEPTH = 3
FULL_RESOLUTION_WIDTH = 16
# p, of the encoder's four stages; the decoder has the first everywhere.
PROJECTIONS = (64, 64, 64, 32)
GAMMA = 1e-6
ATTENTION_DROPOUT = 0.15
CHANNEL_DROPOUT = 0.1
LARGEST_NORM_GROUPS = 32


class EfficientPairedAttention(nn.Module):
    """EPA of the equations, [B, N, C] -> the same.

    Args:
        channels: C, a multiple of 8.
        tokens: N.
        projection: p.
        block: whose layers: see :class:`UNETRPlusPlus`.
    """

    def __init__(self, channels: int, tokens: int, projection: int, block: Block) -> None:
        super().__init__()
        self.projections = nn.Linear(channels, 4 * channels, bias=False)
        self.reduce_keys = nn.Linear(tokens, projection, bias=block != "brats")
        # One for both, unless released otherwise.
        self.reduce_values = nn.Linear(tokens, projection) if block == "acdc" else None
        self.channel_temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.spatial_temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.dropout = nn.Dropout(ATTENTION_DROPOUT)
        self.concatenated = block != "brats"
        if self.concatenated:
            self.spatial_output = nn.Linear(channels, channels // 2)
            self.channel_output = nn.Linear(channels, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        # [4, B, heads, d, N], in memory as well, so that nothing below keeps a copy in another order.
        projected = self.projections(x).unflatten(-1, (4, HEADS, -1)).permute(2, 0, 3, 4, 1).contiguous()
        query, key, channel_value, spatial_value = projected
        reduce_values = self.reduce_keys if self.reduce_values is None else self.reduce_values
        reduced_key, reduced_value = self.reduce_keys(key) * self.spatial_temperature, reduce_values(spatial_value)
        query, key = (F.normalize(one.float(), dim=-1).to(one.dtype) for one in (query, key))

        similarity = (query @ key.transpose(-2, -1)).float() * self.channel_temperature
        by_channel = self.dropout(similarity.softmax(dim=-1)).to(channel_value.dtype) @ channel_value
        # Fused, since the N x p similarity would be by far the largest map of the network.
        by_token = F.scaled_dot_product_attention(
            *(one.transpose(-2, -1).contiguous() for one in (query, reduced_key.to(query.dtype), reduced_value)),
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=1.0,
        )
        by_channel, by_token = by_channel.flatten(1, 2).transpose(1, 2), by_token.transpose(1, 2).flatten(2)
        if not self.concatenated:
            return by_channel + by_token
        return torch.cat((self.spatial_output(by_token), self.channel_output(by_channel)), dim=-1)


class PairedAttentionBlock(nn.Module):
    """A block of the equations on a map of one size, [B, C, *grid] -> the same."""

    def __init__(self, channels: int, grid: Sequence[int], projection: int, block: Block) -> None:
        super().__init__()
        ndim = len(grid)
        tokens = math.prod(grid)
        self.position = nn.Parameter(torch.zeros(tokens, channels))
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.full((channels,), GAMMA))
        self.attention = EfficientPairedAttention(channels, tokens, projection, block)
        style = residual_style(ndim, batch_norm=True)
        self.residual = nn.Sequential(
            *(ResidualBlock(style, channels, channels, [3] * ndim) for _ in range(2 if block == "acdc" else 1))
        )
        self.output = nn.Sequential(
            get_matching_dropout(dimension=ndim)(CHANNEL_DROPOUT),
            convert_dim_to_conv_op(ndim)(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) + self.position
        tokens = tokens + self.gamma * self.attention(self.norm(tokens))
        y = tokens.transpose(1, 2).reshape(x.shape)
        return y + self.output(self.residual(y))


class Stage(nn.Sequential):
    """Blocks on one map, [B, C, *grid] -> the same."""

    def __init__(self, channels: int, grid: Sequence[int], projection: int, block: Block) -> None:
        super().__init__(*(PairedAttentionBlock(channels, grid, projection, block) for _ in range(DEPTH)))


class Down(nn.Module):
    """Convolution with kernel = stride of a map padded at its end, and a GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int], groups: int) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.conv = patch_conv(in_channels, out_channels, stride, bias=False)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        size = [s + -s % step for s, step in zip(x.shape[2:], self.stride, strict=True)]
        return self.norm(self.conv(channels_first(padded_at_end(channels_last(x), size))))


class UNETRPlusPlus(AnySizeNetwork):
    """UNETR++ for patches of one size, [B, input_channels, *patch_size] -> logits [B, num_classes, *patch_size].

    With deep supervision a list: at full resolution, coarser by the product of ``embed_strides``, and by the first of
    ``down_strides`` in addition. Batches of one are normalised over the voxels of that one.

    Args:
        patch_size: in voxels.
        embed_strides: the two strides whose product is what a token stands for.
        down_strides: of the three steps between stages.
        output_strides: of each of the logits to the one before.
        widths: of the four stages, multiples of 8.
        block: "synapse"; "brats", without biases in E and with x_c + x_s in the place of the concatenation; "acdc",
            with another E for the values and two residual blocks.

    Raises:
        ValueError: (forward) the images have another size.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_size: Sequence[int],
        embed_strides: Strides,
        down_strides: Strides,
        output_strides: Strides,
        widths: Sequence[int] = (32, 64, 128, 256),
        block: Block = "synapse",
        deep_supervision: bool = False,
    ) -> None:
        ndim = len(patch_size)
        super().__init__([[1] * ndim, *embed_strides], output_strides, deep_supervision)
        self.patch_size = patch_size
        token = total_stride(embed_strides)
        grids = token_grids(patch_size, [token, *down_strides])
        self.down = nn.ModuleList(
            [Down(input_channels, widths[0], token, math.gcd(input_channels, LARGEST_NORM_GROUPS))]
        )
        for level, stride in enumerate(down_strides):
            self.down.append(Down(widths[level], widths[level + 1], stride, groups=widths[level]))
        self.stages = nn.ModuleList(
            Stage(channels, grid, projection, block)
            for channels, grid, projection in zip(widths, grids, PROJECTIONS, strict=True)
        )
        self.up = nn.ModuleList(
            expanding_conv(widths[level + 1], widths[level], stride, bias=False)
            for level, stride in enumerate(down_strides)
        )
        self.up_stages = nn.ModuleList(
            Stage(channels, grid, PROJECTIONS[0], block) for channels, grid in zip(widths[:3], grids[:3], strict=True)
        )
        self.up_stages.apply(truncated_normal_linears)
        self.stages.apply(truncated_normal_linears)
        style = residual_style(ndim, batch_norm=False)
        full = FULL_RESOLUTION_WIDTH
        self.image = ResidualBlock(style, input_channels, full, [3] * ndim)
        self.full_up = expanding_conv(widths[0], full, token, bias=False)
        self.full_block = ResidualBlock(style, full, full, [3] * ndim)
        conv_op = convert_dim_to_conv_op(ndim)
        self.heads = nn.ModuleList(
            SegmentationHead(conv_op(channels, num_classes, 1)) for channels in (full, widths[0], widths[1])
        )
        self.freeze_unused(self.heads[1:])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        require_patch("UNETR++'s attention", x.shape[2:], self.patch_size, self.strides)
        return super().forward(x)

    def logits(self, x: Tensor) -> list[Tensor]:
        image = self.image(x)
        skips = []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            skips.append(x)
        maps = []
        for level in (2, 1, 0):
            skip = skips[level]
            x = self.up_stages[level](cropped_to(self.up[level](x), skip.shape[2:]) + skip)
            maps.insert(0, x)
        finest = self.full_block(self.full_up(x) + image)
        if not self.decoder.deep_supervision:
            return [self.heads[0](finest)]
        return [head(one) for head, one in zip(self.heads, (finest, *maps[:2]), strict=True)]
