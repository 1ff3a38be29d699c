"""What every depth takes on this machine: latency and memory, measured, kept with the bundle, and picked by.

A profile lies in the bundle, in a folder named by the machine it was measured on. It belongs to that machine and to
that very bundle; it is never read for another. A condition is what latency depends on beside the depth: images per
call, threads, and whether the weights are shared.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddnn.errors import BudgetError, BundleError, RequestError
from ddnn.files import check_writable, write_atomic
from ddnn.runtime.checks import check_above_0, is_finite, is_whole
from ddnn.runtime.kept import machine_folder, now, text_of
from ddnn.runtime.machine import Attention, Machine, this_machine
from ddnn.runtime.manifest import Manifest, Net
from ddnn.timing import in_turns
from ddnn.wording import command, threads_and_weights, three

if TYPE_CHECKING:
    from ddnn.runtime.model import Model
    from ddnn.runtime.pixels import Floats

VERSION = 1
NAME = "profile.json"
FEWEST_RUNS = 40
"""Calls that a 95th percentile is taken from, at the least."""
MOST_RUNS = 400


class Condition(NamedTuple):
    """What latency depends on beside the depth."""

    batch: int
    threads: int
    shared: bool = False

    def __str__(self) -> str:
        return f"batch {self.batch}, {threads_and_weights(self.threads, self.shared)}"


@dataclass(frozen=True)
class Row:
    """One depth under one condition."""

    depth: str
    batch: int
    threads: int
    shared: bool
    p50_ms: float
    """Of the median call."""
    p95_ms: float
    """That all but one in twenty calls stayed below."""
    runs: int
    busy: float
    """Share of the time in which this process was kept from running by other work on the machine."""
    memory_mb: float | None
    """MiB in memory of a process that holds this depth alone and has run such batches."""
    peak_mb: float | None
    """Most MiB that process ever had in memory; loading takes more than running."""

    @property
    def condition(self) -> Condition:
        """What it was measured under."""
        return Condition(self.batch, self.threads, self.shared)


@dataclass(frozen=True)
class Together:
    """A process that holds all depths."""

    batch: int
    shared: bool
    memory_mb: float | None
    peak_mb: float | None


@dataclass(frozen=True)
class Profile:
    """All that was measured of a bundle on one machine."""

    bundle: str
    """Digest of the manifest."""
    machine: Machine
    measured: str
    """Date and time of the last measurement."""
    rows: list[Row] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)

    def rows_for(self, condition: Condition, depths: Iterable[str], bundle: Path) -> list[Row]:
        """The rows of these depths of a bundle under a condition. Raises `RequestError` where it was not measured."""
        wanted = list(depths)
        rows = [row for row in self.rows if row.condition == condition and row.depth in wanted]
        if {row.depth for row in rows} != set(wanted):
            known = "; ".join(map(str, dict.fromkeys(row.condition for row in self.rows)))
            shared = ["--shared"] if condition.shared else []
            asked = ("--batch", condition.batch, "--threads", condition.threads, *shared)
            raise RequestError(
                f"{condition} was not measured on this machine; measured are: {known}; run: "
                + command("ddnn", "profile", bundle, *asked)
            )
        return rows


def read(manifest: Manifest, machine: Machine) -> Profile:
    """This machine's profile of a bundle. Raises `RequestError` where there is none, `BundleError` where damaged."""
    profile = _read(machine_folder(manifest.folder, machine) / NAME)
    run = command("ddnn", "profile", manifest.folder)
    if profile is None:
        others = sorted(path.parent.name for path in manifest.folder.glob(f"machines/*/{NAME}"))
        only = (
            f" (only of {'another machine' if len(others) == 1 else f'{len(others)} other machines'})" if others else ""
        )
        raise RequestError(f"there is no profile of this machine{only}; run: {run}")
    if profile.bundle != manifest.digest or profile.machine != machine:
        raise RequestError(f"the profile of this machine is of another bundle that was here before; run: {run}")
    return profile


def _read(path: Path) -> Profile | None:
    try:
        content = json.loads(text_of(path))
        if content.pop("format") != "ddnn-profile" or content.pop("version") != VERSION:
            raise BundleError(f"{path} is of another format than this ddnn reads; remove it and measure again")
        profile = Profile(
            bundle=str(content["bundle"]),
            machine=Machine(**content["machine"]),
            measured=str(content["measured"]),
            rows=[Row(**row) for row in content["rows"]],
            together=[Together(**each) for each in content["together"]],
        )
        for row in profile.rows:
            _check(row)
        for each in profile.together:
            _check_memory(each)
        if len({(row.depth, row.condition) for row in profile.rows}) < len(profile.rows):
            raise ValueError("a depth is there twice")
    except FileNotFoundError:
        return None
    except BundleError:
        raise
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged ({error}); remove it and measure again") from None
    return profile


def _check(row: Row) -> None:
    """`ValueError` where a row of a file can't have been measured."""
    if not isinstance(row.depth, str):
        raise ValueError("a depth is no text")
    if not all(is_finite(each) and each > 0 for each in (row.p50_ms, row.p95_ms)):
        raise ValueError("a latency is not above 0")
    if not (is_whole(row.threads, 1) and is_whole(row.runs, 1) and is_finite(row.busy)):
        raise ValueError("threads, runs or busy can't be")
    _check_memory(row)


def _check_memory(of: "Row | Together") -> None:
    if not (is_whole(of.batch, 1) and isinstance(of.shared, bool)):
        raise ValueError("a batch, or shared, can't be")
    if not all(each is None or (is_finite(each) and each > 0) for each in (of.memory_mb, of.peak_mb)):
        raise ValueError("a memory is not above 0")


def measure(
    folder: Path,
    batches: Sequence[int],
    threads: Sequence[int],
    *,
    shared: bool = False,
    seconds: float = 10.0,
    watch: Callable[[str], None] = lambda doing: None,
) -> Profile:
    """Measure every depth of a bundle on this machine, and return it with what was measured before; `write` keeps it.

    `seconds`: spent on one condition, more where that is too little for the fewest calls. Depths take turns, so a
    change of the machine's speed meets them all. Latency is that of a call with normalised images; memory is that of
    processes of their own. Raises `RunError` at once where it could not be written.
    """
    from ddnn.runtime.model import load

    machine = this_machine()
    models = {count: load(folder, threads=count, shared=shared) for count in threads}
    manifest = next(iter(models.values())).manifest
    check_writable(machine_folder(manifest.folder, machine))
    rows, together = [], []
    for batch in batches:
        memory = {}
        for name in [*manifest.nets, ""]:
            watch(f"memory of {name or 'all depths'}, batch {batch}")
            memory[name] = _memory_of_process(manifest.folder, name, batch, max(threads), shared)
        together.append(Together(batch, shared, *memory[""]))
        for count, model in models.items():
            watch(f"latency, {Condition(batch, count, shared)}")
            times, busy = side_by_side(model, batch, seconds)
            for name, taken in times.items():
                p50, p95 = (float(np.percentile(taken, percent)) for percent in (50, 95))
                rows.append(Row(name, batch, count, shared, p50, p95, len(taken), busy, *memory[name]))
    path = machine_folder(manifest.folder, machine) / NAME
    return _joined(path, Profile(manifest.digest, machine, now(), rows, together))


def write(profile: Profile, manifest: Manifest) -> Path:
    """Keep a profile with its bundle, and return the folder it is in. Raises `RunError`."""
    folder = machine_folder(manifest.folder, profile.machine)
    content = {"format": "ddnn-profile", "version": VERSION, **asdict(profile)}
    write_atomic(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())
    return folder


def _joined(path: Path, new: Profile) -> Profile:
    """What was measured before and is not measured anew, and what is."""
    try:
        old = _read(path)
    except BundleError:
        old = None
    if old is None or old.bundle != new.bundle or old.machine != new.machine:
        return new
    anew = {row.condition for row in new.rows}
    again = {(each.batch, each.shared) for each in new.together}
    rows = [row for row in old.rows if row.condition not in anew] + new.rows
    together = [each for each in old.together if (each.batch, each.shared) not in again] + new.together
    order = list(dict.fromkeys(row.depth for row in new.rows))
    rows.sort(key=lambda row: (row.condition, order.index(row.depth)))
    return Profile(new.bundle, new.machine, new.measured, rows, sorted(together, key=lambda e: (e.shared, e.batch)))


def side_by_side(model: "Model", batch: int, seconds: float) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of calls of every depth, in turns, and the share of the time that other work took from them."""
    images = noise(model, batch)
    attention = Attention(model.threads)
    calls = {name: partial(model, images, name) for name in model.nets}
    times = in_turns(calls, seconds=seconds, fewest=FEWEST_RUNS, most=MOST_RUNS)
    busy = attention.denied()
    return {name: [1000 * each for each in taken] for name, taken in times.items()}, busy


def noise(model: "Model", batch: int) -> "Floats":
    """Images [batch, 3, S, S] to measure with, normalised ones in range and type."""
    size = model.manifest.input.size
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)


def _memory_of_process(
    folder: Path, depth: str, batch: int, threads: int, shared: bool
) -> tuple[float | None, float | None]:
    """MiB in memory, now and at the most, of a process that loads one depth, or all, and runs a few batches."""
    command = [sys.executable, "-m", "ddnn.runtime.footprint"]
    asked = {"bundle": str(folder), "depth": depth, "batch": batch, "threads": threads, "shared": shared}
    done = subprocess.run([*command, json.dumps(asked)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BundleError(f"measuring the memory of {depth or 'all depths'} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found["memory_mb"], found["peak_mb"]


class Choice(NamedTuple):
    """The depth that was picked and what it takes."""

    depth: str
    top1: float
    row: Row


def pick(
    rows: Sequence[Row],
    nets: Mapping[str, Net],
    *,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
    p95: bool = False,
) -> Choice:
    """The most accurate of the depths that fit; of equally accurate ones the fastest.

    Raises `BudgetError` if none fits, saying what the one that comes nearest takes, and `RequestError` without a
    budget, an accuracy or a measurement to pick by.
    """
    limits = {"ms": latency_ms, "MiB": memory_mb}
    for unit, limit in limits.items():
        check_above_0(limit, unit)
    if latency_ms is None and memory_mb is None:
        raise RequestError("nothing to pick by: give a latency in ms, a memory in MB, or both")

    def taken(row: Row) -> dict[str, float | None]:
        return {"ms": row.p95_ms if p95 else row.p50_ms, "MiB": row.peak_mb}

    def excess(row: Row) -> float:
        """How many times over its tightest limit a depth is."""
        return max(value / limits[unit] for unit, value in taken(row).items() if limits[unit] and value)  # type: ignore[operator]

    accuracies: dict[str, float] = {}
    for row in rows:
        top1 = nets[row.depth].top1
        if top1 is None:
            raise RequestError(f"the bundle does not say how accurate {row.depth} is; export it from a finished run")
        if memory_mb is not None and row.peak_mb is None:
            raise RequestError("this system does not say how much memory a process takes; pick by latency alone")
        accuracies[row.depth] = top1
    fitting = [row for row in rows if excess(row) <= 1]
    if fitting:
        best = max(fitting, key=lambda row: (accuracies[row.depth], -row.p50_ms))
        return Choice(best.depth, accuracies[best.depth], best)
    nearest = min(rows, key=excess)
    over = [
        f"{three(value)} {unit}, {three(value - limit)} {unit} more than {limit:g}"
        for unit, value in taken(nearest).items()
        if (limit := limits[unit]) and value is not None and value > limit
    ]
    what = "p95" if p95 else "p50"
    raise BudgetError(
        f"no depth fits: {nearest.depth}, which comes nearest, takes {' and '.join(over)} ({what}; {nearest.condition})"
    )
