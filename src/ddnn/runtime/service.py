"""A model behind a queue, which answers as deeply as what waits allows: a shallower net when it is overloaded.

Every image has to be answered some time after it came. Whenever a worker is free it takes the images that came first,
and runs them by the most accurate depth that could answer in time all that waits and, if images go on coming as they
did lately, what comes meanwhile. An image for which no depth is fast enough is refused when it is submitted, not after
it has waited.
"""

import contextlib
import heapq
import logging
import math
import threading
import time
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ddnn.cpus import available_cpus
from ddnn.errors import OverloadError, RequestError
from ddnn.runtime.checks import is_finite, is_whole
from ddnn.runtime.model import Model
from ddnn.runtime.pixels import Floats, batch_of
from ddnn.runtime.profile import noise
from ddnn.timing import in_turns

MOST_WAITING = 1024
"""Images; what comes while so many wait is refused, however fast the machine."""
MOST_EXPECTED = 100
"""Images that are played through though they have not come yet."""

log = logging.getLogger("ddnn")


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
    failed: int
    """Those whose depth raised an error, such as for a file of the bundle that has changed."""
    waiting: int
    running: int


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

    What the depths take is measured once, at the start: eight batches of each, and eight single images. From then on
    the service only follows by how much the machine is slower, or faster, than it was then. It has to be closed, as
    `with` does, or its threads stay; a fork of its process has none of them.

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
        if not is_finite(latency_ms) or not 0.01 <= latency_ms <= 10**9:
            raise RequestError(f"latency_ms={latency_ms!r} must be a number from 0.01 to 1000000000")
        workers = max(1, available_cpus() // model.threads) if workers is None else workers
        for name, value, most in (("batch", batch, 1024), ("workers", workers, 256), ("waiting", waiting, 8192)):
            if not is_whole(value, 1) or value > most:
                raise RequestError(f"{name}={value!r} must be a whole number from 1 to {most}")
        self.model = model
        self.latency_ms = float(latency_ms)
        self.batch = int(batch)
        self._most_waiting = int(waiting)
        self._pace = _Pace(measured(model, self.batch))
        self._demand = _Demand(10 * self._latency)
        *self._better, self._fastest = ladder(model, self._pace.base)
        self._waiting: list[_Waiting] = []
        """What came first is first."""
        self._until: list[float | None] = [None] * int(workers)
        """When each worker is expected to be free again; None for those that are."""
        self._running = 0
        """Images."""
        self._answered: Counter[str] = Counter()
        self._late = self._refused = self._failed = 0
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

        `arrived`: the `time.monotonic()` from which on its time counts, if that is not now. What is called when the
        future is done runs in a worker, which answers nobody meanwhile; keep it short.

        Raises `RequestError` for any other array, and `OverloadError` where no depth could answer it in time.
        """
        arrived = _moment(arrived)
        one = _Waiting(arrived, self._normalised(image), Future())
        with self._admitted(arrived) as now:
            self._saw_one(now)
            insort(self._waiting, one, key=lambda each: each.arrived)
            self._changed.notify()
        return one.future

    def expect(self, arrived: float | None = None) -> None:
        """Raise `OverloadError` where `submit` would now, to be asked before an image is decoded for it."""
        with self._admitted(_moment(arrived)):
            pass

    def takes(self) -> dict[str, float]:
        """Milliseconds that each depth took for one image when the service began."""
        return {name: 1000 * seconds[1] for name, seconds in self._pace.base.items()}

    def counts(self) -> Counts:
        """What became of the images so far."""
        with self._changed:
            answered = {name: self._answered[name] for name in self.model.nets}
            waiting = sum(not each.future.done() for each in self._waiting)
            return Counts(answered, self._late, self._refused, self._failed, waiting, self._running)

    def close(self) -> None:
        """Take no more images, answer those that wait, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            if worker is not threading.current_thread():  # called by what it has answered
                worker.join()

    def _normalised(self, image: Any) -> Floats:
        """A copy: whoever submits may go on with the array."""
        try:
            given = np.asarray(image)
        except Exception as error:  # whatever refuses to be an array
            raise RequestError(f"the image is no array ({type(error).__name__}: {error})") from None
        if given.ndim != 3:
            raise RequestError(
                f"the image is {given.dtype} {list(given.shape)}; allowed are uint8 [H, W, 3] and float32 [3, S, S]"
            )
        batch = batch_of((given.copy() if given.dtype == np.float32 else given)[None], self.model.manifest.input)
        return batch[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _admitted(self, arrived: float) -> Iterator[float]:
        """Now, with the queue held, unless an image that came then has to be refused."""
        with self._changed:
            if self._closed:
                raise RequestError("this service is closed")
            now = time.monotonic()
            if not self._has_time_for(arrived, now):
                self._refused += 1
                self._saw_one(now)
                ago = 1000 * (now - arrived)
                raise OverloadError(
                    f"{len(self._waiting)} images wait; one that came {ago:.0f} ms ago could not be answered in "
                    f"{self.latency_ms:g} ms"
                )
            yield now

    def _saw_one(self, now: float) -> None:
        self._demand.saw(now, 1 + len(self._waiting) + self._running)

    @property
    def _latency(self) -> float:
        """In seconds."""
        return self.latency_ms / 1000

    def _has_time_for(self, arrived: float, now: float) -> bool:
        if len(self._waiting) >= self._most_waiting:
            self._forget_cancelled()
        if len(self._waiting) >= self._most_waiting or now >= arrived + self._latency:
            return False
        if len(self._waiting) < self._until.count(None):
            return True  # even if it seems too slow: or a machine that was too slow once would be so for ever
        if arrived <= self._lost_until(now):
            return False
        arrivals = sorted([*(each.arrived for each in self._waiting), arrived])
        return self._in_time(self._fastest, arrivals, now, len(arrivals))

    def _depth(self, now: float) -> str:
        """By which to run what came first."""
        arrivals = [each.arrived for each in self._waiting] + self._demand.expected(now, self._latency)
        peak = self._demand.peak(now, len(self._waiting))
        return next((name for name in self._better if self._in_time(name, arrivals, now, peak)), self._fastest)

    def _in_time(self, depth: str, arrivals: Sequence[float], now: float, peak: int) -> bool:
        """Whether all are, but for those that no depth could answer in time any more."""
        lost = bisect_right(arrivals, self._lost_until(now))
        # who is late already may be as late again
        free = [now if until is None else max(until, 2 * now - until) for until in self._until]
        return in_time(arrivals, self._latency, free, *self._pace.expected(depth), peak, lost)

    def _lost_until(self, now: float) -> float:
        """Who came then or before can't be answered in time, even by itself."""
        return now + self._pace.seconds(self._fastest, 1) - self._latency

    def _forget_cancelled(self) -> None:
        self._waiting = [each for each in self._waiting if not each.future.done()]

    def _work(self, number: int) -> None:
        while (taken := self._take(number)) is not None:
            self._run(number, *taken)

    def _take(self, number: int) -> tuple[str, list[_Waiting]] | None:
        """The next batch and its depth, as soon as there is one; None at the end."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if self._waiting:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            now = time.monotonic()
            depth = self._depth(now)
            taken, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
            self._until[number] = now + self._pace.seconds(depth, len(taken))
            self._running += len(taken)
            return depth, taken

    def _run(self, number: int, depth: str, taken: Sequence[_Waiting]) -> None:
        start, error, logits = time.monotonic(), None, None
        running = [each for each in taken if _begins(each.future)]
        try:
            if running:
                logits = self.model(np.stack([each.image for each in running]), depth)
        except Exception as raised:  # whoever asked is told
            error = raised
        end = time.monotonic()
        latencies = [1000 * (end - each.arrived) for each in running]
        with self._changed:  # before whoever waits for an answer goes on, and asks again
            self._until[number] = None
            self._running -= len(taken)
            if logits is not None:
                self._pace.saw(depth, len(running), end - start)
                self._answered[depth] += len(running)
                self._late += sum(latency > self.latency_ms for latency in latencies)
            else:
                self._failed += len(running)
        for i, each in enumerate(running):
            try:
                if logits is not None:
                    each.future.set_result(Answer(depth, logits[i], latencies[i]))
                else:
                    each.future.set_exception(error)
            except InvalidStateError:  # somebody else has set it
                pass
            except BaseException:  # of what is called when it is done; the others wait for their answers
                log.exception("what was to be called with an answer failed")


def _moment(arrived: float | None) -> float:
    """On the clock of `time.monotonic()`; not in the future."""
    now = time.monotonic()
    if arrived is None:
        return now
    if not is_finite(arrived):
        raise RequestError(f"arrived={arrived!r} must be a time.monotonic()")
    return min(float(arrived), now)


def _begins(future: "Future[Answer]") -> bool:
    """Whether somebody still wants it."""
    try:
        return future.set_running_or_notify_cancel()
    except InvalidStateError:
        return False


def in_time(
    arrivals: Sequence[float],
    latency: float,
    free: Sequence[float],
    seconds: Sequence[float],
    margins: Sequence[float],
    peak: int,
    lost: int = 0,
) -> bool:
    """Whether images that come at these times, in order, are each answered within `latency`, first come, first served.

    `free`: when each worker is, or will be. `seconds`: what a batch of 0, 1, 2 ... images takes, up to the largest
    there may be; `margins`: how much longer one batch may take; delays of several are not added up. A worker takes what
    has come when it is free, and waits for nothing to fill a batch. With `peak` images there, another comes when one of
    them is answered. The first `lost` images need not be in time.
    """
    workers, largest = list(free), min(len(seconds) - 1, peak)
    heapq.heapify(workers)
    answered: list[float] = []

    def comes(number: int) -> float:
        return max(arrivals[number], answered[number - peak]) if number >= peak else arrivals[number]

    while (first := len(answered)) < len(arrivals):
        start = max(workers[0], comes(first))
        stop = min(first + largest, len(arrivals))
        count = stop - first if comes(stop - 1) <= start else bisect_right(range(first, stop), start, key=comes)
        ends = start + seconds[count]
        due = max(first, lost)
        if due < first + count and ends + margins[count] > comes(due) + latency:
            return False
        heapq.heapreplace(workers, ends)
        answered += [max(ends, answered[-1] if answered else ends)] * count
    return True


def ladder(model: Model, seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """The depths worth running, the most accurate first and the fastest last.

    Without those that another is better than and not slower. Deeper is better where the bundle does not say how
    accurate they are.
    """
    known = all(net.top1 is not None for net in model.nets.values())
    better = {name: net.top1 or 0.0 if known else i for i, (name, net) in enumerate(model.nets.items())}
    rungs: list[str] = []
    for name in sorted(model.nets, key=lambda name: (-better[name], seconds[name][1])):
        if not rungs or seconds[name][1] < seconds[rungs[-1]][1]:
            rungs.append(name)
    return rungs


def measured(model: Model, batch: int) -> dict[str, list[float]]:
    """Seconds that each depth takes for 0, 1 ... `batch` images: of 1 and `batch` measured, in between evenly more."""
    images = noise(model, batch)
    counts = sorted({1, batch})
    calls = {(name, count): partial(model, images[:count], name) for name in model.nets for count in counts}
    times = in_turns(calls, seconds=0.0, fewest=5, most=5)
    taken = {key: float(np.median(each)) for key, each in times.items()}
    return {
        name: [0.0, *np.interp(range(1, batch + 1), counts, [taken[name, count] for count in counts]).tolist()]
        for name in model.nets
    }


class _Pace:
    """By how much the machine is slower now than when it was measured, for all depths alike.

    A factor per depth would be known only of depths that run: one that was too slow once would never be tried again.
    Mean and deviation follow what is seen as those of round trips do in TCP (Jacobson 1988).
    """

    def __init__(self, base: dict[str, list[float]]) -> None:
        self.base = base
        self._mean, self._deviation = 1.0, 0.1

    def saw(self, depth: str, count: int, seconds: float) -> None:
        """A batch took so long.

        What takes more than three times as long as usual counts as three, or one pause of the machine would have the
        next images refused.
        """
        error = min(seconds / self.base[depth][count], 3 * self._mean) - self._mean
        self._mean += error / 8
        self._deviation += (abs(error) - self._deviation) / 4

    def seconds(self, depth: str, count: int) -> float:
        """What a batch of so many images takes."""
        return self._mean * self.base[depth][count]

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
        self._rate = self._peak = self._last = 0.0

    def saw(self, now: float, there: int) -> None:
        """One more has come, and so many are there now, waiting or being answered."""
        self._rate = self._faded(self._rate, now) + 1 / self._seconds
        self._peak = max(self._faded(self._peak, now), there)
        self._last = now

    def expected(self, now: float, seconds: float) -> list[float]:
        """When others will come in the next so many seconds, if they do so evenly; `MOST_EXPECTED` at most."""
        rate = self._faded(self._rate, now)
        return [now + (i + 1) / rate for i in range(min(int(rate * seconds), MOST_EXPECTED))]

    def peak(self, now: float, there: int) -> int:
        """How many will be there at most; `there` are now."""
        return max(there, math.ceil(self._faded(self._peak, now)))

    def _faded(self, value: float, now: float) -> float:
        return value * math.exp(-max(0.0, now - self._last) / self._seconds)
