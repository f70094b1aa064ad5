"""Voxels of the preprocessed image in the case and in the world, against SimpleITK and nnU-Net's own resampling."""

import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_deform.inspection.geometry import Geometry


def rotated() -> sitk.Image:
    """Anisotropic, and turned about two axes."""
    image = sitk.Image(7, 6, 5, sitk.sitkFloat32)
    image.SetSpacing((0.5, 0.8, 3.0))
    image.SetOrigin((-12.0, 7.0, 100.0))
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.3, 0.0, 0.5)
    image.SetDirection(turn.GetMatrix())
    return image


def of(image: sitk.Image, **changes: object) -> Geometry:
    size = image.GetSize()[::-1]
    values = {
        "transpose": (0, 1, 2),
        "corner": (0, 0, 0),
        "cropped": size,
        "resampled": size,
        "spacing": image.GetSpacing()[::-1],
        "origin": image.GetOrigin(),
        "direction": image.GetDirection(),
    }
    return Geometry(**{**values, **changes})


def test_the_world_is_simpleitks() -> None:
    image = rotated()
    geometry = of(image)
    for zyx in ((0, 0, 0), (4.0, 5.0, 6.0), (1.25, 2.5, 0.75)):
        expected = image.TransformContinuousIndexToPhysicalPoint(zyx[::-1])
        np.testing.assert_allclose(geometry.to_world(np.array(zyx)), expected, rtol=1e-12)


def test_transposed_cropped_and_resampled() -> None:
    # The case's axes (z, y, x) are preprocessed as (x, z, y).
    geometry = of(rotated(), transpose=(2, 0, 1), corner=(1, 0, 2), cropped=(6, 5, 4), resampled=(3, 10, 4))
    # x: two voxels in one, so its first centre lies between voxels 0 and 1 of the crop; z: each voxel is two.
    np.testing.assert_allclose(geometry.to_case(np.array([0, 0, 0])), [-0.25, 2, 1.5])
    np.testing.assert_allclose(geometry.to_case(np.array([2, 9, 3])), [4.25, 5, 5.5])
    points = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(geometry.from_case(geometry.to_case(points)), points, atol=1e-12)
    assert geometry.resampled_spacing == pytest.approx((1.0, 1.5, 0.8))


def test_a_step_of_one_voxel_is_its_spacing_in_mm() -> None:
    geometry = of(rotated(), resampled=(10, 6, 7))
    points = geometry.to_world(geometry.to_case(np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1]])))
    assert math.dist(points[0], points[1]) == pytest.approx(1.5)
    assert math.dist(points[0], points[2]) == pytest.approx(0.5)
