"""Anchors set by hand appear at their voxel, and their movement is the one put in."""

import math

import numpy as np
import pytest

from nnunet_deform.inspection.anchors import movement, positions


def test_anchors_are_at_their_voxel() -> None:
    size = (4, 8, 10)
    voxel = np.array([[1, 5, 9], [0, 0, 0]])
    anchors = (voxel + 0.5) / np.array(size)
    found = positions(np.stack([anchors, anchors]), np.array([[0, 0, 0], [2, 4, 5]]), size)
    np.testing.assert_allclose(found[0], voxel)
    np.testing.assert_allclose(found[1], voxel + np.array([2, 4, 5]))


def test_movement_in_mm() -> None:
    still = np.tile(np.array([[0.2, 0.5], [0.7, 0.1]]), (3, 1, 1))
    assert movement([still], (10, 20), (3.0, 1.0)).within == pytest.approx(0, abs=1e-12)
    assert math.isnan(movement([still], (10, 20), (3.0, 1.0)).between)
    # One axis moves by 0.1 of 10 voxels of 3 mm to either side of the mean.
    moved = np.stack([still[0] + [0.1, 0], still[0] - [0.1, 0]])
    found = movement([moved, still], (10, 20), (3.0, 1.0))
    assert found.within == pytest.approx(math.sqrt(2 / 5) * 3)
    assert found.between == pytest.approx(0, abs=1e-12)
    apart = movement([still, still + np.array([0, 0.2])], (10, 20), (3.0, 1.0))
    assert apart.within == pytest.approx(0, abs=1e-12)
    assert apart.between == pytest.approx(0.1 * 20)
    np.testing.assert_allclose(apart.mean, [[0.2, 0.6], [0.7, 0.2]])
