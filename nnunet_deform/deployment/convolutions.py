"""3D convolutions of few channels as 2D ones, which ONNX Runtime computes faster.

Its 3D convolution gathers all taps of all input channels and multiplies matrices, which costs the same however few
output channels use them; its 2D convolution has kernels of its own. With the slices of the volume x as a batch and w_t
the t-th slice of the weight along depth,

    y[d] = sum_t conv2d(x[d + t - p], w_t) = sum_t shift_(t - p)(conv2d(x, w_t))[d],

so all taps along depth are output channels of one 2D convolution, and these are shifted and summed. For a depthwise
convolution it is one 2D convolution for each tap. From 32 output channels on nothing is won. What it does for whole
networks: ``python benchmarks/predict_onnx.py``.
"""

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

MOST_OUTPUTS = 16


def use_2d_convolutions(model: ir.Model) -> int:
    """Replace the model's 3D convolutions of few channels in place; returns how many.

    Replaced are those with constant weights, stride and dilation 1, an output as large as the input, and more than one
    tap in the plane, that are depthwise or have one group and at most ``MOST_OUTPUTS`` output channels.
    """
    replaced = 0
    for node in list(model.graph):
        if node.op_type == "Conv" and _is_eligible(node):
            _replace(model.graph, node, number=replaced)
            replaced += 1
    ir.passes.common.RemoveUnusedNodesPass()(model)  # the weights that were replaced
    return replaced


def _is_eligible(node: ir.Node) -> bool:
    weight = node.inputs[1].const_value
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or len(weight.shape) != 5 or (bias is not None and bias.const_value is None):
        return False
    outputs, group_inputs, *kernel = weight.shape
    same = [(k - 1) // 2 for k in kernel]
    if any(k % 2 == 0 for k in kernel) or kernel[1] * kernel[2] == 1 or _ints(node, "pads", [0] * 6) != 2 * same:
        return False
    if {*_ints(node, "strides", [1]), *_ints(node, "dilations", [1])} != {1}:
        return False
    if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() != "NOTSET":
        return False
    groups = _groups(node)
    return outputs <= MOST_OUTPUTS if groups == 1 else groups == outputs and group_inputs == 1


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    return list(node.attributes[name].as_ints() if name in node.attributes else default)


def _groups(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _replace(graph: ir.Graph, node: ir.Node, number: int) -> None:
    new_nodes: list[ir.Node] = []
    prefix = f"conv2d_{number}"

    def add(operator: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attributes: object) -> list[ir.Value]:
        made = ir.node(operator, inputs, attributes, num_outputs=outputs, name=f"{prefix}_node_{len(new_nodes)}")
        for index, value in enumerate(made.outputs):
            value.name = f"{prefix}_{len(new_nodes)}_{index}"
        new_nodes.append(made)
        return list(made.outputs)

    def constant(values: np.ndarray | Sequence[int]) -> ir.Value:
        array = np.ascontiguousarray(values)
        value = ir.Value(name=f"{prefix}_constant_{len(graph.initializers)}", const_value=ir.tensor(array))
        graph.register_initializer(value)
        return value

    weight = node.inputs[1].const_value.numpy()
    depth, *in_plane = weight.shape[2:]
    pads = [(k - 1) // 2 for k in in_plane] * 2
    groups = _groups(node)
    first_axis = constant([0])

    (volume,) = add("Squeeze", [node.inputs[0], first_axis])
    (slices,) = add("Transpose", [volume], perm=[1, 0, 2, 3])
    if groups == 1:
        by_tap = np.concatenate(np.moveaxis(weight, 2, 0))  # [taps * out, in, *in_plane]
        (together,) = add("Conv", [slices, constant(by_tap)], kernel_shape=in_plane, pads=pads)
        taps = [together] if depth == 1 else add("Split", [together], outputs=depth, axis=1, num_outputs=depth)
    else:
        taps = [
            add("Conv", [slices, constant(weight[:, :, tap])], kernel_shape=in_plane, pads=pads, group=groups)[0]
            for tap in range(depth)
        ]
    total: ir.Value | None = None
    for tap, response in enumerate(taps):
        shift = tap - depth // 2
        if shift:
            # Zeros move in, slices move out.
            zeros = [max(-shift, 0), 0, 0, 0, max(shift, 0), 0, 0, 0]
            start, end = (shift, np.iinfo(np.int64).max) if shift > 0 else (0, shift)
            (padded,) = add("Pad", [response, constant(zeros)])
            (response,) = add("Slice", [padded, constant([start]), constant([end]), first_axis])
        total = response if total is None else add("Add", [total, response])[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2].const_value.numpy()
        (total,) = add("Add", [total, constant(bias.reshape(1, -1, 1, 1))])
    (volume,) = add("Transpose", [total], perm=[1, 0, 2, 3])
    add("Unsqueeze", [volume, first_axis])
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, new_nodes[-1].outputs)
