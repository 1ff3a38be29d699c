"""The training loop: one forward of the tree, the sum of the objective's terms, one backward.

A run is a function of its recipe, data and versions. Whatever is random is drawn from a stream named by the seed and
the step, so nothing but the step count, weights, optimiser and averages has to be kept to go on bitwise.
"""

import contextlib
import itertools
import logging
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from ddnn import data
from ddnn.branchwise import branchwise_backward
from ddnn.build import build, make_objective
from ddnn.checkpoint import RunFolder
from ddnn.cost import BUDGET_S, step_cost
from ddnn.cpus import available_cpus
from ddnn.data import DataSet, stream_key
from ddnn.device import (
    PeakMemory,
    choose_device,
    keep_freed_memory,
    make_deterministic,
    settled,
    threads,
    use_huge_pages,
    with_precision,
)
from ddnn.errors import RunError
from ddnn.evaluate import accuracy, latency_conditions, measures
from ddnn.network import DDNN, recalibrate
from ddnn.preemption import Notice, heeded
from ddnn.processes import Processes, check_divides, synchronised_norms, together
from ddnn.recipe import Recipe
from ddnn.state import State, Sums, placed
from ddnn.trained import data_of, eval_batches, load_trained

log = logging.getLogger("ddnn")

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


class Silent:
    """Watches a training and says nothing."""

    def start(self, total_steps: int, done: int, dataset: DataSet, net: DDNN) -> None:
        """Nothing."""

    def steps(self, done: int, loss: float, top1: dict[str, float]) -> None:
        """Nothing."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Nothing."""


GO_ON, SAVE, STOP = 0, 1, 2  # what a process may wish after a step; the highest of all processes' wishes is done


def train(run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Train a run from its last checkpoint, or from the start, to its end; return the content of `summary.json`.

    Under torchrun every process calls this, and together they train one network; `run` is the same folder for all, and
    only process 0 writes there.

    Raises `RunError` when another training is writing there, a loss is no longer finite or another process is lost,
    and `Preempted` after SIGTERM; the last good checkpoint stays.
    """
    device = choose_device(run.recipe.train.device)
    patience = timedelta(minutes=run.recipe.train.patience_minutes)
    with together(device, patience) as processes, heeded(run.path) as notice:
        if not processes.first:
            return _train(run.unwritten(), progress, device, processes, notice)
        with run.held():
            return _train(run, progress, device, processes, notice)


def _train(
    run: RunFolder, progress: Progress, device: torch.device, processes: Processes, notice: Notice
) -> dict[str, Any]:
    # where each process may be on another kind of machine, what the first has settled holds for all
    recipe = run.recipe = with_precision(run.recipe, processes.from_first(settled(run.recipe).train.precision))
    processes.check_same("the recipe", run.recipe_digest())
    summary: dict[str, Any] | None = processes.from_first(run.read_json("summary.json") if processes.first else None)
    if summary:
        return summary
    check_divides(recipe.train.batch_size, recipe.train.accumulate, processes.count)
    if processes.first:
        run.sweep()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    make_deterministic(recipe.train.deterministic)
    dataset = data_of(run)
    processes.check_same(f"the data {dataset.name}", dataset.fingerprint)
    steps = data.steps_per_epoch(dataset.train, recipe.train.batch_size)
    torch.manual_seed(stream_key(recipe.train.seed, "weights"))
    memory = PeakMemory(device)
    keep_freed_memory()  # from here on: what loading the data needed should not count as free for the training
    kept = processes.from_first(run.load_checkpoint() if processes.first else None)
    first = kept is None and processes.first  # whose weights the others then get; they may not see the run folder
    network = recipe.network.seen_from(run.path) if first else recipe.network.unweighted()
    net = build(network, len(dataset.classes), dataset.image_size)
    state = State.fresh(recipe, net, steps, device, processes)
    if recipe.objective.teacher is not None:
        state.teacher = placed(load_teacher(run.path / recipe.objective.teacher, dataset), recipe, device)
    if kept is not None:
        _go_on(state, kept)
    if processes.first:
        about = describe(recipe, dataset, device, processes.count)
        run.write_json("run.json", about if kept is None else _also(run.read_json("run.json"), about, state.step))
    next_step = state.step + (not state.sums.images)  # an epoch that ended without its summary is summarised now
    epochs = [epoch for epoch in run.metrics() if epoch["step"] < next_step]

    begun = state.step
    progress.start(recipe.train.epochs * steps, state.step, dataset, state.net)
    state.start_clocks()
    events = SummaryWriter(str(run.path / "tensorboard"), purge_step=next_step) if processes.first else None
    with (
        contextlib.closing(events) if events else contextlib.nullcontext(),
        synchronised_norms(state.net, processes) if recipe.train.sync_norm else contextlib.nullcontext(),
    ):
        while True:
            if state.sums.images and state.step % steps == 0:
                epochs.append(end_epoch(state, dataset, memory))
                run.write_metrics(epochs)
                if events:
                    _write_events(events, epochs[-1])
                progress.epoch(epochs[-1])
            if state.step == recipe.train.epochs * steps:
                break
            # from here on more is held than ever before in this process
            growing = state.step in (begun, state.join_step)
            train_epoch(state, dataset, run, progress, notice, growing=growing)
    return finish(run, state, dataset, epochs)


def _go_on(state: State, kept: dict[str, Any]) -> None:
    """Take over a checkpoint, and say what is no longer exact if it is one of another number of processes."""
    before, now = kept.get("processes", 1), state.processes.count
    state.load(kept)
    if before != now and state.processes.first:
        train = state.recipe.train
        norms = "" if train.sync_norm else ", and batch norms see parts of another size (train.sync_norm=false)"
        log.warning(
            "the run was on %d process(es) until step %d and goes on with %d: sums are rounded in another order from "
            "here on, so weights are no longer bitwise those of an undisturbed run%s",
            before, state.step, now, norms,
        )  # fmt: skip


def end_epoch(state: State, dataset: DataSet, memory: PeakMemory) -> dict[str, Any]:
    """Sum up the epoch that has just ended, and forget its sums."""
    recipe, processes = state.recipe, state.processes
    metrics: dict[str, Any] = {"epoch": state.step // state.steps_per_epoch, "step": state.step, **state.sums.means()}
    if dataset.validation is not None:
        with state.clock("evaluate"):
            processes.share(state.kept_net.buffers())  # where each process has statistics of its own
            batches = eval_batches(recipe, dataset, dataset.validation, state.device, processes.part)
            metrics["validation"] = accuracy(state.kept_net, batches, processes, only=list(metrics["train_top1"]))
    state.sums = Sums()
    metrics["seconds"] = state.take_seconds()
    metrics["seconds"]["cpu"] = round(float(processes.sum(torch.tensor([metrics["seconds"]["cpu"]]).double())), 3)
    metrics["memory_mb"] = round(processes.most(memory.taken_mb()), 1)
    return metrics


def train_epoch(
    state: State, dataset: DataSet, run: RunFolder, progress: Progress, notice: Notice, *, growing: bool
) -> None:
    """Go on to the end of the epoch that `state` is in, and keep a checkpoint of it.

    `growing`: more memory is needed from here on, so that huge pages are asked for after its first step.
    """
    train, steps, processes = state.recipe.train, state.steps_per_epoch, state.processes
    epoch, start = divmod(state.step, steps)
    if 0 < state.step == state.join_step:
        state.join()
    batches = data.train_batches(
        dataset, state.recipe, epoch=epoch, start=start, device=state.device, part=processes.part
    )
    saved = time.monotonic()
    with notice.held_back():
        for x, target in _timed(batches, state):
            with state.clock("step"):
                try:
                    terms, logits = train_step(state, x, target)
                except torch.OutOfMemoryError:
                    raise RunError(
                        f"{state.device} has too little memory for this step; set train.lean=true, raise "
                        "train.accumulate or lower train.batch_size"
                    ) from None
                state.sums.add(state.step, terms, logits, target)
                if growing:
                    use_huge_pages()
                    growing = False
            ended = state.step % steps == 0
            if state.step % LOOK_EVERY == 0 or ended:
                state.sums.look(processes)
                progress.steps(state.step, *state.sums.so_far())
            due = time.monotonic() - saved > 60 * train.checkpoint_minutes
            wish = processes.agree(STOP if notice.given else SAVE if due else GO_ON)
            counted = train.checkpoint_steps is not None and state.step % train.checkpoint_steps == 0
            if wish != GO_ON or counted or ended:
                run.save_checkpoint(state.step, state.dump())
                saved = time.monotonic()
            if wish == STOP:
                notice.end(f" after step {state.step}, of which a checkpoint was kept")
    if processes.most(notice.given):  # in the last step no call follows by which the others would learn of it
        notice.end(f" after step {state.step}, of which a checkpoint was kept")


def train_step(state: State, x: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimiser step on images [N, 3, H, W] and target; the mean of every term and every net's logits.

    Of several processes each gives its own part of the batch, and gets the means and logits of that part.
    """
    train, processes = state.recipe.train, state.processes
    own = (processes.rank,) if processes.rank else ()  # for dropout and the like, another one in every process
    torch.manual_seed(stream_key(train.seed, "step", state.step, *own))
    if train.precision == "float64":
        x = x.double()
    parts = []
    averaging = state.averaging_now
    pieces = list(zip(x.chunk(train.accumulate), target.chunk(train.accumulate), strict=True))
    for i, (images, classes) in enumerate(pieces, 1):
        share = len(images) / len(x)
        with averaging.no_sync() if averaging and i < len(pieces) else contextlib.nullcontext():
            terms, logits = (_lean_backward if train.lean else _backward)(state, images, classes, share)
        parts.append(({name: share * term for name, term in terms.items()}, logits))
    if averaging is None:
        processes.average_gradients(state.net.parameters())
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
        outputs = state.outputs(images)
        teacher = state.taught(images)
    terms = state.objective_now(outputs, target, teacher)
    loss = share * torch.stack(list(terms.values())).sum()
    if state.averaging_now is None:
        loss.backward()
    else:  # which waits for a gradient of every parameter, also of a net that has no term in this step
        idle = [name for name in outputs if not any(term.startswith(f"{name}/") for term in terms)]
        torch.stack([loss, *(0 * outputs[name].logits.sum() for name in idle)]).sum().backward()
        if idle:
            taught = {p for name in outputs if name not in idle for p in state.net.nets[name].parameters()}
            for parameter in state.net.parameters():
                if parameter not in taught:
                    parameter.grad = None
    return {name: t.detach() for name, t in terms.items()}, {name: o.logits.detach() for name, o in outputs.items()}


def _lean_backward(
    state: State, images: Tensor, target: Tensor, share: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same, one path at a time."""
    with state.autocast():
        teacher = state.taught(images)
    return branchwise_backward(
        state.net,
        state.objective_now,
        images,
        target,
        teacher,
        only=state.learning,
        scale=share,
        autocast=state.autocast,
    )


def finish(run: RunFolder, state: State, dataset: DataSet, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Recalibrate where the recipe says so, keep the weights, and touch the test set for the first and last time."""
    recipe, device, net = state.recipe, state.device, state.kept_net
    state.check_finite()
    processes = state.processes
    processes.share(net.buffers())  # where each process has statistics of its own
    if recipe.network.norm == "recalibrated":
        whole = recipe.augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0})
        unmixed = recipe.model_copy(update={"augment": whole})
        batches = data.train_batches(dataset, unmixed, epoch=recipe.train.epochs, device=device)
        torch.manual_seed(stream_key(recipe.train.seed, "recalibrate"))  # for dropout and the like
        recalibrate(net, (x for x, _ in itertools.islice(batches, RECALIBRATION_BATCHES)))
    digest = run.save_weights(net)
    net.float()
    parts = {"test": dataset.test} | ({} if dataset.validation is None else {"validation": dataset.validation})
    scores = {
        name: accuracy(net, eval_batches(recipe, dataset, images, device, processes.part), processes)
        for name, images in parts.items()
    }
    if not processes.first:  # what is timed now would be disturbed if all did it
        return processes.from_first(None)  # type: ignore[no-any-return]
    x, target = next(data.train_batches(dataset, recipe, epoch=recipe.train.epochs, device=device))
    part = len(x) // recipe.train.accumulate // processes.count  # no more at once than the run's own steps took
    state.optimizer.state.clear()
    trained_s = sum(epoch["seconds"]["total"] for epoch in epochs)
    subnets = measures(net, scores["test"], dataset.image_size, device)
    summary: dict[str, Any] = {
        "subnets": subnets,
        "dataset": {"source": dataset.name, "test_images": len(dataset.test), "train_images": len(dataset.train)},
        "epochs": recipe.train.epochs,
        "seed": recipe.train.seed,
        "train_seconds": trained_s,
        "cpu_seconds": sum(epoch["seconds"]["cpu"] for epoch in epochs),
        "peak_memory_mb": max(epoch["memory_mb"] for epoch in epochs),
        "step_cost": step_cost(
            net,
            make_objective(recipe, list(net.depths)),  # never compiled
            x[:part],
            target[:part],
            bf16=recipe.train.precision == "bf16",
            lean=recipe.train.lean,
            alone_macs=sum(row["macs"] for row in subnets.values()),
            budget_s=min(BUDGET_S, trained_s),  # no longer than the training itself took
        )
        if len(net.depths) > 1
        else None,
        "latency": latency_conditions(device),
        "weights_sha256": digest,
    }
    if dataset.validation is not None:
        summary["validation"] = scores["validation"]
    run.write_json("summary.json", summary)
    return processes.from_first(summary)  # type: ignore[no-any-return]


def load_teacher(path: Path, dataset: DataSet) -> DDNN:
    """The network of a finished run, at rest; `RunError` if it knows other classes."""
    try:
        teacher, about = load_trained(RunFolder.open(path))
    except RunError as error:
        raise RunError(f"objective.teacher: {error}") from None
    if about["data"]["classes"] != list(dataset.classes):
        raise RunError(f"objective.teacher: the run in {path} was trained on other classes than {dataset.name} has")
    return teacher


def describe(recipe: Recipe, dataset: DataSet, device: torch.device, processes: int) -> dict[str, Any]:
    """What `run.json` says: all that the recipe does not."""
    return {
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "device": threads(device),
            "cpus": available_cpus(),
            "processes": processes,
        },
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


def _also(began: dict[str, Any] | None, now: dict[str, Any], step: int) -> dict[str, Any]:
    """What `run.json` says of a run that goes on after `step`: how it began and, where it differs, on what since."""
    if began is None:
        return now
    resumed = began.get("resumed", [])
    before = resumed[-1] if resumed else began
    here = {what: now[what] for what in ("versions", "machine", "commit")}
    if all(before.get(what) == value for what, value in here.items()):
        return began
    return {**began, "resumed": [*resumed, {"step": step, **here}]}


def versions() -> dict[str, str]:
    """Of all that decides what a training computes."""
    return {"python": platform.python_version(), **{p: version(p) for p in ("ddnn", "torch", "torchvision")}}


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
