"""What holds for every dynamic convolution but MAGIC's, which has its own file: precision, copies, starts, export."""

import copy
import pickle
from typing import Any

import pytest
import torch
from dynamic_cases import stirred, volume
from torch import Tensor, nn

from nnunet_deform.layers import (
    DCD2d,
    DCD3d,
    DDConv2d,
    DDConv3d,
    DynamicConv,
    ODConv2d,
    ODConv3d,
)

CASES: dict[str, tuple[dict[int, type[DynamicConv]], dict[str, Any]]] = {
    "odconv": ({2: ODConv2d, 3: ODConv3d}, {}),
    "odconv-layer": ({2: ODConv2d, 3: ODConv3d}, {"attention_norm": "layer"}),
    "odconv-none": ({2: ODConv2d, 3: ODConv3d}, {"attention_norm": "none", "n_kernels": 1}),
    "odconv-batch": ({2: ODConv2d, 3: ODConv3d}, {"attention_norm": "batch"}),
    "dcd": ({2: DCD2d, 3: DCD3d}, {}),
    "dcd-batch": ({2: DCD2d, 3: DCD3d}, {"residual_norm": "batch"}),
    "ddconv": ({2: DDConv2d, 3: DDConv3d}, {"n_kernels": 2}),
    "ddconv-sampled": ({2: DDConv2d, 3: DDConv3d}, {"n_kernels": 2, "routing": "sampled"}),
    "ddconv-1": ({2: DDConv2d, 3: DDConv3d}, {"n_kernels": 1}),
}
every_layer = pytest.mark.parametrize("name", CASES)
main_layers = pytest.mark.parametrize("name", ["odconv", "dcd", "ddconv"])


def layer_of(name: str, ndim: int = 3, scale: float = 0.2, **options: Any) -> DynamicConv:
    classes, of_case = CASES[name]
    arguments = {"kernel_size": 3, "padding": 1, **of_case, **options}
    return stirred(classes[ndim](8, 6, **arguments), scale)


@every_layer
def test_samples_do_not_see_each_other_and_one_alone_can_be_trained_with(name: str):
    layer = layer_of(name).eval()
    x = volume(3, batch=2).float()
    together = layer(x)
    for sample in range(2):
        torch.testing.assert_close(layer(x[sample : sample + 1])[0], together[sample], rtol=0, atol=1e-5)
    if name != "odconv-batch":
        layer.train()(x[:1]).sin().sum().backward()
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@every_layer
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_a_trained_convolution(name: str, ndim: int, bias: bool):
    classes, options = CASES[name]
    conv = (nn.Conv2d if ndim == 2 else nn.Conv3d)(8, 6, 3, 2, 1, bias=bias)
    x = volume(ndim).float()
    for noise, tolerance in ((0.0, 1e-6), (0.01, 0.1 * conv(x).std().item())):
        layer = classes[ndim].from_conv(conv, noise=noise, **options)
        torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=tolerance)
    # It can be trained on, and every sample gets a kernel of its own then.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    before = layer(x)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).sin().sum().backward()
        optimizer.step()
    assert (layer(x) - before).abs().max() > 1e-3
    if name != "ddconv-1":
        own = layer.kernels(x)[0]
        assert (own[0] - own[1]).abs().max() > 1e-6


def test_a_grouped_convolution_of_a_given_number_of_kernels():
    conv = nn.Conv3d(8, 4, (1, 3, 3), 1, (0, 2, 2), (1, 2, 2), groups=2).double()
    layer = ODConv3d.from_conv(conv, 3, noise=0)
    assert (layer.n_kernels, layer.groups, layer.dilation) == (3, 2, (1, 2, 2))
    x = volume(3)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="groups=2 must be 1 for DCD3d"):
        DCD3d.from_conv(conv)
    with pytest.raises(ValueError, match="does not have the 2 axes of DDConv2d"):
        DDConv2d.from_conv(conv)


@every_layer
@pytest.mark.parametrize("ndim", [2, 3])
def test_folded_with_a_samples_kernels_it_gives_that_samples_output(name: str, ndim: int):
    layer = layer_of(name, ndim, stride=2).double().eval()
    x = volume(ndim)
    frozen = layer.folded(*(None if of_sample is None else of_sample[1] for of_sample in layer.kernels(x)))
    assert type(frozen) is (type(layer) if "ddconv" in name else {2: nn.Conv2d, 3: nn.Conv3d}[ndim])
    torch.testing.assert_close(frozen(x)[1], layer(x)[1], rtol=0, atol=1e-12)


@every_layer
def test_volumes_of_one_slice_are_images(name: str):
    image, volumes = layer_of(name, 2).double(), layer_of(name, 3, kernel_size=(1, 3, 3), padding=(0, 1, 1)).double()
    state = volumes.state_dict()
    volumes.load_state_dict({key: value.view_as(state[key]) for key, value in image.state_dict().items()})
    x = volume(2)
    torch.testing.assert_close(volumes(x.unsqueeze(2)).squeeze(2), image(x), rtol=0, atol=1e-12)


def of_sample(layer: DynamicConv, x: Tensor) -> tuple[Tensor, ...]:
    """What a layer computes of a sample before it convolves."""
    if isinstance(layer, (DCD2d, DCD3d)):
        return layer.fusion(x)
    if isinstance(layer, (ODConv2d, ODConv3d)):
        return tuple(value for value in layer.attention(x) if value is not None)
    return layer.mixing_weights(x), layer.offsets(x)


@every_layer
def test_attention_and_kernels_stay_in_float32_under_autocast(name: str):
    layer = layer_of(name).eval()
    x = volume(3).float()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            rounded = (*of_sample(layer, x), *layer.kernels(x))
            output = layer(x)
        exact = (*of_sample(layer, x), *layer.kernels(x))
        for one, other in zip(rounded, exact, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert output.dtype == dtype
        assert (output.float() - layer(x)).norm() < 0.02 * layer(x).norm()


@every_layer
def test_training_under_autocast(name: str):
    layer = layer_of(name)
    x = volume(3).float()
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.05 * expected.norm()
    with torch.backends.mkldnn.flags(enabled=False):
        output.float().sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# The first is in a network of test_compiled_networks, the second differs from dcd as odconv-batch from odconv.
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("odconv", "dcd-batch")),
        *("odconv-batch", "dcd", "ddconv", "ddconv-sampled"),
    ],
)
def test_compiles_as_one_graph(name: str):
    torch.compiler.reset()
    layer = layer_of(name)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        x = volume(3).float()
        outputs = [module.train(training)(x) for module in (compiled, twin)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert all(
        torch.allclose(*pair) for pair in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["odconv", "dcd", "dcd-batch", "ddconv-sampled"])
def test_exports_at_batch_1(name: str):
    layer = layer_of(name)
    layer(volume(3).float())
    layer.eval()
    x = volume(3, batch=1).float()
    exported = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=0, atol=1e-5)


@main_layers
def test_copies_give_the_same_output(name: str):
    layer = layer_of(name).eval()
    x = volume(3).float()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@main_layers
def test_the_whole_layer_runs_in_half_precision(name: str):
    layer = layer_of(name).eval()
    x = volume(3).float()
    expected = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # Offsets are coordinates, and here they are rounded, too.
    assert (half.float() - expected).norm() < 0.1 * expected.norm()


@every_layer
@pytest.mark.parametrize("options", [{}, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": 2}], ids=str)
def test_what_autograd_keeps(name: str, options: dict[str, Any]):
    layer = layer_of(name, **options)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    sizes = []
    size = (6, 8, 7)
    for batch in (2, 3):
        kept.clear()
        x = torch.randn(batch, 8, *size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layer(x)
        of_input = x.untyped_storage().data_ptr()
        sizes.append(sum(t.untyped_storage().nbytes() // 4 for key, t in kept.items() if key not in {*own, of_input}))
        del output
    assert layer.kept_by_autograd(size) == pytest.approx(sizes[1] - sizes[0], rel=0.15, abs=300)
