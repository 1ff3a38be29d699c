"""Thresholds of a cascade, chosen on images that nothing was trained on.

With `cost[k]` the time that the part of net k takes for one image, and a price for a wrong answer, the best thresholds
are those with the least mean of (time + price * wrong). Each threshold is set to its exact optimum given the others,
until none moves. Sweeping the price gives the curve of accuracy against time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddnn.runtime.cascade import NEVER

Numbers = npt.NDArray[np.floating[Any]]

_ROUNDS = 20


class Seen(NamedTuple):
    """What K nets, shallow to deep, made of N images."""

    confidence: Numbers
    """[N, K]: probability of the most likely class."""
    right: npt.NDArray[np.bool_]
    """[N, K]: whether that is the image's class."""


class Outcome(NamedTuple):
    """What a cascade would make of images seen."""

    accuracy: float
    cost: float
    """Mean over the images."""
    share: tuple[float, ...]
    """Of the images, answered by each net."""


def answers(confidence: Numbers, thresholds: Sequence[float]) -> npt.NDArray[np.intp]:
    """The number of the net that answers each of N images, from confidences [N, K] and K - 1 thresholds."""
    last = np.ones((len(confidence), 1), dtype=bool)
    sure = np.concatenate([confidence[:, :-1] >= np.asarray(thresholds), last], axis=1)
    return np.asarray(sure.argmax(axis=1))


def outcome(seen: Seen, cost: Sequence[float], thresholds: Sequence[float]) -> Outcome:
    """Accuracy and mean cost under these thresholds; `cost` has one number for each net's part."""
    stop = answers(seen.confidence, thresholds)
    rows = np.arange(len(stop))
    share = np.bincount(stop, minlength=len(cost)) / len(stop)
    accuracy, mean = float(seen.right[rows, stop].mean()), float(np.cumsum(cost)[stop].mean())
    return Outcome(accuracy, mean, tuple(map(float, share)))


def best(seen: Seen, cost: Sequence[float], price: float) -> list[float]:
    """The thresholds with the least mean of cost + `price` * wrong."""
    found = [_descend(seen, np.asarray(cost), price, start) for start in (NEVER, 0.0)]
    return min(found, key=lambda thresholds: _mean(outcome(seen, cost, thresholds), price))


def _mean(result: Outcome, price: float) -> float:
    return result.cost + price * (1 - result.accuracy)


def _descend(seen: Seen, cost: Numbers, price: float, start: float) -> list[float]:
    """Set one threshold after the other to its optimum, deep to shallow, until none moves."""
    count = len(cost) - 1
    thresholds = [start] * count
    loss = price * ~seen.right + np.cumsum(cost)  # [N, K]: of stopping at each net
    rows = np.arange(len(loss))
    for _ in range(_ROUNDS):
        before = list(thresholds)
        for k in reversed(range(count)):
            reach = np.flatnonzero((seen.confidence[:, :k] < np.asarray(thresholds[:k])).all(axis=1))
            later = k + 1 + answers(seen.confidence[:, k + 1 :], thresholds[k + 1 :])
            thresholds[k] = _split(seen.confidence[reach, k], loss[reach, k], loss[rows, later][reach])
        if thresholds == before:
            break
    return thresholds


def _split(confidence: Numbers, stop: Numbers, go: Numbers) -> float:
    """The threshold with the least sum of `stop` over images at or above it and of `go` over those below; each [n]."""
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    totals = np.concatenate([[0.0], np.cumsum(stop[order] - go[order])])  # when the first m stop, but for a constant
    between = np.concatenate([[True], sorted_confidence[1:] < sorted_confidence[:-1], [True]])[: len(totals)]
    m = int(np.where(between, totals, np.inf).argmin())
    if m == 0:
        return NEVER
    if m == len(order):
        return 0.0
    above, below = sorted_confidence[m - 1], sorted_confidence[m]
    middle = float((above + below) / 2)
    return middle if middle > below else float(above)


def curve(seen: Seen, cost: Sequence[float], points: int) -> list[list[float]]:
    """Thresholds of up to `points` cascades, cheap to dear, each more accurate on these images than any cheaper one."""
    nets = len(cost)
    candidates = {tuple(best(seen, cost, price)) for price in sum(cost) * np.logspace(-1.5, 4, 56)}
    candidates |= {(t,) * (nets - 1) for t in (0.0, *np.quantile(seen.confidence[:, 0], np.linspace(0.02, 0.98, 49)))}
    found = sorted(((outcome(seen, cost, each), each) for each in candidates), key=lambda pair: pair[0].cost)
    front: list[tuple[Outcome, tuple[float, ...]]] = []
    for result, thresholds in found:
        if not front or result.accuracy > front[-1][0].accuracy:
            front.append((result, thresholds))
    if len(front) > points:
        costs = np.array([result.cost for result, _ in front])
        wanted = np.linspace(costs[0], costs[-1], points)
        kept = sorted({int(np.abs(costs - each).argmin()) for each in wanted})
        front = [front[i] for i in kept]
    return [list(map(float, thresholds)) for _, thresholds in front]


def cheapest(seen: Seen, cost: Sequence[float], accuracy: float) -> list[float] | None:
    """The cheapest cascade found that is at least so accurate on these images; None where none is."""
    enough = [
        (result.cost, each)
        for each in curve(seen, cost, points=10**6)
        if (result := outcome(seen, cost, each)).accuracy >= accuracy
    ]
    return min(enough)[1] if enough else None
