"""The training loop: one forward of the tree, the sum of the objective's terms, one backward.

A run is a function of its recipe, data and versions. Whatever is random is drawn from a stream named by the seed and
the step, so nothing but the step count, weights, optimiser and averages has to be kept to go on bitwise.
"""

import contextlib
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from ddnn import data
from ddnn.branchwise import branchwise_backward
from ddnn.build import build
from ddnn.checkpoint import RunFolder
from ddnn.cost import step_cost
from ddnn.data import DataSet, stream_key
from ddnn.device import PeakMemory, choose_device, keep_freed_memory, make_deterministic, threads
from ddnn.errors import RunError
from ddnn.evaluate import accuracy, evaluate
from ddnn.network import DDNN, recalibrate
from ddnn.recipe import Recipe
from ddnn.state import State, Sums
from ddnn.trained import data_of, eval_batches, load_trained

LOOK_EVERY = 20  # steps between looks at the losses; each look makes a GPU wait
RECALIBRATION_BATCHES = 200


class Progress(Protocol):
    """Who watches a training."""

    def start(self, total_steps: int, done: int, dataset: DataSet, net: DDNN) -> None:
        """The training begins, or goes on after `done` steps."""

    def steps(self, done: int, loss: float, top1: dict[str, float]) -> None:
        """Where it stands: optimiser steps done, mean loss and accuracy on this epoch's training images so far."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch ended."""


def train(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Train a run from its last checkpoint, or from the start, to its end; return the content of `summary.json`.

    Raises `RunError` when a loss is no longer finite; the last good checkpoint stays.
    """
    if summary := run.read_json("summary.json"):
        return summary
    recipe = run.recipe
    device = choose_device(recipe.train.device)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    make_deterministic(recipe.train.deterministic)
    dataset = data_of(run)
    steps = data.steps_per_epoch(dataset.train, recipe.train.batch_size)
    torch.manual_seed(stream_key(recipe.train.seed, "weights"))
    memory = PeakMemory(device)
    keep_freed_memory()  # from here on: what loading the data needed should not count as free for the training
    kept = run.load_checkpoint()
    network = recipe.network if kept is None else recipe.network.unweighted()
    state = State.fresh(recipe, build(network, len(dataset.classes), dataset.image_size), steps, device)
    if recipe.objective.teacher is not None:
        state.teacher = load_teacher(run.path / recipe.objective.teacher, dataset, device)
    if kept is not None:
        state.load(kept)
    run.write_json("run.json", describe(recipe, dataset, device))
    epochs = [epoch for epoch in run.metrics() if epoch["epoch"] <= state.step // steps]

    progress.start(recipe.train.epochs * steps, state.step, dataset, state.net)
    state.start_clocks()
    with contextlib.closing(SummaryWriter(str(run.path / "tensorboard"), purge_step=state.step + 1)) as events:
        while state.step < recipe.train.epochs * steps:
            train_epoch(state, dataset, run, progress)
            metrics: dict[str, Any] = {"epoch": state.step // steps, "step": state.step, **state.sums.means()}
            if dataset.validation is not None:
                with state.clock("evaluate"):
                    batches = eval_batches(recipe, dataset, dataset.validation, device)
                    metrics["validation"] = accuracy(state.kept_net, batches)
            state.sums = Sums()
            metrics["seconds"] = state.take_seconds()
            metrics["memory_mb"] = round(memory.taken_mb(), 1)
            epochs.append(metrics)
            run.write_metrics(epochs)
            _write_events(events, metrics)
            run.save_checkpoint(state.step, state.dump())
            progress.epoch(metrics)
    return finish(run, state, dataset, epochs)


def train_epoch(state: State, dataset: DataSet, run: RunFolder, progress: Progress) -> None:
    """Go on to the end of the epoch that `state` is in."""
    recipe, device, steps = state.recipe, state.device, state.steps_per_epoch
    epoch, start = divmod(state.step, steps)
    batches = data.train_batches(dataset, recipe, epoch=epoch, start=start, device=device)
    saved = time.monotonic()
    for x, target in _timed(batches, state):
        with state.clock("step"):
            try:
                terms, logits = train_step(state, x, target)
            except torch.OutOfMemoryError:
                raise RunError(
                    f"{state.device} has too little memory for this step; set train.lean=true, raise train.accumulate "
                    "or lower train.batch_size"
                ) from None
            state.sums.add(state.step, terms, logits, target)
        if state.step % LOOK_EVERY == 0 or state.step % steps == 0:
            state.sums.look()
            progress.steps(state.step, *state.sums.so_far())
            if time.monotonic() - saved > 60 * recipe.train.checkpoint_minutes and state.step % steps:
                run.save_checkpoint(state.step, state.dump())
                saved = time.monotonic()


def train_step(state: State, x: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimiser step on images [N, 3, H, W] and target; the mean of every term and every net's logits."""
    train = state.recipe.train
    torch.manual_seed(stream_key(train.seed, "step", state.step))  # for dropout and the like
    parts = []
    for images, classes in zip(x.chunk(train.accumulate), target.chunk(train.accumulate), strict=True):
        share = len(images) / len(x)
        terms, logits = (_lean_backward if train.lean else _backward)(state, images, classes, share)
        parts.append(({name: share * term for name, term in terms.items()}, logits))
    if state.recipe.optim.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.net.parameters(), state.recipe.optim.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    if state.ema is not None:
        state.ema.update_parameters(state.net)
    state.step += 1
    return (
        {name: torch.stack([terms[name] for terms, _ in parts]).sum() for name in parts[0][0]},
        {name: torch.cat([logits[name] for _, logits in parts]) for name in parts[0][1]},
    )


def _backward(
    state: State, images: Tensor, target: Tensor, share: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Add the gradients of `share` x the objective; its terms and all logits, detached."""
    with state.autocast():
        outputs = state.forward(images)
        teacher = state.taught(images)
    terms = state.objective_now(outputs, target, teacher)
    (share * torch.stack(list(terms.values())).sum()).backward()
    return {name: t.detach() for name, t in terms.items()}, {name: o.logits.detach() for name, o in outputs.items()}


def _lean_backward(
    state: State, images: Tensor, target: Tensor, share: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same, one path at a time."""
    with state.autocast():
        teacher = state.taught(images)
    return branchwise_backward(
        state.net, state.objective_now, images, target, teacher, scale=share, autocast=state.autocast
    )


def finish(run: RunFolder, state: State, dataset: DataSet, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Recalibrate where the recipe says so, keep the weights, and touch the test set for the first and last time."""
    recipe, device, net = state.recipe, state.device, state.kept_net
    state.check_finite()
    if recipe.network.norm == "recalibrated":
        whole = recipe.augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0})
        unmixed = recipe.model_copy(update={"augment": whole})
        batches = data.train_batches(dataset, unmixed, epoch=recipe.train.epochs, device=device)
        torch.manual_seed(stream_key(recipe.train.seed, "recalibrate"))  # for dropout and the like
        recalibrate(net, (x for x, _ in itertools.islice(batches, RECALIBRATION_BATCHES)))
    digest = run.save_weights(net)
    x, target = next(data.train_batches(dataset, recipe, epoch=recipe.train.epochs, device=device))
    part = len(x) // recipe.train.accumulate  # no more at once than the run's own steps took
    state.optimizer.state.clear()
    summary: dict[str, Any] = {
        "subnets": evaluate(net, eval_batches(recipe, dataset, dataset.test, device), dataset.image_size, device),
        "dataset": {"source": dataset.name, "test_images": len(dataset.test), "train_images": len(dataset.train)},
        "epochs": recipe.train.epochs,
        "seed": recipe.train.seed,
        "train_seconds": sum(epoch["seconds"]["total"] for epoch in epochs),
        "cpu_seconds": sum(epoch["seconds"]["cpu"] for epoch in epochs),
        "peak_memory_mb": max(epoch["memory_mb"] for epoch in epochs),
        "step_cost": step_cost(
            net,
            state.objective,
            x[:part],
            target[:part],
            bf16=recipe.train.precision == "bf16",
            lean=recipe.train.lean,
        )
        if len(net.depths) > 1
        else None,
        "latency": f"batch 1, eager float32, {threads(device)}",
        "weights_sha256": digest,
    }
    if dataset.validation is not None:
        summary["validation"] = accuracy(net, eval_batches(recipe, dataset, dataset.validation, device))
    run.write_json("summary.json", summary)
    return summary


def load_teacher(path: Path, dataset: DataSet, device: torch.device) -> DDNN:
    """The network of a finished run, at rest; `RunError` if it knows other classes."""
    teacher, about = load_trained(RunFolder.open(path))
    if about["data"]["classes"] != list(dataset.classes):
        raise RunError(f"objective.teacher: the run in {path} was trained on other classes than {dataset.name} has")
    return teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def describe(recipe: Recipe, dataset: DataSet, device: torch.device) -> dict[str, Any]:
    """What `run.json` says: all that the recipe does not."""
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("ddnn", "torch", "torchvision")}},
        "machine": {"platform": platform.platform(), "device": threads(device), "cpus": os.cpu_count()},
        "commit": commit(),
        "seed": recipe.train.seed,
        "data": {
            "source": dataset.name,
            "classes": list(dataset.classes),
            "image_size": dataset.image_size,
            "images": {
                "train": len(dataset.train),
                "validation": 0 if dataset.validation is None else len(dataset.validation),
                "test": len(dataset.test),
            },
            "fingerprint": dataset.fingerprint,
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "corrupt": list(dataset.corrupt),
        },
    }


def commit() -> str | None:
    """The commit of the source tree this runs from, with `+` if it was changed since; None if it is installed."""
    here = Path(__file__).parent
    if here.parents[1].joinpath(".git").exists():
        with contextlib.suppress(OSError):
            described = subprocess.run(
                ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--match="],
                cwd=here, capture_output=True, text=True, check=False,
            )  # fmt: skip
            return described.stdout.strip() or None
    return None


def _timed(batches: Iterator[tuple[Tensor, Tensor]], state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, with the time it takes to get them clocked as `data`."""
    while True:
        with state.clock("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _write_events(events: SummaryWriter, metrics: dict[str, Any]) -> None:
    step = metrics["step"]
    events.add_scalar("loss", metrics["loss"], step)
    for name, value in metrics["terms"].items():
        events.add_scalar(f"terms/{name}", value, step)
    for name, value in metrics["train_top1"].items():
        events.add_scalar(f"train_top1/{name}", value, step)
    for name, scores in metrics.get("validation", {}).items():
        events.add_scalar(f"validation_top1/{name}", scores["top1"], step)
    events.flush()
