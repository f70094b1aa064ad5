"""What ``torch.compile`` costs for the training step of our networks and nnU-Net's PlainConvUNet on one plan.

    python benchmarks/compile_time.py [--patch 64 64 64] [--batch 2] [--channels 1] [--only NAME ...]
                                      [--output FILE.json]

Inductor on the CPU with an empty cache, one compile worker and one thread; the network under deep supervision, forward
and backward, as nnU-Net compiles it (the loss is outside). Each network in a process of its own. The plan is nnU-Net's
for this patch at isotropic spacing, with three classes.

- nodes: of the graph that dynamo records, and of the forward and backward graphs that inductor gets from AOTAutograd.
- kernels: that inductor generates, forward and backward.
- seconds: CPU seconds, user and system, of this process and the C++ compiler, beside wall time. The compiler's are
  given by themselves, and so are this process's in dynamo, in AOTAutograd and in inductor.
- step: CPU time of the compiled training step, the fastest of several.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import CONTENDERS, STOCK, build
from torch import Tensor

from nnunet_deform.selftest.measuring import describe, fastest, in_own_process

NAMES = (STOCK, "DeformUX-Net", "LightMedSeg", "MAGIC 4x")
STEPS = 2


def call_nodes(graph_module: torch.fx.GraphModule) -> int:
    """Nodes that compute something: neither inputs nor outputs nor attributes."""
    return sum(node.op not in ("placeholder", "output", "get_attr") for node in graph_module.graph.nodes)


def clocks() -> np.ndarray:
    """Wall time, CPU time of this process, and CPU time of its finished children, the C++ compiler; seconds."""
    times = os.times()
    own, children = times.user + times.system, times.children_user + times.children_system
    return np.array([time.perf_counter(), own, children])


def measure(name: str, patch: Sequence[int], batch: int, channels: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return _measure(name, patch, batch, channels)


def _measure(name: str, patch: Sequence[int], batch: int, channels: int) -> dict[str, Any]:
    import torch._inductor.compile_fx as inductor
    from torch._inductor import config, metrics

    config.fx_graph_cache = False
    config.compile_threads = 1
    torch._functorch.config.enable_autograd_cache = False
    graphs: list[int] = []
    recorded: list[int] = []
    in_inductor: list[np.ndarray] = []
    in_backend: list[np.ndarray] = []

    def counting_inner(graph_module: torch.fx.GraphModule, *arguments: Any, **options: Any) -> Any:
        graphs.append(call_nodes(graph_module))
        start = clocks()
        compiled = inductor.compile_fx_inner(graph_module, *arguments, **options)
        in_inductor.append(clocks() - start)
        return compiled

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        recorded.append(call_nodes(graph_module))
        in_dynamo = clocks() - started
        start = clocks()
        compiled = inductor.compile_fx(graph_module, inputs, inner_compile=counting_inner)
        # What is compiled in here is inductor's, and the backward graph may be compiled in here or later.
        in_backend.extend((in_dynamo, clocks() - start - sum(in_inductor)))
        return compiled

    network = build(name, patch, channels).train()
    image = torch.randn(batch, channels, *patch, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(network, backend=backend)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        sum(output.square().mean() for output in compiled(image)).backward()

    started = clocks()
    step()
    if len(recorded) != 1 or len(graphs) != 2:
        raise RuntimeError(f"{name} compiled to {len(recorded)} graphs with {len(graphs)} parts, not to one with two.")
    dynamo, aot = in_backend
    total = dynamo + aot + sum(in_inductor)
    return {
        "name": name,
        "recorded_nodes": recorded[0],
        "forward_nodes": graphs[0],
        "backward_nodes": graphs[1],
        "kernels": metrics.generated_kernel_count,
        "wall_s": total[0],
        "cpu_s": total[1] + total[2],
        "cpp_cpu_s": total[2],
        "dynamo_cpu_s": dynamo[1],
        "aot_cpu_s": aot[1],
        "inductor_cpu_s": sum(in_inductor)[1],
        "step_ms": fastest(STEPS, {"step": step}, time.process_time)["step"],
    }


COLUMNS = {
    "recorded_nodes": ("recorded", "{:d}"),
    "forward_nodes": ("forward", "{:d}"),
    "backward_nodes": ("backward", "{:d}"),
    "kernels": ("kernels", "{:d}"),
    "wall_s": ("wall s", "{:.1f}"),
    "cpu_s": ("CPU s", "{:.1f}"),
    "cpp_cpu_s": ("C++ s", "{:.1f}"),
    "dynamo_cpu_s": ("dynamo s", "{:.1f}"),
    "aot_cpu_s": ("AOT s", "{:.1f}"),
    "inductor_cpu_s": ("inductor s", "{:.1f}"),
    "step_ms": ("step ms", "{:.0f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch", type=int, nargs=3, default=(64, 64, 64))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CONTENDERS), default=NAMES)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    about = describe()
    print(f"{'':36}" + "".join(f"{title:>11}" for title, _ in COLUMNS.values()))
    rows = []
    for name in arguments.only:
        row = in_own_process(1, measure, name, tuple(arguments.patch), arguments.batch, arguments.channels)
        print(f"{name:36}" + "".join(f"{form.format(row[key]):>11}" for key, (_, form) in COLUMNS.items()), flush=True)
        rows.append(row)
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("patch", "batch", "channels")}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**about, **settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
