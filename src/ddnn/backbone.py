"""Every net of a DDNN as a feature backbone, for detection, segmentation and whatever else takes feature maps."""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddnn.errors import NestingError, first_line
from ddnn.families.discover import declared_sizes, ghost
from ddnn.families.family import Anatomy
from ddnn.families.split import holders
from ddnn.network import DDNN
from ddnn.proof import at_rest

SIZES = (256, 224, 384)
"""Sides in pixels of the images to measure with, where none is given: most networks take some of these.

Large ones, as a small feature's stride would be rounded; then whatever the network itself mentions."""


class Shapes(NamedTuple):
    """Of the features of one net."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class Backbone(nn.Module):
    """The stages of a DDNN's nets without the classifier; which net runs is an argument of every call.

    >>> backbone = ddnn.Backbone(net, stages=(1, 2, 3))   # by number from 0, or by name: ("layer2", "layer3", "layer4")
    >>> backbone.channels, backbone.strides               # ((128, 256, 512), (8, 16, 32))
    >>> backbone(images, "resnet18")                      # a list of features, shallow to deep
    >>> backbone.each(images)                             # such a list of every net, by name; common blocks run once
    >>> backbone.at("resnet18")                           # an ordinary module, images -> list, for who passes no depth

    The weights are the DDNN's own, not copies: train one and both change. Neither a classifier nor a stage beyond the
    last one asked for is part of the backbone, so `each` leaves no parameter without gradient. (Nets that run whole, as
    `net.whole` says, are the exception: they run to their end.)

    `names` keeps some of the nets only; a backbone of a single net need not be told which to run. `image_size` is the
    side in pixels of the square images by which channels and strides are measured; a network that takes images of one
    unusual size only needs that here. Raises `NestingError` for nets and stages that are not there.
    """

    def __init__(
        self,
        net: DDNN,
        names: str | Iterable[str] | None = None,
        *,
        stages: Sequence[int | str] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        wanted = [names] if isinstance(names, str) else list(net.depths if names is None else names)
        unknown = [name for name in wanted if name not in net.depths]
        if unknown or not wanted:
            what = f"no net {unknown[0]!r} in this DDNN" if unknown else "a backbone needs a net"
            raise NestingError(f"{what}; it has {', '.join(net.depths)}")
        self._chosen = _stage_numbers(net.stages, stages)
        self.stages = tuple(net.stages[s] for s in self._chosen)
        self.trunk = _trunk(net, [name for name in net.depths if name in wanted], max(self._chosen) + 1)
        self._image_size = image_size
        self._shapes = _measure(self, image_size)

    @property
    def names(self) -> tuple[str, ...]:
        """The nets that can be asked for, the deepest last."""
        return tuple(self.trunk.depths)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each feature. `NestingError` where the nets differ, as DenseNets do: then ask `backbone.at(name)`."""
        return self._common("channels")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per position of each feature, what timm calls reduction."""
        return self._common("strides")

    def _common(self, what: str) -> tuple[int, ...]:
        found = {name: getattr(shapes, what) for name, shapes in self._shapes.items()}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} {numbers}" for name, numbers in found.items())
            raise NestingError(f"the nets differ in {what}: {each}; ask for those of one, backbone.at(name).{what}")
        return next(iter(found.values()))

    def forward(self, x: Tensor, depth: str | None = None) -> list[Tensor]:
        """Images [N, C, H, W] -> features of the net called `depth`, each [N, channels, H / stride, W / stride]."""
        if depth is None:
            if len(self.names) > 1:
                raise NestingError(f"which net is to run? give its name as depth: {', '.join(self.names)}")
            depth = self.names[0]
        return self._pick(self.trunk(x, only=[depth])[depth].features)

    def each(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Images [N, C, H, W] -> features of every net by name, what their paths have in common computed once."""
        return {name: self._pick(output.features) for name, output in self.trunk(x).items()}

    def at(self, depth: str) -> "Backbone":
        """One net as a module of its own that takes images and nothing else; its weights are those of this backbone."""
        return Backbone(self.trunk, depth, stages=self.stages, image_size=self._image_size)

    def _pick(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [features[s] for s in self._chosen]


def _stage_numbers(names: Sequence[str], stages: Sequence[int | str] | None) -> list[int]:
    count = len(names)
    numbers = []
    for stage in range(count) if stages is None else stages:
        known = stage in names if isinstance(stage, str) else -count <= stage < count
        if not known:
            has = ", ".join(f"{s} ({name})" for s, name in enumerate(names))
            raise NestingError(f"no stage {stage!r} in this DDNN; it has {has}")
        numbers.append(names.index(stage) if isinstance(stage, str) else stage % count)
    if not numbers or sorted(set(numbers)) != numbers:
        raise NestingError(f"stages={stages!r}: name at least one stage, each once, shallow to deep")
    return numbers


def _trunk(net: DDNN, names: list[str], stages: int) -> DDNN:
    """A DDNN of some of the nets, cut off after a number of stages; all that is left is the same objects."""
    if net.norm == "recalibrated" and not net.calibrated:
        warnings.warn(
            "the norm statistics of this DDNN were never recalibrated; call ddnn.recalibrate(net, batches) first",
            stacklevel=3,
        )
    nets = {name: _without(net.nets[name], _beyond(net.anatomies[name], stages)) for name in names}
    anatomies = {name: _cut_off(net.anatomies[name], stages) for name in names}
    trunk = DDNN(nets, anatomies, net.norm, net.head)
    if net.norm == "recalibrated":
        trunk.calibrated.copy_(net.calibrated)
    return trunk


def _cut_off(anatomy: Anatomy, stages: int) -> Anatomy:
    """The same network, which ends where a stage does and gives what its last block gives."""
    pieces = anatomy.pieces
    if pieces is not None:
        units = stages if anatomy.family.dense else sum(anatomy.depths[:stages])
        pieces = replace(pieces, before=pieces.before[:units], head=_no_head, head_modules=())
    return replace(anatomy, stages=anatomy.stages[:stages], pieces=pieces)


def _beyond(anatomy: Anatomy, stages: int) -> list[str]:
    """The names of the modules that run after a stage and not before; none can be told of nets that run whole."""
    if anatomy.pieces is None:
        return []
    steps = anatomy.step_modules()
    before = {name for stage in steps[:stages] for step in stage for name in step}
    before |= set(getattr(anatomy.pieces.stem, "modules", ()))
    after = [name for stage in steps[stages:] for step in stage for name in step]
    return [name for name in dict.fromkeys([*after, *anatomy.head_modules()]) if name not in before]


def _without(net: nn.Module, gone: Sequence[str]) -> nn.Module:
    """A network that does nothing where `net` has the modules called `gone`, and else consists of its very parts."""
    # `copy.deepcopy` takes from its memo instead of copying, so only what holds one of the modules is made anew.
    anew = holders(gone) | {""}
    memo: dict[int, Any] = {id(module): module for name, module in net.named_modules() if name not in anew}
    memo.update((id(tensor), tensor) for tensor in [*net.parameters(), *net.buffers()])
    memo.update((id(net.get_submodule(name)), nn.Identity()) for name in gone)
    return copy.deepcopy(net, memo)


def _no_head(net: nn.Module, feature: Tensor) -> Tensor:
    return feature


def _measure(backbone: Backbone, size: int | None) -> dict[str, Shapes]:
    """Channels and strides of every net's features, if possible from a forward that computes no numbers."""
    imagined = ghost(backbone).eval()
    refusal = ""
    full_net = backbone.trunk.nets[backbone.trunk.full_name]
    sides = tuple(dict.fromkeys((*SIZES, *declared_sizes(full_net)))) if size is None else (size,)
    for side, channels in itertools.product(sides, (3, 1)):
        x = torch.empty(1, channels, side, side, device="meta")
        try:
            with torch.no_grad():
                return {name: _shapes(features, side) for name, features in imagined.each(x).items()}
        except Exception as error:  # whatever a forward may raise on images that are not of its size
            refusal = refusal or first_line(error)
            if size is not None:
                with contextlib.suppress(Exception), at_rest(backbone):
                    real = torch.zeros(x.shape, device=next(backbone.parameters()).device)
                    return {name: _shapes(features, side) for name, features in backbone.each(real).items()}
    raise NestingError(
        f"the network does not take images of {' or '.join(map(str, sides))} px "
        f"({refusal}); say which it takes: Backbone(..., image_size=...)"
    )


def _shapes(features: Sequence[Tensor], side: int) -> Shapes:
    return Shapes(tuple(f.shape[1] for f in features), tuple(round(side / f.shape[2]) for f in features))
