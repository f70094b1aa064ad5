"""What a training step compiled by torch.compile keeps in memory."""

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch._inductor.lowering  # decompositions look into it
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from nnunet_deform.networks.fake_backward import without_engine
from nnunet_deform.networks.memory import float16_autocast, on_fake_cuda
from nnunet_deform.ops import BACKEND_VARIABLE


class _Counted(Exception):
    """Ends a compilation of which all is known that was asked for."""


def bytes_kept_by_compiled_step(build: Callable[[], nn.Module], input_shape: Sequence[int]) -> int:
    """Bytes that a training step compiled by inductor keeps for its backward pass on a CUDA device, under float16
    autocast; without parameters and the image, with half-precision copies of the weights.

    Nothing is compiled: it is what the partition of the joint graph of both passes saves. Arguments and errors as of
    :func:`nnunet_deform.networks.memory.bytes_kept_on_cuda`.
    """
    kept = 0

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        nonlocal kept
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, compiler="inductor", num_fwd_outputs=num_fwd_outputs, **options
        )
        outputs = next(node for node in forward.graph.nodes if node.op == "output").args[0]
        saved = {node for node in outputs[num_fwd_outputs:] if isinstance(node, fx.Node) and node.op != "placeholder"}
        values = [node.meta["val"] for node in saved]
        kept = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
        return forward, backward

    def stop(*_: Any) -> Any:
        raise _Counted

    backend = aot_autograd(
        fw_compiler=stop, bw_compiler=stop, partition_fn=partition, decompositions=select_decomp_table()
    )
    torch.compiler.reset()
    # The backends keep the same, and Triton's asks the GPU what it can do.
    with (
        on_fake_cuda(build, input_shape) as (network, image),
        mock.patch.dict(os.environ, {BACKEND_VARIABLE: "torch"}),
    ):
        compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=False)
        try:
            with float16_autocast(), without_engine():
                compiled(image)
        except Exception:  # dynamo's, around ours
            if not kept:
                raise
        finally:
            torch.compiler.reset()
    return kept
