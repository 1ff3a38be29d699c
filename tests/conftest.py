"""What several test files need."""

import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ddnn import cli, cost, evaluate, recipe, trainer
from ddnn.checkpoint import RunFolder

TINY = (
    "data.limit=160",
    "network.width=8",
    "train.epochs=2",
    "train.batch_size=32",
    "train.checkpoint_minutes=0",
)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: it looked through all of torch every few seconds."""
    gc.collect()
    gc.freeze()


def trainings_of(folder: Path) -> list[int]:
    """The processes that have this folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if str(folder / "runs").encode() in command:
            found.append(int(path.parent.name))
    return found


def exact(run: RunFolder) -> list[dict[str, Any]]:
    """The metrics without what depends on the machine's mood."""
    return [{k: v for k, v in epoch.items() if k not in ("seconds", "memory_mb")} for epoch in run.metrics()]


class Quiet(trainer.Silent):
    """Watches a training in silence; calls `at` with the steps done, to disturb it."""

    def __init__(self, at: Callable[[int], None] = lambda done: None) -> None:
        self.at = at

    def steps(self, done: int, *_: object) -> None:
        self.at(done)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunFolder]:
    """Make the run folder of a training of a second: `tiny("name", "optim.lr=0.1", ...)`."""

    def make(name: str, *overrides: str) -> RunFolder:
        return RunFolder.create(tmp_path / name, recipe.load("digits", [*TINY, *overrides]))

    return make


@pytest.fixture
def ddnn(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line: `ddnn("train", ...)` -> exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddnn", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return call


def _measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency and step cost are measured for real, but once, and not for seconds."""
    once = partial(evaluate.side_by_side, warmup=0, least=1)
    for module in (evaluate, cost):
        monkeypatch.setattr(module, "side_by_side", lambda calls, device, budget_s: once(calls, device, 0.0))


@pytest.fixture(autouse=True)
def _no_long_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    _measure_briefly(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished training of a second; to be read and not to be changed."""
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", recipe.load("digits", TINY))
    with pytest.MonkeyPatch.context() as monkeypatch:
        _measure_briefly(monkeypatch)
        trainer.train(run, Quiet())
    return run


@pytest.fixture
def cifar100_folder() -> Path:
    """The folder of the real data set, or a visible skip."""
    folder = Path(os.environ.get("DDNN_DATA", "")) / "cifar100"
    if "DDNN_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("set DDNN_DATA to a folder that holds cifar100/ (parquet files)")
    return folder
