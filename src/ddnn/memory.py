"""The memory of this process. Light: nothing is imported but the standard library."""

import contextlib
import sys
from pathlib import Path


def resident_mb() -> float | None:
    """MiB of this process in memory now; None where the system does not say."""
    return _status_mb("VmRSS")


def peak_mb() -> float | None:
    """Most MiB of this process that ever were in memory; None where the system does not say."""
    if (peak := _status_mb("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak() -> None:
    """Let the peak fall to what is in memory now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_mb(field: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return None
