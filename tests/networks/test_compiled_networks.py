"""Networks as torch.compile makes them: one graph of few operations, the same values and gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from network_cases import ANISOTROPIC, CASES, TWO_LEVELS_2D, as_list, stir
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from nnunet_deform.networks.observation import summarise


def outputs_and_gradients(module: nn.Module, network: nn.Module, image: Tensor) -> list[Tensor]:
    outputs = as_list(module(image))
    loss = sum(output.sin().mean() for output in outputs)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


# Operations of the forward and the backward pass together, before inductor decomposes them and with blocks computed
# again: what compiling costs grows with them. With torch 2.14.1: 423, 806, 504, 930, 452, 450, 344 and 824.
MOST_OPERATIONS = {
    "DeformUXNet": 465,
    "LightMedSeg": 890,
    "MagicPlainConvUNet": 555,
    "MagicResidualEncoderUNet": 1020,
    "DynamicPlainConvUNet-odconv": 500,
    "DynamicPlainConvUNet-dcd": 495,
    "DynamicPlainConvUNet-ddconv": 380,
    "DynamicResidualEncoderUNet-odconv": 905,
}


# One of the networks of dynamic layers: what compiles in it compiles with the layers of test_dynamic_layers. The plain
# U-Net of MAGIC is around other layers that of ODConv, and MAGIC's layers are those of its residual one.
COUNTED = (
    "DeformUXNet",
    "LightMedSeg",
    "MagicResidualEncoderUNet",
    "DynamicPlainConvUNet-odconv",
)
# U-Nets are padded by what pads DeformUX-Net, and are nnU-Net's own around their layers.
PADDED = ("DeformUXNet", "LightMedSeg")


# The default backend, inductor, takes minutes to compile in C++.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COUNTED else pytest.mark.slow) for name in CASES]
)
@pytest.mark.parametrize(
    ("backend", "recompute"),
    [
        ("counted", "blocks"),
        *(
            pytest.param(backend, recompute, marks=pytest.mark.slow)
            for backend, recompute in (("aot_eager", "cheap"), ("inductor", "cheap"), ("inductor", "blocks"))
        ),
    ],
)
def test_compiles_as_one_graph_of_few_operations(name: str, backend: str, recompute: str):
    torch.compiler.reset()
    counts = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        counts.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    options: dict[str, Any] = {"deep_supervision": True, "recompute": recompute}
    if backend == "counted" and name.startswith(("Magic", "Dynamic")):
        # Their levels differ in width: one is enough.
        options["stages"] = [1]
    network = stir(ANISOTROPIC.network(name, **options))
    counted = aot_autograd(fw_compiler=count, bw_compiler=count)
    compiled = torch.compile(network, fullgraph=True, backend=counted if backend == "counted" else backend)
    # As nnU-Net's trainer does it: off for validation, on again for the next epoch.
    for deep_supervision in (True, False, True):
        compiled._orig_mod.decoder.deep_supervision = deep_supervision
        # The gradients without it are those of the next test, and of the slow ones here.
        trained = deep_supervision or backend != "counted"
        network.train(trained)
        # A step takes its samples in, and statistics of one seen twice would amplify the compiler's rounding. Two, as
        # inductor on a CPU cannot compile LightMedSeg's blocks for one (docs/versions.md).
        image = ANISOTROPIC.image(batch=2)
        before = copy.deepcopy(dict(network.named_buffers()))
        results = []
        with torch.set_grad_enabled(trained):
            for module in (network, compiled):
                for key, buffer in network.named_buffers():
                    buffer.copy_(before[key])
                results.append(outputs_and_gradients(module, network, image) if trained else as_list(module(image)))
        eager, ours = results
        assert len(ours) == len(eager)
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if backend == "counted":
        # Once with deep supervision, and once without.
        assert len(counts) == 3
        assert sum(counts[:2]) <= MOST_OPERATIONS[name]
        compiled._orig_mod.decoder.deep_supervision = False
        assert_observing_compiles_nothing(compiled, image)


@torch.no_grad()
def assert_observing_compiles_nothing(compiled: nn.Module, image: Tensor) -> None:
    before = compiled.eval()(image)
    assert summarise(compiled._orig_mod.observe_operators(image))[0]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(image), before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in PADDED else pytest.mark.slow) for name in CASES]
)
def test_compiles_without_deep_supervision_and_at_a_size_that_needs_padding(name: str):
    """For training and for inference; and looking inside compiles nothing again."""
    torch.compiler.reset()
    network = stir(TWO_LEVELS_2D.network(name))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 1, 9, 7)
    eager, ours = (outputs_and_gradients(module, network, image) for module in (network, compiled))
    for one, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-5)
    assert_observing_compiles_nothing(compiled, image)
