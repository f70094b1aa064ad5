import math
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
    gigabytes_for,
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

# Patch and spacing. The constants of plans/memory.py were measured on these,
CALIBRATION = [((64, 64, 64), (1, 1, 1)), ((16, 128, 128), (4, 1, 1)), ((256, 192), (1, 1))]
# and not on these, which have other numbers of levels: U-Nets of 4, 6, 7, 6 and 8.
HELD_OUT = [
    ((40, 56, 40), (1, 1, 1)),
    ((10, 256, 224), (10, 1.56, 1.56)),
    ((20, 320, 256), (3.6, 0.6125, 0.6125)),
    ((128, 128, 128), (1, 1, 1)),
    ((512, 512), (1, 1)),
]
MODES = [("PlainConvUNet", None)] + [(name, mode) for name in list(ARCHITECTURES)[1:] for mode in ("cheap", "blocks")]
# The others are slow, a second for each hundred layers.
QUICK = [
    ("PlainConvUNet", None, (10, 256, 224)),
    ("DeformUXNet", "blocks", (40, 56, 40)),
]


def unet(patch: Sequence[int], spacing: Sequence[float]) -> dict[str, Any]:
    """The U-Net that nnU-Net's planner gives this patch."""
    _, strides, kernel_sizes, size, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    assert list(size) == list(patch)
    planned = stock([[int(step) for step in stride] for stride in strides], [list(kernel) for kernel in kernel_sizes])
    widest = 512 if len(patch) == 2 else 320
    planned["arch_kwargs"]["features_per_stage"] = [min(32 * 2**level, widest) for level in range(len(strides))]
    return planned


def in_mode(name: str, recompute: str | None, patch: Sequence[int], spacing: Sequence[float]) -> dict[str, Any]:
    options = {} if recompute is None else {"recompute": recompute}
    return ARCHITECTURES[name](unet(patch, spacing), patch, **options)


@needs_autocast
@pytest.mark.parametrize(
    ("name", "recompute", "patch", "spacing", "mixed_precision"),
    [
        pytest.param(
            *(*of_network, patch, spacing, mixed_precision),
            marks=() if mixed_precision and (*of_network, patch) in QUICK else pytest.mark.slow,
        )
        for of_network in MODES
        for patch, spacing in HELD_OUT
        for mixed_precision in (True, False)
    ],
    ids=str,
)
def test_the_estimate_is_within_a_tenth_of_what_a_step_holds(name, recompute, patch, spacing, mixed_precision):
    arguments = in_mode(name, recompute, patch, spacing), patch, 2, 4
    measured = step_bytes(*arguments, mixed_precision=mixed_precision).peak
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
    elements = estimated_elements(*arguments, mixed_precision=True)
    assert elements * memory._NNUNETS_OWN.compiled == pytest.approx(measured, rel=0.1)


@needs_autocast
@pytest.mark.slow
def test_mixed_kernels_that_outweigh_the_feature_maps_are_in_the_estimate():
    patch = (56, 40)
    arguments = in_mode("MagicPlainConvUNet", "cheap", patch, (1, 1)), patch, 1, 3
    of_nnunets = step_bytes(*arguments, mixed_precision=True).peak / memory._REFERENCE_HELD[2]
    assert estimated_elements(*arguments, mixed_precision=True) == pytest.approx(of_nnunets, rel=0.15)


@needs_autocast
@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", [True, False], ids=["mixed", "float32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_constants_are_what_calibration_gives(name, mixed_precision):
    kept, in_flight = [], {"cheap": [], "blocks": []}
    for patch, spacing in CALIBRATION:
        modes = [None] if name == "PlainConvUNet" else ["cheap", "blocks"]
        architectures = {mode or "cheap": in_mode(name, mode, patch, spacing) for mode in modes}
        with without_values():
            network = network_of(architectures["cheap"])
        elements = float(network.compute_conv_feature_map_size(patch))
        if hasattr(network, "made_again"):
            elements -= network.made_again(patch)
        finest = architectures["cheap"]["arch_kwargs"]["features_per_stage"][0] * math.prod(patch)
        of_mode = {
            mode: step_bytes(architecture, patch, 1, 3, mixed_precision=mixed_precision)
            for mode, architecture in architectures.items()
        }
        kept.append(of_mode["cheap"].kept / elements)
        for mode, step in of_mode.items():
            in_flight[mode].append((step.peak - of_mode["cheap"].kept) / finest)
    for mode, architecture in architectures.items():
        step = memory._OURS.get((architecture["network_class_name"], mode), memory._NNUNETS_OWN)
        held = step.mixed if mixed_precision else step.float32
        assert held == pytest.approx((sum(kept) / 3, sum(in_flight[mode]) / 3), rel=0.01, abs=0.05)


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if "Residual" in name else name for name in ARCHITECTURES],
)
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
        pytest.param("DeformUXNet", {"recompute": "blocks"}, 21.5, 43.6, marks=pytest.mark.slow),
        pytest.param("LightMedSeg", {}, 9.6, 16.5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_backward_pass_holds_more_at_one_time_than_is_kept(name, options, kept, peak):
    patch = (32, 32, 32)
    architecture = ARCHITECTURES[name](unet(patch, (1, 1, 1)), patch, **options)
    step = step_bytes(architecture, patch, 1, 3, mixed_precision=True)
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
    assert gigabytes_for(elements_for(gigabytes, ndim), ndim) == pytest.approx(gigabytes, rel=1e-12)


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
    # 59.6 M elements of the reference's 560 M; a compiled step keeps 2.10 bytes of each, and of nnU-Net's own 3.95.
    estimate = estimated_gigabytes(ours, (40, 56, 40), 2, 1, 3, mixed_precision=True)
    assert estimate == pytest.approx(8 * 59.6 / 560 * 2.10 / 3.95, rel=0.002)
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
