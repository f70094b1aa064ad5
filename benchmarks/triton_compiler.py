"""Compiles Triton kernels for GPUs that need not be there, and counts what is in the machine code.

    PYTHONPATH=FOLDER python benchmarks/triton_compiler.py KERNELS < jobs > results

Imports Triton and nothing else outside the standard library, so that ``triton_code.py`` can run it with any version
of Triton in a FOLDER of its own. KERNELS is the module that has the kernels. Each line of the input is a job as JSON:
the name of a kernel, a compute capability, the kernel's arguments (a dtype's name for a tensor) and its warps. Each
line of the output is what :func:`count` says, or why the compiler refused.
"""

import importlib.util
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([^;]*);")
_TARGET = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes in a cubin's section .nv.info


class Dtype:
    """Stands in for torch's, which Triton knows by their names."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"torch.{self.name}"

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dtype) and other.name == self.name


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return module


def pretend(capability: int) -> None:
    """Triton finds a GPU to compile for, and none to run on."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_benchmarker=lambda: None,
    )
    # Not set_active, which newer versions of Triton undo only where there is a GPU.
    setattr(driver, "_active" if hasattr(driver, "_active") else "active", gpu)


def compiled(kernels: ModuleType, job: dict) -> bytes:
    """The machine code."""
    from triton.runtime.jit import MockTensor

    pretend(job["capability"])
    arguments = {
        name: MockTensor(Dtype(value)) if isinstance(value, str) else value for name, value in job["arguments"].items()
    }
    kernel = getattr(kernels, job["kernel"])
    return kernel.warmup(**arguments, num_warps=job["warps"], grid=(1, 1, 1)).asm["cubin"]


def disassembled(cubin: bytes) -> str:
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout


def attributes(cubin: bytes) -> dict[int, int]:
    """Attributes with a value for the kernel, from the ELF section that lists them."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    # Name, then after type, flags and address the place in the file and the length.
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(number)]
    names = sections[names_at][1]
    found = {}
    for name, at, length in sections:
        start = names + name
        if cubin[start : cubin.index(b"\0", start)] != b".nv.info":
            continue
        end = at + length
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # the value's length, then the value: here a symbol's number and what is said of it
                if value == 8:
                    found[attribute] = struct.unpack_from("<I", cubin, at + 4)[0]
                at += value
    return found


def count(cubin: bytes, code: str) -> dict:
    """Registers, bytes of stack, accesses to spilled registers, and instructions by the depth of their loop."""
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    loops = []
    for place, instruction in enumerate(instructions):
        target = _TARGET.search(instruction)
        if target and labels.get(target[1], place) < place:
            loops.append((labels[target[1]], place))
    depths = [0] * len(instructions)
    for first, last in loops:
        for place in range(first, last + 1):
            depths[place] += 1
    by_depth = [Counter() for _ in range(max(depths) + 1)]
    for depth, instruction in zip(depths, instructions, strict=True):
        name = instruction.split()[0]
        # Memory accesses with their width, anything else by its first word.
        wide = name.startswith(("LD", "ST", "RED", "ATOM"))
        by_depth[depth][name if wide else name.split(".")[0]] += 1
    about = attributes(cubin)
    return {
        "registers": about[_REGISTERS],
        "stack": about.get(_FRAME, 0),
        "spills": sum(n for by in by_depth for name, n in by.items() if name.startswith(("LDL", "STL"))),
        "instructions": [dict(sorted(by.items())) for by in by_depth],
    }


def main() -> None:
    kernels = load(sys.argv[1])
    for line in sys.stdin:
        try:
            cubin = compiled(kernels, json.loads(line))
            result = count(cubin, disassembled(cubin))
        except Exception as error:  # of any of the compilers: the result is that they refuse
            text = str(error).strip() or type(error).__name__
            result = {"error": f"{type(error).__name__}: {text.splitlines()[0]}", "details": text[-2000:]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
