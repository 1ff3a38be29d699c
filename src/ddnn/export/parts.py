"""The tree of paths cut into the parts of a cascade: what each net adds to what shallower nets have computed."""

from typing import NamedTuple

from torch import Tensor, nn

from ddnn.network import DDNN
from ddnn.sharing import agreement


class Feature(NamedTuple):
    """The output of the first blocks of a path: after how many, and the first net, shallow to deep, that runs them.

    After 0 blocks it is the output of the stem.
    """

    net: str
    blocks: int

    def __str__(self) -> str:
        return f"{self.net}.{self.blocks}"


class Part(NamedTuple):
    """What one net runs in a cascade, the shallower nets having run before."""

    name: str
    start: Feature | None
    """Where it starts; None is at the images."""
    keeps: tuple[Feature, ...]
    """What it makes that deeper nets start from."""


def parts(net: DDNN) -> list[Part]:
    """The parts of all nets, shallow to deep. Each block of the tree is in one of them."""
    names = list(net.depths)
    starts: dict[str, Feature | None] = {names[0]: None}
    for k, name in enumerate(names[1:], 1):
        common = [agreement(net.depths[name], net.depths[other]) for other in names[:k]]
        longest = max(common)
        starts[name] = Feature(names[common.index(longest)], longest)  # the first that has it on its path made it
    kept = sorted({start for start in starts.values() if start is not None}, key=lambda feature: feature.blocks)
    return [Part(name, starts[name], tuple(f for f in kept if f.net == name)) for name in names]


class Route(nn.Module):
    """One net as it runs in its DDNN, giving features on its way too.

    Images [N, C, S, S] -> logits [N, classes] and the feature after each of the numbers of `blocks`.
    """

    def __init__(self, net: DDNN, name: str, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.own = net.nets[name]
        self.full = net.nets[net.full_name]
        self.name = name
        self.blocks = blocks
        self._net = [net]  # in a list, it is no child module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the path from the images."""
        return self.go_on(self._net[0].stem(images), 0)

    def go_on(self, feature: Tensor, done: int) -> tuple[Tensor, ...]:
        """Run the path from the feature after `done` blocks; the features are those from there on."""
        net = self._net[0]
        kept = [feature] if done in self.blocks else []
        for i, step in enumerate(net.path(self.name)[done:], done + 1):
            feature = step.block(feature)
            if i in self.blocks:
                kept.append(feature)
        return (net.head_of(self.name, feature), *kept)
