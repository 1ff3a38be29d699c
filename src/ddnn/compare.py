"""The fair fight: DDNN-EKD against each depth alone and against the rivals, one recipe, several seeds.

Every method is the same recipe with a few fields changed, run by the same trainer; for one seed all methods see the
same images in the same order. A comparison is a folder:

    recipe.toml                the recipe all methods share
    runs/METHOD[-NET]-seedN/   one run folder per training
    comparison.json            what came out so far; rewritten whenever a run ends

Each training is a process of its own (`ddnn train --resume`), so its memory is its own and a crash takes nothing else
along. Calling it again goes on where it was: finished runs are kept, a broken one is resumed from its checkpoint.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ddnn import recipe as recipes
from ddnn.build import build, check
from ddnn.checkpoint import RunFolder
from ddnn.device import choose_device
from ddnn.errors import RecipeError, RunError
from ddnn.evaluate import macs
from ddnn.files import write_atomic
from ddnn.recipe import Network, Recipe


@dataclass(frozen=True)
class Job:
    """One training of a comparison."""

    name: str
    """Of its folder in `runs/`."""
    method: str
    seed: int
    recipe: Recipe
    needs: str | None = None
    """The job that has to be finished before."""


def _changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some fields of some sections changed."""
    parts = {name: getattr(recipe, name).model_copy(update=fields) for name, fields in sections.items()}
    return recipe.model_copy(update=parts)


Trainings = list[tuple[str, Recipe, str | None]]
"""Of one method and seed: ending of the name, recipe, name of the training that has to be finished before."""
Method = Callable[[Recipe, list[str], int], Trainings]
"""Called with the recipe, the names of the nets (the full-net last) and the seed's number."""


def _joint(**objective: Any) -> Method:
    """A method that is one training of the whole DDNN."""
    return lambda recipe, nets, seed: [("", _changed(recipe, objective=objective), None)]


def _alone(recipe: Recipe, nets: list[str], seed: int) -> Trainings:
    return [(f"-{net}", _changed(recipe, network={"alone": net}), None) for net in nets]


def _two_model_kd(recipe: Recipe, nets: list[str], seed: int) -> Trainings:
    teacher = f"alone-{nets[-1]}-seed{seed}"
    beside = Path("..") / teacher  # as seen from its own run folder
    objective = {"teacher": beside, "subnet_weight": 1.0, "ramp": (0.0, 0.0)}
    return [(f"-{net}", _changed(recipe, network={"alone": net}, objective=objective), teacher) for net in nets]


METHODS: dict[str, Method] = {
    "ekd": _joint(),
    "alone": _alone,
    "joint": _joint(kl=0.0, attention=0.0),
    "kl": _joint(attention=0.0),
    "attention": _joint(kl=0.0),
    "two-model-kd": _two_model_kd,
    "adaptive-depth": _joint(labels="full-net", kl=1.0, attention=0.0, temperature=1.0, ramp=(0.0, 0.0)),
}
"""What each method makes of the recipe.

`ekd` is the recipe itself; `alone` trains every depth by itself; `joint` has shared weights and cross-entropy only;
`kl` and `attention` leave one of the two terms of distillation; `two-model-kd` trains every depth with the full-net
of `alone` as its teacher, by the same terms from the beginning on, since that teacher is finished; `adaptive-depth`
has the objective of adaptive-depth networks (NeurIPS 2024): the full-net learns from labels, sub-nets from its
posteriors only, at temperature 1. There only the smallest sub-net is trained; here every sub-net is, since each has
norms of its own.
"""


def plan(recipe: Recipe, methods: Iterable[str], seeds: int, nets: list[str]) -> list[Job]:
    """All trainings, seed by seed, so that a comparison cut short has whole seeds; teachers before their students."""
    jobs: dict[str, Job] = {}
    for seed in range(seeds):
        seeded = _changed(recipe, train={"seed": recipe.train.seed + seed})
        for method in _with_prerequisites(methods):
            for ending, changed, needs in METHODS[method](seeded, nets, seed):
                name = f"{method}{ending}-seed{seed}"
                jobs[name] = Job(name, method, seed, changed, needs)
    return list(jobs.values())


def _with_prerequisites(methods: Iterable[str]) -> list[str]:
    wanted = list(methods)
    unknown = [method for method in wanted if method not in METHODS]
    if unknown:
        raise RecipeError(f"no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    if "two-model-kd" in wanted and "alone" not in wanted:
        wanted.append("alone")  # where its teachers come from
    return [method for method in METHODS if method in wanted]


class Watcher(Protocol):
    """Who watches a comparison."""

    def comparison(self, running: list[str], done: int, total: int, seconds_left: float | None) -> None:
        """Where it stands; called about once a second."""

    def finished(self, name: str, summary: dict[str, Any]) -> None:
        """A training ended."""


def compare(
    folder: Path,
    recipe: Recipe,
    methods: list[str],
    seeds: int,
    watcher: Watcher,
    *,
    name: str = "recipe.toml",
    workers: int = 1,
) -> Path:
    """Run what is missing of a comparison, `workers` trainings at a time, and return its `comparison.json`.

    `name` is what the result calls the recipe.

    A training that fails does not stop the others; `RunError` names the failed ones at the end.
    """
    check(recipe)
    net = build(recipe.network.unweighted(), num_classes=2)
    _open(folder, recipe)
    jobs = plan(_shared_out(recipe, workers), methods, seeds, list(net.depths))
    by_name = {job.name: job for job in jobs}
    todo = [job for job in jobs if not _summary(folder, job)]
    failed: dict[str, str] = {}
    collect(folder, recipe, jobs, name)
    running: dict[Future[int], Job] = {}
    with ThreadPoolExecutor(workers) as pool:
        while todo or running:
            for job in list(todo):
                if job.needs in failed:
                    failed[job.name] = f"needs {job.needs}"
                    todo.remove(job)
                elif len(running) < workers and (job.needs is None or _summary(folder, by_name[job.needs])):
                    running[pool.submit(_train, folder / "runs" / job.name, job.recipe)] = job
                    todo.remove(job)
            ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                summary = _summary(folder, job)
                if future.result() or summary is None:
                    failed[job.name] = f"see {folder / 'runs' / job.name / 'log.txt'}"
                else:
                    collect(folder, recipe, jobs, name)
                    watcher.finished(job.name, summary)
            left = seconds_left(folder, jobs, failed)
            names = [job.name for job in running.values()]
            watcher.comparison(names, sum(_summary(folder, job) is not None for job in jobs), len(jobs), left)
    if failed:
        lines = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise RunError(
            f"{len(failed)} of {len(jobs)} trainings failed: {lines}. The others are kept; call again to retry"
        )
    return folder / "comparison.json"


def _shared_out(recipe: Recipe, workers: int) -> Recipe:
    """The recipe with the cores divided among trainings that run side by side, where it does not say it itself."""
    if workers == 1 or recipe.train.threads is not None or choose_device(recipe.train.device).type != "cpu":
        return recipe
    return _changed(recipe, train={"threads": max(1, (os.cpu_count() or 1) // workers)})


def _open(folder: Path, recipe: Recipe) -> None:
    """Make the folder, or check that it is a comparison of this recipe."""
    path = folder / "recipe.toml"
    if path.exists():
        if recipes.reopen(path) != recipe:
            raise RunError(f"{folder} holds a comparison of another recipe (see {path}); give another --out")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is no comparison; give another --out")
    else:
        write_atomic(path, recipe.to_toml().encode())


def _train(path: Path, recipe: Recipe) -> int:
    """Run, or go on with, one training in a process of its own; its exit code."""
    if not (path / "recipe.toml").exists():
        RunFolder.create(path, recipe)
    with (path / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "ddnn", "train", "--resume", str(path)]
        return subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        ).returncode


def _summary(folder: Path, job: Job) -> dict[str, Any] | None:
    path = folder / "runs" / job.name
    return RunFolder(path, job.recipe).read_json("summary.json")


def seconds_left(folder: Path, jobs: list[Job], failed: Iterable[str] = ()) -> float | None:
    """Seconds per MAC of the epochs done so far, times the MACs of those to come; None before the first epoch.

    Trainings that run side by side slow each other down, and that is in their seconds already.
    """
    spent, macs_done, macs_left = 0.0, 0.0, 0.0
    for job in jobs:
        if job.name in failed:
            continue
        epochs = RunFolder(folder / "runs" / job.name, job.recipe).metrics()
        per_epoch = _cost(job.recipe)
        spent += sum(epoch["seconds"]["total"] for epoch in epochs)
        macs_done += per_epoch * len(epochs)
        macs_left += per_epoch * (job.recipe.train.epochs - len(epochs))
    return spent / macs_done * macs_left if macs_done else None


@functools.cache
def _macs_per_image(network_json: str, taught: bool, size: int, classes: int) -> int:
    """MACs of a training step per image: forward once, backward twice as much; a separate teacher's forward too."""
    network = Network.model_validate_json(network_json).unweighted()
    total = 3 * macs(build(network, classes, size), size)
    if taught:
        whole = build(network.model_copy(update={"alone": None}), classes, size)
        total += macs(whole.nets[whole.full_name], size)
    return total


def _cost(recipe: Recipe, size: int | None = None, classes: int = 10) -> int:
    size = size or recipe.data.image_size or 32
    return _macs_per_image(recipe.network.model_dump_json(), recipe.objective.teacher is not None, size, classes)


def collect(folder: Path, recipe: Recipe, jobs: list[Job], name: str) -> dict[str, Any]:
    """Write `comparison.json` from the runs finished so far, and return it. Accuracies not there yet are null."""
    summaries = {job.name: _summary(folder, job) for job in jobs}
    done = {name: summary for name, summary in summaries.items() if summary}
    seeds = sorted({job.seed for job in jobs})
    content: dict[str, Any] = {
        "dataset": recipe.data.source,
        "recipe": name,
        "seeds": [recipe.train.seed + seed for seed in seeds],
        "epochs": recipe.train.epochs,
        "complete": len(done) == len(jobs),
        "nets": {},
        "methods": {},
    }
    by_name = {job.name: job for job in jobs}
    order = list(build(recipe.network.unweighted(), 2).depths)
    for net in order:
        rows = [summary["subnets"][net] for summary in done.values() if net in summary["subnets"]]
        if rows:
            kept = {key: rows[0][key] for key in ("depths", "params", "macs")}
            content["nets"][net] = {**kept, "latency_ms": statistics.median(row["latency_ms"] for row in rows)}
    for method in dict.fromkeys(job.method for job in jobs):
        mine = {seed: [job for job in jobs if job.method == method and job.seed == seed] for seed in seeds}
        top1: dict[str, list[float | None]] = {net: [] for net in order}
        seconds, cpu_seconds, memory, steps = [], [], [], []
        for seed in seeds:
            finished = [done[job.name] for job in mine[seed] if job.name in done]
            for net in order:
                found = [summary["subnets"][net]["top1"] for summary in finished if net in summary["subnets"]]
                top1[net].append(found[0] if found else None)
            # what the method costs includes the training of a teacher that it needs
            all_jobs = {job.name: job for job in mine[seed]}
            all_jobs |= {job.needs: by_name[job.needs] for job in mine[seed] if job.needs}
            if all(name in done for name in all_jobs):
                seconds.append(sum(done[name]["train_seconds"] for name in all_jobs))
                cpu_seconds.append(sum(done[name]["cpu_seconds"] for name in all_jobs))
                memory.append(max(done[name]["peak_memory_mb"] for name in all_jobs))
                data = _about(folder, next(iter(all_jobs)))["data"]
                size, classes = data["image_size"], len(data["classes"])
                steps.append(
                    recipe.train.batch_size * sum(_cost(job.recipe, size, classes) for job in all_jobs.values())
                )
        content["methods"][method] = {
            "subnets": top1,
            "seconds": statistics.mean(seconds) if seconds else None,
            "cpu_seconds": statistics.mean(cpu_seconds) if cpu_seconds else None,
            "macs_per_step": steps[0] if steps else None,
            "peak_memory_mb": max(memory) if memory else None,
            "runs": {str(recipe.train.seed + seed): [job.name for job in mine[seed]] for seed in seeds},
        }
    if done:
        first, summary = next(iter(done.items()))
        about = _about(folder, first)
        content |= {"machine": about["machine"]["device"], "versions": about["versions"], "commit": about["commit"]}
        content["test_images"] = summary["dataset"]["test_images"]
    write_atomic(folder / "comparison.json", (json.dumps(content, indent=2) + "\n").encode())
    return content


def _about(folder: Path, name: str) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "runs" / name / "run.json").read_text(encoding="utf-8"))
    return about
