"""Thresholds of a cascade, chosen on images that nothing was trained on.

With the time that the part of each net takes for one image, and a price for a wrong answer, the best thresholds are
those with the least mean of (time + price * wrong). Each threshold is set to its exact optimum given the others, until
none moves. Sweeping the price gives the curve of accuracy against time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddnn.runtime.cascade import NEVER, UNREACHED

Numbers = npt.NDArray[np.floating[Any]]

_ROUNDS = 20


class Seen(NamedTuple):
    """What K nets, shallow to deep, made of N images."""

    confidence: Numbers
    """[N, K]: probability of the most likely class."""
    right: npt.NDArray[np.bool_]
    """[N, K]: whether that is the image's class."""


class Costs(NamedTuple):
    """What the part of each of K nets costs for one image."""

    asked: Sequence[float]
    """Of a net that answers."""
    left_out: Sequence[float]
    """Of a net of which only what deeper nets start from is computed."""


class Outcome(NamedTuple):
    """What a cascade would make of images seen."""

    accuracy: float
    cost: float
    """Mean over the images."""
    share: tuple[float, ...]
    """Of the images, answered by each net."""


Frontier = list[tuple[Outcome, list[float]]]
"""What cascades would make of images seen, and the thresholds of each."""


def answers(confidence: Numbers, thresholds: Sequence[float]) -> npt.NDArray[np.intp]:
    """The number of the net that answers each of N images, from confidences [N, K] and K - 1 thresholds."""
    last = np.ones((len(confidence), 1), dtype=bool)
    sure = np.concatenate([confidence[:, :-1] >= np.asarray(thresholds), last], axis=1)
    return np.asarray(sure.argmax(axis=1))


def outcome(seen: Seen, costs: Costs, thresholds: Sequence[float]) -> Outcome:
    """Accuracy and mean cost under these thresholds."""
    stop = answers(seen.confidence, thresholds)
    rows = np.arange(len(stop))
    share = np.bincount(stop, minlength=len(costs.asked)) / len(stop)
    mean = float(np.cumsum(_spent(costs, thresholds))[stop].mean())
    return Outcome(float(seen.right[rows, stop].mean()), mean, tuple(map(float, share)))


def _spent(costs: Costs, thresholds: Sequence[float]) -> Numbers:
    """[K]: what each net's part costs an image that comes to it."""
    left_out = np.append(np.asarray(thresholds) >= NEVER, False)
    return np.where(left_out, costs.left_out, costs.asked)


def best(seen: Seen, costs: Costs, price: float) -> list[float]:
    """The thresholds with the least mean of cost + `price` * wrong.

    Descents from several starts: all nets left out but the last, all images stopped, one net alone asked first.
    """
    count = len(costs.asked) - 1
    starts = [[NEVER] * count, [0.0] * count]
    for k in range(count):
        usual = float(np.median(seen.confidence[:, k]))
        starts.append([usual if i == k else NEVER for i in range(count)])
    found = [_descend(seen, costs, price, start) for start in starts]
    return min(found, key=lambda thresholds: _mean(outcome(seen, costs, thresholds), price))


def _mean(result: Outcome, price: float) -> float:
    return result.cost + price * (1 - result.accuracy)


def _descend(seen: Seen, costs: Costs, price: float, start: list[float]) -> list[float]:
    """Set one threshold after the other to its optimum, deep to shallow, until none moves."""
    thresholds = list(start)
    wrong = price * ~seen.right
    rows = np.arange(len(wrong))
    for _ in range(_ROUNDS):
        before = list(thresholds)
        for k in reversed(range(len(thresholds))):
            thresholds[k] = UNREACHED  # asked, to begin with
            loss = wrong + np.cumsum(_spent(costs, thresholds))  # [N, K]: of stopping at each net
            reach = np.flatnonzero((seen.confidence[:, :k] < np.asarray(thresholds[:k])).all(axis=1))
            later = k + 1 + answers(seen.confidence[:, k + 1 :], thresholds[k + 1 :])
            saved = costs.asked[k] - costs.left_out[k]
            thresholds[k] = _split(seen.confidence[reach, k], loss[reach, k], loss[rows, later][reach], saved)
        if thresholds == before:
            break
    return thresholds


def _split(confidence: Numbers, stop: Numbers, go: Numbers, saved: float) -> float:
    """The threshold with the least sum of `stop` over images at or above it and of `go` over those below; each [n].

    `saved`: what each image costs less if the net is left out, and so all go on.
    """
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    totals = np.concatenate([[0.0], np.cumsum(stop[order] - go[order])])  # when the first m stop, but for a constant
    totals[0] -= saved * len(order)
    between = np.concatenate([[True], sorted_confidence[1:] < sorted_confidence[:-1], [True]])[: len(totals)]
    m = int(np.where(between, totals, np.inf).argmin())
    if m == 0:
        return NEVER
    if m == len(order):
        return 0.0
    above, below = sorted_confidence[m - 1], sorted_confidence[m]
    middle = float((above + below) / 2)
    return middle if middle > below else float(above)


def frontier(seen: Seen, costs: Costs) -> Frontier:
    """All cascades found, cheap to dear, each more accurate on these images than any cheaper one."""
    count = len(costs.asked) - 1
    candidates = {tuple(best(seen, costs, price)) for price in sum(costs.asked) * np.logspace(-1.5, 4, 56)}
    candidates |= {(t,) * count for t in (0.0, *np.quantile(seen.confidence[:, 0], np.linspace(0.02, 0.98, 49)))}
    found = sorted(((outcome(seen, costs, each), each) for each in candidates), key=lambda pair: pair[0].cost)
    front: Frontier = []
    for result, thresholds in found:
        if not front or result.accuracy > front[-1][0].accuracy:
            front.append((result, list(map(float, thresholds))))
    return front


def curve(front: Frontier, points: int) -> list[list[float]]:
    """Thresholds of up to `points` cascades of a frontier, spread evenly over the cost."""
    if len(front) > points:
        means = np.array([result.cost for result, _ in front])
        wanted = np.linspace(means[0], means[-1], points)
        kept = sorted({int(np.abs(means - each).argmin()) for each in wanted})
        front = [front[i] for i in kept]
    return [thresholds for _, thresholds in front]


def cheapest(front: Frontier, accuracy: float) -> list[float] | None:
    """The cheapest cascade of a frontier that is at least so accurate; None where none is."""
    return next((thresholds for result, thresholds in front if result.accuracy >= accuracy), None)
