"""The cascade on a machine, kept with its bundle: accuracy against measured milliseconds, beside every depth alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ddnn.errors import BudgetError, BundleError, RequestError
from ddnn.files import write_atomic
from ddnn.runtime.checks import check_above_0, is_finite, is_number, is_whole
from ddnn.runtime.kept import machine_folder, text_of
from ddnn.runtime.machine import Machine
from ddnn.runtime.manifest import Manifest
from ddnn.wording import command, threads_and_weights, three

VERSION = 1
NAME = "cascade.json"


class Took(NamedTuple):
    """Milliseconds of a call with one batch."""

    mean: float
    p95: float


@dataclass(frozen=True)
class Point:
    """A fixed depth, or a cascade with some thresholds."""

    name: str
    """Of the fixed depth; "" of a cascade."""
    thresholds: list[float]
    """Empty for a fixed depth."""
    chosen_on: float
    """Accuracy on the images that thresholds were chosen on; what a point is chosen by."""
    accuracy: float
    """Accuracy on the images they are judged by; nothing is chosen by it, so that it is not flattered."""
    share: list[float]
    """Of the latter images, answered by each net."""
    macs: float
    """Mean multiply-accumulates of one image."""
    took: dict[int, Took]
    """By batch size."""


@dataclass(frozen=True)
class Curve:
    """All that was measured of a bundle's cascade on one machine."""

    bundle: str
    """Digest of the manifest."""
    machine: Machine
    measured: str
    threads: int
    shared: bool
    nets: list[str]
    """Shallow to deep."""
    images: dict[str, str]
    """What thresholds were chosen on and judged by, and how many those were, for a person."""
    judged: int
    """Images they are judged by."""
    through: dict[int, Took]
    """Of a cascade whose images all go all the way, by batch size."""
    calls: dict[int, int]
    """Calls that latencies are means over, by batch size."""
    busy: float
    """Share of the time in which this process was kept from running by other work on the machine."""
    fixed: list[Point]
    points: list[Point]
    """Cheap to dear."""
    chosen: int = 0
    """Which point `ddnn predict --cascade` takes."""
    wanted: str = ""
    """What that was chosen for."""
    unread: list[str] = field(default_factory=list)
    """On images that could not be read, for a person."""

    @property
    def batches(self) -> list[int]:
        """Batch sizes measured."""
        return list(self.calls)

    def under(self, manifest: Manifest, threads: int, shared: bool) -> "Curve":
        """This curve, if that is what it was measured under; else `RequestError`."""
        if (self.threads, self.shared) != (threads, shared):
            raise RequestError(
                f"the cascade was not measured with {threads_and_weights(threads, shared)} but "
                f"with {threads_and_weights(self.threads, self.shared)}; run: "
                + command("ddnn", "cascade", manifest.folder, "--data", "HELD-OUT", "--threads", threads)
                + (" --shared" if shared else "")
            )
        return self


def check_wanted(accuracy: float | None, latency_ms: float | None) -> None:
    """`RequestError` for what no thresholds can be chosen by."""
    if accuracy is not None and latency_ms is not None:
        raise RequestError("give a wanted accuracy or a wanted latency, not both")
    if accuracy is not None and not (is_number(accuracy) and 0 <= accuracy <= 1):
        raise RequestError(f"an accuracy of {accuracy!r} is none; it is a share from 0 to 1, such as 0.7")
    check_above_0(latency_ms, "ms")


def choose(curve: Curve, *, accuracy: float | None = None, latency_ms: float | None = None) -> Curve:
    """The curve with the point chosen for a wanted accuracy, or a wanted mean latency of a batch of the first size.

    Without either, for the accuracy of the most accurate depth, or as near as it gets. Accuracies are those on the
    images that thresholds were chosen on: by the others a point is judged. Raises `BudgetError` if no point meets what
    is wanted, saying by how much.
    """
    batch = curve.batches[0]
    numbered = list(enumerate(curve.points))

    def latency(pair: tuple[int, Point]) -> float:
        return pair[1].took[batch].mean

    check_wanted(accuracy, latency_ms)
    if accuracy is not None:
        enough = [pair for pair in numbered if pair[1].chosen_on >= accuracy]
        if not enough:
            most = max(point.chosen_on for point in curve.points)
            raise BudgetError(
                f"no thresholds reach an accuracy of {100 * accuracy:.2f} %: the best reach {100 * most:.2f} %, "
                f"{100 * (accuracy - most):.2f} points less, on the images they are chosen on"
            )
        return replace(curve, chosen=min(enough, key=latency)[0], wanted=f"an accuracy of {100 * accuracy:.2f} %")
    if latency_ms is not None:
        quick = [pair for pair in numbered if latency(pair) <= latency_ms]
        if not quick:
            least = min(map(latency, numbered))
            raise BudgetError(
                f"no thresholds answer in {latency_ms:g} ms on average (batch {batch}): the quickest take "
                f"{three(least)} ms, {three(least - latency_ms)} ms more"
            )
        best = max(quick, key=lambda pair: (pair[1].chosen_on, -latency(pair)))[0]
        return replace(curve, chosen=best, wanted=f"a mean latency of {latency_ms:g} ms (batch {batch})")
    most = max(point.chosen_on for point in curve.fixed)
    enough = [pair for pair in numbered if pair[1].chosen_on >= most]
    best = min(enough, key=latency)[0] if enough else max(numbered, key=lambda pair: pair[1].chosen_on)[0]
    return replace(curve, chosen=best, wanted="the accuracy of the most accurate depth")


def write(curve: Curve, manifest: Manifest) -> Path:
    """Keep a curve with its bundle, and return the folder it is in."""
    folder = machine_folder(manifest.folder, curve.machine)
    content = {"format": "ddnn-cascade", "version": VERSION, **asdict(curve)}
    write_atomic(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())
    return folder


def read(manifest: Manifest, machine: Machine) -> Curve:
    """This machine's curve. Raises `RequestError` where there is none, `BundleError` where it is damaged."""
    path = machine_folder(manifest.folder, machine) / NAME
    run = "run: " + command("ddnn", "cascade", manifest.folder, "--data", "HELD-OUT")
    try:
        content = json.loads(text_of(path))
        if content.pop("format") != "ddnn-cascade" or content.pop("version") != VERSION:
            raise BundleError(f"{path} is of another format than this ddnn reads; remove it and measure again")
        content["machine"] = Machine(**content["machine"])
        content["calls"] = {int(batch): count for batch, count in content["calls"].items()}
        content["through"] = _took(content["through"])
        for part in ("fixed", "points"):
            content[part] = [Point(**{**each, "took": _took(each["took"])}) for each in content[part]]
        found = Curve(**content)
        _check(found)
    except FileNotFoundError:
        raise RequestError(f"there are no thresholds measured on this machine; {run}") from None
    except BundleError:
        raise
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged ({error}); remove it and measure again") from None
    if found.bundle != manifest.digest or found.machine != machine:
        raise RequestError(f"the thresholds here are of another bundle that was here before; {run}")
    return found


def _check(curve: Curve) -> None:
    """`ValueError` where a curve of a file can't have been measured."""
    if not (is_whole(curve.threads, 1) and isinstance(curve.shared, bool) and is_finite(curve.busy)):
        raise ValueError("threads, shared or busy can't be")
    if not (curve.calls and curve.points and curve.fixed and all(is_whole(each, 1) for each in curve.calls.values())):
        raise ValueError("nothing was measured")
    if not (is_whole(curve.chosen) and curve.chosen < len(curve.points)):
        raise ValueError("no point is chosen")
    for took in (curve.through, *(point.took for point in (*curve.fixed, *curve.points))):
        if took.keys() != curve.calls.keys() or not all(
            is_finite(each) and each > 0 for t in took.values() for each in t
        ):
            raise ValueError("a latency is missing, or not above 0")
    for point in (*curve.fixed, *curve.points):
        if not all(is_finite(each) for each in (point.chosen_on, point.accuracy, point.macs, *point.share)):
            raise ValueError("an accuracy, a share or MACs are no number")
    for point in curve.points:
        if len(point.thresholds) != len(curve.nets) - 1 or not all(is_finite(t) and t >= 0 for t in point.thresholds):
            raise ValueError("its thresholds are none")


def _took(by_batch: Mapping[str, Sequence[float]]) -> dict[int, Took]:
    return {int(batch): Took(*map(float, each)) for batch, each in by_batch.items()}
