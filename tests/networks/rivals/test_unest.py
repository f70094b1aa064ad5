"""UNesT: the authors' counts, and blocks that do not see each other."""

import pytest
import torch
from rival_cases import NARROW, TWOS, Plan, parameters

from nnunet_deform.layers.transformer import from_windows, to_windows
from nnunet_deform.networks.rivals.unest import NestedLevel, UNesT
from nnunet_deform.networks.without_values import without_values
from nnunet_deform.plans.rivals import _OPTIONS

SMALL = {"token_widths": [64, 128, 256], "heads": [2, 4, 8], "depths": [2, 2, 8]}


def published(classes: int, options: dict) -> UNesT:
    arguments = Plan("96", (96,) * 3, (TWOS,) * 4).arguments("UNesT_B", **options)
    with without_values():
        return UNesT(1, classes, **arguments)


def test_parameters() -> None:
    base = published(133, {})
    assert parameters(base) == 87_205_158
    assert parameters([base.embedding, base.aggregations, base.levels, base.norm]) == 33_952_896
    assert list(map(parameters, base.skips)) == [28_544, 69_632, 884_736, 3_538_944]
    assert parameters(base.bottleneck) == 14_156_801
    assert list(map(parameters, base.up)) == [101_376, 405_504, 1_622_016, 6_488_064, 25_952_256]
    assert parameters(base.head) == 4_389
    assert parameters(published(14, {})) == 87_201_231
    assert parameters(published(14, _OPTIONS["UNesT_L"])) == 279_457_455
    assert parameters(published(14, SMALL)) == 22_400_239
    assert [tuple(level.positions.shape[:2]) for level in base.levels] == [(64, 216), (8, 216), (1, 216)]


@pytest.mark.parametrize(("grid", "block"), [((4, 6), (2, 3)), ((2, 4, 9), (1, 2, 3))], ids=str)
def test_cut_and_joined_again(grid, block) -> None:
    x = torch.randn(2, *grid, 5)
    blocks = to_windows(x, block)
    assert torch.equal(from_windows(blocks, block, grid), x)
    # The first block is the map's first corner.
    assert torch.equal(blocks[:, 0].flatten(), x[(slice(None), *map(slice, block))].flatten())


def test_blocks_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    level = NestedLevel(8, 2, (5, 8), (3, 4), (2, 2), [0.0, 0.0]).eval()
    x = torch.randn(1, 8, 5, 8)
    changed = x.clone()
    changed[:, 0, 4, 6] += 1  # of one channel, since a norm takes out what all have in common
    difference = (level(changed) - level(x)).abs().sum(dim=1)[0] > 1e-6
    expected = torch.zeros(5, 8, dtype=torch.bool)
    expected[3:, 4:] = True
    assert torch.equal(difference, expected)


def test_weights_of_a_padded_and_an_unpadded_patch_are_the_same() -> None:
    filled, padded = (
        UNesT(1, 2, **Plan("", patch, (TWOS,) * 3).arguments("UNesT_B", **NARROW["UNesT_B"]))
        for patch in ((16, 16, 32), (15, 14, 29))
    )
    padded.load_state_dict(filled.state_dict(), strict=True)


def test_an_image_drops_a_path_in_all_of_its_blocks() -> None:
    torch.manual_seed(0)
    level = NestedLevel(8, 2, (4, 4), (2, 2), (2, 2), [0.9]).train()
    x = torch.randn(20, 8, 4, 4)
    with torch.no_grad():
        level.positions.zero_()
        changed = (level(x) - x).abs().amax(dim=1) > 1e-6
    assert {tuple(sample.flatten().tolist()) for sample in changed} == {(False,) * 16, (True,) * 16}
