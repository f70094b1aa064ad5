"""Offsets set by hand, at their place and axis, in mm."""

import numpy as np
import SimpleITK as sitk
import torch
from test_geometry import of, rotated

from nnunet_deform.inspection.offsets import EDGES, histograms, lengths, sampling_positions
from nnunet_deform.networks.observation import Offsets

SIZE = (5, 3, 3)  # of a level with strides (1, 2, 2) in a patch of (5, 6, 6)


def observation() -> Offsets:
    """Nothing moves but the centre tap of voxel (2, 1, 2): by 2 voxels of the level along y."""
    values = torch.zeros(1, 27, 3, *SIZE)
    values[0, 13, 1, 2, 1, 2] = 2.0
    return Offsets(values, level=1, kernel_size=(3, 3, 3))


def test_lengths_are_in_mm_of_the_axis() -> None:
    found = lengths(observation(), (3.0, 1.6, 1.0))
    expected = torch.zeros(1, *SIZE)
    expected[0, 2, 1, 2] = 2 * 1.6 / 27
    torch.testing.assert_close(found, expected)


def test_positions_are_the_level_s_voxels_in_the_patch() -> None:
    regular, moved = sampling_positions(observation(), 0, (2, 3, 4), (1, 2, 2))
    # Voxel (2, 3, 4) of the patch is in voxel (2, 1, 2) of the level, whose centre is (2, 2.5, 4.5).
    np.testing.assert_allclose(regular[13], [2, 2.5, 4.5])
    np.testing.assert_allclose(regular[0], [1, 0.5, 2.5])
    np.testing.assert_allclose(regular[26], [3, 4.5, 6.5])
    np.testing.assert_allclose(moved - regular, [[0, 0 if tap != 13 else 4, 0] for tap in range(27)])
    _, elsewhere = sampling_positions(observation(), 0, (2, 3, 2), (1, 2, 2))
    np.testing.assert_allclose(elsewhere[13], [2, 2.5, 2.5])


def test_a_strided_layer_reads_around_its_own_voxels() -> None:
    values = torch.zeros(1, 9, 2, 2, 2)
    strided = Offsets(values, level=0, kernel_size=(3, 3), stride=(2, 2), size=(4, 4))
    regular, _ = sampling_positions(strided, 0, (3, 3), (1, 1))
    np.testing.assert_allclose(regular[4], [2, 2])


def test_in_a_rotated_anisotropic_image_the_arrow_points_where_simpleitk_says() -> None:
    image: sitk.Image = rotated()
    regular, moved = sampling_positions(observation(), 0, (2, 3, 4), (1, 2, 2))
    corner = np.array([0, 0, 1])  # of the patch
    geometry = of(image)
    arrow = geometry.to_world(geometry.to_case(moved[13] + corner)) - geometry.to_world(
        geometry.to_case(regular[13] + corner)
    )
    # Two voxels of a level with stride 2 are 4 voxels of 0.8 mm along the image's second axis.
    direction = np.array(image.GetDirection()).reshape(3, 3)[:, 1]
    np.testing.assert_allclose(arrow, 4 * 0.8 * direction, atol=1e-12)


def test_histograms_by_axis_count_every_offset_and_those_beyond_in_the_last_bin() -> None:
    found = observation()
    found.values[0, 0, 2, 0, 0, 0] = -9.0
    counts = histograms(found)
    assert counts.sum(1).tolist() == [27 * 45] * 3
    assert counts[2, 0] == 1
    assert counts[1, np.searchsorted(EDGES, 2.0, "right") - 1] == 1
