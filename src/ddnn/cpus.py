"""How many CPUs there are for this process. Light: nothing is imported but the standard library."""

import os
from pathlib import Path


def available_cpus() -> int:
    """CPUs this process may use: those it is bound to, fewer where a control group grants less time; at least one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(count, _granted())))


def _granted() -> float:
    """CPUs' worth of time that the control group of a container grants."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return float("inf")
    return int(quota) / int(period) if quota not in ("max", "-1") else float("inf")
