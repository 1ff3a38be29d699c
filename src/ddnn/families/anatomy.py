"""Where one network keeps its stem, stages and head, and how it looks after its stages were cut."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ddnn.errors import NestingError

Modules = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A run of blocks at one resolution."""

    name: str
    """How tables, errors and users call it; it also says where it is, see `named_stages`."""
    blocks: tuple[Modules, ...]
    """Of every block the dotted names of its modules, in the order they run; mostly one."""

    def __len__(self) -> int:
        return len(self.blocks)


class Chain:
    """Functions one after the other as one: a block together with what its network does just before it."""

    def __init__(self, parts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        """Run them."""
        for part in self.parts:
            x = part(x)
        return x


def named_stages(net: nn.Module, names: Iterable[str]) -> tuple[Stage, ...]:
    """The stages that these names stand for in `net`.

    `layer1`: every module in `layer1` is a block. `blocks[0:4]`: the first four modules in `blocks` are; `[0:4]`, of
    the network itself. `features[7:13:3]`: each three are one. `block1..block3`: the modules from `block1` to `block3`
    of the same holder. `stages.*.blocks`: one stage for every module that fits.

    Raises `NestingError` for a name that leads nowhere.
    """
    stages = [stage for name in names for stage in _resolve(net, name)]
    taken: dict[str, str] = {}
    for stage in stages:
        for module in (module for block in stage.blocks for module in block):
            if module in taken:
                raise NestingError(f"stages {taken[module]} and {stage.name} both hold {module}")
            taken[module] = stage.name
    return tuple(stages)


def _resolve(net: nn.Module, name: str) -> Iterator[Stage]:
    if "*" in name:
        pattern = re.compile(re.escape(name).replace(r"\*", r"[^.]+"))
        found = [
            path
            for path, module in net.named_modules()
            if pattern.fullmatch(path) and next(module.children(), None) is not None
        ]
        if not found:
            raise _leads_nowhere(net, name)
        yield from (_whole(net, path) for path in found)
    elif part := re.fullmatch(r"(.*)\[(\d+):(\d+)(?::(\d+))?\]", name):
        holder, first, last, step = part[1], int(part[2]), int(part[3]), int(part[4] or 1)
        children = _children(net, holder, name)[first:last]
        if len(children) != last - first or not children or step < 1 or len(children) % step:
            raise NestingError(
                f"stage {name!r}: {holder or 'the network'} has {len(_children(net, holder, name))} modules, which "
                f"{first}:{last} does not take whole blocks of {step} from"
            )
        yield Stage(name, tuple(tuple(children[i : i + step]) for i in range(0, len(children), step)))
    elif part := re.fullmatch(r"(.*?)([^.]+)\.\.([^.]+)", name):
        children = _children(net, part[1].rstrip("."), name)
        begin, end = (joined(part[1].rstrip("."), part[i]) for i in (2, 3))
        if begin not in children or end not in children[children.index(begin) :]:
            raise _leads_nowhere(net, name)
        run = children[children.index(begin) : children.index(end) + 1]
        yield Stage(name, tuple((child,) for child in run))
    else:
        yield _whole(net, name)


def _whole(net: nn.Module, name: str) -> Stage:
    children = _children(net, name, name)
    if not children:
        raise NestingError(f"stage {name!r} is a {type(net.get_submodule(name)).__name__} and holds no blocks")
    return Stage(name, tuple((child,) for child in children))


def _children(net: nn.Module, holder: str, name: str) -> list[str]:
    try:
        module = net.get_submodule(holder)
    except AttributeError:
        raise _leads_nowhere(net, name) from None
    return [joined(holder, child) for child in module._modules]


def joined(holder: str, child: str) -> str:
    """The dotted name of a module in a holder, "" for the network itself."""
    return f"{holder}.{child}" if holder else child


def _leads_nowhere(net: nn.Module, name: str) -> NestingError:
    has = ", ".join(child for child, module in net.named_children() if next(module.children(), None) is not None)
    return NestingError(
        f"stage {name!r} leads nowhere in this {type(net).__name__}; what it has that holds modules: {has}"
    )


def cut(net: nn.Module, stages: Sequence[Stage], depths: Sequence[int]) -> tuple[Stage, ...]:
    """Take the blocks beyond `depths` out of `net`, in place, and return the stages as they are then.

    What is left keeps or gets the names it has in the library's own network of these depths: where modules are
    numbered, those behind the ones taken out move up.
    """
    gone = [m for stage, kept in zip(stages, depths, strict=True) for block in stage.blocks[kept:] for m in block]
    moved: dict[str, str] = {}
    for holder in dict.fromkeys(name.rpartition(".")[0] for name in gone):
        children = {name.rpartition(".")[2] for name in gone if name.rpartition(".")[0] == holder}
        moved |= {
            joined(holder, old): joined(holder, new) for old, new in _take_out(net.get_submodule(holder), children)
        }

    def renamed(module: str) -> str:
        for old, new in moved.items():
            if module == old or module.startswith(old + "."):
                return new + module[len(old) :]
        return module

    return tuple(
        Stage(stage.name, tuple(tuple(renamed(module) for module in block) for block in stage.blocks[:kept]))
        for stage, kept in zip(stages, depths, strict=True)
    )


def _take_out(holder: nn.Module, children: set[str]) -> list[tuple[str, str]]:
    """Take these children out; old and new names of those that had to move."""
    if not isinstance(holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        for child in children:  # its forward may call each by its name
            holder._modules[child] = nn.Identity()
        return []
    left = {name: module for name, module in holder._modules.items() if name not in children}
    renamed = _renumbered(list(holder._modules), list(left))
    holder._modules.clear()
    holder._modules.update(zip(renamed, left.values(), strict=True))
    return [(old, new) for old, new in zip(left, renamed, strict=True) if old != new]


def _renumbered(names: list[str], left: list[str]) -> list[str]:
    """`left` with the numbers they would have had from the start, if `names` are numbered in a row."""
    parts = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    if not all(parts) or len({part[1] for part in parts if part}) != 1:
        return left
    numbers = [int(part[2]) for part in parts if part]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return left
    stem = names[0][: len(names[0]) - len(str(numbers[0]))]
    return [f"{stem}{numbers[0] + i}" for i in range(len(left))]
