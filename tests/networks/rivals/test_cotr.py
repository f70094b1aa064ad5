"""CoTr: the published counts, and where its attention samples."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from rival_cases import NARROW, TWOS, Plan, parameters
from torch import nn

from nnunet_deform.networks.rivals.cotr import CoTr, DeformableAttention, _centres, _sines
from nnunet_deform.networks.without_values import without_values

SIZES = ((4, 3, 5), (2, 2, 3))


def published(classes: int) -> CoTr:
    arguments = Plan("", (48, 192, 192), ((1, 2, 2), TWOS, TWOS, TWOS)).arguments("CoTr")
    with without_values():
        return CoTr(1, classes, **arguments)


def test_parameters() -> None:
    network = published(14)
    assert parameters(network) == 41_872_504
    assert parameters([network.stem, network.backbone]) == 20_500_800
    assert parameters(network.transformer) + network.level_vectors.numel() == 9_316_992
    assert parameters(published(4)) == 41_865_424


def attention(offset: tuple[float, ...]) -> DeformableAttention:
    """One that samples every point at this offset, and passes values on as they are."""
    module = DeformableAttention(6, 2, len(offset))
    with torch.no_grad():
        module.offset.bias.copy_(torch.tensor(offset).expand(2 * 2 * 4, -1).flatten())
    module.value, module.output = nn.Identity(), nn.Identity()
    return module


@pytest.mark.parametrize("offset", [(0, 0, 0), (1, 0, 0), (0, -1, 0), (0, 0, 2), (1, -1, 1), (0.5, 0, 0)], ids=str)
def test_a_token_reads_its_own_voxel_or_the_one_at_the_offset(offset) -> None:
    """Of the fine level, with the coarse one empty: half of the weight."""
    torch.manual_seed(0)
    fine = torch.randn(2, *SIZES[0], 6)
    x = torch.cat((fine.flatten(1, -2), torch.zeros(2, math.prod(SIZES[1]), 6)), dim=1)
    centres = torch.cat([_centres(size, x.device) for size in SIZES])
    found = attention(offset)(x, torch.randn_like(x), centres, SIZES)[:, : math.prod(SIZES[0])]
    expected = torch.zeros_like(fine)
    # Half a voxel lies between two.
    ends = {tuple(map(math.floor, offset)), tuple(map(math.ceil, offset))}
    for voxel, end in itertools.product(itertools.product(*map(range, SIZES[0])), ends):
        target = tuple(i + o for i, o in zip(voxel, end, strict=True))
        if all(0 <= i < s for i, s in zip(target, SIZES[0], strict=True)):
            expected[(slice(None), *voxel)] += fine[(slice(None), *target)] / 2 / len(ends)
    torch.testing.assert_close(found, expected.flatten(1, -2), rtol=0, atol=1e-5)


def test_a_token_reads_the_other_level_at_its_own_place() -> None:
    """A map that grows linearly is read at the token's centre, in the other map's voxels."""
    sizes = ((8, 8), (4, 4))
    coarse = _centres(sizes[1], torch.device("cpu")).repeat(1, 3)[None]
    x = torch.cat((torch.zeros(1, 64, 6), coarse), dim=1)
    centres = torch.cat([_centres(size, x.device) for size in sizes])
    found = attention((0.0, 0.0))(x, torch.randn_like(x), centres, sizes)[0, :64].view(8, 8, 6)
    # Not at the border, where what lies outside is zero.
    inside = centres[:64].view(8, 8, 2)[1:-1, 1:-1].repeat(1, 1, 3)
    torch.testing.assert_close(found[1:-1, 1:-1], inside / 2, rtol=0, atol=1e-5)


def test_offsets_start_along_both_directions_of_each_axis() -> None:
    for ndim, distinct in ((2, 4), (3, 6)):
        bias = DeformableAttention(12, 6, ndim).offset.bias.view(6, 2, 4, ndim)
        directions = bias[:, 0, 0]
        assert len({tuple(one) for one in directions.tolist()}) == distinct
        assert torch.equal(directions.abs().sum(dim=1), torch.ones(6))
        assert torch.equal(bias[:, 1, 3], 4 * directions)


def test_positions() -> None:
    """Feature j of an axis is the sine (j even) or cosine of 2 pi (i + 1/2) / size / 10000^(3 floor(j / 3) / 128)."""
    sines = _sines(_centres((2, 3, 4), torch.device("cpu")), 384).view(2, 3, 4, 384)
    for (d, h, w), axis, feature in itertools.product([(0, 0, 0), (1, 2, 3), (1, 0, 2)], range(3), (0, 1, 5, 7, 127)):
        u = 2 * math.pi * ((d, h, w)[axis] + 0.5) / (2, 3, 4)[axis]
        function = math.cos if feature % 2 else math.sin
        expected = function(u / 10_000 ** (3 * (feature // 3) / 128))
        assert sines[d, h, w, 128 * axis + feature].item() == pytest.approx(expected, abs=1e-6)


def test_any_size_with_one_set_of_weights() -> None:
    torch.manual_seed(0)
    network = Plan("", (32,) * 3, (TWOS,) * 4).network("CoTr").eval()
    image = torch.randn(1, 1, 33, 40, 21)
    with torch.no_grad():
        logits = network(image)
        assert logits.shape == (1, 3, 33, 40, 21)
        # Padded to the first stride only.
        padded = network(F.pad(image, (0, 1, 0, 0, 0, 1)))
    torch.testing.assert_close(padded[..., :33, :, :21], logits)
    assert NARROW["CoTr"]["widths"][2] == network.level_vectors.shape[1]
