"""What this process holds in memory, and has held."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes that are in memory now. Linux only."""
    return _read("VmRSS")


def most_resident() -> int:
    """Bytes that have been in memory at most. Not on Windows."""
    # On Linux getrusage begins with what the parent held when it started this process.
    if _STATUS.exists():
        return _read("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read(field: str) -> int:
    return int(next(line for line in _STATUS.read_text().splitlines() if line.startswith(field)).split()[1]) * 1024
