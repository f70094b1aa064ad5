r"""UNesT: a convolutional decoder over a transformer that attends within blocks, which merge from level to level.

X. Yu et al., "UNesT: Local Spatial Representation Learning with Hierarchical Transformer for Efficient Medical
Segmentation", Medical Image Analysis 2023, arXiv:2209.14378. Written from the paper and from what the released code
does.

With H_0 the embedded tokens, P a learnt position table, and blocks that each hold as many tokens as the third level:

    H_{l+1} = blocks(T(cut(pool LN conv H_l) + P_l)),  no pooling and convolution for l = 0
    T: x <- x + A(LN x),  x <- x + MLP(LN x),  A the attention inside a block
    b = IN PReLU conv(LN H_3),  y_i = RB(up(y_{i+1}) || skip_i)

RB is a residual block with InstanceNorm, || concatenation; the skips are RB of the image, an upsampled H_0, RB of H_1
and H_2, and H_3 itself.

Differences from the released code:

- The token grid, the blocks and the strides follow nnU-Net's plan, in 3D and 2D, and halve with ceil; any number of
  input channels. The released code takes cubes of one channel. In 2D it is our generalisation.
- Grids that the blocks do not fill are padded with zeros, which have a position of their own and take part as keys.
- The attention's output keeps the order (heads, width of a head); the released one is a permutation of it.
"""

import math
from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_dim_to_conv_op,
    get_matching_convtransp,
    get_matching_instancenorm,
    get_matching_pool_op,
)
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn

from nnunet_deform.layers.norm import ChannelLayerNorm
from nnunet_deform.layers.residual import ResidualBlock
from nnunet_deform.layers.transformer import (
    SelfAttention,
    TransformerMLP,
    channels_first,
    channels_last,
    cropped_at_end,
    from_windows,
    padded_at_end,
    to_windows,
)
from nnunet_deform.networks.padding import AnySizeNetwork, SegmentationHead, Strides
from nnunet_deform.networks.rivals.geometry import (
    Sizes,
    cropped_to,
    drop_path_rates,
    expanding_conv,
    halving_conv,
    patch_conv,
    residual_style,
    token_grids,
    total_stride,
    truncated_normal_linears,
)
from nnunet_deform.networks.topology import require_patch

NORM_EPS = 1e-6
LARGEST_DROP_PATH = 0.5


class TransformerLayer(nn.Module):
    """T of the equations, [B, N, C] -> the same."""

    def __init__(self, channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.attention = SelfAttention(channels, heads, qkv_bias=True)
        self.mlp_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mlp = TransformerMLP(channels, 4 * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, samples: int) -> Tensor:
        """x has the blocks of ``samples`` images as its batch; an image drops a path in all of its blocks."""
        x = x + self._dropped(self.attention(self.norm(x)), samples)
        return x + self._dropped(self.mlp(self.mlp_norm(x)), samples)

    def _dropped(self, x: Tensor, samples: int) -> Tensor:
        return self.drop_path(x.unflatten(0, (samples, -1))).flatten(0, 1)


class Aggregation(nn.Module):
    """To the next level: convolution, LayerNorm, max pooling; [B, in, *grid] -> [B, out, *ceil(grid / stride)]."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        ndim = len(stride)
        self.conv = convert_dim_to_conv_op(ndim)(in_channels, out_channels, 3, padding=1)
        self.norm = ChannelLayerNorm(out_channels, eps=NORM_EPS)
        kernel = tuple(3 if step == 2 else 1 for step in stride)
        self.pool = get_matching_pool_op(dimension=ndim, pool_type="max")(
            kernel, tuple(stride), tuple(k // 2 for k in kernel)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.conv(x)))


class NestedLevel(nn.Module):
    """Attention in blocks, [B, C, *grid] -> the same.

    Args:
        channels: C, a multiple of ``heads``.
        heads: of the attention.
        grid: size of the map.
        block: size of a block, in tokens.
        blocks: on each axis; together they cover the grid.
        drop_paths: of each layer.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        grid: Sequence[int],
        block: Sequence[int],
        blocks: Sequence[int],
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.block = tuple(block)
        self.padded = tuple(n * b for n, b in zip(blocks, block, strict=True))
        self.positions = nn.Parameter(torch.empty(math.prod(blocks), math.prod(block), channels))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.layers = nn.ModuleList(TransformerLayer(channels, heads, rate) for rate in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        blocks = to_windows(padded_at_end(channels_last(x), self.padded), self.block) + self.positions
        tokens = blocks.flatten(0, 1)
        for layer in self.layers:
            tokens = layer(tokens, samples)
        joined = from_windows(tokens.unflatten(0, (samples, -1)), self.block, self.padded)
        return channels_first(cropped_at_end(joined, self.grid))


class UpLevel(nn.Module):
    """Transposed convolution, crop, concatenation with the skip, residual block."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        ndim = len(stride)
        self.up = expanding_conv(in_channels, out_channels, stride, bias=False)
        self.block = ResidualBlock(residual_style(ndim, batch_norm=False), 2 * out_channels, out_channels, [3] * ndim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat((cropped_to(self.up(x), skip.shape[2:]), skip), dim=1))


class UNesT(AnySizeNetwork):
    """UNesT for patches of one size, [B, input_channels, *patch_size] -> logits [B, num_classes, *patch_size].

    There is no deep supervision.

    Args:
        patch_size: in voxels.
        embed_strides: the two strides whose product is what a token stands for.
        down_strides: of the two aggregations and the bottleneck.
        bottleneck_kernel: of the convolution to the bottleneck, odd.
        output_strides: of each of the logits to the one before.
        token_widths: of the three levels, the last four times the first; the decoder is a quarter of the first as wide
            at full resolution, and doubles at each level.
        heads: of the three levels, divisors of the widths.
        depths: of the three levels, in layers.

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
        bottleneck_kernel: Sequence[int],
        output_strides: Strides,
        token_widths: Sequence[int] = (128, 256, 512),
        heads: Sequence[int] = (4, 8, 16),
        depths: Sequence[int] = (2, 2, 8),
        deep_supervision: bool = False,
    ) -> None:
        ndim = len(patch_size)
        super().__init__([[1] * ndim, *embed_strides], output_strides, deep_supervision)
        self.patch_size = patch_size
        token = total_stride(embed_strides)
        grids = token_grids(patch_size, [token, *down_strides])
        block = grids[2]
        blocks: Sizes = [total_stride(down_strides[:2]), down_strides[1], [1] * ndim]
        widths = [token_widths[0] // 4 * 2**level for level in range(6)]

        self.embedding = patch_conv(input_channels, token_widths[0], token, bias=True)
        self.aggregations = nn.ModuleList(
            Aggregation(token_widths[level], token_widths[level + 1], down_strides[level]) for level in range(2)
        )
        rates = drop_path_rates(LARGEST_DROP_PATH, sum(depths))
        self.levels = nn.ModuleList(
            NestedLevel(
                token_widths[level],
                heads[level],
                grids[level],
                block,
                blocks[level],
                rates[sum(depths[:level]) : sum(depths[: level + 1])],
            )
            for level in range(3)
        )
        self.norm = ChannelLayerNorm(token_widths[2], eps=NORM_EPS)
        self.bottleneck = nn.Sequential(
            halving_conv(token_widths[2], widths[5], bottleneck_kernel, down_strides[2]),
            nn.PReLU(),
            get_matching_instancenorm(dimension=ndim)(widths[5]),
        )
        style = residual_style(ndim, batch_norm=False)
        self.skips = nn.ModuleList(
            [
                ResidualBlock(style, input_channels, widths[0], [3] * ndim),
                nn.Sequential(
                    expanding_conv(token_widths[0], widths[1], embed_strides[1], bias=False),
                    get_matching_convtransp(dimension=ndim)(widths[1], widths[1], 1, bias=False),
                ),
                ResidualBlock(style, token_widths[0], widths[2], [3] * ndim),
                ResidualBlock(style, token_widths[1], widths[3], [3] * ndim),
            ]
        )
        strides = [*embed_strides, *down_strides]
        self.up = nn.ModuleList(UpLevel(widths[level + 1], widths[level], strides[level]) for level in range(5))
        self.head = SegmentationHead(convert_dim_to_conv_op(ndim)(widths[0], num_classes, 1))
        self.levels.apply(truncated_normal_linears)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        require_patch("UNesT's position table", x.shape[2:], self.patch_size, self.strides)
        return super().forward(x)

    def logits(self, x: Tensor) -> list[Tensor]:
        hidden = [self.embedding(x)]
        for level, blocks in enumerate(self.levels):
            hidden.append(blocks(self.aggregations[level - 1](hidden[-1]) if level else hidden[-1]))
        skips = [skip(one) for skip, one in zip(self.skips, (x, *hidden[:3]), strict=True)]
        x = self.bottleneck(self.norm(hidden[3]))
        for level, skip in reversed(list(enumerate([*skips, hidden[3]]))):
            x = self.up[level](x, skip)
        return [self.head(x)]
