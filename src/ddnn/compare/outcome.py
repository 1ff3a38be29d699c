"""What came out of a comparison so far, and how long the rest will take: both are read from the run folders."""

import functools
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddnn.build import build
from ddnn.checkpoint import RunFolder, epochs_of
from ddnn.compare.plan import METHODS, Job
from ddnn.evaluate import macs
from ddnn.files import write_atomic
from ddnn.recipe import Network, Recipe


def summary_of(folder: Path, job: Job) -> dict[str, Any] | None:
    """The `summary.json` of a training; None where it has not ended."""
    return _run_of(folder, job).read_json("summary.json")


def _run_of(folder: Path, job: Job) -> RunFolder:
    return RunFolder(folder / "runs" / job.name, job.recipe)


def methods_in(folder: Path, jobs: Iterable[Job]) -> list[str]:
    """The methods of those of these trainings that have ended in this folder."""
    return list(dict.fromkeys(job.method for job in jobs if (folder / "runs" / job.name / "summary.json").exists()))


def seeds_in(folder: Path) -> int:
    """How many seeds, counted from the first, trainings that have ended in this folder had."""
    found = (re.search(r"-seed(\d+)$", path.parent.name) for path in folder.glob("runs/*/summary.json"))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def seconds_left(folder: Path, jobs: list[Job], failed: Iterable[str] = (), at_a_time: int = 1) -> float | None:
    """Seconds per MAC of the epochs done so far, times the MACs of those to come; None before the first epoch.

    `at_a_time` trainings share the work. How they slow each other down is in their seconds already.
    """
    begun = next(filter(None, (_run_of(folder, job).read_json("run.json") for job in jobs)), None)
    if begun is None:
        return None
    images = _images(begun)
    spent, macs_done, macs_left = 0.0, 0.0, 0.0
    for job in jobs:
        if job.name in failed:
            continue
        seconds, costs = _epochs(folder, job), _costs(job.recipe, *images)
        spent += sum(seconds)
        macs_done += sum(costs[: len(seconds)])
        macs_left += sum(costs[len(seconds) :])
    return spent / macs_done * macs_left / max(1, at_a_time) if macs_done else None


def _epochs(folder: Path, job: Job) -> tuple[float, ...]:
    """Seconds of the epochs that a training has done so far."""
    run = _run_of(folder, job)
    try:
        return _epochs_in(run.path, (run.path / "metrics.jsonl").stat().st_mtime_ns)
    except FileNotFoundError:
        return ()


@functools.lru_cache(maxsize=1024)
def _epochs_in(path: Path, _written: int) -> tuple[float, ...]:
    """Read once, and again when it was written again: whoever waits for a comparison asks every second."""
    return tuple(epoch["seconds"]["total"] for epoch in epochs_of(path))


@functools.cache
def _macs_per_image(network_json: str, size: int, classes: int) -> tuple[int, int, int]:
    """MACs of one image forward: through the deepest net that is trained, through all that are, through a teacher."""
    network = Network.model_validate_json(network_json)
    whole = build(network.model_copy(update={"alone": None}), classes, size)
    net = whole if network.alone is None else whole.alone(network.alone)
    return macs(net.nets[net.full_name], size), macs(net, size), macs(whole.nets[whole.full_name], size)


def _images(about: dict[str, Any]) -> tuple[int, int]:
    """Side in pixels and number of classes of the images that a training found, by its `run.json`."""
    return about["data"]["image_size"], len(about["data"]["classes"])


def _costs(recipe: Recipe, size: int, classes: int) -> list[int]:
    """MACs per image of every epoch: forward once, backward twice as much; a separate teacher's forward too."""
    full, tree, teacher = _macs_per_image(recipe.network.unweighted().model_dump_json(), size, classes)
    taught = teacher if recipe.objective.teacher is not None else 0
    first = recipe.train.full_net_epochs
    return [3 * full + taught] * first + [3 * tree + taught] * (recipe.train.epochs - first)


def collect(folder: Path, recipe: Recipe, jobs: list[Job], nets: list[str], name: str) -> dict[str, Any]:
    """Write `comparison.json` from the runs finished so far, and return it. Accuracies not there yet are null.

    `nets` are the names of the recipe's, the full-net last. `macs_per_step` is a method's MACs in all, divided by the
    steps of one net's training alone.
    """
    about, done = {}, {}
    for job in jobs:
        if ((run := _run_of(folder, job)).path / "summary.json").exists():
            about[job.name], done[job.name] = run.finished()
    seeds = sorted({job.seed for job in jobs})
    content: dict[str, Any] = {
        "dataset": recipe.data.source,
        "recipe": name,
        "seeds": [recipe.train.seed + seed for seed in seeds],
        "epochs": recipe.train.epochs,
        "full_net_epochs": recipe.train.full_net_epochs,
        "alone_epochs": recipe.train.alone_epochs,
        "complete": len(done) == len(jobs),
        "nets": {},
        "methods": {},
    }
    by_name = {job.name: job for job in jobs}
    for net in nets:
        rows = [summary["subnets"][net] for summary in done.values() if net in summary["subnets"]]
        if rows:
            kept = {key: rows[0][key] for key in ("depths", "params", "macs")}
            content["nets"][net] = {**kept, "latency_ms": statistics.median(row["latency_ms"] for row in rows)}
    for method in sorted({job.method for job in jobs}, key=list(METHODS).index):
        mine = {seed: [job for job in jobs if job.method == method and job.seed == seed] for seed in seeds}
        top1: dict[str, list[float | None]] = {net: [] for net in nets}
        seconds, cpu_seconds, memory, steps = [], [], [], []
        for seed in seeds:
            finished = [done[job.name] for job in mine[seed] if job.name in done]
            for net in nets:
                found = [summary["subnets"][net]["top1"] for summary in finished if net in summary["subnets"]]
                top1[net].append(found[0] if found else None)
            # what the method costs includes the training of a teacher that it needs
            all_jobs = {job.name: job for job in mine[seed]}
            all_jobs |= {job.needs: by_name[job.needs] for job in mine[seed] if job.needs}
            if all(name in done for name in all_jobs):
                seconds.append(sum(done[name]["train_seconds"] for name in all_jobs))
                cpu_seconds.append(sum(done[name]["cpu_seconds"] for name in all_jobs))
                memory.append(max(done[name]["peak_memory_mb"] for name in all_jobs))
                images = _images(about[next(iter(all_jobs))])
                per_image = sum(sum(_costs(job.recipe, *images)) for job in all_jobs.values())
                steps.append(recipe.train.batch_size * per_image / recipe.train.alone_epochs)
        content["methods"][method] = {
            "subnets": top1,
            "seconds": statistics.mean(seconds) if seconds else None,
            "cpu_seconds": statistics.mean(cpu_seconds) if cpu_seconds else None,
            "macs_per_step": steps[0] if steps else None,
            "peak_memory_mb": max(memory) if memory else None,
            "runs": {str(recipe.train.seed + seed): [job.name for job in mine[seed]] for seed in seeds},
        }
    if done:
        # a run may have gone on elsewhere, or with other code
        stretches = [part for run in about.values() for part in (run, *run.get("resumed", []))]
        machines = list(dict.fromkeys(part["machine"]["device"] for part in stretches))
        content |= {"machine": "; ".join(machines), "machines": machines}
        packages = dict.fromkeys(package for part in stretches for package in part["versions"])
        content["versions"] = {
            package: _distinct(part["versions"].get(package) for part in stretches) for package in packages
        }
        content["commit"] = _distinct(part["commit"] for part in stretches) or None
        content["test_images"] = next(iter(done.values()))["dataset"]["test_images"]
    write_atomic(folder / "comparison.json", (json.dumps(content, indent=2) + "\n").encode())
    return content


def _distinct(texts: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))
