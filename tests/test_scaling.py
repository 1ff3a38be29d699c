"""The arithmetic of docs/scaling.md, against figures worked out by hand; the page is what the script prints."""

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import cluster  # noqa: E402
import scaling  # noqa: E402

PLAIN = dataclasses.replace(
    cluster.Hardware(), peak=1e12, bandwidth=1e12, link=100.0, network=10.0, cores_per_gpu=2, decoded=50.0,
    reached_peak=0.5, reached_bandwidth=0.5, reached_network=0.5, hop=0.0, launch=0.0,
)  # fmt: skip


def facts(**changed: Any) -> cluster.Facts:
    given = {
        "name": "two layers", "tree_macs": 10**9, "full_macs": 10**9, "parameters": 100, "buffers": 8, "saved": 1e9,
        "saved_lean": 5e8, "traffic": 5e9, "operators": 1000, "norms": 3, "ready": [(0.5, 200), (1.0, 200)],
    }  # fmt: skip
    return cluster.Facts(**{**given, **changed})


def test_a_ring_by_sending_every_piece() -> None:
    """Each of n GPUs sends n - 1 pieces to sum up, and n - 1 to spread the sums."""
    for gpus, speed in ((2, 50.0), (8, 50.0), (64, 5.0)):
        sent = sum(400 / gpus for _ in range(gpus - 1)) + sum(400 / gpus for _ in range(gpus - 1))
        assert cluster.ring(400, gpus, PLAIN) == pytest.approx(sent / speed)
    assert cluster.ring(400, 1, PLAIN) == 0
    late = dataclasses.replace(PLAIN, hop=1.0)
    assert cluster.ring(400, 8, late) - cluster.ring(400, 8, PLAIN) == pytest.approx(14)


def test_buckets_close_when_they_are_full() -> None:
    ready = [(0.1, 3), (0.2, 3), (0.3, 3), (0.4, 7), (0.5, 2), (1.0, 1)]
    assert cluster.buckets(ready, first=4, cap=10) == [(0.2, 6), (0.4, 10), (1.0, 3)]
    assert cluster.buckets([], first=4, cap=10) == []


def test_overlap_by_hand() -> None:
    # two buckets of 200 bytes at 2 GPUs: 200 x 2 x 1/2 / 50 = 4 s each
    ready = [(0.5, 200), (1.0, 200)]
    # backward of 10 s: the first goes from 5 to 9, the second from 10 to 14
    assert cluster.overlap(ready, 10.0, 2, PLAIN) == (8.0, 4.0)
    # backward of 4 s: from 2 to 6, then from 6 to 10
    assert cluster.overlap(ready, 4.0, 2, PLAIN) == (8.0, 6.0)
    assert cluster.overlap(ready, 4.0, 1, PLAIN) == (0.0, 0.0)
    # never less than the last bucket, never more than all of it
    for backward in (0.1, 1.0, 7.0, 100.0):
        total, exposed = cluster.overlap(ready, backward, 8, PLAIN)
        assert cluster.ring(200, 8, PLAIN) - 1e-9 <= exposed <= total


def test_a_step_by_hand() -> None:
    one = cluster.step(facts(), 1, 100, PLAIN)
    assert one.compute == pytest.approx(6 * 1e9 * 100 / 5e11)  # 1.2 s
    assert one.traffic == pytest.approx(5e9 * 100 / 5e11)  # 1.0 s
    assert one.total == pytest.approx(2.2)
    # 400 bytes go as one bucket, when the last of them is there
    two = cluster.step(facts(), 2, 100, PLAIN)
    assert two.network == pytest.approx(8.0)
    assert two.exposed == pytest.approx(8.0)
    # 2 MiB each at 2 MiB/s are sent from half of backward, 0.733 s, to 1.733 and then to 2.733
    large = facts(ready=[(0.5, 2**21), (1.0, 2**21)])
    two = cluster.step(large, 2, 100, dataclasses.replace(PLAIN, link=2.0**22))
    assert two.exposed == pytest.approx(2.2 / 3 + 2 - 2.2 * 2 / 3)
    slow = dataclasses.replace(PLAIN, launch=0.01)
    assert cluster.step(facts(), 1, 100, slow).busy == pytest.approx(10.0)


def test_what_limits() -> None:
    assert cluster.limits(facts(), 1, 100, PLAIN) == (["compute", "decoding", "storage"], pytest.approx(100 / 2.2))
    few = dataclasses.replace(PLAIN, decoded=10.0)
    assert cluster.limits(facts(), 1, 100, few) == (["decoding", "compute", "storage"], pytest.approx(20.0))
    assert cluster.limits(facts(traffic=9e9), 1, 100, PLAIN)[0][0] == "GPU memory bandwidth"
    assert cluster.limits(facts(), 64, 100, PLAIN)[0][0] == "network"
    far = dataclasses.replace(PLAIN, disk=110e3)
    assert cluster.limits(facts(ready=[]), 16, 100, far) == (["storage", "compute", "decoding"], pytest.approx(2.0))
    slow = dataclasses.replace(PLAIN, launch=0.01)
    assert cluster.limits(facts(), 1, 100, slow)[0][0] == "launching operators"


def test_memory_by_hand() -> None:
    assert cluster.memory(facts(), 3, context=0) == 18 * 100 + 8 + 3e9
    assert cluster.memory(facts(), 3, lean=True, context=0) == 18 * 100 + 8 + 1.5e9
    assert cluster.checkpoint(facts()) == 808


def test_failures() -> None:
    cost, mtbf, restart = 5.0, 20_000.0, 60.0
    best = cluster.best_interval(cost, mtbf)
    assert best == pytest.approx(math.sqrt(200_000))
    losses = {k: cluster.lost(k * best, cost, mtbf, restart) for k in (0.5, 0.9, 1.0, 1.1, 2.0)}
    assert min(losses, key=lambda k: losses[k]) == 1.0
    found = cluster.simulate_failures(best, cost, mtbf, restart)
    assert found == pytest.approx(losses[1.0], rel=0.05)
    assert cluster.simulate_failures(100, 1.0, 1e15, 60) == pytest.approx(1 - 100 / 101)
    # exactly, by the geometric series: of an exponential time, so many whole pieces are finished in the mean
    pieces = 1 / math.expm1((best + cost) / mtbf)
    assert found == pytest.approx(1 - best * pieces / (mtbf + restart), rel=0.05)


def test_bytes_that_operators_move_and_hold() -> None:
    a = torch.randn(4, 8, requires_grad=True)
    b = torch.randn(8, 2)
    with scaling.Traffic() as found:
        c = a.detach() @ b.view(8, 2)  # reads 32 + 16 numbers, writes 8
        c.add_(1.0)  # reads and writes 8
    assert (found.bytes, found.operators) == (4 * (32 + 16 + 8) + 4 * (8 + 8), 2)
    net = scaling.nest(*scaling.build("cifar-resnet8-14-20", 10, width=4))
    held = scaling.Held(net)
    with held.hooks():
        (a.exp().exp().sum()).backward()  # two results of 4 x 8 numbers
    assert held.peak == 2 * 4 * 32
    assert held._now == 0


def test_gradients_arrive_once_each_and_last_at_the_end() -> None:
    torch.manual_seed(0)
    net = scaling.nest(*scaling.build("cifar-resnet8-14-20", 10, width=4)).train()
    ready = scaling.gradients(net, torch.randn(4, 3, 32, 32), torch.arange(4))
    assert len(ready) == len(list(net.parameters()))
    assert sum(size for _, size in ready) == 4 * sum(p.numel() for p in net.parameters())
    done = [share for share, _ in ready]
    assert done == sorted(done)
    assert 0 <= done[0] < 0.2
    assert done[-1] == 1.0


def test_the_page_is_what_the_script_prints() -> None:
    page = scaling.PAGE.read_text()
    assert scaling.written(page, scaling.parts(64, cluster.Hardware())) == page, "python benchmarks/scaling.py --write"
    for name in ("networks", "speeds", "failures", "check", "assumptions"):
        assert re.search(rf"<!-- {name} -->\n\|", page)


@pytest.mark.slow
def test_the_networks_are_what_was_counted() -> None:
    counted = {f["name"]: f for f in scaling.json.loads(scaling.COUNTED.read_text())}
    assert set(counted) == {*scaling.PRESETS, "resnet50"}
    again = dataclasses.asdict(scaling.count("resnet26-50"))
    kept = counted["resnet26-50"]
    for key in ("tree_macs", "full_macs", "parameters", "buffers", "norms"):
        assert again[key] == kept[key], key
    for key in ("saved", "saved_lean", "traffic", "operators"):  # another version of torch may cut operators otherwise
        assert again[key] == pytest.approx(kept[key], rel=0.1), key
    assert sum(size for _, size in again["ready"]) == sum(size for _, size in kept["ready"])
