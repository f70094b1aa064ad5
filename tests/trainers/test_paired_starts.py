"""At one seed, all variants of a network start from equal weights, so that a contrast of them shows what differs.

A new trainer takes part by being listed in ``trainers.__all__``. ``pytest -s`` prints how many random tensors of each
pair are equal.
"""

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantoms import unet_architecture
from torch import Tensor

from nnunet_deform import trainers
from nnunet_deform.plans import deformux
from nnunet_deform.trainers.variants import find_trainer

# By the number of axes: strides, kernels, patch.
PLANS = {
    2: ([[1, 1], *[[2, 2]] * 4], [[3, 3]] * 5, [64, 64]),
    3: ([[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3], [[1, 3, 3], *[[3, 3, 3]] * 4], [16, 64, 64]),
}

_BLOCK = r"encoder\.stages\.\d\.\d\.branches\.\d\.\d"
_KERNELS = (r"encoder\.stages\.\d\.0\.convs\.\d\.conv\.(weight|bias)",)
_OTHER_BLOCK = {"shape": (rf"{_BLOCK}\.weight",), "equal": (rf"{_BLOCK}\.bias",)}  # norms where eq. 3 has operators
_PLANAR = {"shape": (rf"{_BLOCK}\.offset\.(weight|bias)",)}  # fewer offsets
_MORE_ANCHORS = {
    "shape": (
        r"anchor_detector\.coordinates\.2\.(weight|bias)",
        r"encoder\.stages\.\d\.modulation\.(gamma|beta)\.weight",
        r"decoder\.fusions\.\d\.position_bias\.linear\.weight",
    ),
    "equal": (r"decoder\.fusions\.\d\.position_bias\.linear\.bias",),  # its bound falls with the number of anchors
}
# Nearly everything is wider, and what is not has more inputs, which bound its bias.
_WIDER = {"shape": (r".*",), "equal": (r".*\.bias",)}
_RELEASED_START = {"equal": (r"encoder\..*\.attention\.(fusion\.2|recalculation\.3)\.weight",)}  # larger by a factor
# What a variant has under the names of its family's main network without having the same: tensors of another shape, and
# tensors of the same shape that another number of inputs bounds otherwise.
EXCEPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "DeformUX_convnext": _OTHER_BLOCK,
    "UXNet": _OTHER_BLOCK,
    "DeformUX_dense": {"shape": (rf"{_BLOCK}\.weight",), "equal": (rf"{_BLOCK}\.bias",)},
    "DeformUX_depthwiseScaling": {
        "shape": (rf"{_BLOCK}\.(expand|reduce)\.weight",),
        "equal": (rf"{_BLOCK}\.(expand|reduce)\.bias",),
    },
    "DeformUX_offsetKernel3": {"shape": (rf"{_BLOCK}\.offset\.weight",)},
    "DeformUX_xy": _PLANAR,
    "DeformUX_xz": _PLANAR,
    "DeformUX_yz": _PLANAR,
    "LightMedSeg_anchors16": _MORE_ANCHORS,
    "LightMedSeg_anchors32": _MORE_ANCHORS,
    # Other levels take the features of their own level, so the list begins elsewhere.
    "LightMedSeg_noRouter": {"shape": (r"decoder\.skips\.\d\.(weight|bias)",)},
    # Wide enough for as many parameters.
    "LightMedSeg_opOff": {
        "shape": (r"bottleneck\.0\.weight", r"bottleneck\.1\.0\.(weight|bias)", r"bottleneck\.2\.weight"),
        "equal": (r"bottleneck\.2\.bias",),  # before nnU-Net's initialisation
    },
    "LightMedSeg_w2": _WIDER,
    "LightMedSeg_w4": _WIDER,
    "MAGIC_2x": {
        "shape": (
            *_KERNELS,
            r"encoder\..*\.attention\.fusion\.2\.weight",
            r"encoder\..*\.attention\.recalculation\.\d\.(weight|bias)",
        )
    },
    "MAGIC_letter": _RELEASED_START,
    "MAGIC_released": _RELEASED_START,
    "MAGIC_annealed": _RELEASED_START,
    # Another number of kernels, in DDConv's network also of those that are static there.
    **{
        f"{name}{suffix}": {"shape": _KERNELS}
        for name in ("CondConv", "DCD", "DDConv", "DDConv_slowOffsets")
        for suffix in ("", "_BN")
    },
    "MAGIC_CondConv": {"shape": _KERNELS},
    **{name: _RELEASED_START for name in ("DYConv", "DYConv_BN", "MAGIC_DYConv")},
    # By fan-out before nnU-Net's initialisation.
    **{
        name: {"equal": (r"encoder\.stages\.\d\.0\.convs\.\d\.conv\.weight",)}
        for name in ("ODConv", "ODConv_BN", "ODConv_layer")
    },
}


def _family(trainer: type) -> type:
    """The main trainer of a network: the uppermost that says where its architecture comes from, and of other dynamic
    convolutions MAGIC's."""
    main = [base for base in trainer.__mro__ if "architecture" in vars(base)][-1]
    return trainers.nnUNetTrainerMAGIC if main.__module__ == "nnunet_deform.trainers.dynamic" else main


OURS = [name for name in trainers.__all__ if name not in (*trainers.BASELINES, *trainers.RIVALS)]
PAIRS = [(name, _family(getattr(trainers, name)).__name__) for name in OURS]


def _axes(name: str) -> int:
    """Those with BatchNorm are for 2D."""
    return 2 if name.endswith("_BN") else 3


@cache
def _start(name: str, seed: int, deep_supervision: bool, initialize: bool, ndim: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    trainer = getattr(trainers, name)
    strides, kernels, patch_size = PLANS[ndim]
    architecture = unet_architecture(strides, kernels)
    architecture["arch_kwargs"] |= {
        "features_per_stage": [8, 12, 16, 20, 20],
        "n_conv_per_stage": [2] * 5,
        "n_conv_per_stage_decoder": [2] * 4,
    }
    configuration = SimpleNamespace(configuration={"architecture": architecture}, patch_size=patch_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformux, "BASE_FEATURES", 8)
        if not initialize:
            patch.setattr(torch.nn.Module, "apply", lambda self, function: self)
        network = trainer.build_network_architecture(None, configuration, 1, 3, deep_supervision)
    return dict(network.named_parameters())


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


# Trainings begin from what is initialized; nnU-Net replaces most of what was constructed.
@pytest.mark.parametrize(
    "initialize",
    [pytest.param(True, id="initialized"), pytest.param(False, id="constructed", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("name", "main"), PAIRS, ids=[name.removeprefix("nnUNetTrainer") for name in OURS])
def test_what_a_variant_shares_with_the_main_network_starts_equal(record_property, name, main, initialize) -> None:
    exceptions = EXCEPTIONS.get(name.removeprefix("nnUNetTrainer"), {})
    ndim = _axes(name)
    network = _start(main, 1, True, initialize, ndim)
    variant = _start(name, 1, False, initialize, ndim)
    other_seed = {**_start(name, 2, False, initialize, ndim), **_start(main, 2, True, initialize, ndim)}
    shared = [key for key in variant if key in network]
    other_shape = [key for key in shared if network[key].shape != variant[key].shape]
    assert all(_matches(key, exceptions.get("shape", ())) for key in other_shape)
    comparable = [key for key in shared if key not in other_shape and not _matches(key, exceptions.get("equal", ()))]
    random = [key for key in comparable if not torch.equal(network[key], other_seed[key])]
    unequal = [key for key in comparable if not torch.equal(network[key], variant[key])]
    equal = f"{len(set(random) - set(unequal))} of {len(random)}"
    record_property("equal", equal)
    print(f"\n{name} and {main}: {equal} random tensors equal")
    assert random
    assert not unequal


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_exception_is_one(name: str) -> None:
    main = _family(getattr(trainers, f"nnUNetTrainer{name}")).__name__
    network = _start(main, 1, True, False, _axes(name))
    variant = _start(f"nnUNetTrainer{name}", 1, False, False, _axes(name))
    for kind, patterns in EXCEPTIONS[name].items():
        for pattern in patterns:
            pairs = [(network[key], variant[key]) for key in variant if key in network and _matches(key, (pattern,))]
            if kind == "shape":
                assert any(one.shape != other.shape for one, other in pairs), pattern
            else:
                assert any(one.shape == other.shape and not torch.equal(one, other) for one, other in pairs), pattern


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nnUNetTrainerDeformUX_seed1", "nnUNetTrainerDeformUX_opOff_AdamW_2epochs1iters_seed1_unmirrored"),
        ("nnUNetTrainerLightMedSeg_seed1", "nnUNetTrainerLightMedSeg_paper_3epochs_seed1"),
        ("nnUNetTrainerMAGIC_seed1", "nnUNetTrainerMAGIC_noKR_AdamW_seed1"),
    ],
)
def test_suffixes_do_not_change_the_start(make_trainer, monkeypatch, one: str, other: str) -> None:
    monkeypatch.setattr(deformux, "BASE_FEATURES", 8)
    networks = [_initialized(make_trainer, find_trainer(name)) for name in (one, other)]
    shared = [key for key in networks[1] if key in networks[0]]
    assert len(shared) > 20
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in shared)


def test_the_stock_trainer_with_our_plan_starts_as_ours_do(make_trainer, monkeypatch) -> None:
    monkeypatch.setattr(deformux, "BASE_FEATURES", 8)
    stock = unet_architecture([[1, 1, 1], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 3)
    planned = deformux.deformux_architecture(stock, (16, 16, 16))
    ours = _initialized(make_trainer, find_trainer("nnUNetTrainerDeformUX_opOff_seed3"), architecture=stock)
    stocks = _initialized(make_trainer, find_trainer("nnUNetTrainer_seed3"), architecture=planned)
    assert ours.keys() < stocks.keys()
    assert all(torch.equal(ours[key], stocks[key]) for key in ours)


def _initialized(make_trainer, trainer_class: type[nnUNetTrainer], **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(trainer_class, **options)
    trainer.initialize()
    return dict(trainer.network.named_parameters())
