"""Where the work runs."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch
from torch import nn

from ddnn.errors import RunError
from ddnn.launch import launched, local_rank
from ddnn.memory import peak_mb, reset_peak
from ddnn.recipe import Recipe
from ddnn.wording import counted


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RunError("device cuda is asked for, but torch finds no GPU here; use auto or cpu")
    if not available or wanted == "cpu":
        return torch.device("cpu")
    if not launched():
        return torch.device("cuda")
    if local_rank() >= torch.cuda.device_count():
        raise RunError(
            f"process {local_rank()} of this host has no GPU of its own, as there are {torch.cuda.device_count()}; "
            "start no more processes than there are GPUs (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def threads(device: torch.device) -> str:
    """What the work runs on, for a person."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def has_bf16(device: torch.device) -> bool:
    """Whether torch has fast kernels for bfloat16 there: on an x86 CPU from AVX-512 on, on a GPU from Ampere on.

    Without them a CPU computes one value at a time, hundreds of times slower than in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type != "cpu" or not mkldnn or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe with this for `train.precision=auto`; as it is where it says something else."""
    if recipe.train.precision != "auto":
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def settled(recipe: Recipe, kept: Recipe | None = None) -> Recipe:
    """The recipe with what it leaves to the machine, `train.precision=auto`, decided.

    As it is in `kept`, the same recipe when the work began, or else by what is fast here.
    """
    if kept is not None and kept in (with_precision(recipe, "bf16"), with_precision(recipe, "float32")):
        return kept
    gpu = recipe.train.device != "cpu" and torch.cuda.is_available()
    return with_precision(recipe, "bf16" if has_bf16(torch.device("cuda" if gpu else "cpu")) else "float32")


def check_precision(device: torch.device, precision: str) -> None:
    """`RunError` for a precision that this processor is far too slow in."""
    if precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        raise RunError(
            "train.precision=bf16: this processor has no instructions for it (x86 has from AVX-512 on), and torch "
            "takes hundreds of times longer than in float32; what was begun in bf16 goes on elsewhere, and what "
            "begins here, with another --out, can have train.precision=float32, or auto"
        )


def avx2_at_most() -> bool:
    """Whether this is an x86 processor with AVX2 and without AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def check_able(net: nn.Module, device: torch.device, precision: str, *, channels_last: bool) -> None:
    """`RunError` for a training that this processor is not made for, with what to set instead."""
    check_precision(device, precision)
    # there torch 2.14.1's library writes beyond the end of the gradient of such weights, and the process dies;
    # float64 has other kernels, but what a step costs is measured in float32
    if device.type == "cpu" and avx2_at_most() and channels_last:
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and _strides_few_channels(module):
                raise RunError(
                    "train.channels_last=true: on a processor without AVX-512 torch crashes in the gradient of "
                    f"{name}, a convolution of 1 x 1 with a stride and less than 8 channels; use "
                    "train.channels_last=false here"
                )


def _strides_few_channels(convolution: nn.Conv2d) -> bool:
    return convolution.kernel_size == (1, 1) and max(convolution.stride) > 1 and convolution.in_channels < 8


def make_deterministic(wanted: bool) -> None:
    """Whether a run repeats bitwise on one machine; process-wide, as torch has it."""
    if wanted and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    torch.backends.cudnn.benchmark = not wanted


def keep_freed_memory() -> None:
    """Let the allocator keep what tensors give back, in huge pages where the system has them; process-wide.

    A training step frees and asks for the same blocks again and again. glibc by default maps each large one anew, so
    that the system has to clear its pages every time: a quarter of the time of a small network's step on a CPU. What is
    free already goes back first: the index of a million images leaves a hundred MB. Does nothing where the C library is
    another one.

    A step's tensors are out of the cache when they are needed again, and finding their pages then takes time beside
    reading them. In pages of 2 MB instead of 4 KB a small network's step takes a fifteenth less.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        if os.confstr("CS_GNU_LIBC_VERSION"):
            library = ctypes.CDLL(None)
            library.malloc_trim(0)
            for option, value in _MALLOC_OPTIONS.items():
                library.mallopt(option, value)
            library.malloc.restype = ctypes.c_void_p
            grown = library.malloc(ctypes.c_size_t(HEAP - HUGE))  # addresses; no memory before something is put there
            library.free(ctypes.c_void_p(grown))
            use_huge_pages()


_MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


HEAP = 2**30
"""Bytes by which the heap is grown first: only for memory that is mapped already can huge pages be asked for."""
HUGE = 2**21
_ADVICE = (14, 25)  # madvise(2): MADV_HUGEPAGE, from now on; MADV_COLLAPSE, for what there is, from Linux 6.1 on


def use_huge_pages() -> None:
    """Put the heap as it is now into huge pages, where the system has them; process-wide.

    `keep_freed_memory` asks for them in advance, as far as a small network's heap grows. That of a larger one has grown
    beyond when its first step is done: then call this, which takes a second for each gigabyte.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith("[heap]"):
                begin, end = (int(place, 16) // HUGE * HUGE for place in line.split()[0].split("-"))
                for advice in _ADVICE:
                    library.madvise(ctypes.c_void_p(begin + HUGE), ctypes.c_size_t(max(0, end - begin - HUGE)), advice)


class PeakMemory:
    """Most memory in MiB that work took since this was made: tensors on a GPU, resident pages on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device) / 2**20
        else:
            reset_peak()
            self.base = peak_mb() or 0.0

    def taken_mb(self) -> float:
        """The peak so far, less what was there at the beginning."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.base
        return (peak_mb() or 0.0) - self.base
