"""What a benchmark ran on, and how much memory a process has held: shared by the benchmarks beside this file."""

import ctypes
import datetime
import os
import platform
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3


def describe() -> dict[str, str]:
    """Processor, GPU, system and versions, for the record beside the figures."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
        model += ", AVX-512" if "avx512f" in flags else ", AVX2" if "avx2" in flags else ""
    about = {
        "processor": model,
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def can_measure_memory() -> bool:
    """Whether this system says how much memory a process has held: Linux with glibc."""
    return platform.libc_ver()[0] == "glibc" and os.access(_CLEAR_REFS, os.W_OK)


class PeakMemory:
    """Bytes that this process holds at most, from ``start`` on, beyond what it held then."""

    def __init__(self) -> None:
        # Freed tensors leave the process at once, so that what stays is what is in use.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
        libc.malloc_trim(0)

    def start(self) -> None:
        _CLEAR_REFS.write_text("5")  # resets the peak
        self._before = _kibibytes("VmRSS")

    def bytes(self) -> int:
        return (_kibibytes("VmHWM") - self._before) * 1024


def _kibibytes(field: str) -> int:
    return int(next(line for line in _STATUS.read_text().splitlines() if line.startswith(field)).split()[1])
