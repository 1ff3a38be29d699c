"""The arithmetic of `scaling.py`: a training step on so many GPUs, from numbers of networks and hardware.

Nothing here was measured on such hardware. Units: seconds, bytes, bytes per second; everything per GPU unless it says
otherwise.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

IMAGES = 1_281_167  # of ImageNet's training set


@dataclass(frozen=True)
class Hardware:
    """What is assumed of the machines; docs/scaling.md has the sources."""

    name: str = "H100 SXM"
    peak: float = 989.4e12  # operations per second, bf16, dense
    bandwidth: float = 3.35e12  # of the GPU's memory
    memory: float = 80e9
    link: float = 450e9  # to other GPUs of the host, each way
    network: float = 50e9  # to other hosts, each way, per GPU
    gpus_per_host: int = 8
    cores_per_gpu: float = 14.0
    disk: float = 3e9  # reading, per host
    saving: float = 1e9  # a checkpoint, to where all hosts see it
    mtbf: float = 50_676 * 3600.0  # of one GPU with all that belongs to it
    restart: float = 300.0  # from a failure to the first new step
    reached_peak: float = 0.45
    reached_bandwidth: float = 0.8
    reached_network: float = 0.8
    hop: float = 5e-6  # of a message between neighbours in the ring
    launch: float = 6e-6  # of an operator, on the host
    small_reduce: float = 40e-6  # of an all-reduce of a norm's statistics
    decoded: float = 550.0  # images per second and core
    jpeg: float = 110e3


A100 = replace(
    Hardware(),
    name="A100 SXM 80 GB",
    peak=312e12,
    bandwidth=2.039e12,
    link=300e9,
    network=25e9,
    cores_per_gpu=16.0,
)
HARDWARE = {"h100": Hardware(), "a100": A100}


@dataclass(frozen=True)
class Facts:
    """What was counted of a network; per image of 224 px where it says so."""

    name: str
    tree_macs: int  # per image
    full_macs: int  # per image
    parameters: int
    buffers: int
    saved: float  # bytes per image that a plain joint step holds for its backward
    saved_lean: float  # and a lean one
    traffic: float  # bytes per image that all operators of a step read and write
    operators: int  # of a step
    norms: int  # batch norms run in a forward
    ready: list[tuple[float, int]] = field(default_factory=list)
    """Per parameter in the order of backward: share of its operations done when the gradient is complete, bytes."""


@dataclass(frozen=True)
class Step:
    gpus: int
    images: int
    compute: float
    traffic: float
    launch: float
    network: float  # all of the gradients' reduction
    exposed: float  # of it, what backward does not hide

    @property
    def busy(self) -> float:
        return max(self.compute + self.traffic, self.launch)

    @property
    def total(self) -> float:
        return self.busy + self.exposed


def ring(size: float, gpus: int, hardware: Hardware) -> float:
    """Seconds of a ring all-reduce: every GPU sends and gets 2 (n - 1) / n of the data, in 2 (n - 1) hops."""
    if gpus == 1:
        return 0.0
    speed = hardware.link if gpus <= hardware.gpus_per_host else min(hardware.link, hardware.network)
    return 2 * (gpus - 1) / gpus * size / (speed * hardware.reached_network) + 2 * (gpus - 1) * hardware.hop


def buckets(
    ready: Iterable[tuple[float, int]], first: float = 2**20, cap: float = 25 * 2**20
) -> list[tuple[float, int]]:
    """Gradients in the order of backward, in buckets as DistributedDataParallel makes them: when ready, bytes."""
    found: list[tuple[float, int]] = []
    size = 0
    when = 0.0
    for when, part in ready:
        size += part
        if size >= (cap if found else first):
            found.append((when, size))
            size = 0
    return [*found, (when, size)] if size else found


def overlap(full: list[tuple[float, int]], backward: float, gpus: int, hardware: Hardware) -> tuple[float, float]:
    """Send each bucket once it is full and the one before is through: seconds of sending, and what backward leaves."""
    free = total = 0.0
    for when, size in full:
        takes = ring(size, gpus, hardware)
        free = max(free, when * backward) + takes
        total += takes
    return total, max(0.0, free - backward)


def step(facts: Facts, gpus: int, images: int, hardware: Hardware) -> Step:
    """One step of `images` images per GPU.

    Operators limited by arithmetic and operators limited by memory take turns, so their times add up.
    """
    compute = 6 * facts.tree_macs * images / (hardware.peak * hardware.reached_peak)
    traffic = facts.traffic * images / (hardware.bandwidth * hardware.reached_bandwidth)
    launch = facts.operators * hardware.launch
    backward = 2 / 3 * max(compute + traffic, launch)
    network, exposed = overlap(buckets(facts.ready), backward, gpus, hardware)
    return Step(gpus, images, compute, traffic, launch, network, exposed)


def memory(facts: Facts, images: int, lean: bool = False, context: float = 1.5e9) -> float:
    """Weights, gradients, momentum and the buckets of gradients in float32, weights in bf16, buffers, activations."""
    fixed = (4 * 4 + 2) * facts.parameters + facts.buffers + context
    return fixed + images * (facts.saved_lean if lean else facts.saved)


def checkpoint(facts: Facts) -> float:
    """Bytes of a checkpoint: weights, momentum, buffers."""
    return 8 * facts.parameters + facts.buffers


def waits(facts: Facts, gpus: int, images: int, hardware: Hardware) -> dict[str, float]:
    """Seconds that one step would take if only this limited it."""
    one = step(facts, gpus, images, hardware)
    hosts = math.ceil(gpus / hardware.gpus_per_host)
    return {
        "GPUs": one.total,
        "decoding": images / (hardware.cores_per_gpu * hardware.decoded),
        "storage": gpus * images * hardware.jpeg / (hosts * hardware.disk),
    }


def limits(facts: Facts, gpus: int, images: int, hardware: Hardware) -> tuple[list[str], float]:
    """What limits, the tightest first, and the images per second that are left."""
    one = step(facts, gpus, images, hardware)
    parts = {"compute": one.compute, "GPU memory bandwidth": one.traffic, "network": one.exposed}
    if one.launch > one.compute + one.traffic:
        parts = {"launching operators": one.launch, "network": one.exposed}
    found = waits(facts, gpus, images, hardware)
    order = sorted(found, key=lambda what: -found[what])
    within = max(parts, key=lambda what: parts[what])
    return [within if what == "GPUs" else what for what in order], gpus * images / max(found.values())


def best_interval(cost: float, mtbf: float) -> float:
    """Young 1974: seconds between checkpoints, each of which stops the training for `cost`."""
    return math.sqrt(2 * cost * mtbf)


def lost(interval: float, cost: float, mtbf: float, restart: float) -> float:
    """Share of the time that goes to checkpoints, repeated work and restarts, to first order (Daly 2006)."""
    return cost / (interval + cost) + (interval / 2 + restart) / mtbf


def simulate_failures(
    interval: float, cost: float, mtbf: float, restart: float, *, failures: int = 10_000, seed: int = 0
) -> float:
    """The same share by simulation: so many failures at exponential intervals, each undoing what was not yet saved."""
    draw = random.Random(seed)
    kept = clock = 0.0
    for _ in range(failures):
        up = draw.expovariate(1 / mtbf)
        kept += up // (interval + cost) * interval
        clock += up + restart
    return 1 - kept / clock
