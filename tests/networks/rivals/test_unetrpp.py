"""UNETR++: the authors' counts, and the attention against its equations."""

import pytest
import torch
from rival_cases import parameters

from nnunet_deform.networks.rivals.unetrpp import EfficientPairedAttention, UNETRPlusPlus
from nnunet_deform.networks.without_values import without_values

TWOS = [[2, 2, 2]] * 3


def published(inputs: int, classes: int, patch: list[int], embed: list[list[int]], block: str) -> UNETRPlusPlus:
    strides = {"embed_strides": embed, "down_strides": TWOS, "output_strides": [[1] * 3] * 3}
    with without_values():
        return UNETRPlusPlus(inputs, classes, patch_size=patch, block=block, **strides)


def test_parameters_of_synapse() -> None:
    network = published(1, 14, [64, 128, 128], [[1, 2, 2], [2, 2, 2]], "synapse")
    assert parameters(network) == 42_952_850
    parts = [network.down, network.image, network.up, network.up_stages, network.full_up, network.full_block]
    assert list(map(parameters, parts)) == [346_048, 7_360, 344_064, 15_182_376, 16_384, 13_824]
    assert list(map(parameters, network.stages)) == [9_622_584, 2_312_088, 3_247_704, 11_858_808]
    assert parameters(network.heads) == 1_610
    # The paper's 42.96 M has the running statistics of BatchNorm.
    assert parameters(network) + sum(buffer.numel() for buffer in network.buffers()) == 42_961_340


@pytest.mark.parametrize(
    ("configuration", "count"),
    [
        ((4, 4, [128] * 3, [[2] * 3] * 2, "brats"), 42_647_604),
        ((4, 4, [128] * 3, [[2] * 3] * 2, "synapse"), 42_976_596),
        ((1, 4, [16, 160, 160], [[1, 2, 2]] * 2, "acdc"), 66_796_404),
        ((1, 4, [16, 160, 160], [[1, 2, 2]] * 2, "synapse"), 37_984_980),
        ((1, 2, [32, 192, 192], [[1, 2, 2]] * 2, "acdc"), 121_174_798),
    ],
    ids=["brats", "brats-ours", "acdc", "acdc-ours", "lung"],
)
def test_parameters_of_the_other_releases(configuration, count) -> None:
    assert parameters(published(*configuration)) == count


def attention(channels: int, tokens: int, block: str = "synapse") -> EfficientPairedAttention:
    torch.manual_seed(0)
    module = EfficientPairedAttention(channels, tokens, 3, block).eval()
    with torch.no_grad():
        module.channel_temperature.uniform_(0.5, 3)
        module.spatial_temperature.uniform_(0.5, 3)
    return module


@pytest.mark.parametrize("block", ["synapse", "brats", "acdc"])
def test_paired_attention_is_its_equations(block) -> None:
    module = attention(16, 6, block)
    x = torch.randn(2, 6, 16)
    expected = torch.empty(2, 6, 16)
    values = module.reduce_keys if block != "acdc" else module.reduce_values
    for sample in range(2):
        q, k, v_c, v_s = (x[sample] @ module.projections.weight.T).T.reshape(4, 4, 4, 6)
        x_c, x_s = [], []
        for head in range(4):
            unit = [one[head] / one[head].norm(dim=1, keepdim=True) for one in (q, k)]
            similarity = unit[0] @ unit[1].T * module.channel_temperature[head]
            x_c.append(similarity.softmax(1) @ v_c[head])
            similarity = unit[0].T @ module.reduce_keys(k[head]) * module.spatial_temperature[head]
            x_s.append((similarity.softmax(1) @ values(v_s[head]).T).T)
        x_c, x_s = torch.cat(x_c).T, torch.cat(x_s).T
        if block == "brats":
            expected[sample] = x_c + x_s
        else:
            expected[sample] = torch.cat((module.spatial_output(x_s), module.channel_output(x_c)), dim=1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)


def test_tokens_have_no_order_but_in_the_projection() -> None:
    """The released order of the spatial attention's output would fail: it depends on where a token stands."""
    module = attention(8, 10)
    x, order = torch.randn(1, 10, 8), torch.randperm(10)
    expected = module(x)[:, order]
    with torch.no_grad():
        module.reduce_keys.weight.copy_(module.reduce_keys.weight[:, order])
    torch.testing.assert_close(module(x[:, order]), expected)


def test_the_released_order_of_the_spatial_attention_is_a_permutation_of_ours() -> None:
    """Released, x_s lies as (d, heads, N) and is read as (N, C): no token keeps its own channels."""
    module = attention(16, 6, "brats")
    with torch.no_grad():
        module.projections.weight[32:48] = 0  # values of the channel attention
        x = torch.randn(1, 6, 16)
        q, k, _, v = (x[0] @ module.projections.weight.T).T.reshape(4, 4, 4, 6)
        similarity = torch.einsum("hdn,hdp->hnp", q / q.norm(dim=2, keepdim=True), module.reduce_keys(k))
        weights = (similarity * module.spatial_temperature).softmax(dim=2)
        released = torch.einsum("hnp,hdp->dhn", weights, module.reduce_keys(v)).reshape(6, 16)
        ours = module(x)[0]
    token, head, channel = torch.meshgrid(torch.arange(6), torch.arange(4), torch.arange(4), indexing="ij")
    order = ((channel * 4 + head) * 6 + token).reshape(6, 16)
    torch.testing.assert_close(ours, released.flatten()[order], rtol=0, atol=1e-6)
    assert not torch.allclose(ours, released, atol=1e-3)
