"""Measure networks: accuracy, parameters, multiply-accumulates (MACs), latency."""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddnn.device import threads
from ddnn.families.discover import ghost
from ddnn.network import DDNN
from ddnn.processes import ALONE, Processes
from ddnn.proof import at_rest
from ddnn.timing import in_turns


class Accuracy(TypedDict):
    """Shares of images whose class is the most likely one, or among the five most likely ones; in [0, 1]."""

    top1: float
    top5: float


class Measures(Accuracy):
    """One row of the table of sub-nets."""

    depths: list[int]
    params: int
    macs: int
    latency_ms: float


def evaluate(
    net: DDNN, batches: Iterable[tuple[Tensor, Tensor]], image_size: int, device: torch.device
) -> dict[str, Measures]:
    """Everything there is to say of every net, by name. Latency is that of the extracted sub-nets, batch 1."""
    return measures(net, accuracy(net, batches), image_size, device)


def measures(net: DDNN, scores: Mapping[str, Accuracy], image_size: int, device: torch.device) -> dict[str, Measures]:
    """The same, where the accuracy is known already."""
    plain = {name: copy.deepcopy(sub).eval() for name, sub in net.nets.items()}
    for sub in plain.values():
        sub.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # however they were trained
    latencies = latency_ms(plain, image_size, device)
    return {
        name: {
            "depths": list(net.depths[name]),
            "top1": scores[name]["top1"],
            "top5": scores[name]["top5"],
            "params": parameters(sub),
            "macs": macs(sub, image_size),
            "latency_ms": latencies[name],
        }
        for name, sub in plain.items()
    }


def accuracy(
    net: DDNN,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes = ALONE,
    only: Iterable[str] | None = None,
) -> dict[str, Accuracy]:
    """Accuracy of every net over batches of images [N, 3, H, W] and classes [N], each image counted once.

    `only` names some of the nets. Several processes each give batches of their own, and all get the accuracy over the
    batches of all.
    """
    kind = next(net.parameters()).dtype
    names = list(net.depths if only is None else only)
    counts = torch.zeros(len(names), 2, dtype=torch.int64)
    images = 0
    with at_rest(net):
        for x, target in batches:
            outputs = net(x.to(kind), only=names)
            counts += torch.stack([hits(outputs[name].logits, target).cpu() for name in names])
            images += len(x)
    *right, total = processes.sum(torch.cat([counts.flatten(), torch.tensor([images])])).tolist()
    assert total, "no images to evaluate on"
    return {
        name: {"top1": top1 / total, "top5": top5 / total}
        for name, top1, top5 in zip(names, right[::2], right[1::2], strict=True)
    }


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """How many of N images are right, as [top-1, top-5]. With fewer than five classes top-5 counts what there is."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
    return torch.stack([best[:, 0].sum(), best.sum()])


def parameters(net: nn.Module) -> int:
    """Number of parameters, each counted once however often it is shared."""
    return sum(p.numel() for p in net.parameters())


def macs(net: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image of 3 x `image_size` x `image_size` through convolutions and matrix products.

    Of a DDNN: those of the whole tree, common beginnings counted once. A network on the meta device is counted itself,
    any other by a ghost of it; while it is, its batch norms are out of it.
    """
    imagined = net if all(t.is_meta for t in itertools.chain(net.parameters(), net.buffers())) else ghost(net)
    norms = [  # which multiply nothing, and would take two thirds of the time
        (module, name, child)
        for module in imagined.modules()
        for name, child in module.named_children()
        if type(child) is nn.BatchNorm2d
    ]
    for module, name, _ in norms:
        setattr(module, name, nn.Identity())
    try:
        with at_rest(imagined):
            return call_macs(imagined, torch.empty(1, 3, image_size, image_size, device="meta"))
    finally:
        for module, name, norm in norms:
            setattr(module, name, norm)


def tree_bound(net: DDNN, image_size: int) -> float:
    """MACs of the tree of a DDNN over those of its nets alone: the share of the work that sharing leaves."""
    return macs(net, image_size) / sum(macs(sub, image_size) for sub in net.nets.values())


def call_macs(call: Callable[..., object], *inputs: object) -> int:
    """Multiply-accumulates of one call, whose tensors may be on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*inputs)
    return int(counter.get_total_flops()) // 2


def latency_ms(nets: Mapping[str, nn.Module], image_size: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of one image through each net, eager float32, with torch's current number of threads."""
    x = torch.zeros(1, 3, image_size, image_size, device=device)

    def call(net: nn.Module) -> Callable[[], object]:
        return lambda: net(x)

    with torch.inference_mode():
        seconds = side_by_side({name: call(net) for name, net in nets.items()}, device, budget_s=2.0)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def latency_conditions(device: torch.device) -> str:
    """What `latency_ms` measures under, for a person."""
    return f"batch 1, eager float32, {threads(device)}"


def side_by_side(
    calls: Mapping[str, Callable[[], object]], device: torch.device, budget_s: float, warmup: int = 3, least: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns: `least` rounds, and then until `budget_s` are spent or there are 50."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return in_turns(calls, seconds=budget_s, fewest=least, most=50, warmup=warmup, settle=settle)


def ratio(seconds: Mapping[str, Sequence[float]], above: Iterable[str], below: Iterable[str]) -> float:
    """What the calls `above` take together over those `below`, from `side_by_side`: the median over its rounds.

    A machine that is slower for some seconds, as shared ones are, is so for both calls of a round. So this moves
    half as much from one measurement to the next as a ratio of medians.
    """

    def together(names: Iterable[str]) -> list[float]:
        return [sum(times) for times in zip(*(seconds[name] for name in names), strict=True)]

    return statistics.median(over / under for over, under in zip(together(above), together(below), strict=True))
