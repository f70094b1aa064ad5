"""3D convolutions of few channels, rewritten, beside torch's."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
import onnxruntime
from onnxscript import ir

from nnunet_deform.deployment.convolutions import MOST_OUTPUTS, use_2d_convolutions


def model_of(conv: torch.nn.Conv3d, size: tuple[int, int, int]) -> ir.Model:
    """One convolution, as torch's exporter writes it."""
    tensors = {"weight": conv.weight, **({} if conv.bias is None else {"bias": conv.bias})}
    constants = [ir.Value(name=name, const_value=ir.tensor(t.detach().numpy())) for name, t in tensors.items()]
    float32 = ir.TensorType(ir.DataType.FLOAT)
    image = ir.Value(name="image", type=float32, shape=ir.Shape([1, conv.in_channels, *size]))
    attributes = {
        "kernel_shape": list(conv.kernel_size),
        "pads": list(conv.padding) * 2,
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "group": conv.groups,
        "auto_pad": "NOTSET",
    }
    node = ir.node("Conv", [image, *constants], attributes)
    node.outputs[0].name, node.outputs[0].type = "logits", float32
    graph = ir.Graph([image], list(node.outputs), nodes=[node], initializers=constants, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, image: torch.Tensor) -> np.ndarray:
    serialized = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image.numpy()})[0]


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((3, MOST_OUTPUTS), {"kernel_size": 3, "padding": 1}),
        ((3, 2), {"kernel_size": (5, 3, 3), "padding": (2, 1, 1), "bias": False}),
        ((3, 2), {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)}),
        ((40, 40), {"kernel_size": 5, "padding": 2, "groups": 40}),
        ((4, 4), {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False}),
    ],
    ids=["most outputs", "deep kernel", "flat kernel", "depthwise", "depthwise without bias"],
)
@pytest.mark.parametrize("size", [(6, 5, 7), (1, 4, 4)], ids=["volume", "slice"])
def test_2d_convolutions_give_what_the_3d_one_gives(channels, options, size):
    conv = torch.nn.Conv3d(*channels, **options)
    model = model_of(conv, size)
    assert use_2d_convolutions(model) == 1
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    assert {len(node.attributes["kernel_shape"].as_ints()) for node in convolutions} == {2}
    assert not {"weight", "bias"} & set(model.graph.initializers)
    image = torch.randn(1, channels[0], *size)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, image), conv(image).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((3, MOST_OUTPUTS + 1), {"kernel_size": 3, "padding": 1}),
        ((3, 2), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((3, 2), {"kernel_size": 3, "padding": 2, "dilation": 2}),
        ((3, 2), {"kernel_size": 3}),
        ((3, 2), {"kernel_size": 1}),
        ((3, 2), {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)}),
        ((3, 2), {"kernel_size": 2}),
        ((4, 4), {"kernel_size": 3, "padding": 1, "groups": 2}),
    ],
    ids=["many outputs", "stride", "dilation", "no padding", "1x1x1", "depth only", "even", "groups"],
)
def test_other_convolutions_stay(channels, options):
    conv = torch.nn.Conv3d(*channels, **options)
    model = model_of(conv, (6, 6, 6))
    assert use_2d_convolutions(model) == 0
    image = torch.randn(1, channels[0], 6, 6, 6)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, image), conv(image).numpy(), atol=2e-6)
