"""What the allocator is told, seen from the system's side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

SCRIPT = """
import torch
from pathlib import Path
from ddnn.device import keep_freed_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

def heap():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    of_heap = []
    for number, line in enumerate(lines):
        if line.endswith("[heap]"):
            of_heap += [l for l in lines[number : number + 30] if l.startswith("VmFlags")][:1]
    return of_heap

before = resident_mb()
keep_freed_memory()
keep_freed_memory()  # which changes nothing any more
after = resident_mb()
tensor = torch.ones(50 * 2**20)
held = resident_mb()
del tensor
freed = resident_mb()
print(after - before, held - after, freed - after, sum(" hg" in flags for flags in heap()))
"""


def glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError):
        return False


@pytest.mark.skipif(not glibc(), reason="another C library")
def test_freed_memory_is_kept_in_huge_pages() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    asked, held, freed, huge = map(float, done.stdout.split())
    assert asked < 32, "addresses, not memory"
    assert held >= 195
    assert freed >= 195, "what was freed is not given back"
    if HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text():
        assert huge >= 1
