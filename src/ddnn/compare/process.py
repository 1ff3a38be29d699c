"""One training in a process of its own, which ends with the process that started it."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ddnn.checkpoint import RunFolder
from ddnn.recipe import Recipe

PATIENCE = 15.0
"""Seconds that a training which is told to stop has to save what it wants to."""

_COMMAND = "from ddnn.compare import process; process.end_with_parent(); from ddnn import cli; cli.main()"


def train_run(path: Path, recipe: Recipe, keep_on: Callable[[], bool] = lambda: True) -> int:
    """Run, or go on with, the training in a run folder, and return its exit code; negative if a signal killed it.

    It is `ddnn train --resume`, so its memory is its own and a crash takes nothing else along; what it prints goes to
    `log.txt`. `keep_on` is asked every second; when it says no, or an exception arrives here, the training is stopped.
    """
    if not (path / "recipe.toml").exists():
        RunFolder.create(path, recipe)
    command = [sys.executable, "-c", _COMMAND, "train", "--resume", str(path)]
    with (path / "log.txt").open("ab") as log:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
    try:
        while keep_on():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=1.0)
    finally:
        _stop(child)
    return child.returncode


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    assert child.stdin is not None
    child.stdin.close()


def end_with_parent() -> None:
    """Let this process end when the one that holds the other end of its standard input does, however that died.

    Otherwise a training whose worker was killed would go on, beside the one that takes its place.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
