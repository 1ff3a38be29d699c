"""All that changes while a run goes on, and so all that a checkpoint has to hold."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddnn.autocast import autocast
from ddnn.build import make_objective
from ddnn.compiling import compiled
from ddnn.device import check_able
from ddnn.errors import RunError
from ddnn.evaluate import hits
from ddnn.network import DDNN, Output
from ddnn.objective import EKD
from ddnn.optimizer import make_optimizer, make_scheduler, take_in_late
from ddnn.processes import ALONE, Processes
from ddnn.recipe import Recipe

WHAT_NOW = (
    "the last good checkpoint, if there was one yet, is kept. A lower optim.lr or optim.clip_norm usually helps, and "
    "train.precision=float32 where it is bf16"
)
"""After numbers that are none."""


@dataclass
class Sums:
    """Running sums of an epoch; looked at now and then, because a look makes a GPU wait."""

    images: int = 0
    steps: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    top1: dict[str, int] = field(default_factory=dict)
    unseen: list[tuple[int, dict[str, Tensor], dict[str, Tensor], int]] = field(default_factory=list)

    def add(self, step: int, terms: dict[str, Tensor], logits: dict[str, Tensor], target: Tensor) -> None:
        """Take in one step; `target` [N] or, mixed, [N, classes], of which the likelier class counts."""
        classes = target if target.ndim == 1 else target.argmax(dim=1)
        right = {name: hits(z, classes)[0] for name, z in logits.items()}
        self.unseen.append((step, terms, right, len(target)))

    def look(self, processes: Processes = ALONE) -> None:
        """Add what came in since the last look; `RunError` names the first term that was not finite.

        Of several processes all look at the same steps, and all then know the sums over all.
        """
        if not self.unseen:
            return
        losses = torch.stack([term for _, terms, _, _ in self.unseen for term in terms.values()]).cpu().double()
        counts = torch.stack([count for _, _, right, _ in self.unseen for count in right.values()]).cpu()
        images = torch.tensor([images for *_, images in self.unseen])
        summed = processes.sum(torch.cat([losses / processes.count, counts, images]))
        parts = summed.split([len(losses), len(counts), len(images)])
        every_loss, every_count, every_images = (iter(part.tolist()) for part in parts)
        for step, terms, right, _ in self.unseen:
            for name in terms:
                value = next(every_loss)
                if not math.isfinite(value):
                    raise RunError(f"the loss is no longer finite: term {name} is {value} at step {step}; {WHAT_NOW}")
                self.terms[name] = self.terms.get(name, 0.0) + value
            for name in right:
                self.top1[name] = self.top1.get(name, 0) + int(next(every_count))
            self.images += int(next(every_images))
            self.steps += 1
        self.unseen = []

    def so_far(self) -> tuple[float, dict[str, float]]:
        """Mean loss and training accuracy."""
        means = self.means()
        return means["loss"], means["train_top1"]

    def means(self) -> dict[str, Any]:
        """Means over the steps seen."""
        terms = {name: value / self.steps for name, value in self.terms.items()}
        top1 = {name: count / self.images for name, count in self.top1.items()}
        return {"loss": sum(terms.values()), "terms": terms, "train_top1": top1}

    def dump(self) -> dict[str, Any]:
        """For a checkpoint; nothing may be unseen."""
        assert not self.unseen
        return {"images": self.images, "steps": self.steps, "terms": self.terms, "top1": self.top1}


def placed(net: DDNN, recipe: Recipe, device: torch.device) -> DDNN:
    """The net itself, moved to the device, in the precision and memory layout of the recipe's training."""
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    kind = torch.float64 if recipe.train.precision == "float64" else None
    return net.to(device, dtype=kind, memory_format=layout)  # type: ignore[call-overload,no-any-return]


@dataclass
class State:
    """All that changes while a run goes on."""

    recipe: Recipe
    net: DDNN
    forward: Callable[..., dict[str, Output]]
    """`net`, or its twin with the same parameters: compiled, or with gradients averaged over processes."""
    objective: EKD
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: AveragedModel | None
    steps_per_epoch: int
    device: torch.device
    processes: Processes = ALONE
    averaging: DistributedDataParallel | None = None
    """What averages gradients over several processes during a backward."""
    teacher: DDNN | None = None
    """The network that teaches in two-model KD; its last net does."""
    step: int = 0
    """Optimiser steps done."""
    sums: Sums = field(default_factory=Sums)
    """Of the epoch that is going on."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent in this epoch, in all (`total`) and on what."""
    banked: tuple[float, float] = field(default_factory=lambda: _now())
    """Until when `total` and `cpu` are counted."""

    @classmethod
    def fresh(
        cls, recipe: Recipe, net: DDNN, steps_per_epoch: int, device: torch.device, processes: Processes = ALONE
    ) -> "State":
        """The state before the first step, the same in all processes."""
        check_able(net, device, recipe.train.precision, channels_last=recipe.train.channels_last)
        placed(net, recipe, device).train()
        processes.share([*net.parameters(), *net.buffers()])
        lean = recipe.train.lean
        forward = net if lean or processes.count == 1 else processes.wrap(net)
        objective = make_objective(recipe, list(net.depths))
        optimizer = make_optimizer(net, recipe.optim)
        average = get_ema_multi_avg_fn(recipe.train.ema)
        return cls(
            recipe=recipe,
            net=net,
            forward=compiled(forward, device) if recipe.train.compile else forward,
            objective=objective,
            optimizer=optimizer,
            scheduler=make_scheduler(optimizer, recipe.schedule, recipe.train.epochs, steps_per_epoch),
            ema=AveragedModel(net, multi_avg_fn=average, use_buffers=True) if recipe.train.ema else None,
            steps_per_epoch=steps_per_epoch,
            device=device,
            processes=processes,
            averaging=forward if isinstance(forward, DistributedDataParallel) else None,
        )

    @property
    def objective_now(self) -> EKD:
        """The objective at this point of the run."""
        return self.objective.at(self.step / (self.recipe.train.epochs * self.steps_per_epoch))

    @property
    def join_step(self) -> int:
        """Optimiser steps after which sub-nets join; 0 where all nets begin together."""
        return self.recipe.train.full_net_epochs * self.steps_per_epoch

    @property
    def learning(self) -> list[str] | None:
        """The nets that learn at this point of the run: None for all, the full-net as long as its sub-nets wait."""
        return [self.net.full_name] if self.step < self.join_step else None

    @property
    def averaging_now(self) -> DistributedDataParallel | None:
        """`averaging`, which waits for a gradient of every parameter, and so is of no use while sub-nets wait."""
        return self.averaging if self.learning is None else None

    @property
    def attends(self) -> bool:
        """Whether attention is taken at this point of the run."""
        return self.objective_now.attends(self.learning or self.net.depths, taught=self.teacher is not None)

    def outputs(self, images: Tensor) -> dict[str, Output]:
        """What the nets that learn make of images [N, 3, H, W]."""
        if self.learning is None:
            return self.forward(images, energies=self.attends)
        forward = self.forward if self.averaging is None else self.net
        return forward(images, only=self.learning, energies=self.attends)

    def join(self) -> None:
        """Let the sub-nets start from what the full-net is now."""
        self.net.follow_full_net()
        take_in_late(self.optimizer)
        if self.ema is not None:
            self.kept_net.follow_full_net()

    @property
    def kept_net(self) -> DDNN:
        """What is evaluated and kept: the moving average where there is one."""
        net = self.net if self.ema is None else self.ema.module
        assert isinstance(net, DDNN)
        return net

    def dump(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        self.sums.look(self.processes)
        self.check_finite()  # a checkpoint never holds what can't be gone on from
        self.bank()
        return {
            "step": self.step,
            "processes": self.processes.count,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "sums": self.sums.dump(),
            "seconds": self.seconds,
        }

    def load(self, kept: dict[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        self.step = kept["step"]
        self.net.load_state_dict(kept["net"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.scheduler.load_state_dict(kept["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(kept["ema"])
        self.sums = Sums(**kept["sums"])
        self.seconds = kept["seconds"]

    @contextlib.contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Add the time spent inside to the seconds of `what`."""
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def check_finite(self) -> None:
        """`RunError` if a weight or statistic is no longer a number: the loss tells of that only a step later."""
        for name, tensor in self.kept_net.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise RunError(f"the weights are no longer finite: {name} after step {self.step}; {WHAT_NOW}")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """What every piece of forward runs in."""
        return autocast(self.net, self.device, self.recipe.train.precision == "bf16")

    def taught(self, images: Tensor) -> Output | None:
        """What the separate teacher, if there is one, makes of the images."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            name = self.teacher.full_name
            return self.teacher(images, only=[name], energies=self.attends)[name]

    def bank(self) -> None:
        """Count the time until now into `total`, and what the processor worked for this process into `cpu`."""
        now = _now()
        for what, until, since in zip(("total", "cpu"), now, self.banked, strict=True):
            self.seconds[what] = self.seconds.get(what, 0.0) + until - since
        self.banked = now

    def start_clocks(self) -> None:
        """Count `total` and `cpu` from now on."""
        self.banked = _now()

    def take_seconds(self) -> dict[str, float]:
        """The seconds since they were last taken."""
        self.bank()
        taken, self.seconds = self.seconds, {}
        return {what: round(spent, 3) for what, spent in taken.items()}


def _now() -> tuple[float, float]:
    """Seconds on the clock, and of the processor's work for this process."""
    return time.perf_counter(), time.process_time()
