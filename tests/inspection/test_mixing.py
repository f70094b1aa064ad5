"""Mixing weights set by hand."""

import numpy as np
import pytest
import torch

from nnunet_deform.inspection.mixing import mixing, most_different
from nnunet_deform.networks.observation import MixingWeights


def test_uniform_one_kernel_and_dead_ones() -> None:
    uniform = mixing(MixingWeights(torch.full((3, 4), 0.5)))
    assert (uniform.entropy, uniform.spread, uniform.dead) == (pytest.approx(1), pytest.approx(0), 0)
    one = mixing(MixingWeights(torch.tensor([[1.0, 0, 0, 0]])))
    assert (one.entropy, one.spread, one.dead) == (pytest.approx(0), 0, 3)
    two = mixing(MixingWeights(torch.tensor([[1.0, 0], [0.5, 0.5]])))
    assert two.entropy == pytest.approx(0.5)
    # As in the training log: the sample's standard deviation.
    assert two.spread == pytest.approx(0.125**0.5)
    np.testing.assert_allclose(two.shares, [[1, 0], [0.5, 0.5]])


def test_the_two_patches_that_differ_most() -> None:
    first = mixing(MixingWeights(torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])))
    second = mixing(MixingWeights(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])))
    assert most_different({"a": first}) == (1, 2)
    assert most_different({"a": first, "b": second}) == (1, 3)
    assert most_different({"a": mixing(MixingWeights(torch.tensor([[0.5, 0.5]])))}) == (0, 0)
