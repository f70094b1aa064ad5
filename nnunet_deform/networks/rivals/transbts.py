r"""TransBTS: a residual U-Net whose features at an eighth of the resolution pass through a global transformer.

W. Wang, C. Chen, M. Ding, H. Yu, S. Zha, J. Li, "TransBTS: Multimodal Brain Tumor Segmentation Using Transformer",
MICCAI 2021, arXiv:2103.04430. Written from the paper and from what the released code does.

    x <- x + conv ReLU GN conv ReLU GN x                                                    encoder, widths 16 to 128
    z = conv ReLU BN x + P,  z <- z + A(LN z),  z <- z + MLP(LN z)                          four layers of width 512
    x = D(ReLU BN conv ReLU BN conv z),  D: x + ReLU BN conv ReLU BN conv x                 back to a map
    x <- D(conv1(skip || up(conv1 x)))                                                      decoder

Differences from the released code:

- The strides and the number of tokens follow nnU-Net's plan, in 3D and 2D, and halve with ceil. In 2D it is our
  generalisation.
- Left out are 263,680 parameters (at four channels and 128^3) that never reach the loss: a linear layer for another
  tokenisation and the LayerNorm after the transformer.
- The stem's dropout is off in evaluation; the released one ignores the mode, so that two evaluations differ.
- Attention is fused, so that nothing is kept that grows with the square of the tokens. Logits instead of softmax.
"""

import math
from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_dim_to_conv_op,
    get_matching_batchnorm,
    get_matching_dropout,
)
from torch import Tensor, nn

from nnunet_deform.layers.transformer import SelfAttention, TransformerMLP
from nnunet_deform.networks.padding import AnySizeNetwork, SegmentationHead, Strides
from nnunet_deform.networks.rivals.geometry import cropped_to, expanding_conv, halving_conv, token_grids, total_stride
from nnunet_deform.networks.topology import require_patch

DEPTHS = (1, 2, 2, 4)
NORM_GROUPS = 8
STEM_DROPOUT = 0.2
DROPOUT = 0.1


class EncoderBlock(nn.Module):
    """The encoder's residual block, [B, C, *spatial] -> the same; C is a multiple of 8."""

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        conv_op = convert_dim_to_conv_op(ndim)
        self.body = nn.Sequential(
            *(
                layer
                for _ in range(2)
                for layer in (
                    nn.GroupNorm(NORM_GROUPS, channels),
                    nn.ReLU(),
                    conv_op(channels, channels, 3, padding=1),
                )
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvNormReLU(nn.Sequential):
    """Twice a convolution, BatchNorm and ReLU, [B, in, *spatial] -> [B, out, *spatial]."""

    def __init__(self, in_channels: int, out_channels: int, ndim: int) -> None:
        conv_op, norm_op = convert_dim_to_conv_op(ndim), get_matching_batchnorm(dimension=ndim)
        super().__init__(
            *(
                layer
                for inputs in (in_channels, out_channels)
                for layer in (conv_op(inputs, out_channels, 3, padding=1), norm_op(out_channels), nn.ReLU())
            )
        )


class DecoderBlock(nn.Module):
    """D of the equations, [B, C, *spatial] -> the same."""

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        self.body = ConvNormReLU(channels, channels, ndim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TransformerLayer(nn.Module):
    """Attention to all tokens and an MLP, [B, N, C] -> the same."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads, qkv_bias=False, dropout=DROPOUT)
        # The released code drops the attention's output twice in a row.
        self.dropout = nn.Dropout(1 - (1 - DROPOUT) ** 2)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = TransformerMLP(channels, hidden, DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm(x)))
        return x + self.mlp(self.mlp_norm(x))


class UpLevel(nn.Module):
    """[B, 2 C, *coarse] and the skip [B, C, *fine] -> [B, C, *fine]."""

    def __init__(self, channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        ndim = len(stride)
        conv_op = convert_dim_to_conv_op(ndim)
        self.narrow = conv_op(2 * channels, channels, 1)
        self.up = expanding_conv(channels, channels, stride, bias=True)
        self.fuse = conv_op(2 * channels, channels, 1)
        self.block = DecoderBlock(channels, ndim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = cropped_to(self.up(self.narrow(x)), skip.shape[2:])
        return self.block(self.fuse(torch.cat((skip, x), dim=1)))


class TransBTS(AnySizeNetwork):
    """TransBTS for patches of one size, [B, input_channels, *patch_size] -> logits [B, num_classes, *patch_size].

    There is no deep supervision.

    Args:
        patch_size: in voxels.
        strides: of the four levels, the first all ones; the transformer has a token for each voxel of the last.
        output_strides: of each of the logits to the one before.
        base_width: at full resolution, doubled at each level; a multiple of 8.
        token_width: of the transformer, a multiple of ``heads``.
        heads: of its attention.
        layers: of the transformer.
        mlp_width: hidden width of its MLP.

    Raises:
        ValueError: (forward) the images have another size.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_size: Sequence[int],
        strides: Strides,
        output_strides: Strides,
        base_width: int = 16,
        token_width: int = 512,
        heads: int = 8,
        layers: int = 4,
        mlp_width: int = 4096,
        deep_supervision: bool = False,
    ) -> None:
        ndim = len(patch_size)
        # Strided convolutions round up, so nothing is padded.
        super().__init__([[1] * ndim], output_strides, deep_supervision)
        self.patch_size = patch_size
        conv_op = convert_dim_to_conv_op(ndim)
        widths = [base_width * 2**level for level in range(4)]
        self.stem = nn.Sequential(
            conv_op(input_channels, widths[0], 3, padding=1), get_matching_dropout(dimension=ndim)(STEM_DROPOUT)
        )
        self.down = nn.ModuleList(
            halving_conv(inputs, outputs, [3] * ndim, stride)
            for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides[1:], strict=True)
        )
        self.levels = nn.ModuleList(
            nn.Sequential(*(EncoderBlock(channels, ndim) for _ in range(depth)))
            for channels, depth in zip(widths, DEPTHS, strict=True)
        )
        self.to_tokens = nn.Sequential(
            get_matching_batchnorm(dimension=ndim)(widths[-1]),
            nn.ReLU(),
            conv_op(widths[-1], token_width, 3, padding=1),
        )
        (grid,) = token_grids(patch_size, [total_stride(strides)])
        self.positions = nn.Parameter(torch.zeros(math.prod(grid), token_width))
        self.dropout = nn.Dropout(DROPOUT)
        self.transformer = nn.Sequential(*(TransformerLayer(token_width, heads, mlp_width) for _ in range(layers)))
        self.to_map = nn.Sequential(ConvNormReLU(token_width, widths[-1], ndim), DecoderBlock(widths[-1], ndim))
        self.up = nn.ModuleList(
            UpLevel(channels, stride) for channels, stride in zip(widths[:-1], strides[1:], strict=True)
        )
        self.head = SegmentationHead(conv_op(widths[0], num_classes, 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        require_patch("TransBTS's position table", x.shape[2:], self.patch_size, self.strides)
        return super().forward(x)

    def logits(self, x: Tensor) -> list[Tensor]:
        x = self.levels[0](self.stem(x))
        skips = []
        for down, level in zip(self.down, self.levels[1:], strict=True):
            skips.append(x)
            x = level(down(x))
        x = self.to_tokens(x)
        tokens = self.transformer(self.dropout(x.flatten(2).transpose(1, 2) + self.positions))
        x = self.to_map(tokens.transpose(1, 2).reshape(x.shape))
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = up(x, skip)
        return [self.head(x)]
