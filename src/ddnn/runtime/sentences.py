"""What a measured cascade means, in plain words: where it pays, where it does not, and why."""

from dataclasses import dataclass
from typing import Literal

from ddnn.runtime.cascade import NEVER
from ddnn.runtime.curve import Curve, Point
from ddnn.runtime.manifest import Manifest
from ddnn.wording import listed, three

BUSY = 0.1
"""Share of the time taken by other work from which on a measurement is not to be trusted."""
EVEN = 0.03
"""Latencies that differ by less than this share are called the same."""


@dataclass(frozen=True)
class Match:
    """The cascade against one fixed depth, in batches of one size."""

    depth: Point
    batch: int
    point: Point | None
    """The quickest cascade that is at least as accurate; None where none is."""
    ratio: float
    """Its mean latency, or that of the most accurate cascade, relative to the depth's."""

    @property
    def pays(self) -> bool:
        """Whether the cascade is as accurate in less time."""
        return self.point is not None and self.ratio < 1 - EVEN


def match(curve: Curve, depth: Point, batch: int) -> Match:
    """Compare the cascade with a fixed depth, by the images that judge; `notes` says that this is a choice too."""
    enough = [point for point in curve.points if point.accuracy >= depth.accuracy]
    if not enough:
        most = max(curve.points, key=lambda point: point.accuracy)
        return Match(depth, batch, None, most.took[batch].mean / depth.took[batch].mean)
    best = min(enough, key=lambda point: point.took[batch].mean)
    return Match(depth, batch, best, best.took[batch].mean / depth.took[batch].mean)


def reference(curve: Curve) -> Point:
    """The most accurate depth; of equally accurate ones the quickest."""
    batch = curve.batches[0]
    return max(curve.fixed, key=lambda point: (point.accuracy, -point.took[batch].mean))


def headline(curve: Curve) -> str:
    """Whether it pays, in one sentence."""
    depth = reference(curve)
    if depth is curve.fixed[0]:
        return f"The cascade does not pay here: {depth.name}, the shallowest net, is the most accurate already"
    matches = [match(curve, depth, batch) for batch in curve.batches]
    paying = [each for each in matches if each.pays]
    if not paying:
        return f"The cascade does not pay here: no thresholds are as accurate as {depth.name} alone in less time"
    best = min(paying, key=lambda each: each.ratio)
    saves = f"as accurate as {depth.name} alone in {_less(best.ratio)} time in batches of {best.batch}"
    if best.batch == 1:
        saves = f"as accurate as {depth.name} alone in {_less(best.ratio)} time, one image at a time"
    if len(paying) == len(matches):
        return f"The cascade pays: {saves}"
    others = [str(each.batch) for each in matches if not each.pays]
    return f"The cascade pays in some cases: {saves}; not in batches of {listed(others)}"


def verdicts(curve: Curve) -> list[tuple[Literal["above", "below", "same"], str]]:
    """One sentence for every batch size, and whether the cascade is above, below or the same as the depth alone."""
    depth = reference(curve)
    found: list[tuple[Literal["above", "below", "same"], str]] = []
    for batch in curve.batches:
        each = match(curve, depth, batch)
        kind: Literal["above", "below", "same"] = "above" if each.pays else "below"
        if each.point is not None and abs(each.ratio - 1) < EVEN:
            kind = "same"
        found.append((kind, verdict(each, curve)))
    return found


def verdict(each: Match, curve: Curve) -> str:
    """The cascade against one depth, in a sentence."""
    where = f"Batch {each.batch}"
    alone = f"{each.depth.name} alone {_ms(each.depth.took[each.batch].mean)}"
    if each.point is None:
        most = max(curve.points, key=lambda point: point.accuracy)
        return (
            f"{where}: does not pay. No thresholds are as accurate as {each.depth.name} "
            f"({percent(each.depth.accuracy)}); the best reach {percent(most.accuracy)} in "
            f"{_ms(most.took[each.batch].mean)}, {alone}"
        )
    took = _ms(each.point.took[each.batch].mean)
    if each.pays:
        return (
            f"{where}: as accurate as {each.depth.name} ({percent(each.depth.accuracy)}) in {took} on average, "
            f"{alone}: {_less(each.ratio)}"
        )
    if abs(each.ratio - 1) < EVEN:
        return f"{where}: makes no difference. As accurate as {each.depth.name} takes {took} on average, {alone}"
    return f"{where}: does not pay. As accurate as {each.depth.name} takes {took} on average, {alone}"


def reasons(curve: Curve, manifest: Manifest) -> list[str]:
    """Why a cascade does not pay where it does not, each with its number; empty where it pays everywhere."""
    depth, batch = reference(curve), curve.batches[0]
    if depth is curve.fixed[0] or all(match(curve, depth, size).pays for size in curve.batches):
        return []
    found = []
    first, net = curve.nets[0], manifest.nets[depth.name]
    if net.cascade and net.macs and depth.name != first and (shared := 1 - net.cascade.macs / net.macs) < 0.5:
        found.append(
            f"The paths part early: only {shared:.0%} of what {depth.name} computes is shared with shallower nets, so "
            f"an image that goes on pays nearly for all of {depth.name} again"
        )
    each = match(curve, depth, batch)
    point = each.point or max(curve.points, key=lambda other: other.accuracy)
    asked = next((k for k, threshold in enumerate(point.thresholds) if threshold < NEVER), len(curve.nets) - 1)
    if asked < len(curve.nets) - 1 and (on := 1 - point.share[asked]) > 0.3:
        found.append(
            f"Many images are unsure: to be as accurate as that, {on:.0%} of them go on beyond {curve.nets[asked]}"
        )
    for size in curve.batches:
        by_time, by_macs = match(curve, depth, size).ratio, point.macs / depth.macs
        if by_time > by_macs + 0.1 and match(curve, depth, size).point is not None:
            found.append(
                f"Batch {size}: by MACs alone it would take {by_macs:.2f} of the time of {depth.name}, measured are "
                f"{by_time:.2f}; small calls to several graphs, each with the few images left, run less efficiently "
                "than one"
            )
            break
    return found


def worst(curve: Curve) -> str:
    """What the least sure image costs."""
    batch, deepest = curve.batches[0], curve.fixed[-1]
    whole = curve.through[batch].mean
    ratio = whole / deepest.took[batch].mean
    return (
        f"An image that goes all the way takes {_ms(whole)} at batch {batch}, {ratio:.2f} times {deepest.name} alone: "
        "a cascade lowers the mean, not the longest wait"
    )


def looked_up(curve: Curve) -> str:
    """That comparisons with depths alone are a choice on the images that judge."""
    return (
        f"Where it pays was looked up: the quickest of {len(curve.points)} cascades that is as accurate as a depth on "
        "the very images that accuracies are measured on; that flatters it where cascades differ by no more than chance"
    )


def caveat(curve: Curve) -> str | None:
    """That a quicker depth is as good as the most accurate one, as far as so few images can tell; None if none is."""
    depth, batch = reference(curve), curve.batches[0]
    error = standard_error(depth, curve.judged)
    near = [
        point
        for point in curve.fixed
        if depth.accuracy - point.accuracy < error and point.took[batch].mean < depth.took[batch].mean
    ]
    if not near:
        return None
    quickest = min(near, key=lambda point: point.took[batch].mean)
    return (
        f"{quickest.name} alone, {percent(quickest.accuracy)} in {_ms(quickest.took[batch].mean)} at batch {batch}, is "
        f"within one standard error ({100 * error:.1f} points) of {depth.name}: on {curve.judged} images the "
        "difference may be chance"
    )


def standard_error(point: Point, images: int) -> float:
    """Of an accuracy measured on so many images."""
    return float((point.accuracy * (1 - point.accuracy) / images) ** 0.5)


def notes(curve: Curve) -> list[str]:
    """How to read the numbers."""
    batch = curve.batches[0]
    deviation = standard_error(curve.points[curve.chosen], curve.judged)
    return [
        "A net answers where its confidence, the probability it gives to its most likely class, reaches its threshold; "
        "otherwise the image goes on to the next net, which starts from what has been computed already.",
        "Thresholds, and which of them were chosen, come from other images than accuracies are measured on; both are "
        "held out from training.",
        f"{looked_up(curve)}.",
        f"Accuracies are of {curve.judged} images: one standard error is {100 * deviation:.1f} points. All depths and "
        "cascades saw the same images.",
        "Latency is the mean over calls with real images, every depth and every cascade in turns, from normalised "
        f"pixels to logits: {', '.join(f'{calls} calls in batches of {size}' for size, calls in curve.calls.items())}.",
        f"Thresholds were chosen for the time of the parts in batches of {batch}.",
        f"Latencies that differ by less than {EVEN:.0%} are called the same.",
        *(f"{each}." for each in curve.unread),
        *(
            [f"Other work had the machine for {curve.busy:.0%} of the time: measure again when it is idle."]
            if curve.busy > BUSY
            else []
        ),
    ]


def details(curve: Curve) -> dict[str, str]:
    """Where the numbers come from."""
    return {
        "machine": str(curve.machine),
        "threads": f"{curve.threads}{', shared weights' if curve.shared else ''}",
        **curve.images,
        "measured": curve.measured,
        "bundle": curve.bundle[:12],
    }


def title(curve: Curve) -> str:
    """What it is about."""
    return f"Cascade of {listed(curve.nets)}"


def percent(share: float) -> str:
    """An accuracy."""
    return f"{100 * share:.2f} %"


def _ms(value: float) -> str:
    return f"{three(value)} ms"


def _less(ratio: float) -> str:
    return f"{1 - ratio:.0%} less"
