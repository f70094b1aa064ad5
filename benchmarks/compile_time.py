"""What ``torch.compile`` costs for the training step of our networks and nnU-Net's PlainConvUNet on one plan.

    python benchmarks/compile_time.py [--patch 64 64 64] [--batch 2] [--channels 1] [--only NAME ...]
                                      [--output FILE.json]

Inductor on the CPU with an empty cache, one compile worker and one thread; the network under deep supervision, forward
and backward, as nnU-Net compiles it (the loss is outside). Each network in a process of its own. The plan is nnU-Net's
for this patch at isotropic spacing, with three classes.

- nodes: of the graph that dynamo records, and of the forward and backward graphs that inductor gets from AOTAutograd.
- kernels: that inductor generates, forward and backward.
- seconds: the first training step less a later one. CPU seconds, user and system, are of this process and of the C++
  compiler, which is counted by itself; the rest is Python: recording, AOTAutograd and inductor, by wall time.
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

import torch
from measuring import describe, in_own_process
from networks import CONTENDERS, STOCK, build
from torch import Tensor

NAMES = (STOCK, "DeformUX-Net", "LightMedSeg", "MAGIC 4x")
STEPS = 3


def call_nodes(graph_module: torch.fx.GraphModule) -> int:
    """Nodes that compute something: neither inputs nor outputs nor attributes."""
    return sum(node.op not in ("placeholder", "output", "get_attr") for node in graph_module.graph.nodes)


def measure(name: str, patch: Sequence[int], batch: int, channels: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return _measure(name, patch, batch, channels)


def _measure(name: str, patch: Sequence[int], batch: int, channels: int) -> dict[str, Any]:
    import torch._inductor.compile_fx as inductor
    from torch._dynamo.utils import compilation_time_metrics
    from torch._inductor import config, metrics

    config.fx_graph_cache = False
    config.compile_threads = 1
    torch._functorch.config.enable_autograd_cache = False
    graphs: list[int] = []
    inner_seconds: list[float] = []

    def counting_inner(graph_module: torch.fx.GraphModule, *arguments: Any, **options: Any) -> Any:
        graphs.append(call_nodes(graph_module))
        start = time.perf_counter()
        compiled = inductor.compile_fx_inner(graph_module, *arguments, **options)
        inner_seconds.append(time.perf_counter() - start)
        return compiled

    recorded: list[int] = []
    backend_seconds: list[float] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        recorded.append(call_nodes(graph_module))
        start = time.perf_counter()
        compiled = inductor.compile_fx(graph_module, inputs, inner_compile=counting_inner)
        backend_seconds.append(time.perf_counter() - start)
        return compiled

    network = build(name, patch, channels).train()
    image = torch.randn(batch, channels, *patch, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(network, backend=backend)

    def step() -> tuple[float, float, float, float]:
        """Wall time and CPU time of forward and backward: total wall, CPU here, CPU of children, wall of forward."""
        network.zero_grad(set_to_none=True)
        wall, cpu = time.perf_counter(), os.times()
        outputs = compiled(image)
        forward_wall = time.perf_counter() - wall
        sum(output.square().mean() for output in outputs).backward()
        after = os.times()
        return (
            time.perf_counter() - wall,
            after.user + after.system - cpu.user - cpu.system,
            after.children_user + after.children_system - cpu.children_user - cpu.children_system,
            forward_wall,
        )

    first = step()
    later = [step() for _ in range(STEPS)]
    if len(recorded) != 1 or len(graphs) != 2:
        raise RuntimeError(f"{name} compiled to {len(recorded)} graphs with {len(graphs)} parts, not to one with two.")
    fastest = [min(run[i] for run in later) for i in range(4)]
    return {
        "name": name,
        "recorded_nodes": recorded[0],
        "forward_nodes": graphs[0],
        "backward_nodes": graphs[1],
        "kernels": metrics.generated_kernel_count,
        "wall_s": first[0] - fastest[0],
        "cpu_s": first[1] + first[2] - fastest[1],
        "cpp_cpu_s": first[2],
        "dynamo_wall_s": first[3] - fastest[3] - backend_seconds[0],
        "aot_wall_s": backend_seconds[0] - inner_seconds[0],
        "inductor_wall_s": sum(inner_seconds),
        "step_ms": fastest[1] * 1e3,
        "phases": {key: sum(values) for key, values in compilation_time_metrics.items()},
    }


COLUMNS = {
    "recorded_nodes": ("recorded", "{:d}"),
    "forward_nodes": ("forward", "{:d}"),
    "backward_nodes": ("backward", "{:d}"),
    "kernels": ("kernels", "{:d}"),
    "wall_s": ("wall s", "{:.1f}"),
    "cpu_s": ("CPU s", "{:.1f}"),
    "cpp_cpu_s": ("C++ s", "{:.1f}"),
    "dynamo_wall_s": ("dynamo s", "{:.1f}"),
    "aot_wall_s": ("AOT s", "{:.1f}"),
    "inductor_wall_s": ("inductor s", "{:.1f}"),
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
