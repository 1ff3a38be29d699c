"""What a joint training step costs, against the least it could cost."""

import copy
import statistics
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from ddnn.evaluate import macs, side_by_side
from ddnn.network import DDNN, nest
from ddnn.objective import EKD


class StepCost(TypedDict):
    """One joint step against one step of every net trained alone."""

    tree_macs: int
    """MACs of one image through the tree: every distinct node once."""
    alone_macs: int
    """MACs of one image through every net by itself."""
    bound: float
    """tree_macs / alone_macs: no joint step that computes every node can take a smaller share."""
    measured: float
    """Seconds of the joint step (forward, objective, backward) over the sum of those of the nets alone."""


def step_cost(
    net: DDNN, objective: EKD, x: Tensor, target: Tensor, *, bf16: bool = False, budget_s: float = 4.0
) -> StepCost:
    """Measure on copies; `net` is left as it is. Times are medians of steps taken in turns."""

    def step(of: DDNN) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                outputs = of(x)
            sum(objective(outputs, target).values(), torch.zeros((), device=x.device)).backward()
            of.zero_grad()

        return run

    joint = copy.deepcopy(net).train()
    alone = {
        name: nest(copy.deepcopy(sub), {}, full_name=name, family=net.family).train() for name, sub in net.nets.items()
    }
    rng = torch.get_rng_state()  # dropout draws from it
    calls = {"": step(joint)} | {name: step(one) for name, one in alone.items()}
    seconds = {name: statistics.median(times) for name, times in side_by_side(calls, x.device, budget_s).items()}
    torch.set_rng_state(rng)
    tree = macs(net, x.shape[-1])
    separate = sum(macs(one, x.shape[-1]) for one in alone.values())
    return {
        "tree_macs": tree,
        "alone_macs": separate,
        "bound": tree / separate,
        "measured": seconds.pop("") / sum(seconds.values()),
    }
