"""How the self-test and all benchmarks measure: what they ran on, the fastest of interleaved rounds, peak memory."""

import ctypes
import datetime
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nnunet_deform.processes.memory import most_resident, resident

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


def clock_of(device: str, threads: int) -> Callable[[], float]:
    """CPU time of this process for one thread, so that other programs matter little; else wall time."""
    if device == "cuda":

        def after_all_kernels() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return after_all_kernels
    if device == "mps":

        def after_all_work() -> float:
            torch.mps.synchronize()
            return time.perf_counter()

        return after_all_work
    return time.process_time if threads == 1 else time.perf_counter


def fastest(rounds: int, runs: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each, the rounds interleaved after one to warm up."""
    best = dict.fromkeys(runs, float("inf"))
    for round_number in range(rounds + 1):
        for name, call in runs.items():
            start = clock()
            call()
            if round_number:
                best[name] = min(best[name], (clock() - start) * 1e3)
    return best


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
        self._before = resident()

    def bytes(self) -> int:
        return most_resident() - self._before


def in_own_process(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a new process with this number of threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        return process.submit(function, *arguments).result()
