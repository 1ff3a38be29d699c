"""The fair fight: DDNN-EKD against each depth alone and against the rivals, one recipe, several seeds.

Every method is the same recipe with a few fields changed, run by the same trainer; for one seed all methods see the
same images in the same order. A comparison is a folder:

    recipe.toml                the recipe all methods share
    runs/METHOD[-NET]-seedN/   one run folder per training
    comparison.json            what came out so far; rewritten whenever a run ends

Each training is a process of its own (`ddnn train --resume`), on this machine or, with Ray, on one of many hosts.
Calling it again goes on where it was: finished runs are kept, a broken one is resumed from its checkpoint.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ddnn import data
from ddnn import recipe as recipes
from ddnn.build import check, make_objective
from ddnn.checkpoint import RunFolder
from ddnn.compare.engine import Engine, Local, see_log
from ddnn.compare.outcome import collect, methods_in, seconds_left, seeds_in, summary_of
from ddnn.compare.plan import METHODS, Job, plan, worthwhile
from ddnn.device import check_precision, choose_device, settled
from ddnn.errors import RunError
from ddnn.files import write_atomic
from ddnn.recipe import Recipe

__all__ = ["METHODS", "Engine", "Job", "Local", "Watcher", "compare", "plan", "seconds_left"]


class Watcher(Protocol):
    """Who watches a comparison."""

    def comparison(self, running: list[str], done: int, total: int, seconds_left: float | None) -> None:
        """Where it stands; called about once a second."""

    def finished(self, name: str, summary: dict[str, Any]) -> None:
        """A training ended."""

    def note(self, sentence: str) -> None:
        """Something happened that a person should know."""


def compare(
    folder: Path,
    recipe: Recipe,
    methods: list[str] | None,
    seeds: int,
    watcher: Watcher,
    *,
    name: str = "recipe.toml",
    engine: Engine | None = None,
) -> Path:
    """Run what is missing of a comparison and return its `comparison.json`.

    `methods` None stands for all that the recipe can have and that differ with it; the watcher is told of the others.
    `name` is what the result calls the recipe. `engine` is what the trainings run on; by default processes of this
    machine, one at a time.

    A training that fails does not stop the others; `RunError` names the failed ones at the end.
    """
    begun = _begun(folder)
    recipe = settled(recipe, begun)
    nets = check(recipe)

    def check_method(made: Recipe, method: str) -> None:
        recipes.validate(made, f"what {method} makes of the recipe")
        make_objective(made, [made.network.alone] if made.network.alone else nets)

    left_out: list[str] = []
    if methods is None:
        methods, left_out = worthwhile(recipe, nets, check_method)
    for job in plan(recipe, methods, 1, nets):  # mistakes show before anything is made
        check_method(job.recipe, job.method)
    engine = engine or Local()
    if isinstance(engine, Local) and any(summary_of(folder, job) is None for job in plan(recipe, methods, seeds, nets)):
        check_precision(choose_device(recipe.train.device), recipe.train.precision)
        data.check(recipe.data)  # the hosts of a cluster may have them where this one has not
    _open(folder, recipe, begun, watcher.note)
    for sentence in left_out:
        watcher.note(sentence)
    try:
        ready = engine.open(folder, recipe, watcher.note)
        jobs = plan(ready, methods, seeds, nets)
        # what earlier calls, with other methods or more seeds, left here stays in the result
        most = max(seeds, seeds_in(folder))
        kept = methods_in(folder, plan(ready, METHODS, most, nets))
        every = plan(ready, [*methods, *kept], most, nets)
        if not {"ekd", "alone"} <= {job.method for job in every}:
            watcher.note("without both ekd and alone among the methods there will be no verdict")
        collect(folder, recipe, every, nets, name)
        failed = _run(folder, jobs, watcher, engine, lambda: collect(folder, recipe, every, nets, name))
    finally:
        engine.close()
    if failed:
        lines = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise RunError(
            f"{len(failed)} of {len(jobs)} trainings failed: {lines}. {_reason(folder, next(iter(failed)))}The others "
            "are kept; call again to retry"
        )
    return folder / "comparison.json"


def _run(
    folder: Path, jobs: list[Job], watcher: Watcher, engine: Engine, sum_up: Callable[[], object]
) -> dict[str, str]:
    """Run what is missing, and sum up after each; why trainings failed, by name."""
    by_name = {job.name: job for job in jobs}
    done = {job.name for job in jobs if summary_of(folder, job) is not None}
    todo = [job for job in jobs if job.name not in done]
    started: set[str] = set()
    failed: dict[str, str] = {}
    while todo or started:
        for job in list(todo):
            if job.needs in failed:
                failed[job.name] = f"needs {job.needs}"
                todo.remove(job)
            elif engine.takes_more() and (job.needs is None or job.needs in done):
                engine.start(job)
                started.add(job.name)
                todo.remove(job)
        for ended, why in engine.ended(1.0).items():
            started.remove(ended)
            summary = summary_of(folder, by_name[ended])
            if why or summary is None:
                failed[ended] = why or see_log(folder, ended)
            else:
                done.add(ended)
                sum_up()
                watcher.finished(ended, summary)
        running = engine.running()
        watcher.comparison(running, len(done), len(jobs), seconds_left(folder, jobs, failed, len(running)))
    return failed


def _reason(folder: Path, name: str) -> str:
    """The last thing that a failed training said, as a sentence; '' where it said nothing."""
    try:
        lines = (folder / "runs" / name / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"The first of them ended with: {said}. " if said else ""


def _begun(folder: Path) -> Recipe | None:
    """The recipe of the comparison in a folder; None where there is none yet. `RunError` for any other folder."""
    if any((folder / part).exists() for part in ("run.json", "checkpoints", "summary.json")):
        raise RunError(f"{folder} holds a run, not a comparison; give another --out")
    if (folder / "recipe.toml").exists():
        return recipes.reopen(folder / "recipe.toml")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is no comparison; give another --out")
    return None


def _open(folder: Path, recipe: Recipe, begun: Recipe | None, note: Callable[[str], None]) -> None:
    """Make the folder, or check that the comparison `begun` there is of this recipe.

    Of another recipe it may be as long as nothing is trained by that: then it begins anew.
    """
    path = folder / "recipe.toml"
    if begun == recipe:
        return
    if begun is not None:
        if any(folder.glob("runs/*/summary.json")) or any(folder.glob("runs/*/checkpoints/step-*.pt")):
            raise RunError(f"{folder} holds a comparison of another recipe (see {path}); give another --out")
        for run in filter(Path.is_dir, folder.glob("runs/*")):
            with RunFolder(run, recipe).held():
                shutil.rmtree(run)
        note(f"{folder} held a comparison of another recipe that had trained nothing yet; it begins anew")
    write_atomic(path, recipe.to_toml().encode())
