"""What the tree execution has to know about a network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn


def _no_objection(net: nn.Module, name: str) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """Where a kind of network keeps its stem, stages and head.

    The network's own forward must be ``head(net, stages(stem(net, x)))``, each stage its blocks one after the
    other; the tests hold every family to this, bitwise.
    """

    name: str
    """How errors and tables call it."""
    matches: Callable[[nn.Module], bool]
    """Whether a network belongs to the family."""
    stages: tuple[str, ...]
    """Dotted names of the stages, shallow to deep: `nn.Sequential` or `nn.ModuleList` of blocks."""
    stem: Callable[[Any, Tensor], Tensor]
    """`stem(net, x)`: image [N, C, H, W] -> input of the first stage."""
    head: Callable[[Any, Tensor], Tensor]
    """`head(net, feature)`: output of the last stage -> logits [N, classes]."""
    after_stages: tuple[str, ...]
    """Names of the modules that run after the last stage; all others outside of the stages are the stem."""
    classifier: str
    """Dotted name of the layer that makes the logits; one of, or within, `after_stages`."""
    objection: Callable[[nn.Module, str], str | None] = field(default=_no_objection)
    """Why a sub-net of this full-net can't bear this name (the library's net of that name is another), or None."""

    def blocks(self, net: nn.Module) -> list[list[nn.Module]]:
        """The blocks of every stage of `net`."""
        return [list(self.stage(net, stage)) for stage in self.stages]

    def depths(self, net: nn.Module) -> tuple[int, ...]:
        """Number of blocks in every stage of `net`."""
        return tuple(len(blocks) for blocks in self.blocks(net))

    def stage(self, net: nn.Module, stage: str) -> nn.Sequential:
        """The container of a stage's blocks."""
        return cast(nn.Sequential, net.get_submodule(stage))


def children_outside(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The outermost modules of `net` that neither are, hold, nor lie in the modules called `names`."""

    def walk(module: nn.Module, prefix: str) -> list[nn.Module]:
        found = []
        for name, child in module.named_children():
            path = prefix + name
            if path in names:
                continue
            if any(other.startswith(path + ".") for other in names):
                found += walk(child, path + ".")
            else:
                found.append(child)
        return found

    return walk(net, "")
