"""What can go wrong in a long training does go wrong here: kills, pre-emption, full disks, a host that is gone."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Quiet
from ddnn import recipe
from ddnn.checkpoint import RunFolder
from ddnn.errors import RunError
from ddnn.trainer import train
from launching import ENVIRONMENT, EXACT, finished, steps_kept, torchrun, weights

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("DDNN_KILLS", "50"))
EVERY = 4  # steps between checkpoints: no more are repeated


def children(process: int) -> list[int]:
    """The processes that torchrun has started and that are still there."""
    listing = Path(f"/proc/{process}/task/{process}/children")
    return [int(pid) for pid in listing.read_text().split()] if listing.exists() else []


def until(happened: Iterator[bool], within_s: float = 240) -> None:
    end = time.monotonic() + within_s
    for yes in happened:
        if yes:
            return
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A training that is killed, with its workers, when the test is over."""
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as training:
        try:
            yield training
        finally:
            workers = children(training.pid)
            training.kill()
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)


@pytest.mark.timeout(1200)
def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL of one of two processes at random moments; torchrun starts them again, and nothing is different."""
    epochs = min(20, 4 + 2 * KILLS)
    often = [*EXACT, f"train.epochs={epochs}", f"train.checkpoint_steps={EVERY}", "train.precision=float32"]
    finished(torchrun(2, "digits", *often, "--out", tmp_path / "undisturbed"))

    run, steps, chance = tmp_path / "run", epochs * 5, random.Random(0)
    moments = sorted(chance.randrange(steps - EVERY) for _ in range(KILLS))
    launch = ("--standalone", f"--max-restarts={KILLS}", "--monitor-interval=0.05")
    with started(torchrun(2, "digits", *often, "--out", run, options=launch)) as training:
        assert training.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(training.stdout or []))
        reader.start()
        before: list[int] = []
        killed, furthest = 0, 0
        for moment in moments:
            # new processes; then, the training having come as far, at any time within a checkpoint's interval
            until(len(now) == 2 and not set(now) & set(before) for now in iter(lambda: children(training.pid), None))
            before = children(training.pid)
            until(max(steps_kept(run), default=0) >= moment - EVERY for _ in iter(int, None))
            time.sleep(chance.random() * chance.choice([0.1, 2.0]))
            kept = max(steps_kept(run), default=0)
            assert kept >= furthest, "something already saved was lost"
            furthest = kept
            os.kill(chance.choice(before), signal.SIGKILL)
            killed += 1
        code = training.wait(timeout=240)
        reader.join()
    assert code == 0, "".join(lines)
    assert killed == KILLS
    ours, theirs = weights(run), weights(tmp_path / "undisturbed")
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
    assert [epoch["step"] for epoch in RunFolder.open(run).metrics()] == [5 * e for e in range(1, epochs + 1)]


@pytest.mark.parametrize("told", ["workers", "torchrun"])
def test_preemption_leaves_a_checkpoint_and_a_code_to_requeue_on(told: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = [*EXACT, "train.epochs=2000", "train.checkpoint_minutes=60", "--out", run]
    command = torchrun(2, "digits", *long)
    with started(command) as training:
        until(bool(steps_kept(run)) for _ in iter(int, None))
        workers = children(training.pid)
        since = time.monotonic()
        for process in workers if told == "workers" else [training.pid]:  # schedulers do the one or the other
            os.kill(process, signal.SIGTERM)
        printed, _ = training.communicate(timeout=120)
    assert time.monotonic() - since < 10 + 10, printed  # ten for the checkpoint, ten for torchrun to see it
    assert "stopped by SIGTERM" in printed
    assert told == "torchrun" or "exitcode  : 75" in printed
    step = int(printed.split("after step ")[1].split(",")[0]) if "after step" in printed else None
    assert step is None or steps_kept(run)[-1] == step
    reached = steps_kept(run)[-1]
    with started(command) as again:  # the same command goes on
        until(steps_kept(run)[-1] > reached or again.poll() is not None for _ in iter(int, None))
        assert again.poll() is None, again.communicate()[0]


# -- disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    run = RunFolder.create(small_disk / "run", recipe.load("digits", [*EXACT, "train.checkpoint_steps=1"]))
    filler = small_disk / "filler"
    used: list[int] = []

    class Filling(Quiet):
        def epoch(self, metrics: dict[str, object]) -> None:
            used.extend(steps_kept(run.path))
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(max(free - 4096, 0)))

    with pytest.raises(RunError, match=r"cannot write .*: No space left on device; what was saved before is intact"):
        train(run, Filling())
    assert steps_kept(run.path) == used  # what was saved is there, and nothing half written beside it
    assert not list(run.path.rglob("*.tmp"))
    filler.unlink()
    shutil.rmtree(run.path / "tensorboard")
    moved = run.path.parent.parent / "moved"
    shutil.move(run.path, moved)  # the disk is too small for the end of it
    train(RunFolder.open(moved), Quiet())
    whole = RunFolder.create(moved.parent / "whole", run.recipe)
    train(whole, Quiet())
    assert (moved / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_a_folder_that_can_only_be_read(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunError, match=r"cannot write .*: Read-only file system"):
        RunFolder.create(small_disk / "run", recipe.load("digits", list(EXACT)))


# -- two hosts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between them: 10.77.0.1 and 10.77.0.2."""
    names = f"ddnn-a-{os.getpid()}", f"ddnn-b-{os.getpid()}"

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0

    if os.geteuid() != 0 or shutil.which("ip") is None or not ip("netns", "add", names[0]):
        pytest.skip("needs the right to make network namespaces, and iproute2")
    try:
        assert ip("netns", "add", names[1])
        assert ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for number, (name, link) in enumerate(zip(names, ("va", "vb"), strict=True), 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            assert ip("-n", name, "link", "set", link, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_a_host_that_vanishes_ends_the_training_in_time(two_hosts: tuple[str, str], tmp_path: Path) -> None:
    run, patience_s = tmp_path / "run", 9
    long = ["digits", *EXACT, "train.epochs=2000", "train.checkpoint_steps=5"]
    hosts = []
    for number, (name, link) in enumerate(zip(two_hosts, ("va", "vb"), strict=True)):
        meet = (
            "--nnodes=2",
            f"--node-rank={number}",
            "--master-addr=10.77.0.1",
            "--master-port=29412",
        )
        command = torchrun(1, *long, f"train.patience_minutes={patience_s / 60}", "--out", run, options=meet)
        hosts.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": link},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        until(max(steps_kept(run), default=0) >= 10 for _ in iter(int, None))
        subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "va", "down"], check=True)
        since = time.monotonic()
        kept = steps_kept(run)[-1]
        printed = []
        for host in hosts:
            workers = children(host.pid)
            until(not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers) for _ in iter(int, None))
            assert time.monotonic() - since < 3 * patience_s
        for host in hosts:
            host.kill()
            printed.append(host.communicate(timeout=60)[0])
        for text in printed:
            assert f"another process was lost, or did not answer for {patience_s} s" in text
        assert steps_kept(run)[-1] >= kept
        assert RunFolder.open(run).load_checkpoint() is not None
    finally:
        for host in hosts:
            host.kill()
