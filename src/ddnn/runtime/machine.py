"""The machine a bundle runs on: what tells it from others, its CPUs, the memory of a process."""

import contextlib
import ctypes
import hashlib
import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime

from ddnn.cpus import available_cpus
from ddnn.wording import counted

_SIMD = re.compile(r"avx|sse|fma|amx|f16c|asimd|neon|sve|sme|i8mm|bf16|fphp|rvv")


@dataclass(frozen=True)
class Machine:
    """What latency depends on, as far as software can tell. Equal machines share their measurements."""

    cpu: str
    """Model of the processor."""
    cpus: int
    """CPUs that this process may use."""
    simd: str
    """Instructions for vectors that the processor has, as the operating system calls them."""
    system: str
    """Operating system and architecture."""
    onnxruntime: str
    """Version of onnxruntime."""

    @property
    def key(self) -> str:
        """Short name of all of it, fit for a folder."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.cpu}, {counted(self.cpus, 'CPU')}, onnxruntime {self.onnxruntime}"


def this_machine() -> Machine:
    """The machine this process runs on."""
    cpu, simd = _processor()
    return Machine(cpu, available_cpus(), simd, f"{platform.system()} {platform.machine()}", onnxruntime.__version__)


def _processor() -> tuple[str, str]:
    """Model and vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown processor", ""
    about: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        about.setdefault(name.strip().lower(), value.strip())
    flags = about.get("flags") or about.get("features") or about.get("isa") or ""
    simd = " ".join(sorted({flag for flag in flags.split() if _SIMD.search(flag)}))
    with contextlib.suppress(OSError):  # boards name themselves better than their processor does
        board = Path("/proc/device-tree/model").read_text(errors="replace").strip("\0 \n")
        return board, simd
    parts = [about[name] for name in ("cpu implementer", "cpu part") if name in about]
    return about.get("model name") or " ".join(parts) or platform.processor() or "unknown processor", simd


class Attention:
    """How much of the machine this process gets, from now on, for calls that use so many threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._wall, self._cpu, self._tasks = time.perf_counter(), time.process_time(), _tasks()

    def denied(self) -> float:
        """Share of the time in which it wanted to run that other work had the CPUs; 0 where that can't be told.

        With one thread, which never sleeps, that is the time it did not run. Of several, some sleep; what counts is how
        long they waited for a CPU, if the system says so. More threads than CPUs wait for each other.
        """
        if self._threads == 1:
            return max(0.0, 1 - (time.process_time() - self._cpu) / (time.perf_counter() - self._wall))
        ran = waited = 0
        for task, (now_ran, now_waited) in _tasks().items():
            before_ran, before_waited = self._tasks.get(task, (0, 0))
            ran, waited = ran + now_ran - before_ran, waited + now_waited - before_waited
        return waited / (ran + waited) if ran and self._threads <= available_cpus() else 0.0


def _tasks() -> dict[str, tuple[int, int]]:
    """By thread of this process: nanoseconds that it ran, and that it waited for a CPU; empty where unknown."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended
            ran, waited = path.read_text().split()[:2]
            found[path.parent.name] = int(ran), int(waited)
    return found


def give_back() -> None:
    """Let the allocator return what is free to the system; without it, loading weights leaves as much again behind."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries than glibc have no such call
        ctypes.CDLL(None).malloc_trim(0)
