"""A model behind a queue, which answers as deeply as what waits allows: a shallower net when it is overloaded.

Every image has to be answered some time after it came. Whenever a worker is free it takes the images that have waited
longest, and runs them by the most accurate depth that could answer in time all that waits and, if images go on coming
as they did lately, what comes meanwhile. An image for which no depth is fast enough is refused when it comes, not after
it has waited.
"""

import heapq
import math
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ddnn.errors import OverloadError, RequestError
from ddnn.runtime.machine import available_cpus
from ddnn.runtime.model import Model
from ddnn.runtime.pixels import Floats, batch_of
from ddnn.runtime.profile import is_finite, is_whole

MOST_WAITING = 1024
"""Images; what comes while so many wait is refused, however fast the machine."""


class Answer(NamedTuple):
    """What a service makes of one image."""

    depth: str
    """Name of the net that answered."""
    logits: Floats
    """[classes]"""
    latency_ms: float
    """From its arrival."""


class Counts(NamedTuple):
    """What became of the images so far."""

    answered: dict[str, int]
    """By each depth."""
    late: int
    """Of those answered, how many were not in time."""
    refused: int
    waiting: int


class _Waiting(NamedTuple):
    arrived: float
    image: Floats
    future: "Future[Answer]"


class Service:
    """A loaded model that answers images one by one, from any thread, each within a time.

    >>> with Service(ddnn.load("bundle", threads=1), latency_ms=50) as service:
    ...     answer = service.submit(pixels).result()          # depth, logits, latency_ms

    `latency_ms`: the time in which an image is to be answered. `batch`: most images that run together. `workers`:
    batches that run at a time; as many as there are CPUs for, by default. `waiting`: most images that wait; what comes
    then is refused.

    What the depths take is measured once, at the start, which takes some dozen calls of each. From then on the service
    only follows by how much the machine is slower, or faster, than it was then.

    Raises `RequestError` for numbers that can't be.
    """

    def __init__(
        self,
        model: Model,
        latency_ms: float,
        *,
        batch: int = 8,
        workers: int | None = None,
        waiting: int = MOST_WAITING,
    ) -> None:
        if not is_finite(latency_ms) or latency_ms <= 0:
            raise RequestError(f"latency_ms={latency_ms!r} must be a number above 0")
        workers = max(1, available_cpus() // model.threads) if workers is None else workers
        for name, value in {"batch": batch, "workers": workers, "waiting": waiting}.items():
            if not is_whole(value, 1):
                raise RequestError(f"{name}={value!r} must be a whole number of at least 1")
        self.model = model
        self.latency_ms = float(latency_ms)
        self.batch = int(batch)
        self._room = int(waiting)
        self._pace = _Pace(measured(model, self.batch))
        self._demand = _Demand(10 * self.latency_ms / 1000)
        self._fastest = min(model.nets, key=lambda name: self._pace.base[name][1])
        order = by_accuracy(model)
        self._better = order[: order.index(self._fastest)]
        """The depths that are more accurate than the fastest, the most accurate first."""
        self._waiting: deque[_Waiting] = deque()
        self._free_at = [0.0] * int(workers)
        """When each worker will be free again, or has been since."""
        self._answered: Counter[str] = Counter()
        self._late = self._refused = self._running = 0
        self._changed = threading.Condition()
        self._closed = False
        self._workers = [
            threading.Thread(target=self._work, args=(number,), name=f"ddnn-service-{number}", daemon=True)
            for number in range(int(workers))
        ]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, image: Any, *, arrived: float | None = None) -> "Future[Answer]":
        """Queue one image: uint8 [H, W, 3], raw pixels, or float32 [3, S, S], normalised, as a model takes them.

        `arrived`: the `time.monotonic()` from which on its time counts, if that is not now.

        Raises `RequestError` for any other array, and `OverloadError` where no depth could answer it in time.
        """
        now = time.monotonic()
        try:
            given = np.asarray(image)[None]
        except Exception as error:  # whatever refuses to be an array
            raise RequestError(f"the image is no array ({type(error).__name__}: {error})") from None
        one = _Waiting(now if arrived is None else arrived, batch_of(given, self.model.manifest.input)[0], Future())
        with self._changed:
            if self._closed:
                raise RequestError("this service is closed")
            self._demand.came(now, 1 + len(self._waiting) + self._running)
            if not self._has_time_for(one, now):
                self._refused += 1
                ago = 1000 * (now - one.arrived)
                raise OverloadError(
                    f"{len(self._waiting)} images wait; one that came {ago:.0f} ms ago could not be answered in "
                    f"{self.latency_ms:g} ms"
                )
            self._waiting.append(one)
            self._changed.notify()
        return one.future

    def counts(self) -> Counts:
        """What became of the images so far."""
        with self._changed:
            answered = {name: self._answered[name] for name in self.model.nets}
            return Counts(answered, self._late, self._refused, len(self._waiting))

    def close(self) -> None:
        """Take no more images, answer those that wait, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def _has_time_for(self, one: _Waiting, now: float) -> bool:
        if len(self._waiting) >= self._room or now >= one.arrived + self.latency_ms / 1000:
            return False
        if not self._waiting and min(self._free_at) <= now:
            return True  # even if it seems too slow: or a machine that was too slow once would be so for ever
        arrivals = [*(each.arrived for each in self._waiting), one.arrived]
        return self._in_time(self._fastest, arrivals, now, len(arrivals))

    def _depth(self, now: float) -> str:
        """By which to run what has waited longest."""
        arrivals = [each.arrived for each in self._waiting] + self._demand.expected(now, self.latency_ms / 1000)
        most = self._demand.crowd(now, len(self._waiting))
        return next((name for name in self._better if self._in_time(name, arrivals, now, most)), self._fastest)

    def _in_time(self, depth: str, arrivals: Sequence[float], now: float, most: int) -> bool:
        free = [max(now, at) for at in self._free_at]
        return in_time(arrivals, self.latency_ms / 1000, free, *self._pace.expected(depth), most)

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                now = time.monotonic()
                self._free_at[number] = now
                depth = self._depth(now)
                taken = [self._waiting.popleft() for _ in range(min(self.batch, len(self._waiting)))]
                self._free_at[number] = now + self._pace.expected(depth)[0][len(taken)]
                self._running += len(taken)
            running = [each for each in taken if each.future.set_running_or_notify_cancel()]
            if running:
                self._run(depth, running)
            with self._changed:
                self._free_at[number] = time.monotonic()
                self._running -= len(taken)

    def _run(self, depth: str, running: Sequence[_Waiting]) -> None:
        start = time.monotonic()
        try:
            logits = self.model(np.stack([each.image for each in running]), depth)
        except Exception as error:  # such as a file of the bundle that has changed: whoever asked is told
            for each in running:
                each.future.set_exception(error)
            return
        end = time.monotonic()
        answers = [Answer(depth, row, 1000 * (end - each.arrived)) for row, each in zip(logits, running, strict=True)]
        with self._changed:
            self._pace.saw(depth, len(running), end - start)
            self._answered[depth] += len(running)
            self._late += sum(answer.latency_ms > self.latency_ms for answer in answers)
        for each, answer in zip(running, answers, strict=True):
            each.future.set_result(answer)


def in_time(
    arrivals: Sequence[float],
    latency: float,
    free: Sequence[float],
    seconds: Sequence[float],
    margins: Sequence[float],
    most: int,
) -> bool:
    """Whether images that come at these times are each answered within `latency`, first come, first served.

    `free`: when each worker is, or will be. `seconds`: what a batch of 0, 1, 2 ... images takes, up to the largest
    there may be; `margins`: how much longer it may take. Of batches in turn one may, not all. A worker takes what has
    come when it is free, and waits for nothing to fill a batch. With `most` images there, another comes when one of
    them is answered.
    """
    workers, largest = list(free), min(len(seconds) - 1, most)
    heapq.heapify(workers)
    done: list[float] = []

    def came(number: int) -> float:
        return max(arrivals[number], done[number - most]) if number >= most else arrivals[number]

    while (first := len(done)) < len(arrivals):
        start = max(workers[0], came(first))
        stop = min(first + largest, len(arrivals))
        count = stop - first if came(stop - 1) <= start else bisect_right(range(first, stop), start, key=came)
        ends = start + seconds[count]
        if ends + margins[count] > came(first) + latency:
            return False
        heapq.heapreplace(workers, ends)
        done += [ends] * count
    return True


def by_accuracy(model: Model) -> list[str]:
    """The depths, the most accurate first; the deepest first where the bundle does not say how accurate they are."""
    deep_first = list(reversed(model.nets))
    accuracy = {name: net.top1 for name, net in model.nets.items()}
    if any(top1 is None for top1 in accuracy.values()):
        return deep_first
    return sorted(deep_first, key=lambda name: -(accuracy[name] or 0.0))


def measured(model: Model, batch: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds that each depth takes for 0, 1 ... `batch` images: of powers of two measured, in between evenly more."""
    size = model.manifest.input.size
    counts = [2**i for i in range(batch.bit_length()) if 2**i < batch] + [batch]
    images = np.zeros((batch, 3, size, size), dtype=np.float32)
    found = {}
    for name in model.nets:
        taken = []
        for count in counts:
            times = []
            for _ in range(4):
                start = clock()
                model(images[:count], name)
                times.append(clock() - start)
            taken.append(sorted(times[1:])[1])  # the first one makes things ready
        found[name] = [float(seconds) for seconds in np.interp(range(batch + 1), [0, *counts], [0.0, *taken])]
    return found


class _Pace:
    """By how much the machine is slower now than when it was measured, for all depths alike.

    A factor per depth would be known only of depths that run: one that was too slow once would never be tried again.
    Mean and deviation follow what is seen as those of round trips do in TCP (Jacobson 1988).
    """

    def __init__(self, base: dict[str, list[float]]) -> None:
        self.base = base
        self._mean, self._deviation = 1.0, 0.1

    def saw(self, depth: str, count: int, seconds: float) -> None:
        """A batch took so long; what takes more than three times as long as usual counts as three, or one pause of the
        machine would have the next images refused."""
        error = min(seconds / self.base[depth][count], 3 * self._mean) - self._mean
        self._mean += error / 8
        self._deviation += (abs(error) - self._deviation) / 4

    def expected(self, depth: str) -> tuple[list[float], list[float]]:
        """Seconds that batches of 0, 1 ... images take, and by which one will hardly exceed that."""
        factors = (self._mean, 2 * self._deviation)
        seconds, margins = ([factor * each for each in self.base[depth]] for factor in factors)
        return seconds, margins


class _Demand:
    """How many images a second have come lately, and how many at most were there at a time. Both fade.

    The second tells those who ask again when they have their answer from those who ask whatever happens: the former are
    no more, however slowly they are answered, though the quicker they are, the more images they send.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._rate = self._crowd = self._last = 0.0

    def came(self, now: float, there: int) -> None:
        """One more has come, and so many are there now, waiting or being answered."""
        self._rate = self._faded(self._rate, now) + 1 / self._seconds
        self._crowd = max(self._faded(self._crowd, now), there)
        self._last = now

    def expected(self, now: float, seconds: float) -> list[float]:
        """When others will come in the next so many seconds, if they do so evenly; the first hundred of them."""
        rate = self._faded(self._rate, now)
        return [now + (i + 1) / rate for i in range(min(int(rate * seconds), 100))]

    def crowd(self, now: float, there: int) -> int:
        """How many will be there at most; `there` are now."""
        return max(there, math.ceil(self._faded(self._crowd, now)))

    def _faded(self, value: float, now: float) -> float:
        return value * math.exp(-max(0.0, now - self._last) / self._seconds)
