"""Learning-rate schedules and what is decayed."""

import math

import pytest
import torch

from ddnn.build import build
from ddnn.optimizer import make_optimizer, make_scheduler, rate
from ddnn.recipe import Network, Optim, Schedule


def test_norms_and_biases_are_not_decayed_and_every_parameter_is_in_once() -> None:
    net = build(Network(width=4), 10)
    for name in ("sgd", "adamw"):
        decayed, free = make_optimizer(net, Optim(name=name, weight_decay=0.1)).param_groups
        assert decayed["weight_decay"] == 0.1
        assert free["weight_decay"] == 0
        expected = {id(p) for n, p in net.named_parameters() if p.ndim > 1}
        assert {id(p) for p in decayed["params"]} == expected
        both = [id(p) for p in [*decayed["params"], *free["params"]]]
        assert len(both) == len(set(both)) == len(list(net.parameters()))


def test_cosine_with_warmup() -> None:
    schedule = Schedule(name="cosine")
    rates = [rate(schedule, step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert rates[30] == pytest.approx((1 + math.cos(math.pi * 20 / 90)) / 2)


def test_onecycle_is_torchs() -> None:
    total = 40
    ours = [0.5 * rate(Schedule(name="onecycle", rise=0.25), step, total) for step in range(total)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    # torch counts both ends of a phase, so its phases are a step shorter; given one more step the ends meet.
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=total + 1, pct_start=11 / (total + 1), final_div_factor=1e9, cycle_momentum=False
    )
    for step in range(total):
        assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-6), step
        optimizer.step()
        theirs.step()


def test_multistep_and_constant() -> None:
    schedule = Schedule(name="multistep", milestones=(0.5, 0.75), gamma=0.1)
    assert [round(rate(schedule, s, 100), 6) for s in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rate(Schedule(name="constant"), 50, 100) == 1.0


def test_warmup_may_be_part_of_an_epoch() -> None:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), Optim(lr=1.0))
    scheduler = make_scheduler(optimizer, Schedule(name="constant", warmup_epochs=0.5), 2, 8)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
