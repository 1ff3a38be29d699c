"""Choosing the thresholds of a cascade and measuring what they give on this machine.

Thresholds are chosen on some held-out images and judged by others, so that accuracies are not flattered. Latencies are
those of real calls on real images, in turns with every fixed depth, at each batch size.
"""

import itertools
import random
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ddnn.errors import RequestError
from ddnn.runtime.cascade import NEVER, UNREACHED, confidence
from ddnn.runtime.curve import Curve, Point, Took, choose
from ddnn.runtime.heldout import HeldOut, all_unread
from ddnn.runtime.kept import now
from ddnn.runtime.machine import Attention, this_machine
from ddnn.runtime.manifest import Net
from ddnn.runtime.pixels import Floats, normalised
from ddnn.runtime.profile import FEWEST_RUNS, MOST_RUNS
from ddnn.runtime.thresholds import Costs, Seen, cheapest, curve, frontier, outcome
from ddnn.timing import in_turns, time_round

if TYPE_CHECKING:
    from ddnn.runtime.model import Model

POINTS = 12
FEWEST, MOST = 20, 2000
"""Calls that a mean latency is taken over, at the least and at the most."""


def measure(
    model: "Model",
    chosen_on: HeldOut,
    judged_by: HeldOut,
    batches: Sequence[int],
    *,
    accuracy: float | None = None,
    seconds: float = 30.0,
    watch: Callable[[str], None] = lambda doing: None,
) -> Curve:
    """Choose thresholds on `chosen_on`, judge them by `judged_by`, measure them in batches, and return the curve.

    `accuracy`: let the cheapest thresholds found that reach it be among the points. `seconds`: spent on each batch
    size.

    Raises `RequestError` where there are too few images or depths.
    """
    nets = list(model.nets.values())
    if len(nets) < 2:
        raise RequestError(f"a cascade needs at least two depths; the bundle has {nets[0].name} only")
    for what, held in (("chosen", chosen_on), ("judged", judged_by)):
        if len(held) < 10:
            raise RequestError(
                f"{len(held)} held-out images for thresholds to be {what} are too few; give 10 for that, or 20 in all"
            )
    if any(not 1 <= batch <= len(judged_by) for batch in batches):
        raise RequestError(f"batch sizes must be from 1 to the {len(judged_by)} images that thresholds are judged by")
    watch(f"answers of all depths to {len(chosen_on) + len(judged_by)} images")
    seen, judged = see(model, chosen_on), see(model, judged_by)
    watch("cost of every part of the cascade")
    costs = part_costs(model, judged_by, batches[0], seconds / 4)
    front = frontier(seen, costs)
    found = curve(front, POINTS)
    if accuracy is not None and (just := cheapest(front, accuracy)) is not None and just not in found:
        found = sorted([*found, just], key=lambda thresholds: outcome(seen, costs, thresholds).cost)
    macs = part_macs(nets)
    through = [UNREACHED] * (len(nets) - 1)
    calls, took = {}, {}
    attention = Attention(model.threads)
    for batch in batches:
        watch(f"latency in batches of {batch}")
        took[batch], calls[batch] = _latencies(model, [*found, through], judged_by, judged, batch, seconds)
    busy = attention.denied()
    points = [
        Point(
            name="",
            thresholds=thresholds,
            chosen_on=outcome(seen, costs, thresholds).accuracy,
            accuracy=(result := outcome(judged, macs, thresholds)).accuracy,
            share=list(result.share),
            macs=result.cost,
            took={batch: took[batch][tuple(thresholds)] for batch in batches},
        )
        for thresholds in found
    ]
    fixed = [
        Point(
            name=net.name,
            thresholds=[],
            chosen_on=float(seen.right[:, k].mean()),
            accuracy=float(judged.right[:, k].mean()),
            share=[float(k == i) for i in range(len(nets))],
            macs=net.macs,
            took={batch: took[batch][net.name] for batch in batches},
        )
        for k, net in enumerate(nets)
    ]
    measured = Curve(
        bundle=model.manifest.digest,
        machine=this_machine(),
        measured=now(),
        threads=model.threads,
        shared=model.shared,
        nets=[net.name for net in nets],
        images={"thresholds chosen on": chosen_on.about, "judged by": judged_by.about},
        judged=len(judged_by),
        through={batch: took[batch][tuple(through)] for batch in batches},
        calls=calls,
        busy=busy,
        fixed=fixed,
        points=points,
        unread=all_unread(chosen_on, judged_by),
    )
    return choose(measured)


def see(model: "Model", held: HeldOut, batch: int = 32) -> Seen:
    """The answers of every depth."""
    sure: list[npt.NDArray[Any]] = []
    right: list[npt.NDArray[Any]] = []
    for start in range(0, len(held), batch):
        images = normalised(held.pixels[start : start + batch], model.manifest.input)
        logits = [model(images, name) for name in model.nets]
        sure.append(np.stack([confidence(each) for each in logits], axis=1))
        labels = held.labels[start : start + batch]
        right.append(np.stack([each.argmax(axis=1) == labels for each in logits], axis=1))
    return Seen(np.concatenate(sure), np.concatenate(right))


def part_costs(model: "Model", held: HeldOut, batch: int, seconds: float) -> Costs:
    """Milliseconds that each net's part of the cascade takes for one image, in batches of this size.

    From whole cascades in turns: those in which all images stop at net k, and those of which one net is left out.
    """
    count = len(model.nets)
    images = normalised(held.pixels[:batch], model.manifest.input)
    forced = {("to", k): [UNREACHED] * k + [0.0] * (count - 1 - k) for k in range(count)}
    for k in range(count - 1):
        forced["without", k] = [UNREACHED] * k + [NEVER] + [0.0] * (count - 2 - k)
    calls = {key: partial(model.cascade, images, thresholds) for key, thresholds in forced.items()}
    times = in_turns(calls, seconds=seconds, fewest=FEWEST_RUNS, most=MOST_RUNS)
    took = {key: 1000 * float(np.median(taken)) / batch for key, taken in times.items()}
    to = [0.0, *(took["to", k] for k in range(count))]
    asked = [max(after - before, 1e-9) for before, after in itertools.pairwise(to)]
    saved = [took["to", k + 1] - took["without", k] for k in range(count - 1)]
    left_out = [float(np.clip(whole - less, 0, whole)) for whole, less in zip(asked, saved, strict=False)]
    return Costs(asked, [*left_out, asked[-1]])


def part_macs(nets: Sequence[Net]) -> Costs:
    """Multiply-accumulates that each net's part of the cascade takes for one image."""
    begun = {}  # by feature, the multiply-accumulates from the images on
    asked, left_out = [], []
    for net in nets:
        assert net.cascade is not None
        for feature in net.cascade.inputs.values():
            begun[feature] = net.macs - net.cascade.macs
    for net in nets:
        assert net.cascade is not None
        made = [begun[feature] for feature in net.cascade.outputs.values() if feature in begun]
        asked.append(net.cascade.macs)
        left_out.append(max(0, max(made, default=0) - (net.macs - net.cascade.macs)))
    return Costs(asked, left_out)


def _latencies(
    model: "Model", found: list[list[float]], judge: HeldOut, judged: Seen, batch: int, seconds: float
) -> tuple[dict[Hashable, Took], int]:
    """Of every depth and every cascade, on the same batches in turns; and the number of batches that count.

    The images are spread evenly over the confidence of the shallowest net, so that a small sample has its fair share of
    those that go on.
    """
    calls: dict[Hashable, Callable[[Floats], object]] = {name: partial(model, depth=name) for name in model.nets}
    calls |= {tuple(each): partial(model.cascade, threshold=each) for each in found}
    first = normalised(judge.pixels[:batch], model.manifest.input)
    for call in calls.values():
        call(first)
    chance = random.Random(0)

    def timed(images: Floats) -> list[float]:
        """Milliseconds of each call with these."""
        taken = time_round({key: partial(call, images) for key, call in calls.items()}, chance)
        return [1000 * each for each in taken.values()]

    rounds = int(np.clip(1000 * seconds / sum(timed(first)), FEWEST, MOST))
    order = np.argsort(judged.confidence[:, 0], kind="stable")
    spread = order[np.linspace(0, len(order) - 1, rounds * batch).astype(int)]
    spread = np.random.default_rng(0).permutation(spread)
    given = (judge.pixels[spread[i * batch : (i + 1) * batch]] for i in range(rounds))
    table = np.array([timed(normalised(pixels, model.manifest.input)) for pixels in given]).T
    table = table[:, undisturbed(table.sum(axis=0))]
    took = [Took(float(taken.mean()), float(np.percentile(taken, 95))) for taken in table]
    return dict(zip(calls, took, strict=True)), table.shape[1]


def undisturbed(rounds: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which rounds to count, from the time each took: those of more than twice the median, the machine did other work.

    A round holds every depth and every cascade, so whether it counts depends on none of them.
    """
    return rounds <= 2 * np.median(rounds)
