import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from test_deformux_plan import isotropic, stock

from nnunet_deform.layers.recomputation import plain_forms
from nnunet_deform.networks.memory import unable_to_follow_autocast
from nnunet_deform.networks.without_values import without_values
from nnunet_deform.plans import (
    deformux_architecture,
    dynamic_architecture,
    estimated_gigabytes,
    lightmedseg_architecture,
    magic_architecture,
    memory,
)
from nnunet_deform.plans.memory import (
    compiled_kept_bytes,
    elements_for,
    estimated_bytes,
    estimated_elements,
    kept_bytes,
    step_bytes,
)

ARCHITECTURES = {
    "PlainConvUNet": lambda base, patch, **options: base,
    "DeformUXNet": deformux_architecture,
    "LightMedSeg": lightmedseg_architecture,
    "MagicPlainConvUNet": magic_architecture,
    "MagicResidualEncoderUNet": partial(magic_architecture, encoder="residual"),
}
# On a GPU, or by fake tensors that torch follows through autocast without one.
needs_autocast = pytest.mark.skipif(unable_to_follow_autocast() is not None, reason=str(unable_to_follow_autocast()))
every_network = pytest.mark.parametrize("name", ARCHITECTURES)

# Patch and spacing. The constants of plans/memory.py were measured on these,
CALIBRATION = [((64, 64, 64), (1, 1, 1)), ((16, 128, 128), (4, 1, 1)), ((256, 192), (1, 1))]
# and not on these, which have other numbers of levels: U-Nets of 3, 4, 6, 7, 6, 8 and 4.
HELD_OUT = [
    ((16, 16, 16), (1, 1, 1)),
    ((40, 56, 40), (1, 1, 1)),
    ((10, 256, 224), (10, 1.56, 1.56)),
    pytest.param((20, 320, 256), (3.6, 0.6125, 0.6125), marks=pytest.mark.slow),
    pytest.param((128, 128, 128), (1, 1, 1), marks=pytest.mark.slow),
    pytest.param((512, 512), (1, 1), marks=pytest.mark.slow),
    ((56, 40), (1, 1)),
]


def unet(patch: Sequence[int], spacing: Sequence[float]) -> dict[str, Any]:
    """The U-Net that nnU-Net's planner gives this patch."""
    _, strides, kernel_sizes, size, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    assert list(size) == list(patch)
    planned = stock([[int(step) for step in stride] for stride in strides], [list(kernel) for kernel in kernel_sizes])
    widest = 512 if len(patch) == 2 else 320
    planned["arch_kwargs"]["features_per_stage"] = [min(32 * 2**level, widest) for level in range(len(strides))]
    return planned


@every_network
@pytest.mark.parametrize(("patch", "spacing"), HELD_OUT, ids=lambda value: "x".join(map(str, value)))
@pytest.mark.parametrize(
    "mixed_precision",
    [pytest.param(True, marks=needs_autocast), pytest.param(False, marks=pytest.mark.slow)],
    ids=["mixed", "float32"],
)
def test_the_estimate_is_within_a_tenth_of_what_autograd_keeps(name, patch, spacing, mixed_precision):
    arguments = ARCHITECTURES[name](unet(patch, spacing), patch), patch, 2, 4
    measured = kept_bytes(*arguments, mixed_precision=mixed_precision)
    assert estimated_bytes(*arguments, mixed_precision=mixed_precision) == pytest.approx(measured, rel=0.1)


@needs_autocast
@pytest.mark.parametrize(
    ("layer", "patch", "spacing"),
    [
        ("odconv", (56, 40), (1, 1)),
        ("ddconv", (56, 40), (1, 1)),
        pytest.param("odconv", (40, 56, 40), (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("ddconv", (40, 56, 40), (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("odconv", (256, 192), (1, 1), marks=pytest.mark.slow),
        pytest.param("ddconv", (256, 192), (1, 1), marks=pytest.mark.slow),
        pytest.param("dcd", (256, 192), (1, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_dynamic_convolutions_keep_in_float32_is_in_the_estimate(layer, patch, spacing):
    arguments = dynamic_architecture(unet(patch, spacing), patch, layer=layer), patch, 2, 4
    measured = kept_bytes(*arguments, mixed_precision=True)
    assert estimated_bytes(*arguments, mixed_precision=True) == pytest.approx(measured, rel=0.1)


@needs_autocast
@pytest.mark.parametrize(
    "name", [name if name == "LightMedSeg" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_the_constants_are_what_calibration_gives(name):
    measured = {}
    for patch, spacing in CALIBRATION:
        architecture = ARCHITECTURES[name](unet(patch, spacing), patch)
        with without_values():
            network = network_of(architecture)
        for mixed_precision in (False, True):
            kept = kept_bytes(architecture, patch, 1, 3, mixed_precision=mixed_precision)
            measured[patch, mixed_precision] = kept / float(network.compute_conv_feature_map_size(patch))
    (isotropic_3d, _), (anisotropic, _), (plane, _) = CALIBRATION
    means = (
        sum(measured[patch, False] for patch, _ in CALIBRATION) / 3,
        measured[plane, True],
        (measured[isotropic_3d, True] + measured[anisotropic, True]) / 2,
    )
    constants = memory._OURS.get(architecture["network_class_name"], memory._NNUNETS_OWN)
    assert constants == pytest.approx(means, rel=0.005)


def network_of(architecture: dict[str, Any]) -> torch.nn.Module:
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        allow_init=False,
        deep_supervision=True,
    )


@every_network
def test_what_is_measured_is_what_a_cpu_keeps(name):
    patch = (32, 32, 32)
    architecture = ARCHITECTURES[name](isotropic(4), patch)
    network = network_of(architecture)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def kept_on_the_cpu(batch: int) -> int:
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            # Detached, because an operation that holds its own output with its history is never freed.
            tensor = tensor.detach()
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with plain_forms(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(batch, 1, *patch))
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)

    measured = kept_bytes(architecture, patch, 1, 3, mixed_precision=False)
    # The CPU's convolution of few channels, LightMedSeg's, keeps its input filled up with zeros.
    tolerance = 0.02 if name == "LightMedSeg" else 0.001
    assert measured == pytest.approx(kept_on_the_cpu(2) - kept_on_the_cpu(1), rel=tolerance)


# Megabytes of one sample as an eager step keeps them, at most: what was measured, and a little more.
@needs_autocast
@pytest.mark.parametrize(
    ("name", "patch", "most"),
    [
        ("DeformUXNet", (64, 64, 64), 275),
        pytest.param("DeformUXNet", (128, 128, 128), 2200, marks=pytest.mark.slow),
        ("LightMedSeg", (64, 64, 64), 79),
        pytest.param("LightMedSeg", (128, 128, 128), 630, marks=pytest.mark.slow),
        pytest.param("MagicPlainConvUNet", (128, 128, 128), 1791, marks=pytest.mark.slow),
    ],
)
def test_eager_steps_keep_less(name, patch, most):
    architecture = ARCHITECTURES[name](unet(patch, (1, 1, 1)), patch)
    kept = kept_bytes(architecture, patch, 1, 3, mixed_precision=True, eager=True)
    assert 0.9 * most < kept / 1e6 < most


@needs_autocast
@pytest.mark.parametrize(
    ("name", "options", "kept", "peak"),
    [
        ("PlainConvUNet", {}, 28.0, 36.2),
        ("DeformUXNet", {}, 34.2, 52.9),
        pytest.param("DeformUXNet", {"recompute": "blocks"}, 21.5, 49.6, marks=pytest.mark.slow),
        pytest.param("LightMedSeg", {}, 9.6, 16.5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_backward_pass_holds_more_at_one_time_than_is_kept(name, options, kept, peak):
    patch = (32, 32, 32)
    architecture = ARCHITECTURES[name](unet(patch, (1, 1, 1)), patch, **options)
    step = step_bytes(architecture, patch, 1, 3)
    assert (step.kept / 1e6, step.peak / 1e6) == pytest.approx((kept, peak), rel=0.01)


@needs_autocast
@pytest.mark.slow
def test_a_compiled_stock_network_keeps_what_an_eager_one_does():
    patch = (32, 32, 32)
    architecture = unet(patch, (1, 1, 1))
    eager = kept_bytes(architecture, patch, 1, 3, mixed_precision=True, eager=True)
    assert compiled_kept_bytes(architecture, patch, 1, 3) == pytest.approx(eager, rel=0.01)


@needs_autocast
def test_autocast_is_off_after_a_measurement():
    kept_bytes(isotropic(3), (16,) * 3, 1, 3, mixed_precision=True)
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    ("version", "built", "unable"), [("2.13.0+cpu", False, True), ("2.8.0+cu128", True, True), ("2.11.0", True, False)]
)
def test_mixed_precision_that_torch_cannot_follow_has_a_sentence(version, built, unable, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    if not unable:
        assert unable_to_follow_autocast() is None
        return
    with pytest.raises(RuntimeError, match=re.escape(f"torch {version} cannot follow mixed precision without a CUDA")):
        kept_bytes(isotropic(3), (16,) * 3, 1, 3, mixed_precision=True)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("gigabytes", [0.5, 8, 11, 24, 31, 40, 80])
def test_gigabytes_and_elements_are_each_others_inverse(ndim, gigabytes):
    assert memory._gigabytes_for(elements_for(gigabytes, ndim), ndim) == pytest.approx(gigabytes, rel=1e-12)


def test_beyond_the_largest_reference_memory_is_proportional():
    assert elements_for(80, 3) == 2 * elements_for(40, 3) == 2 * 2 * 3600e6
    assert elements_for(4, 2) == elements_for(8, 2) / 2 == 12 * 85e6 / 2
    assert elements_for(16, 3) == 560e6 + 2100e6


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
    # 59.6 M elements of the reference's 560 M, and 4.04 bytes of each where nnU-Net's own network keeps 3.95.
    estimate = estimated_gigabytes(ours, (40, 56, 40), 2, 1, 3, mixed_precision=True)
    assert estimate == pytest.approx(8 * 59.6 / 560 * 4.04 / 3.95, rel=0.002)
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
    assert estimated_elements(linear, (8, 8), 1, 2, mixed_precision=True) is None


class Silent:
    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool) -> None:
        pass
