"""The encoder block in all its forms, against its equations written out."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_cases import CONV_OP, TWO_LEVELS, kept_by_autograd, parameter_count, stir
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_deform.layers import DeformConv
from nnunet_deform.layers.recomputation import plain_forms
from nnunet_deform.networks import deformux
from nnunet_deform.networks.deformux import DeformUXBlock
from nnunet_deform.ops import deform_conv2d, deform_conv3d

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FORMS = [
    pytest.param(
        {"block": block, "scaling": scaling, "layer_scale_init": layer_scale},
        deformable,
        id=f"{block}-{scaling}-{'deformable' if deformable else 'plain'}-{layer_scale}",
    )
    for block, scaling, deformable, layer_scale in itertools.product(
        ("eq3", "convnext"), ("mlp", "depthwise", "none"), (True, False), (None, 0.7)
    )
]
CONV = {2: F.conv2d, 3: F.conv3d}


def block_of(ndim: int, channels: int, options: dict[str, Any], deformable: bool, ratio: int = 4) -> DeformUXBlock:
    conv = DeformConv(CONV_OP[ndim], channels, (3,) * ndim, deformable=deformable)
    return DeformUXBlock(CONV_OP[ndim], conv, channels, ratio=ratio, **options)


def along_channels(vector: Tensor, ndim: int) -> Tensor:
    return vector.view(-1, *[1] * ndim)


def block_by_hand(block: DeformUXBlock, z: Tensor, options: dict[str, Any]) -> Tensor:
    """Reads the parameters in the order of the checkpoint, which is the order of the equation."""
    parameters = iter(block.state_dict().values())
    ndim = z.ndim - 2
    conv = CONV[ndim]
    deformable = any("offset" in name for name, _ in block.named_parameters())

    def norm(x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        gain, bias = (along_channels(next(parameters), ndim) for _ in range(2))
        return (x - mean) / torch.sqrt(variance + 1e-6) * gain + bias

    def ddc(x: Tensor) -> Tensor:
        weight, bias = next(parameters), next(parameters)
        if not deformable:
            return conv(x, weight, bias, padding=1, groups=x.shape[1])
        offset = conv(x, next(parameters), next(parameters))
        return (deform_conv2d if ndim == 2 else deform_conv3d)(x, offset, weight, bias, padding=1)

    def scaling(x: Tensor) -> Tensor:
        # As 1x1 convolutions, which is what the papers call both forms.
        groups = x.shape[1] if options["scaling"] == "depthwise" else 1
        (expand, expand_bias), (reduce, reduce_bias) = ((next(parameters), next(parameters)) for _ in range(2))
        as_kernel = [w.reshape(*w.shape[:2], *[1] * ndim) for w in (expand, reduce)]
        hidden = conv(x, as_kernel[0], expand_bias, groups=groups)
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        return conv(hidden, as_kernel[1], reduce_bias, groups=groups)

    def layer_scale(x: Tensor) -> Tensor:
        return x if options["layer_scale_init"] is None else x * along_channels(next(parameters), ndim)

    mixing = [] if options["scaling"] == "none" else [scaling]
    if options["block"] == "eq3":
        for operator in (ddc, *mixing):
            z = z + layer_scale(operator(norm(z)))
    else:
        branch = norm(ddc(z))
        for operator in mixing:
            branch = operator(branch)
        z = z + layer_scale(branch)
    assert next(parameters, None) is None
    return z


@pytest.mark.parametrize(("options", "deformable"), FORMS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_equals_its_equation(ndim: int, options: dict[str, Any], deformable: bool):
    block = stir(block_of(ndim, 5, options, deformable, ratio=3)).double()
    z = torch.randn(2, 5, *(4, 5, 3)[:ndim], dtype=torch.float64)
    torch.testing.assert_close(block(z), block_by_hand(block, z, options), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("options", "deformable"), FORMS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_kept_per_voxel_is_what_autograd_keeps(ndim: int, options: dict[str, Any], deformable: bool):
    channels, size = 48, (6, 7, 6)[:ndim]
    block = block_of(ndim, channels, options, deformable)
    z = torch.randn(1, channels, *size).contiguous(memory_format=CHANNELS_LAST[ndim]).requires_grad_()
    with kept_by_autograd(block) as kept:
        block(z)
    assert block.kept_per_voxel == pytest.approx(sum(kept) / math.prod(size), rel=0.03)


@pytest.mark.parametrize(("options", "deformable"), FORMS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_autograd_keeps_the_input_of_each_branch(ndim: int, options: dict[str, Any], deformable: bool):
    """Not the norms' results, the offsets or what the scaling holds. Of "convnext" the convolution's result as well,
    and the first branch of "eq3" before its LayerScale."""
    channels, size = 48, (6, 7, 6)[:ndim]
    block = block_of(ndim, channels, options, deformable)
    z = torch.randn(1, channels, *size).contiguous(memory_format=CHANNELS_LAST[ndim]).requires_grad_()
    own = {parameter.data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(z)
    maps = len(block.branches) + (options["block"] == "convnext" or options["layer_scale_init"] is not None)
    assert sum(tensor.numel() for key, tensor in kept.items() if key not in own) == maps * z.numel()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # Depthwise 27C + C, offsets 81(C + 1), norms 2 * 2C, MLP 8C^2 + 5C, at C = 48.
        ({"block": "eq3"}, 1_344 + 3_969 + 192 + 18_672),
        ({"block": "eq3", "layer_scale_init": 1.0}, 1_344 + 3_969 + 192 + 18_672 + 96),
        ({"block": "eq3", "scaling": "depthwise"}, 1_344 + 3_969 + 192 + 13 * 48),
        ({"block": "eq3", "scaling": "none"}, 1_344 + 3_969 + 96),
        ({"block": "convnext", "layer_scale_init": 1e-6}, 1_344 + 3_969 + 96 + 18_672 + 48),
        ({"block": "convnext", "scaling": "none"}, 1_344 + 3_969 + 96),
    ],
    ids=str,
)
def test_parameters_of_one_block(options: dict[str, Any], count: int):
    options = {"scaling": "mlp", "layer_scale_init": None, **options}
    assert parameter_count(block_of(3, 48, options, deformable=True)) == count


@pytest.mark.parametrize("ndim", [2, 3])
def test_channels_last_stays_channels_last(ndim: int):
    options = {"block": "eq3", "scaling": "mlp", "layer_scale_init": None}
    block = block_of(ndim, 8, options, deformable=True)
    z = torch.randn(1, 8, *(4, 5, 6)[:ndim]).contiguous(memory_format=CHANNELS_LAST[ndim])
    assert block(z).stride() == z.stride()


class Copies(TorchDispatchMode):
    """Names of the operations that copied a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy) and result.ndim > 2:
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("block", ["eq3", "convnext"])
def test_channels_last_is_never_copied(block: str, batch: int):
    options = {"block": block, "scaling": "mlp", "layer_scale_init": 0.7}
    network = block_of(3, 8, options, deformable=True)
    z, grad = (torch.randn(batch, 8, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    with Copies() as copies:
        network(z.requires_grad_()).backward(grad)
    # Autograd hands the caller's leaf a gradient of its own.
    assert copies.names in ([], ["aten.clone.default"])


def test_layer_scale_starts_where_it_is_told():
    options = {"block": "convnext", "scaling": "mlp", "layer_scale_init": 1e-6}
    block = block_of(2, 8, options, deformable=True)
    z = torch.randn(1, 8, 5, 5)
    change = (block(z) - z).abs().amax()
    assert 0 < change < 1e-5


@pytest.mark.parametrize("block", ["eq3", "convnext"])
def test_the_form_for_gpus_compiles(block: str, monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    network = stir(TWO_LEVELS.network("DeformUXNet", block=block, layer_scale_init=None).double())
    stage, z = network.encoder.stages[0], torch.randn(2, 8, 3, 4, 3, dtype=torch.float64, requires_grad=True)

    def outputs_and_gradients(module: Callable[[Tensor], Tensor]) -> list[Tensor]:
        output = module(z)
        return [output, *torch.autograd.grad(output.sin().sum(), [z, *stage.parameters()])]

    with plain_forms():
        expected = outputs_and_gradients(stage)
    # On a CPU compilers are given the plain form.
    monkeypatch.setattr(deformux, "may_keep_less_compiled", lambda x, *blocks: True)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for one, other in zip(outputs_and_gradients(compiled), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
