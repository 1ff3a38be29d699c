"""Start trainings as a user does: torchrun, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
EXACT = ("train.precision=float64", "data.limit=160", "network.width=8", "train.batch_size=32", "train.epochs=2")
"""A training of a second on the digits."""


def torchrun(processes: int, *arguments: object, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    """The command."""
    launch = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}"]
    return [*launch, "-m", "ddnn", "train", *map(str, arguments)]


def finished(command: list[str], within_s: float = 240) -> str:
    """Run it to its end, which must be good; what it printed."""
    ended = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=within_s
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a finished run."""
    return load_file(run / "model.safetensors")


def furthest(a: Path, b: Path) -> float:
    """The largest difference of two runs' tensors, relative to the largest number of each tensor."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max().clamp(min=1e-30))
        for name in ours
        if ours[name].is_floating_point()
    )


def steps_kept(run: Path) -> list[int]:
    """The steps of which a checkpoint is there, in order."""
    return sorted(int(file.name.split("-")[1]) for file in run.glob("checkpoints/step-*.pt"))
