"""The deformable convolution's backends against the float64 reference, in the forms that networks use and others."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_deform.ops import BACKEND_VARIABLE, CHANNELS_LAST, backends_for, deform_conv2d, deform_conv3d
from nnunet_deform.ops.backends import reference
from nnunet_deform.ops.backends.agreement import disagreement
from nnunet_deform.ops.checks import convolved_size

Result = dict[str, Any]

# In the place of a case's own in Triton's interpreter, which takes a tenth of a second for a tap.
_INTERPRETED_SIZE, _INTERPRETED_KERNEL = {2: (2, 3), 3: (1, 2, 2)}, {2: (1, 2), 3: (1, 1, 2)}


@dataclass(frozen=True)
class Case:
    """One problem and how it is computed.

    ``offsets``: "spread" over 1.5 voxels, "zero" as in a new network, or "wild" with a few that are no positions.
    ``mode``: "plain", "deterministic", "autocast" (``dtype`` is then autocast's), "compile" (torch.compile), "stream"
    (not the default one), "second GPU" (while the first one is current), "wide" (a volume that 32 bits do not index).
    """

    title: str
    dtype: str = "float32"
    channels: int = 48
    size: tuple[int, ...] = (5, 6, 7)
    kernel: tuple[int, ...] = (3, 3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    batch: int = 2
    channels_last: bool = True
    dense: bool = False
    offsets: str = "spread"
    mode: str = "plain"


CASES = (
    Case("float32, 3D"),
    Case("float32, 3D, contiguous", channels_last=False),
    Case("float64, 3D", dtype="float64", channels=8),
    Case("bfloat16, 3D", dtype="bfloat16"),
    Case("float16, 3D", dtype="float16"),
    Case("float16, 3D, contiguous", dtype="float16", channels_last=False),
    Case("float32, 2D", size=(9, 13), kernel=(3, 3)),
    Case("float16, 2D", dtype="float16", size=(9, 13), kernel=(3, 3)),
    Case("5 channels", channels=5),
    Case("20 channels, float16", channels=20, dtype="float16"),
    Case("384 channels, 3 x 3 x 3 voxels", channels=384, size=(3, 3, 3), batch=1),
    Case("1 x 17 x 3 voxels, kernel 1 x 3 x 3", size=(1, 17, 3), kernel=(1, 3, 3)),
    Case("kernel 5, dilation 2", size=(7, 9, 8), kernel=(5, 5, 5), padding=4, dilation=2, channels=16, batch=1),
    Case("stride 2, no padding", size=(7, 9, 8), stride=2, padding=0),
    Case("3 groups of offsets", groups=3),
    Case("dense", dense=True, channels=6),
    Case("zero offsets", offsets="zero"),
    Case("offsets that are no positions", offsets="wild"),
    Case("deterministic, float32", mode="deterministic"),
    Case("deterministic, float16", dtype="float16", mode="deterministic"),
    Case("autocast to bfloat16", dtype="bfloat16", mode="autocast"),
    Case("autocast to float16", dtype="float16", mode="autocast"),
    Case("torch.compile", mode="compile"),
    Case("another stream", mode="stream"),
    Case("a second GPU", mode="second GPU"),
    Case("more than 2^31 elements apart", dtype="float16", size=(3, 4, 5), batch=1, channels=16, mode="wide"),
)


def check_case(device: str, backend: str, title: str) -> Result:
    """``{}`` where output and all gradients agree, else a "fault", or why it was "skipped"."""
    case = next(case for case in CASES if case.title == title)
    if case.mode in ("stream", "second GPU", "wide") and not device.startswith("cuda"):
        return {"skipped": "of CUDA"}
    if device == "mps" and case.dtype == "float64":
        return {"skipped": "MPS has no float64"}
    if case.mode == "second GPU":
        if torch.cuda.device_count() < 2:
            return {"skipped": "there is one GPU"}
        device = "cuda:1"
    if case.mode == "wide" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        return {"skipped": "it takes 8 GB of free GPU memory"}
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and (case.mode in ("autocast", "compile") or case.dtype == "bfloat16"):
        return {"skipped": "Triton's interpreter cannot do that as a GPU does"}
    leaves, grad_output, spatial = _problem(case, interpreted)
    values = torch.float32 if case.mode == "autocast" else getattr(torch, case.dtype)
    tensors = [_placed(leaf, device, values, case) for leaf in leaves]
    if case.dtype != "float64":
        tensors[1] = _placed(leaves[1], device, torch.float32, case)
    if case.mode == "wide":
        tensors[0] = _far_apart(tensors[0])
    dtype = getattr(torch, case.dtype)
    reason = backends_for(tensors[0].to(dtype), tensors[1], tensors[2].to(dtype))[backend]
    if reason is not None:
        return {"skipped": reason}

    expected = _truth(leaves, grad_output, spatial)
    with _forced(backend):
        results = _computed(case, device, tensors, grad_output, spatial)
        fault = disagreement(results, expected)
        if fault is None and case.mode == "deterministic":
            again = _computed(case, device, tensors, grad_output, spatial)
            if not all(map(torch.equal, results, again)):
                fault = "a second run gave other results"
    return {} if fault is None else {"fault": fault}


def _problem(case: Case, interpreted: bool) -> tuple[list[Tensor], Tensor, list[list[int]]]:
    """Input, offset, weight, bias and the gradient of the output in float64 on the CPU, all of them numbers of the
    case's dtype, and stride, padding and dilation."""
    axes = len(case.size)
    size = _INTERPRETED_SIZE[axes] if interpreted else case.size
    kernel = _INTERPRETED_KERNEL[axes] if interpreted else case.kernel
    spatial = [[value] * axes for value in (case.stride, case.padding, case.dilation)]
    spatial[1] = [0 if k == 1 else p for k, p in zip(kernel, spatial[1], strict=True)]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    dtype = getattr(torch, case.dtype)
    positions = torch.float64 if dtype == torch.float64 else torch.float32
    out_size = convolved_size(size, kernel, *spatial)
    offset_channels = case.groups * torch.Size(kernel).numel() * axes
    offset = 1.5 * random(case.batch, offset_channels, *out_size, dtype=positions)
    if case.offsets == "zero":
        offset.zero_()
    if case.offsets == "wild":
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 2.0**31, -(2.0**31)], dtype=torch.float64)
        offset[0, 0].flatten()[: len(bad)] = bad[: offset[0, 0].numel()]
    weight = random(case.channels, case.channels if case.dense else 1, *kernel, dtype=dtype)
    leaves = [random(case.batch, case.channels, *size, dtype=dtype), offset, weight, random(case.channels, dtype=dtype)]
    return leaves, random(case.batch, case.channels, *out_size, dtype=dtype), spatial


def _placed(tensor: Tensor, device: str, dtype: torch.dtype, case: Case) -> Tensor:
    # In this order, because not every device has float64.
    tensor = tensor.to(dtype).to(device)
    if case.channels_last and tensor.ndim > 2 and len(tensor) == case.batch:
        tensor = tensor.contiguous(memory_format=CHANNELS_LAST[tensor.ndim - 2])
    return tensor.requires_grad_()


def _far_apart(input: Tensor) -> Tensor:
    """The same values with 2^30 elements from one slice to the next."""
    slices = input.shape[2]
    memory = torch.empty((slices - 1) * 2**30 + input[0, :, 0].numel(), dtype=input.dtype, device=input.device)
    strides = (memory.numel(), 1, 2**30, input.shape[1] * input.shape[4], input.shape[1])
    with torch.no_grad():
        return memory.as_strided(input.shape, strides).copy_(input).requires_grad_()


def _truth(leaves: list[Tensor], grad_output: Tensor, spatial: list[list[int]]) -> list[Tensor]:
    gradients = reference.backward(grad_output, *leaves[:3], *spatial, (True,) * 4)
    return [reference.forward(*leaves, *spatial), *gradients]


def _computed(
    case: Case, device: str, tensors: list[Tensor], grad_output: Tensor, spatial: list[list[int]]
) -> list[Tensor]:
    """Output and gradients, those of the values rounded as autocast's are."""
    operator: Callable[..., Tensor] = deform_conv2d if len(case.size) == 2 else deform_conv3d
    if case.mode == "compile":
        torch.compiler.reset()
        # Inductor wants a C++ compiler on a CPU, where nnU-Net does not compile.
        operator = torch.compile(operator, backend="inductor" if device.startswith("cuda") else "aot_eager")
    with _mode(case, device):
        output = operator(*tensors, *spatial)
        upstream = _placed(grad_output, device, output.dtype, case).detach()
        gradients = torch.autograd.grad(output, tensors, upstream)
    results = [output.detach(), *gradients]
    if case.mode == "autocast":
        dtype = getattr(torch, case.dtype)
        results = [result if place == 2 else result.to(dtype) for place, result in enumerate(results)]
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return results


@contextmanager
def _mode(case: Case, device: str) -> Iterator[None]:
    context: AbstractContextManager[Any] = nullcontext()
    if case.mode == "autocast":
        context = torch.autocast(device.split(":")[0], getattr(torch, case.dtype))
    if case.mode == "stream":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        context = torch.cuda.stream(stream)
    torch.use_deterministic_algorithms(case.mode == "deterministic")
    try:
        with context:
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _forced(backend: str) -> Iterator[None]:
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = backend
    try:
        yield
    finally:
        del os.environ[BACKEND_VARIABLE]
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before
