"""nnFormer: the authors' counts, and attention in shifted and padded windows against all pairs of tokens."""

import itertools
import math

import pytest
import torch
from rival_cases import parameters
from torch import Tensor

from nnunet_deform.networks.rivals.nnformer import NnFormer, WindowAttention, Windows
from nnunet_deform.networks.without_values import without_values

TWOS = [[2, 2, 2]] * 3
SYNAPSE = {"embed_strides": [[1, 2, 2], [2, 2, 2]], "down_strides": TWOS, "down_kernels": [[3] * 3] * 3}


def published(inputs: int, classes: int, patch: list[int], **options) -> NnFormer:
    full = [[1, 1, 1], *options["down_strides"][:2]]
    with without_values():
        return NnFormer(inputs, classes, patch_size=patch, output_strides=full, deep_supervision=True, **options)


def coarse_heads(network: NnFormer) -> int:
    """What the releases without deep supervision do not have."""
    return parameters(network.heads[1:])


def test_parameters_of_the_released_configurations() -> None:
    synapse = published(1, 14, [64, 128, 128], **SYNAPSE, window_sizes=[[4] * 3, [4] * 3, [8] * 3, [4] * 3])
    assert parameters(synapse) == 150_054_210
    parts = [
        synapse.embedding,
        synapse.encoder,
        synapse.merging,
        synapse.norms,
        synapse.expanding,
        synapse.upward,
        synapse.heads,
    ]
    assert list(map(parameters, parts)) == [1_746_144, 75_484_716, 41_809_152, 5_760, 12_393_024, 18_013_260, 602_154]
    assert coarse_heads(synapse) == 516_124
    assert parameters(synapse) - coarse_heads(synapse) == 149_538_086

    tables = published(1, 14, [96] * 3, **SYNAPSE, window_sizes=[[4] * 3, [4] * 3, [6] * 3, [3] * 3])
    assert parameters(tables) - coarse_heads(tables) == 149_320_934

    options = {"width": 96, "embed_strides": [[2] * 3] * 2, "down_strides": TWOS, "down_kernels": [[3] * 3] * 3}
    options["window_sizes"] = [[4] * 3, [4] * 3, [8] * 3, [4] * 3]
    brats = published(4, 4, [128] * 3, **options)
    assert parameters(brats) - coarse_heads(brats) == 37_519_552
    released = published(4, 4, [128] * 3, **options, decoder_heads=[6, 12, 24])
    assert parameters(released) - coarse_heads(released) == 37_606_726

    acdc = published(
        1,
        4,
        [14, 160, 160],
        width=96,
        embed_strides=[[1, 2, 2]] * 2,
        down_strides=[[1, 2, 2], [2, 2, 2], [2, 2, 2]],
        down_kernels=[[1, 3, 3], [3] * 3, [3] * 3],
        window_sizes=[[3, 5, 5], [3, 5, 5], [7, 10, 10], [3, 5, 5]],
    )
    assert parameters(acdc) - coarse_heads(acdc) == 37_160_200


def every_pair(attention: WindowAttention, grid: tuple[int, ...], window: tuple[int, ...], x: Tensor, shifted: bool):
    """The attention of all tokens to all, each pair in another window masked, biases looked up by the offset."""
    tokens = list(itertools.product(*map(range, grid)))
    shift = [w // 2 if shifted and w < g else 0 for g, w in zip(grid, window, strict=True)]
    cells = [tuple((i - s) // w for i, s, w in zip(t, shift, window, strict=True)) for t in tokens]
    table = attention.bias_table.reshape(*(2 * w - 1 for w in window), -1)
    heads, scale = attention.heads, (x.shape[-1] // attention.heads) ** -0.5
    q, k, v = (
        one.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2) for one in attention.project(x).chunk(3, dim=-1)
    )
    logits = (q @ k.transpose(-2, -1)) * scale
    bias = torch.full((heads, len(tokens), len(tokens)), -math.inf)
    for (i, one), (j, other) in itertools.product(enumerate(tokens), repeat=2):
        if cells[i] == cells[j]:
            bias[:, i, j] = table[tuple(a - b + w - 1 for a, b, w in zip(one, other, window, strict=True))]
    return attention.output(((logits + bias).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(
    ("grid", "window"),
    [((5, 6), (3, 3)), ((4, 7), (4, 3)), ((6, 6), (6, 6)), ((3, 5, 4), (2, 3, 4)), ((1, 7, 5), (1, 4, 2))],
    ids=str,
)
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
def test_window_attention_is_attention_region_by_region(grid, window, shifted) -> None:
    """With windows as large as the map it is plain multi-head attention with a bias."""
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, window, own_queries=True)
    attention.bias_table.data.normal_()
    x = torch.randn(2, *grid, 8)
    found = attention(x, Windows(grid, window), shifted)
    torch.testing.assert_close(found, every_pair(attention, grid, window, x, shifted), rtol=0, atol=1e-5)


def test_skip_attention_has_its_queries_as_they_are() -> None:
    torch.manual_seed(0)
    given = WindowAttention(8, 2, (2, 2), own_queries=False)
    own = WindowAttention(8, 2, (2, 2), own_queries=True)
    with torch.no_grad():
        own.project.weight.copy_(torch.cat((torch.eye(8), given.project.weight)))
        own.project.bias.copy_(torch.cat((torch.zeros(8), given.project.bias)))
        own.output.load_state_dict(given.output.state_dict())
        own.bias_table.copy_(given.bias_table)
    x, windows = torch.randn(1, 4, 5, 8), Windows((4, 5), (2, 2))
    torch.testing.assert_close(given(x, windows, False, queries=x), own(x, windows, False))


def test_drop_path_grows_in_the_encoder_and_from_the_coarsest_level_in_the_decoder() -> None:
    network = published(1, 2, [32] * 3, **SYNAPSE, window_sizes=[[2] * 3, [2] * 3, [2] * 3, [2, 1, 1]])
    encoder = [block.drop_path.drop_prob for level in network.encoder for block in level]
    assert encoder == pytest.approx([0.2 * i / 7 for i in range(8)])
    decoder = [block.drop_path.drop_prob for level in reversed(network.upward) for block in level]
    assert decoder == pytest.approx([0.2 * i / 5 for i in range(6)])
    shifted = [block.shifted for level in network.encoder for block in level]
    assert shifted == [False, True] * 4
