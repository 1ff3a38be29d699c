"""Trainings on the hosts of a Ray cluster. Each is one Ray task, which does what a local worker does.

The comparison's folder has to be the same on every host, at the same path (NFS or the like): runs, checkpoints and
weights go there and nowhere else. A training whose worker or host is lost starts again on another and goes on from
its last checkpoint. Besides what every comparison holds, the folder gets

    workers/driver.json   the process that hands out the trainings; a worker that doesn't find it has another folder
    workers/NAME.json     the host and the process that last ran a training
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddnn.compare.engine import see_log
from ddnn.compare.plan import Job
from ddnn.compare.process import PATIENCE, train_run
from ddnn.errors import RunError, first_line
from ddnn.files import write_atomic
from ddnn.recipe import Recipe, changed
from ddnn.trainer import versions
from ddnn.wording import counted

LOSSES = 3
"""How often a training may lose its worker before it counts as failed."""
ANSWER = 10.0
"""Seconds that a cluster's head has to answer in."""
LOOK = 300.0
"""Seconds within which every host has to say that it can run trainings."""
WITHOUT_HOST = 600.0
"""Seconds that trainings wait for a host that can run them, when the last one is gone."""
UNSEEN = 60.0
"""Seconds until what one host wrote has to be visible on another; network file systems remember directories a while."""

_LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.OutOfMemoryError,
)


class OverRay:
    """The cluster at `address` (`auto`: the one this host is in), by default one started on this machine for the while.

    `workers` is the most trainings at a time, by default as many as the cluster has room for. A training takes
    `train.threads` cores (by default one), and a GPU where it is to run on one.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self.address = address
        self.workers = workers
        self._ours = False
        self._jobs: dict[Any, tuple[Job, str]] = {}
        """By reference to the task's result: the job, and the token of this attempt at it."""
        self._losses: dict[str, int] = {}
        self._last_host = time.monotonic()

    # -- what an engine does -----------------------------------------------------------------------------------------

    def open(self, folder: Path, recipe: Recipe, note: Callable[[str], None]) -> Recipe:
        """Connect, and see that every host has the folder and the same versions; `RunError` where one has not."""
        self._folder, self._note = folder.resolve(), note
        (self._folder / "workers").mkdir(exist_ok=True)
        self._driver = {"token": uuid.uuid4().hex, "host": socket.gethostname(), **versions()}
        write_atomic(self._folder / "workers" / "driver.json", json.dumps(self._driver).encode())
        self._connect()
        train = recipe.train
        gpus = any(node["Resources"].get("GPU", 0) for node in _nodes())
        self._needs = {
            "CPU": train.threads or 1,
            "GPU": int(train.device == "cuda" or (train.device == "auto" and gpus)),
        }
        if not (hosts := self._able()):
            raise RunError(f"no host of the Ray cluster can run a training, which takes {self._amount()}")
        looks = [(node["NodeManagerHostname"], _remote(_complaint, num_cpus=0, strategy=_on(node))) for node in hosts]
        for host, look in [(host, task.remote(self._folder, self._driver)) for host, task in looks]:
            try:
                complaint = ray.get(look, timeout=LOOK)
            except (exceptions.RayError, ImportError) as error:
                complaint = f"host {host} of the Ray cluster can't run a training: {_told(error)}"
            if complaint:
                raise RunError(complaint)
        if train.threads is None and not self._needs["GPU"]:
            return changed(recipe, train={"threads": 1})
        return recipe

    def takes_more(self) -> bool:
        """Ray itself holds back what has no room yet."""
        return self.workers is None or len(self._jobs) < self.workers

    def start(self, job: Job) -> None:
        """Hand the training to Ray."""
        token = uuid.uuid4().hex
        task = _remote(
            _task, num_cpus=self._needs["CPU"], num_gpus=self._needs["GPU"], strategy="SPREAD", name=job.name
        )
        reference = task.remote(self._folder, self._driver, job, token)
        self._jobs[reference] = (job, token)

    def running(self) -> list[str]:
        """Those that have a worker."""
        return [job.name for job, token in self._jobs.values() if _token(self._folder, job.name) == token]

    def ended(self, seconds: float) -> dict[str, str | None]:
        """Start those again that lost their worker."""
        ready, _ = ray.wait(list(self._jobs), timeout=seconds) if self._jobs else ([], [])
        found: dict[str, str | None] = {}
        for reference in ready:
            job, _ = self._jobs.pop(reference)
            try:
                code, complaint = ray.get(reference)
            except _LOST as error:
                self._lost(job, _told(error), found)
            except (exceptions.RayError, OSError, ImportError) as error:
                found[job.name] = _told(error)
            else:
                if complaint:
                    raise RunError(complaint)
                if code < 0:
                    self._lost(job, f"it was killed by signal {-code} on {_worker(self._folder, job.name)}", found)
                elif code:
                    found[job.name] = see_log(self._folder, job.name)
                else:
                    found[job.name] = self._unseen(job)
        self._check_hosts()
        return found

    def close(self) -> None:
        """Stop the trainings and leave the cluster."""
        if not ray.is_initialized():
            return
        try:
            for reference in self._jobs:
                ray.cancel(reference)
            if self._jobs:
                _, left = ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=PATIENCE + 5)
                for reference in left:
                    ray.cancel(reference, force=True)
        finally:
            if self._ours:
                ray.shutdown()

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    def _lost(self, job: Job, why: str, found: dict[str, str | None]) -> None:
        losses = self._losses[job.name] = self._losses.get(job.name, 0) + 1
        if losses > LOSSES:
            found[job.name] = f"lost its worker {losses} times, at last so: {why}"
            return
        self._note(f"{job.name} lost its worker ({why}); it goes on from its last checkpoint, attempt {losses + 1}")
        self.start(job)

    def _unseen(self, job: Job) -> str | None:
        """Why the result of a training that ended well can't be read here."""
        summary = self._folder / "runs" / job.name / "summary.json"
        deadline = time.monotonic() + UNSEEN
        while not summary.exists():
            if time.monotonic() > deadline:
                return f"it ended on {_worker(self._folder, job.name)}, but its {summary} can't be seen here"
            os.listdir(summary.parent)  # makes a network file system look again
            time.sleep(0.5)
        return None

    def _check_hosts(self) -> None:
        if not self._jobs or self._able():
            self._last_host = time.monotonic()
        elif time.monotonic() - self._last_host > WITHOUT_HOST:
            raise RunError(
                f"for {WITHOUT_HOST / 60:.0f} minutes no host of the Ray cluster could run a training, which takes "
                f"{self._amount()}; what is there is kept, call again when there are hosts"
            )

    # -- the cluster -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
        os.environ.setdefault("RAY_worker_niceness", "0")  # or other work of this machine would starve the trainings
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray is going to do anyway
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is None:
                ray.init("local", include_dashboard=False, **quiet)
            else:
                if self.address != "auto":  # Ray itself would try for a quarter of an hour
                    host, _, port = self.address.rpartition(":")
                    socket.create_connection((host, int(port)), timeout=ANSWER).close()
                ray.init(self.address, **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise RunError(
                f"cannot reach a Ray cluster at {self.address or 'this machine'}: {_told(error)}; "
                "`ray start --head` starts one, `ray start --address=HEAD:6379` adds a host"
            ) from None
        self._ours = True

    def _able(self) -> list[dict[str, Any]]:
        """The hosts that are large enough for a training."""
        return [n for n in _nodes() if all(n["Resources"].get(what, 0) >= much for what, much in self._needs.items())]

    def _amount(self) -> str:
        cores = self._needs["CPU"]
        return f"{counted(cores, 'core')} (train.threads){' and a GPU' if self._needs['GPU'] else ''}"


def _task(folder: Path, driver: dict[str, str], job: Job, token: str) -> tuple[int, str | None]:
    """What runs on a worker: the exit code of the training, or what is wrong with this host."""
    if complaint := _complaint(folder, driver):
        return 1, complaint
    about = {"token": token, "host": socket.gethostname(), "pid": os.getpid()}
    write_atomic(folder / "workers" / f"{job.name}.json", json.dumps(about).encode())

    def still_ours() -> bool:
        """No: this host was given up as lost, and another goes on with the training."""
        return _token(folder, job.name) in (token, None)

    return train_run(folder / "runs" / job.name, job.recipe, still_ours), None


def _complaint(folder: Path, driver: dict[str, str]) -> str | None:
    """What keeps this host from running trainings, in a sentence."""
    host = socket.gethostname()
    try:
        seen = json.loads((folder / "workers" / "driver.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        seen = {}
    if seen.get("token") != driver["token"]:
        return (
            f"host {host} of the Ray cluster doesn't see {folder} as {driver['host']} does; give an --out on a file "
            "system that all hosts have at the same path"
        )
    if not os.access(folder / "workers", os.W_OK):
        return f"host {host} of the Ray cluster can't write to {folder}"
    for package, ours in versions().items():
        if ours != driver[package]:
            return f"host {host} of the Ray cluster has {package} {ours}, {driver['host']} has {driver[package]}"
    return None


def _about(folder: Path, name: str) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / "workers" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about


def _token(folder: Path, name: str) -> str | None:
    return _about(folder, name).get("token")


def _worker(folder: Path, name: str) -> str:
    return str(_about(folder, name).get("host", "a host unknown"))


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _on(node: dict[str, Any]) -> Any:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _remote(function: Callable[..., Any], *, strategy: Any, **options: Any) -> Any:
    """The function as a Ray task; Ray repeats nothing by itself, so that every loss is counted and told."""
    return ray.remote(max_retries=0)(function).options(scheduling_strategy=strategy, **options)


def _told(error: BaseException) -> str:
    if isinstance(error, exceptions.GetTimeoutError):
        return f"it has not answered for {LOOK:.0f} s"
    if isinstance(error, exceptions.RayTaskError):
        error = error.cause
    return first_line(error, kind=False)
