import pytest
from test_deformux_plan import isotropic

from nnunet_deform.plans import deformux_architecture, estimated_gigabytes


def test_a_plan_for_eight_gigabytes_stays_below_them():
    # 128^3 at batch 2 is what nnU-Net's planner chooses for 8 GB; 451 M elements of the reference's 560 M.
    estimate = estimated_gigabytes(isotropic(6), (128,) * 3, 2, 1, 2, mixed_precision=True)
    assert estimate == pytest.approx(8 * 451.3 / 560, rel=0.002)


def test_the_estimate_is_linear_in_the_batch_and_doubles_in_float32():
    one = estimated_gigabytes(isotropic(5), (64,) * 3, 1, 1, 3, mixed_precision=True)
    assert estimated_gigabytes(isotropic(5), (64,) * 3, 4, 1, 3, mixed_precision=True) == pytest.approx(4 * one)
    assert estimated_gigabytes(isotropic(5), (64,) * 3, 1, 1, 3, mixed_precision=False) == pytest.approx(2 * one)


def test_deformux_counts_more_than_the_stock_network():
    base = isotropic(4)
    ours = deformux_architecture(base, (40, 56, 40))
    # 59.6 M elements of the reference's 2 * 560 M.
    estimate = estimated_gigabytes(ours, (40, 56, 40), 2, 1, 3, mixed_precision=True)
    assert estimate == pytest.approx(8 * 59.6 / 560, rel=0.002)
    assert estimate > estimated_gigabytes(base, (40, 56, 40), 2, 1, 3, mixed_precision=True)


def test_2d_has_its_own_reference():
    estimate = estimated_gigabytes(isotropic(8, ndim=2), (512, 512), 12, 1, 2, mixed_precision=True)
    assert 7 < estimate < 9


def test_no_estimate_for_a_network_that_gives_none():
    linear = {
        "network_class_name": "test_memory.Silent",
        "arch_kwargs": {},
        "_kw_requires_import": [],
    }
    assert estimated_gigabytes(linear, (8, 8), 1, 1, 2, mixed_precision=True) is None


class Silent:
    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool) -> None:
        pass
