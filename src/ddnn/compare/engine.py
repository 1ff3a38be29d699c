"""What the trainings of a comparison run on: here processes of this machine; `over_ray` has the hosts of a cluster."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from ddnn.compare.plan import Job
from ddnn.compare.process import train_run
from ddnn.cpus import available_cpus
from ddnn.device import choose_device
from ddnn.recipe import Recipe, changed


class Engine(Protocol):
    """Runs trainings side by side; every one is `train_run`."""

    def open(self, folder: Path, recipe: Recipe, note: Callable[[str], None]) -> Recipe:
        """Make ready for a comparison in this folder; the recipe with the cores that each training may take.

        `note` takes a sentence for the user whenever there is something to say.
        """

    def takes_more(self) -> bool:
        """Whether one more training may be started now."""

    def start(self, job: Job) -> None:
        """Begin, or go on with, a training, and return at once."""

    def running(self) -> list[str]:
        """The names of those that are being trained now."""

    def ended(self, seconds: float) -> dict[str, str | None]:
        """Wait until a training ends, or for so long: name -> why it failed, or None."""

    def close(self) -> None:
        """Stop what still runs; it can be gone on with from its last checkpoint."""


class Local:
    """Processes of this machine, so many at a time."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        self._futures: dict[Future[int], str] = {}

    def open(self, folder: Path, recipe: Recipe, note: Callable[[str], None]) -> Recipe:
        """The cores are divided among the trainings where the recipe does not say how many it takes."""
        self._folder = folder
        train = recipe.train
        if self.workers == 1 or train.threads is not None or choose_device(train.device).type != "cpu":
            return recipe
        return changed(recipe, train={"threads": max(1, available_cpus() // self.workers)})

    def takes_more(self) -> bool:
        """Whether a worker is free."""
        return len(self._futures) < self.workers

    def start(self, job: Job) -> None:
        """In a thread that waits for the process."""
        future = self._pool.submit(train_run, self._folder / "runs" / job.name, job.recipe, self._keep_on)
        self._futures[future] = job.name

    def _keep_on(self) -> bool:
        return not self._stopped.is_set()

    def running(self) -> list[str]:
        """All that were started and have not ended."""
        return list(self._futures.values())

    def ended(self, seconds: float) -> dict[str, str | None]:
        """Those that did since the last call; an exception of theirs is raised."""
        done, _ = wait(self._futures, timeout=seconds, return_when=FIRST_COMPLETED)
        names = {self._futures.pop(future): future for future in done}
        return {name: see_log(self._folder, name) if future.result() else None for name, future in names.items()}

    def close(self) -> None:
        """Stop the processes; returns when they have ended."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


def see_log(folder: Path, name: str) -> str:
    """Where to read why a training failed."""
    return f"see {folder / 'runs' / name / 'log.txt'}"
