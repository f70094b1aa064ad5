"""SegFormer3D: the authors' counts, any size, and where keys live."""

import math

import pytest
import torch
from rival_cases import NARROW, Plan, parameters

from nnunet_deform.networks.rivals.segformer3d import ReducedAttention, SegFormer3D
from nnunet_deform.networks.without_values import without_values

ISOTROPIC = {
    "embed_strides": [[2] * 3] * 2,
    "down_strides": [[2] * 3] * 3,
    "down_kernels": [[3] * 3] * 3,
    "output_strides": [[1] * 3],
}


def published(inputs: int, classes: int, **options) -> SegFormer3D:
    with without_values():
        return SegFormer3D(inputs, classes, **ISOTROPIC, **options)


def test_parameters() -> None:
    network = published(4, 3)
    assert parameters(network) == 4_525_251
    assert parameters(network.levels) == 4_127_680
    assert parameters(network.linear_decoder) == 397_571
    embeddings = [parameters([level.embedding, level.embedding_norm]) for level in network.levels]
    assert embeddings == [44_000, 55_488, 276_960, 1_106_688]
    blocks = [parameters(block) for level in network.levels for block in level.blocks]
    assert blocks == [82_176, 82_176, 90_624, 90_624, 328_480, 328_480, 820_480, 820_480]
    assert parameters(published(4, 3, reduced=True)) == 4_511_939
    assert parameters(published(1, 14)) == 4_495_150


@pytest.mark.parametrize("size", [(33, 40, 21), (16, 17, 18)], ids=str)
def test_any_size_with_one_set_of_weights(size) -> None:
    torch.manual_seed(0)
    network = Plan("32", (32,) * 3, ((2, 2, 2),) * 4).network("SegFormer3D").eval()
    with torch.no_grad():
        logits = network(torch.randn(1, 1, *size))
    assert logits.shape == (1, 3, *size)
    assert logits.isfinite().all()


def test_keys_live_on_the_third_levels_grid() -> None:
    plan = Plan("", (40, 56, 40), ((2, 2, 2),) * 3)
    network = SegFormer3D(1, 2, **plan.arguments("SegFormer3D", **NARROW["SegFormer3D"]))
    keys = []
    for module in network.modules():
        if isinstance(module, ReducedAttention):
            made = module.keys_and_values
            module.keys_and_values = lambda x, made=made: keys.append(made(x)) or keys[-1]
    with torch.no_grad():
        network(plan.image())
    assert [one.shape[3] for one in keys] == [math.prod((3, 4, 3))] * 6 + [math.prod((2, 2, 2))] * 2
