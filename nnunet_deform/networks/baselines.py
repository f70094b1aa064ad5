"""MONAI's networks on nnU-Net's terms: images of any size, and a list of logits under deep supervision.

This module needs MONAI and is imported only where one of its networks is built. Layers and weights are MONAI's.
"""

from collections.abc import Sequence

import monai.networks.nets as nets
from monai.networks.nets.mednext import create_mednext
from torch import Tensor, nn

from nnunet_deform.networks.padding import PaddedNetwork, SegmentationHead, Strides
from nnunet_deform.networks.topology import padded_size, require_patch


class SwinUNETR(PaddedNetwork):
    """Swin UNETR, https://arxiv.org/abs/2201.01266. Sizes are padded to 32; no deep supervision.

    Args:
        feature_size: width at full resolution, a multiple of 12.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        feature_size: int,
        deep_supervision: bool = False,
    ) -> None:
        network = nets.SwinUNETR(
            in_channels=input_channels,
            out_channels=num_classes,
            feature_size=feature_size,
            spatial_dims=len(strides[0]),
        )
        network.out = SegmentationHead(network.out)
        super().__init__(network, strides, output_strides, [], deep_supervision)


class UNETR(PaddedNetwork):
    """UNETR, https://arxiv.org/abs/2103.10504. Sizes are padded to 16; no deep supervision.

    Its position embedding has one entry for each token of 16 voxels a side, so it takes patches of one size only.

    Args:
        patch_size: in voxels.
        hidden_size: of a token, a multiple of ``num_heads``.
        mlp_dim: of the transformer's MLP.
        feature_size: width at full resolution.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        patch_size: Sequence[int],
        feature_size: int,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        deep_supervision: bool = False,
    ) -> None:
        network = nets.UNETR(
            in_channels=input_channels,
            out_channels=num_classes,
            img_size=padded_size(patch_size, strides),
            feature_size=feature_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            spatial_dims=len(strides[0]),
        )
        for block in network.vit.blocks:
            # MONAI builds the norm (1.5 both) and never calls it; distributed training would wait for its gradients.
            block.norm_cross_attn = nn.Identity()
            block.cross_attn = nn.Identity()
        network.out = SegmentationHead(network.out)
        super().__init__(network, strides, output_strides, [], deep_supervision)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """
        Raises:
            ValueError: x has another size than the patch, once both are padded.
        """
        require_patch("UNETR's position embedding", x.shape[2:], self.patch_size, self.strides)
        return super().forward(x)


class SegResNet(PaddedNetwork):
    """SegResNet without its autoencoder, https://arxiv.org/abs/1810.11654. Sizes are padded to 8; no deep supervision.

    Args:
        init_filters: width at full resolution, doubled at each level; a multiple of 8.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        init_filters: int,
        deep_supervision: bool = False,
    ) -> None:
        network = nets.SegResNet(
            spatial_dims=len(strides[0]),
            init_filters=init_filters,
            in_channels=input_channels,
            out_channels=num_classes,
            blocks_down=(1, 2, 2, 4),
            blocks_up=(1, 1, 1),
        )
        network.conv_final[-1] = SegmentationHead(network.conv_final[-1])
        super().__init__(network, strides, output_strides, [], deep_supervision)


class DynUNet(PaddedNetwork):
    """MONAI's reimplementation of nnU-Net's U-Net, with a plan's strides, kernels and widths.

    MONAI resizes coarse logits to full resolution; here they keep the resolution of their level, as in nnU-Net.

    Args:
        features_per_stage, kernel_sizes: of each level; at least three levels.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        kernel_sizes: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        deep_supervision: bool = False,
    ) -> None:
        network = nets.DynUNet(
            spatial_dims=len(strides[0]),
            in_channels=input_channels,
            out_channels=num_classes,
            kernel_size=kernel_sizes,
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=features_per_stage,
            deep_supervision=True,
            deep_supr_num=len(strides) - 2,
        )
        # The same layers once more, wired for MONAI's own forward pass.
        del network.skip_layers
        network.output_block = SegmentationHead(network.output_block)
        network.deep_supervision_heads = nn.ModuleList(map(SegmentationHead, network.deep_supervision_heads))
        super().__init__(network, strides, output_strides, network.deep_supervision_heads, deep_supervision)

    def logits(self, x: Tensor) -> list[Tensor]:
        skips = []
        for block in (self.network.input_block, *self.network.downsamples):
            x = block(x)
            skips.append(x)
        x = self.network.bottleneck(x)
        levels = []
        for block in self.network.upsamples:
            x = block(x, skips.pop())
            levels.insert(0, x)
        heads = [self.network.output_block]
        if self.decoder.deep_supervision:
            heads += self.network.deep_supervision_heads
        return [head(level) for head, level in zip(heads, levels, strict=False)]


class UNetPlusPlus(PaddedNetwork):
    """UNet++, https://arxiv.org/abs/1807.10165. Sizes are padded to 16.

    Its logits under deep supervision are all at full resolution, those of the longest path first.

    Args:
        features: width at each of the five levels, and before the last logits.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        features: Sequence[int],
        deep_supervision: bool = False,
    ) -> None:
        network = nets.BasicUNetPlusPlus(
            spatial_dims=len(strides[0]),
            in_channels=input_channels,
            out_channels=num_classes,
            features=features,
            deep_supervision=True,
        )
        names = [f"final_conv_0_{path}" for path in (1, 2, 3, 4)]
        for name in names:
            setattr(network, name, SegmentationHead(getattr(network, name)))
        coarse_heads = [getattr(network, name) for name in names[:-1]]
        super().__init__(network, strides, output_strides, coarse_heads, deep_supervision)

    def logits(self, x: Tensor) -> list[Tensor]:
        return self.network(x)[::-1]


class MedNeXt(PaddedNetwork):
    """MedNeXt, https://arxiv.org/abs/2303.09975. Sizes are padded to 16. Logits at all five levels.

    Args:
        variant: "S", "B", "M" or "L", the paper's Table 1.
        kernel_size: 3 or 5 in the paper.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Strides,
        output_strides: Strides,
        variant: str,
        kernel_size: int,
        deep_supervision: bool = False,
    ) -> None:
        network = create_mednext(
            variant,
            spatial_dims=len(strides[0]),
            in_channels=input_channels,
            out_channels=num_classes,
            kernel_size=kernel_size,
            deep_supervision=True,
        )
        network.out_0 = SegmentationHead(network.out_0)
        network.out_blocks = nn.ModuleList(map(SegmentationHead, network.out_blocks))
        super().__init__(network, strides, output_strides, network.out_blocks, deep_supervision)

    def train(self, mode: bool = True) -> "MedNeXt":
        super().train(mode)
        # Of the outermost module MONAI takes this for "return all logits"; its layers have their own.
        self.network.training = True
        return self

    def logits(self, x: Tensor) -> list[Tensor]:
        return list(self.network(x))
