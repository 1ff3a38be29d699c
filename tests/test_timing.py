"""Calls take turns, in ever another order."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from types import SimpleNamespace

import pytest

from ddnn import timing


def noted(order: list[str], names: str = "abc") -> dict[str, Callable[[], None]]:
    return {name: (lambda name=name: order.append(name)) for name in names}


def test_a_round_calls_each_once_in_an_order_drawn() -> None:
    orders = []
    chance = random.Random(0)
    for _ in range(60):
        order: list[str] = []
        assert list(timing.time_round(noted(order), chance)) == ["a", "b", "c"], "by the calls, not by their order"
        orders.append(tuple(order))
    assert set(orders) == set(permutations("abc"))


def test_what_settles_is_called_before_the_clock_is_read() -> None:
    order: list[str] = []
    timing.time_round(noted(order, "a"), random.Random(0), lambda: order.append("settled"))
    assert order == ["settled", "a", "settled"]


def test_a_call_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only the calls and what settles move."""
    clock = [0.0]

    def passes(seconds: float) -> Callable[[], None]:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    calls = {"a": passes(2.0), "b": passes(5.0)}
    assert timing.time_round(calls, random.Random(0)) == {"a": 2.0, "b": 5.0}
    assert timing.time_round(calls, random.Random(0), passes(1.0)) == {"a": 3.0, "b": 6.0}
    times = timing.in_turns(calls, seconds=27.0, fewest=2, most=10, warmup=1)
    assert times == {"a": [2.0] * 4, "b": [5.0] * 4}, "as soon as more than 27 of them have passed"


@pytest.mark.parametrize(("seconds", "rounds"), [(-1.0, 4), (math.inf, 9)])
def test_rounds_are_no_fewer_and_no_more(seconds: float, rounds: int) -> None:
    order: list[str] = []
    times = timing.in_turns(noted(order), seconds=seconds, fewest=4, most=9)
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", rounds)
    assert order[:9] == [*"aaabbbccc"]
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(9, len(order), 3))
    again: list[str] = []
    timing.in_turns(noted(again), seconds=seconds, fewest=4, most=9)
    assert again == order


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys; from ddnn import timing; print(any(m in sys.modules for m in ('torch', 'numpy', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
