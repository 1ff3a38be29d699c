"""Find the stages of a network that no family lists, by running it once and looking at what its modules do.

A stage is a run of modules of one class, side by side in the same holder, each taking what the one before it gave, and
each after the first giving what has the shape of what it took: so the later ones can be left out.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddnn.errors import NestingError
from ddnn.families.anatomy import joined

Net = TypeVar("Net", bound=nn.Module)

SIZES = (64, 32, 224, 28, 96, 128, 256, 384, 16, 8)
"""Sides of the images that are tried on a network that does not say what it takes, in pixels."""


@dataclass(frozen=True)
class Call:
    """What one module did while its network ran, if it ran once, on one tensor."""

    order: int
    takes: torch.Size
    gives: torch.Size


@dataclass(frozen=True)
class Behaviour:
    """What the modules of a network did with one batch, by name, and what came out."""

    calls: dict[str, Call]
    times: dict[str, int]
    """How often each module ran."""
    order: dict[str, int]
    """When each layer that has parameters ran last."""
    result: object


def example_for(net: nn.Module) -> Tensor:
    """Images that the network takes, on the meta device, found out by trying; `NestingError` if none of them do."""
    ghost_net = ghost(net).eval()
    for channels, size in itertools.product(_channels(net), [*declared_sizes(net), *SIZES]):
        x = torch.empty(2, channels, size, size, device="meta")
        with suppress(Exception), torch.no_grad():
            ghost_net(x)
            return x
    raise NestingError(
        f"cannot tell what images {type(net).__name__} takes; give some that it takes, as "
        "example=torch.randn(2, 3, 32, 32)"
    )


def ghost(net: Net) -> Net:
    """A copy on the meta device: it computes shapes and holds no numbers."""
    tensors: dict[int, object] = {id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad) for t in net.parameters()}
    return copy.deepcopy(net, tensors).to("meta")


def behaviour(net: nn.Module, x: Tensor) -> Behaviour:
    """Run the network in evaluation mode on a ghost of itself and of `x`, and say what its modules did."""
    ghost_net = ghost(net).eval()
    calls: dict[str, Call] = {}
    times: dict[str, int] = {}
    order: dict[str, int] = {}

    def seen(name: str) -> object:
        def hook(module: nn.Module, given: tuple[object, ...], result: object) -> None:
            times[name] = times.get(name, 0) + 1
            if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                order[name] = sum(times.values())
            if given and isinstance(given[0], Tensor) and isinstance(result, Tensor):
                calls[name] = Call(len(calls), given[0].shape, result.shape)

        return hook

    for name, module in ghost_net.named_modules():
        module.register_forward_hook(seen(name))  # type: ignore[arg-type]
    with torch.no_grad():
        result = ghost_net(x.to("meta"))
    once = {name: call for name, call in calls.items() if times[name] == 1}
    return Behaviour(once, times, order, result)


def find_stages(net: nn.Module, did: Behaviour) -> list[str]:
    """Names of the stages, in the order they run, in the notation of `named_stages`; none if there are none."""
    runs = list(_runs(net, "", did)) or list(_patterns(net, did))
    classes = {type(net.get_submodule(run.names[0])) for run in runs if run.step == 1} - {nn.Sequential, nn.ModuleList}
    runs = [run for run in runs if not _inside_a_block(net, run, classes)]
    return [run.named(net) for run in sorted(runs, key=lambda run: did.calls[run.names[0]].order)]


@dataclass(frozen=True)
class Run:
    """Modules that follow each other in one holder; each `step` of them are a block."""

    holder: str
    names: tuple[str, ...]
    step: int = 1

    def named(self, net: nn.Module) -> str:
        """In the notation of `named_stages`."""
        children = [joined(self.holder, child) for child in net.get_submodule(self.holder)._modules]
        first = children.index(self.names[0])
        if self.step == 1 and len(self.names) == len(children) and self.holder:
            return self.holder
        if isinstance(net.get_submodule(self.holder), (nn.Sequential, nn.ModuleList)):
            step = f":{self.step}" if self.step > 1 else ""
            return f"{self.holder}[{first}:{first + len(self.names)}{step}]"
        return f"{self.names[0]}..{self.names[-1].rpartition('.')[2]}"


def _runs(net: nn.Module, holder: str, did: Behaviour) -> Iterator[Run]:
    """The runs in a holder, or in what it holds."""
    module = net.get_submodule(holder)
    taken: set[str] = set()
    for run in _runs_here(module, holder, did):
        inner = [found for name in run.names for found in _runs(net, name, did)] if _plain(net, run.names) else []
        taken |= set(run.names)
        if inner:
            yield from inner  # Sequentials in a row are stages rather than blocks
        else:
            yield run
    for child, part in module.named_children():
        if joined(holder, child) not in taken and next(part.children(), None) is not None:
            yield from _runs(net, joined(holder, child), did)


def _runs_here(module: nn.Module, holder: str, did: Behaviour) -> Iterator[Run]:
    named = [(joined(holder, child), part) for child, part in module._modules.items() if part is not None]
    listed = isinstance(module, (nn.Sequential, nn.ModuleList))
    run: list[str] = []
    for name, part in [*named, ("", nn.Identity())]:
        call = did.calls.get(name)
        leaf = next(part.children(), None) is None
        fits = call is not None and next(part.parameters(), None) is not None and (listed or not leaf)
        if run:
            before = did.calls[run[-1]]
            same = type(part) is type(module.get_submodule(run[-1].removeprefix(holder).lstrip(".")))
            if fits and call and same and call.takes == before.gives and call.gives == call.takes:
                run.append(name)
                continue
            if len(run) > 1:
                yield Run(holder, tuple(run))
        run = [name] if fits else []


def _patterns(net: nn.Module, did: Behaviour) -> Iterator[Run]:
    """Runs of blocks that are written out flat, such as convolution, norm, ReLU, convolution, norm, ReLU."""
    for holder, module in net.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        names = [joined(holder, child) for child in module._modules]
        at = 0
        while at < len(names):
            best: tuple[int, int] = (0, 1)
            for step in range(2, 7):
                best = max(best, (_repeats(module, names, at, step, did) * step, -step))
            length, step = best[0], -best[1]
            if step > 1 and length > step:
                yield Run(holder, tuple(names[at : at + length]), step)
                at += length
            else:
                at += 1


def _repeats(module: nn.Sequential, names: Sequence[str], at: int, step: int, did: Behaviour) -> int:
    """How many blocks of `step` modules follow each other from `at` on, 0 if not even one begins there."""
    parts = list(module)
    kinds = [type(part) for part in parts[at : at + step]]
    if len(kinds) < step or next(parts[at].parameters(), None) is None or any(n not in did.calls for n in names[at:]):
        return 0
    blocks = 1
    while True:
        first = at + blocks * step
        last = first + step - 1
        if [type(part) for part in parts[first : last + 1]] != kinds:
            return blocks
        if did.calls[names[last]].gives != did.calls[names[first]].takes:
            return blocks
        blocks += 1


def _plain(net: nn.Module, names: Sequence[str]) -> bool:
    return all(type(net.get_submodule(name)) in (nn.Sequential, nn.ModuleList) for name in names)


def _inside_a_block(net: nn.Module, run: Run, classes: set[type[nn.Module]]) -> bool:
    """Whether the run lies in a module of a class whose modules are blocks elsewhere: then it is a part of a block."""
    parts = run.holder.split(".") if run.holder else []
    return any(type(net.get_submodule(".".join(parts[: i + 1]))) in classes for i in range(len(parts)))


def _channels(net: nn.Module) -> list[int]:
    """How many channels the images may have."""
    first = next((m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 3)
    return list(dict.fromkeys([first, 3, 1]))


def declared_sizes(net: nn.Module) -> list[int]:
    """Sizes of images that the network itself mentions."""
    sizes = []
    for holder in (net, getattr(net, "patch_embed", None)):
        for name in ("img_size", "image_size"):
            size = getattr(holder, name, None)
            size = size[0] if isinstance(size, (tuple, list)) and size else size
            if isinstance(size, int):
                sizes.append(size)
    declared = getattr(net, "pretrained_cfg", None)
    if isinstance(declared, dict) and isinstance(declared.get("input_size"), (tuple, list)):
        sizes.append(declared["input_size"][-1])
    return list(dict.fromkeys(sizes))
