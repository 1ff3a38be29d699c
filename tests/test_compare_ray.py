"""Trainings on a Ray cluster: the same results, whatever happens to workers and hosts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY, trainings_of
from ddnn import recipe as recipes
from ddnn.checkpoint import RunFolder
from ddnn.compare import compare
from ddnn.errors import RunError
from ddnn.recipe import Recipe

RECIPE = (*TINY, "train.epochs=20", "train.threads=1")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ddnn[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning:ray")]


class Disturber:
    """Does something to the first training of this name that has a checkpoint, so many times."""

    def __init__(self, victim: str, folder: Path, harm: Callable[[dict[str, Any]], None], times: int = 1) -> None:
        self.victim, self.folder, self.harm, self.times = victim, folder, harm, times
        self.notes: list[str] = []
        self.ended: list[str] = []
        self.most_at_once = 0
        self.harmed: set[str] = set()

    def comparison(self, running: list[str], done: int, total: int, seconds_left: float | None) -> None:
        self.most_at_once = max(self.most_at_once, len(running))
        worker = self.folder / "workers" / f"{self.victim}.json"
        if len(self.harmed) == self.times or self.victim not in running:
            return
        about = json.loads(worker.read_text())
        if about["token"] not in self.harmed and list(self.folder.glob(f"runs/{self.victim}/checkpoints/step-*.pt")):
            self.harmed.add(about["token"])
            self.harm(about)

    def finished(self, name: str, summary: dict[str, Any]) -> None:
        self.ended.append(name)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def recipe() -> Recipe:
    return recipes.load("digits", RECIPE)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("runs/*/model.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of a comparison by the engine that is the default."""
    folder = tmp_path_factory.mktemp("undisturbed") / "fair"
    compare(folder, recipe(), ["ekd"], 2, Disturber("", folder, lambda about: None))
    return weights(folder)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three hosts in one: the head, which has no cores, and two with one each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.hosts = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


def engine(**options: Any) -> Any:
    from ddnn.compare.over_ray import OverRay

    return OverRay(**options)


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_is_replaced(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "fair"

    def kill(about: dict[str, Any]) -> None:
        os.kill(about["pid"], signal.SIGKILL)

    watcher = Disturber("ekd-seed0", folder, kill)
    path = compare(folder, recipe(), ["ekd"], 2, watcher, engine=engine())
    assert json.loads(path.read_text())["complete"]
    assert watcher.harmed
    assert watcher.most_at_once == 2
    assert re.match(
        r"ekd-seed0 lost its worker \(.+\); it goes on from its last checkpoint, attempt 2", watcher.notes[0]
    )
    assert len(watcher.notes) == 1
    assert "resumed after step" in (folder / "runs" / "ekd-seed0" / "log.txt").read_text()
    assert weights(folder) == undisturbed

    # a training that itself is killed, again and again, is given up; the other one is kept
    def kill_training(about: dict[str, Any]) -> None:
        for pid in trainings_of(folder / "again"):
            if b"ekd-seed2" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    watcher = Disturber("ekd-seed2", folder / "again", kill_training, times=4)
    with pytest.raises(
        RunError, match=r"1 of 3 .*ekd-seed2 \(lost its worker 4 times, at last so: it was killed by sig"
    ):
        compare(folder / "again", recipe(), ["ekd"], 3, watcher, engine=engine())
    assert sorted(watcher.ended) == ["ekd-seed0", "ekd-seed1"]
    assert weights(folder / "again") == undisturbed


def test_a_lost_host_is_replaced(cluster: Any, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "fair"
    lost = cluster.hosts[0]
    watcher = Disturber("ekd-seed0", folder, lambda about: cluster.remove_node(lost, allow_graceful=False))
    path = compare(folder, recipe(), ["ekd"], 2, watcher, engine=engine())
    assert json.loads(path.read_text())["complete"]
    assert watcher.harmed
    assert "lost its worker" in watcher.notes[0]
    assert weights(folder) == undisturbed


@pytest.mark.usefixtures("cluster")
def test_what_no_host_can_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddnn.compare import over_ray
    from ddnn.compare.over_ray import _complaint
    from ddnn.trainer import versions

    watcher = Disturber("", tmp_path, lambda about: None)
    large = recipes.load("digits", [*RECIPE, "train.threads=3"])
    with pytest.raises(RunError, match=r"no host .* can run a training, which takes 3 cores \(train\.threads\)$"):
        compare(tmp_path / "large", large, ["ekd"], 1, watcher, engine=engine())
    with monkeypatch.context() as patched:  # what is written here doesn't arrive there
        patched.setattr(over_ray, "write_atomic", lambda path, content: None)
        with pytest.raises(
            RunError, match=r"^host \S+ of the Ray cluster doesn't see \S+/apart as \S+ does; give an --out"
        ):
            compare(tmp_path / "apart", recipe(), ["ekd"], 1, watcher, engine=engine())
    driver = {"token": "ours", "host": "here", **versions()}
    (tmp_path / "workers").mkdir()
    assert "doesn't see" in str(_complaint(tmp_path, driver))
    (tmp_path / "workers" / "driver.json").write_text(json.dumps({**driver, "token": "another"}))
    assert re.search(
        r"host \S+ of the Ray cluster doesn't see .* as here does; give an", str(_complaint(tmp_path, driver))
    )
    (tmp_path / "workers" / "driver.json").write_text(json.dumps(driver))
    assert _complaint(tmp_path, driver) is None
    assert re.search(r"has torch \S+, here has 1\.0$", str(_complaint(tmp_path, {**driver, "torch": "1.0"})))


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    watcher = Disturber("", tmp_path, lambda about: None)
    with pytest.raises(RunError, match=r"cannot reach a Ray cluster at 127\.0\.0\.1:9: .*refused; `ray start --head`"):
        compare(tmp_path / "fair", recipe(), ["ekd"], 1, watcher, engine=engine(address="127.0.0.1:9"))


def test_ctrl_c_leaves_what_can_be_gone_on_with(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """By the command line, which starts Ray on this machine by itself."""
    folder = tmp_path / "fair"
    options = ["--methods", "ekd", "--seeds", "2", "--engine", "ray", "--workers", "1", "-o", str(folder)]
    command = [sys.executable, "-m", "ddnn", "compare", "digits", *RECIPE, *options]
    first = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has them ignore Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 200
    while not list(folder.glob("runs/*/checkpoints/step-*.pt")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "stopped; the same command goes on where it was" in said
    assert trainings_of(folder) == []
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert weights(folder) == undisturbed
    assert "resumed after step" in (folder / "runs" / "ekd-seed0" / "log.txt").read_text()
    assert len(RunFolder.open(folder / "runs" / "ekd-seed0").metrics()) == 20
