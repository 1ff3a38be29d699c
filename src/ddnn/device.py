"""Where the work runs."""

import os

import torch

from ddnn.errors import RunError


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RunError("train.device=cuda, but torch finds no GPU here; use train.device=auto or cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def threads(device: torch.device) -> str:
    """What the work runs on, for a person."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def make_deterministic(wanted: bool) -> None:
    """Whether a run repeats bitwise on one machine; process-wide, as torch has it."""
    if wanted and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    torch.backends.cudnn.benchmark = not wanted
