"""TransBTS: the authors' counts without what never reaches the loss, and the tokens of each plan."""

import pytest
from rival_cases import NARROW, TWOS, Plan, parameters

from nnunet_deform.networks.rivals.transbts import TransBTS
from nnunet_deform.networks.without_values import without_values


def published(inputs: int, size: int) -> TransBTS:
    arguments = Plan(f"{size}", (size,) * 3, (TWOS,) * 4).arguments("TransBTS")
    with without_values():
        return TransBTS(inputs, 4, **arguments)


def test_parameters() -> None:
    brats = published(4, 128)
    # Less than the released 32,987,588: a linear layer at its four channels, and a LayerNorm.
    assert parameters(brats) == 32_723_908 == 32_987_588 - 262_656 - 1_024
    assert parameters([brats.stem, brats.down, brats.levels]) == 4_402_320
    assert brats.positions.numel() == 2_097_152
    assert parameters(brats.transformer) == 21_000_192
    assert parameters(brats.to_tokens) - 2 * 128 == 1_769_984
    assert list(map(parameters, brats.to_map)) == [2_212_608, 885_504]
    assert list(map(parameters, brats.up)) == [17_040, 67_872, 270_912]
    assert parameters(published(1, 96)) == 31_510_196


@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (Plan("2d", (320, 256), ((2, 2),) * 6), 40 * 32),
        (Plan("thick", (20, 320, 256), ((1, 2, 2), (1, 2, 2), TWOS, TWOS)), 10 * 40 * 32),
        (Plan("odd", (20, 36, 30), (TWOS,) * 3), 3 * 5 * 4),
        (Plan("shallow", (24, 24, 40), (TWOS,) * 2), 6 * 6 * 10),
    ],
    ids=str,
)
def test_tokens(plan, tokens) -> None:
    with without_values():
        network = TransBTS(1, 2, **plan.arguments("TransBTS", **NARROW["TransBTS"]))
    assert len(network.positions) == tokens


def test_too_many_tokens_for_lack_of_poolings() -> None:
    plan = Plan("shallow", (128, 128, 80), (TWOS,) * 2)
    with pytest.raises(NotImplementedError, match=r"would have 20480 tokens, more than 16384; plan with more poolings"):
        plan.arguments("TransBTS")
