"""The one way to time calls: in turns, each round in an order of its own. Only the standard library is imported.

In turns, so that a change of the machine's speed meets all calls. In ever another order, because what a call finds in
caches and in freed memory depends on which one was before it.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


def _nothing() -> None:
    """What a CPU needs before the clock is read."""


def time_round(
    calls: Mapping[Key, Callable[[], object]], chance: random.Random, settle: Callable[[], object] = _nothing
) -> dict[Key, float]:
    """Seconds of each call, made once, in an order drawn from `chance`.

    `settle` is called before the clock is read, as a GPU works on when a call has returned.
    """
    seconds = dict.fromkeys(calls, 0.0)
    for key in chance.sample(list(calls), len(calls)):
        settle()
        start = time.perf_counter()
        calls[key]()
        settle()
        seconds[key] = time.perf_counter() - start
    return seconds


def in_turns(
    calls: Mapping[Key, Callable[[], object]],
    *,
    seconds: float,
    fewest: int,
    most: int,
    warmup: int = 3,
    settle: Callable[[], object] = _nothing,
) -> dict[Key, list[float]]:
    """Seconds of each call over the `fewest` rounds, and then until `seconds` are spent or there are the `most`.

    Before that, each is called `warmup` times in a row. The orders are the same every time.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
            settle()
    times: dict[Key, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + seconds
    chance = random.Random(0)
    for done in range(most):
        if done >= fewest and time.perf_counter() > end:
            break
        for key, taken in time_round(calls, chance, settle).items():
            times[key].append(taken)
    return times
