"""What a joint training step costs, against the least it could cost."""

import copy
from collections.abc import Callable
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from ddnn.autocast import autocast
from ddnn.branchwise import branchwise_backward
from ddnn.evaluate import macs, ratio, side_by_side
from ddnn.network import DDNN
from ddnn.objective import EKD

BUDGET_S = 4.0
"""Seconds to measure for."""


class StepCost(TypedDict):
    """One joint step against one step of every net trained alone."""

    tree_macs: int
    """MACs of one image through the tree: every distinct node once."""
    alone_macs: int
    """MACs of one image through every net by itself."""
    bound: float
    """tree_macs / alone_macs: the share of work that sharing leaves; of time, too, where time goes with MACs."""
    measured: float | None
    """Seconds of the joint step (forward, objective, backward, not compiled) over the sum of those of the nets alone;
    None where the memory did not suffice to measure it."""


def step_cost(
    net: DDNN,
    objective: EKD,
    x: Tensor,
    target: Tensor,
    *,
    bf16: bool = False,
    lean: bool = False,
    alone_macs: int | None = None,
    budget_s: float = BUDGET_S,
) -> StepCost:
    """Measure on copies, with steps taken in turns; `net` is left as it is. `alone_macs` are counted if not given."""

    def step(of: DDNN) -> Callable[[], None]:
        halved = partial(autocast, of, x.device, bf16)

        def run() -> None:
            if lean:
                branchwise_backward(of, objective, x, target, autocast=halved)
            else:
                with halved():
                    outputs = of(x, energies=objective.attends(of.depths))
                torch.stack(list(objective(outputs, target).values())).sum().backward()
            of.zero_grad()

        return run

    tree = macs(net, x.shape[-1])
    if alone_macs is None:
        alone_macs = sum(macs(sub, x.shape[-1]) for sub in net.nets.values())
    cost: StepCost = {"tree_macs": tree, "alone_macs": alone_macs, "bound": tree / alone_macs, "measured": None}
    try:
        return {**cost, "measured": _joint_over_alone(net, step, x, budget_s)}
    except torch.OutOfMemoryError:
        return cost


def _joint_over_alone(net: DDNN, step: Callable[[DDNN], Callable[[], None]], x: Tensor, budget_s: float) -> float:
    """Time of the joint step over that of every net alone."""
    joint = copy.deepcopy(net).train()
    alone = {name: net.alone(name).train() for name in net.nets}
    calls = {f"alone {name}": step(one) for name, one in alone.items()}
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # dropout draws from it
        seconds = side_by_side({"joint": step(joint), **calls}, x.device, budget_s)
    return ratio(seconds, ["joint"], calls)
