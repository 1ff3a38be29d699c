"""Measured on this machine, kept with the bundle, picked by: against rules written out."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bundles
import ddnn
from ddnn.errors import BudgetError, BundleError, RequestError
from ddnn.runtime import machine, profile
from ddnn.runtime.manifest import Manifest, Net
from ddnn.runtime.manifest import read as read_manifest
from ddnn.runtime.profile import Condition, Row


def measure(bundle: Path, batches: list[int], threads: list[int], *, shared: bool = False) -> profile.Profile:
    """Measured as briefly as can be, and kept."""
    found = profile.measure(bundle, batches, threads, shared=shared, seconds=0)
    profile.write(found, read_manifest(bundle))
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, profile.Profile]:
    bundle = bundles.make(tmp_path_factory.mktemp("bundles") / "bundle")
    measure(bundle, [1], [1])
    with pytest.MonkeyPatch.context() as patch:
        _know_memory(patch)
        return bundle, measure(bundle, [3], [1])


def _know_memory(patch: pytest.MonkeyPatch) -> None:
    """For what is not about memory, as a process of its own takes a while."""
    patch.setattr(profile, "_memory_of_process", lambda *_: (60.0, 70.0))


def test_every_depth_is_measured_under_every_condition(measured: tuple[Path, profile.Profile]) -> None:
    bundle, found = measured
    assert [(row.depth, row.batch, row.threads) for row in found.rows] == [
        (name, batch, 1) for batch in (1, 3) for name in bundles.PATHS
    ]
    for row in found.rows:
        assert 0 < row.p50_ms <= row.p95_ms
        assert row.runs == profile.FEWEST_RUNS
        assert row.memory_mb is not None
        assert row.peak_mb is not None
        assert 10 < row.memory_mb <= row.peak_mb
    assert [(each.batch, each.shared) for each in found.together] == [(1, False), (3, False)]
    assert profile.read(read_manifest(bundle), machine.this_machine()) == found
    ddnn.load(bundle)  # nothing of the bundle's own has changed


@pytest.fixture
def _memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    _know_memory(monkeypatch)


@pytest.mark.usefixtures("_memory_is_known")
def test_further_measurements_are_added(measured: tuple[Path, profile.Profile]) -> None:
    bundle, before = measured
    after = measure(bundle, [3, 2], [1], shared=True)
    assert [row for row in after.rows if not row.shared] == before.rows
    assert {row.condition for row in after.rows} == {
        Condition(1, 1), Condition(3, 1), Condition(2, 1, True), Condition(3, 1, True)
    }  # fmt: skip
    again = measure(bundle, [3], [1])
    assert len(again.rows) == len(after.rows)
    others = [row for row in after.rows if row.condition != Condition(3, 1)]
    assert [row for row in again.rows if row.condition != Condition(3, 1)] == others


def test_what_is_timed_in_seconds_is_kept_in_ms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "in_turns", lambda calls, **_: {name: [0.002, 0.004] for name in calls})
    times, _ = profile.side_by_side(ddnn.load(bundles.make(tmp_path / "bundle")), 1, 0.0)
    assert times == {name: [2.0, 4.0] for name in bundles.PATHS}


def another(folder: Path) -> None:
    """Let the profile be of another machine."""
    path = next(folder.glob("machines/*/profile.json"))
    content = json.loads(path.read_text())
    content["machine"]["cpu"] = "Another"
    theirs = folder / "machines" / machine.Machine(**content["machine"]).key
    path.parent.rename(theirs)
    (theirs / "profile.json").write_text(json.dumps(content))


def copied(source: Path, place: Path) -> Path:
    import shutil

    shutil.copytree(source, place)
    return place


def test_another_machines_profile_is_not_trusted(measured: tuple[Path, profile.Profile], tmp_path: Path) -> None:
    bundle = copied(measured[0], tmp_path / "copy")
    theirs = next(bundle.glob("machines/*"))
    another(bundle)
    with pytest.raises(
        RequestError, match=r"no profile of this machine \(only of another machine\); run: ddnn profile"
    ):
        ddnn.load(bundle, threads=1).within(latency_ms=10)
    next(bundle.glob("machines/*")).rename(theirs)  # even where this machine's is expected
    with pytest.raises(RequestError, match="is of another bundle that was here before"):
        ddnn.load(bundle, threads=1).within(latency_ms=10)


def test_another_bundles_profile_is_not_trusted(measured: tuple[Path, profile.Profile], tmp_path: Path) -> None:
    bundle = copied(measured[0], tmp_path / "copy")
    bundles.seal(bundle, source={"dataset": "newer"})
    with pytest.raises(RequestError, match="is of another bundle that was here before; run: ddnn profile"):
        ddnn.load(bundle, threads=1).within(latency_ms=10)


def test_no_profile_says_what_to_run(tmp_path: Path) -> None:
    bundle = bundles.make(tmp_path / "bundle")
    with pytest.raises(RequestError, match=f"there is no profile of this machine; run: ddnn profile {bundle}"):
        ddnn.load(bundle).within(latency_ms=10)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "ddnn-profile", "version": 2}', "is of another format than this ddnn reads"),
        ('{"format": "ddnn-profile", "version": 1}', "is damaged"),
    ],
)
@pytest.mark.usefixtures("_memory_is_known")
def test_damaged_profiles_are_named(
    measured: tuple[Path, profile.Profile], tmp_path: Path, content: str, sentence: str
) -> None:
    bundle = copied(measured[0], tmp_path / "copy")
    next(bundle.glob("machines/*/profile.json")).write_text(content)
    with pytest.raises(BundleError, match=rf"profile.json {sentence}.*; remove it and measure again"):
        ddnn.load(bundle, threads=1).within(latency_ms=10)
    assert len(measure(bundle, [1], [1]).rows) == 3  # measuring anew mends it


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", 1), ("batch", [1]), ("batch", "1"), ("threads", None), ("shared", 0), ("p50_ms", 0), ("p95_ms", "1"),
        ("p50_ms", 10**400), ("runs", 0), ("busy", "x"), ("memory_mb", 0), ("peak_mb", "x"), ("depth", "middle"),
    ],
)  # fmt: skip
def test_a_profile_that_cannot_have_been_measured_is_damaged(
    measured: tuple[Path, profile.Profile], tmp_path: Path, key: str, value: object
) -> None:
    """The last: a depth twice, and another not at all."""
    bundle = copied(measured[0], tmp_path / "copy")
    path = next(bundle.glob("machines/*/profile.json"))
    content = json.loads(path.read_text())
    content["rows"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"profile.json is damaged .*; remove it and measure again"):
        ddnn.load(bundle, threads=1).within(latency_ms=1e6)


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_waited_for(measured: tuple[Path, profile.Profile], tmp_path: Path) -> None:
    bundle = copied(measured[0], tmp_path / "copy")
    path = next(bundle.glob("machines/*/profile.json"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match=r"profile.json is no file; remove it and measure again"):
        ddnn.load(bundle, threads=1).within(latency_ms=1e6)


def test_within_picks_for_the_model_as_it_is_loaded(measured: tuple[Path, profile.Profile]) -> None:
    bundle, _ = measured
    model = ddnn.load(bundle, threads=1)
    assert model.within(latency_ms=1e6) == "large"
    assert model.within(memory_mb=1e6, batch=3) == "large"
    assert ddnn.load(bundle, ["small", "middle"], threads=1).within(latency_ms=1e6) == "middle"
    with pytest.raises(BudgetError, match="no depth fits"):
        model.within(latency_ms=1e-6)
    with pytest.raises(
        RequestError, match="batch 7, 1 thread was not measured on this machine; measured are: batch 1, 1"
    ):
        model.within(latency_ms=1e6, batch=7)
    with pytest.raises(RequestError, match=r"batch 1, 3 threads was not measured .* --batch 1 --threads 3"):
        ddnn.load(bundle, threads=3).within(latency_ms=1e6)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"latency_ms": 5, "batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"latency_ms": 5, "batch": 1.5}, "batch=1.5 must be a whole number of at least 1"),
        ({"latency_ms": "5"}, "a budget of '5' ms must be a number above 0"),
        ({"memory_mb": True}, "a budget of True MiB must be a number above 0"),
        ({"latency_ms": float("nan")}, "a budget of nan ms must be a number above 0"),
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, asked: dict[str, Any], sentence: str) -> None:
    """Whether there is a profile or not."""
    with pytest.raises(RequestError, match=sentence):
        ddnn.load(bundles.make(tmp_path / "bundle")).within(**asked)


@pytest.mark.parametrize(("number", "text"), [(3.21, "3.21"), (3210.4, "3210"), (1.5e6, "1500000")])
def test_what_is_over_a_budget_has_no_exponent(number: float, text: str) -> None:
    with pytest.raises(BudgetError, match=f"takes {text} ms, "):
        profile.pick([row("a", number, number)], NETS, latency_ms=number / 2)


# ---- the rule


def net(name: str, top1: float | None) -> Net:
    return Net(name, (1,), f"{name}.onnx", 1, 1, top1, None, None)


def row(name: str, p50: float, p95: float, peak: float | None = 100) -> Row:
    return Row(name, 1, 1, False, p50, p95, 40, 0.0, peak, peak)


NETS = {"a": net("a", 0.5), "b": net("b", 0.7), "c": net("c", 0.6)}
ROWS = [row("a", 1, 2, 50), row("b", 5, 9, 100), row("c", 4, 12, 80)]


def test_the_most_accurate_that_fits_is_picked() -> None:
    assert profile.pick(ROWS, NETS, latency_ms=5).depth == "b"
    assert profile.pick(ROWS, NETS, latency_ms=4.9).depth == "c"
    assert profile.pick(ROWS, NETS, latency_ms=10, p95=True).depth == "b"
    assert profile.pick(ROWS, NETS, latency_ms=5, p95=True).depth == "a"
    assert profile.pick(ROWS, NETS, memory_mb=90).depth == "c"
    assert profile.pick(ROWS, NETS, latency_ms=5, memory_mb=60).depth == "a"
    even = {name: net(name, 0.5) for name in "abc"}
    assert profile.pick(ROWS, even, latency_ms=100).depth == "a"  # of equally accurate ones the fastest


def test_picking_is_the_rule_written_out() -> None:
    draw = random.Random(0)
    for _ in range(300):
        nets = {name: net(name, draw.choice([0.5, 0.6, 0.7])) for name in "abcd"}
        rows = []
        for name in nets:
            p50 = draw.uniform(1, 9)
            rows.append(row(name, p50, p50 * draw.uniform(1, 2), draw.uniform(50, 150)))
        latency, memory, p95 = draw.uniform(1, 12), draw.choice([None, draw.uniform(40, 150)]), draw.random() < 0.5
        fitting = [
            r
            for r in rows
            if (r.p95_ms if p95 else r.p50_ms) <= latency and (memory is None or (r.peak_mb or 0) <= memory)
        ]
        if fitting:
            most = max(nets[r.depth].top1 or 0 for r in fitting)
            expected = min((r.p50_ms, r.depth) for r in fitting if nets[r.depth].top1 == most)[1]
            assert profile.pick(rows, nets, latency_ms=latency, memory_mb=memory, p95=p95).depth == expected
        else:
            with pytest.raises(BudgetError):
                profile.pick(rows, nets, latency_ms=latency, memory_mb=memory, p95=p95)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (
            {"latency_ms": 0.5},
            "no depth fits: a, which comes nearest, takes 1 ms, 0.5 ms more than 0.5 (p50; batch 1, 1",
        ),
        ({"latency_ms": 1.5, "p95": True}, "a, which comes nearest, takes 2 ms, 0.5 ms more than 1.5 (p95;"),
        ({"memory_mb": 40}, "a, which comes nearest, takes 50 MiB, 10 MiB more than 40"),
        ({"latency_ms": 0.8, "memory_mb": 45}, "takes 1 ms, 0.2 ms more than 0.8 and 50 MiB, 5 MiB more than 45"),
        ({"latency_ms": 3, "memory_mb": 10}, "takes 50 MiB, 40 MiB more than 10 (p50"),
    ],
)
def test_none_fits_says_by_how_much(budget: dict[str, float], sentence: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(sentence)):
        profile.pick(ROWS, NETS, **budget)  # type: ignore[arg-type]


def test_what_cannot_be_picked_by_is_said() -> None:
    with pytest.raises(RequestError, match="nothing to pick by"):
        profile.pick(ROWS, NETS)
    for limit in (0, -1, float("nan")):
        with pytest.raises(RequestError, match="must be a number above 0"):
            profile.pick(ROWS, NETS, latency_ms=limit)
    with pytest.raises(RequestError, match="the bundle does not say how accurate b is"):
        profile.pick(ROWS, {**NETS, "b": net("b", None)}, latency_ms=5)
    with pytest.raises(RequestError, match="does not say how much memory a process takes"):
        profile.pick([row("a", 1, 2, None)], NETS, memory_mb=50)
    assert profile.pick([row("a", 1, 2, None)], NETS, latency_ms=5).depth == "a"


# ---- the machine


def test_machines_differ_in_what_latency_depends_on() -> None:
    here = machine.this_machine()
    assert here == machine.this_machine()
    others = [
        dataclasses.replace(here, cpus=here.cpus + 1),
        dataclasses.replace(here, onnxruntime="0"),
        dataclasses.replace(here, simd=""),
        dataclasses.replace(here, cpu="other"),
    ]
    assert len({each.key for each in [here, *others]}) == 5


def test_a_container_has_the_cpus_it_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for granted, expected in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)):
        monkeypatch.setattr(Path, "read_text", lambda self, granted=granted: granted)
        assert machine.available_cpus() == expected


def test_other_work_is_seen_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By how long threads waited for a CPU: one that slept and one that ended do not count, a new one does."""
    read = [{"1": (100, 10), "2": (50, 5), "3": (7, 7)}, {"1": (160, 30), "2": (50, 5), "4": (20, 0)}]
    for threads, cpus, expected in ((2, 2, 20 / 100), (2, 1, 0.0)):
        times = iter(read)
        monkeypatch.setattr(machine, "_tasks", lambda times=times: next(times))
        monkeypatch.setattr(machine, "available_cpus", lambda cpus=cpus: cpus)
        assert machine.Attention(threads).denied() == pytest.approx(expected)
    monkeypatch.setattr(machine, "_tasks", dict)
    assert machine.Attention(2).denied() == 0.0  # a system that does not say


def test_memory_is_that_of_this_process() -> None:
    """In a process that has given back nothing before: what an allocator keeps would be used again, and not counted."""
    code = """
from ddnn.memory import peak_mb, resident_mb
before = resident_mb()
block = bytearray(64 * 2**20)
block[::4096] = b"x" * (len(block) // 4096)
after = resident_mb()
print(after - before, peak_mb() - after)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, above = map(float, done.stdout.split())
    assert 50 < taken < 80
    assert above > -1


def test_a_profile_can_be_drawn(measured: tuple[Path, profile.Profile], tmp_path: Path) -> None:
    from ddnn.runtime.output import write_profile

    manifest: Manifest = read_manifest(measured[0])
    files = write_profile(measured[1], manifest.nets, tmp_path)
    assert [path.name for path in files] == ["profile.svg", "profile.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[0].read_text()
