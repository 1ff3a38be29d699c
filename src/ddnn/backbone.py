"""Every net of a DDNN as a feature backbone, for detection, segmentation and whatever else takes feature maps."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddnn.errors import NestingError
from ddnn.families.family import Family, children_outside
from ddnn.network import DDNN


class Backbone(nn.Module):
    """The stages of a DDNN's nets without the classifier; which net runs is an argument of every call.

    >>> backbone = ddnn.Backbone(net, stages=(1, 2, 3))   # by number from 0, or by name: ("layer2", "layer3", "layer4")
    >>> backbone.channels, backbone.strides               # ((128, 256, 512), (8, 16, 32)), the same for every net
    >>> backbone(images, "resnet18")                      # a list of features, shallow to deep
    >>> backbone.each(images)                             # such a list of every net, by name; common blocks run once
    >>> backbone.at("resnet18")                           # an ordinary module, images -> list, for who passes no depth

    The weights are the DDNN's own, not copies: train one and both change. Neither a classifier nor a stage beyond the
    last one asked for is part of the backbone, so `each` leaves no parameter without gradient.

    `names` keeps some of the nets only; a backbone of a single net need not be told which to run. `image_size` is the
    side in pixels of the square images by which channels and strides are measured; a network that takes images of one
    size only needs that here. Raises `NestingError` for nets and stages that are not there.
    """

    channels: tuple[int, ...]
    """Of each feature."""
    strides: tuple[int, ...]
    """Pixels of the image per position of each feature, what timm calls reduction."""

    def __init__(
        self,
        net: DDNN,
        names: str | Iterable[str] | None = None,
        *,
        stages: Sequence[int | str] | None = None,
        image_size: int = 256,
    ) -> None:
        super().__init__()
        wanted = [names] if isinstance(names, str) else list(net.depths if names is None else names)
        unknown = [name for name in wanted if name not in net.depths]
        if unknown or not wanted:
            what = f"no net {unknown[0]!r} in this DDNN" if unknown else "a backbone needs a net"
            raise NestingError(f"{what}; it has {', '.join(net.depths)}")
        self._chosen = _stage_numbers(net.family, stages)
        self.stages = tuple(net.family.stages[s] for s in self._chosen)
        self.trunk = _trunk(net, [name for name in net.depths if name in wanted], max(self._chosen) + 1)
        self._image_size = image_size
        self.channels, self.strides = _measure(self, image_size)

    @property
    def names(self) -> tuple[str, ...]:
        """The nets that can be asked for, the deepest last."""
        return tuple(self.trunk.depths)

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


def _stage_numbers(family: Family, stages: Sequence[int | str] | None) -> list[int]:
    count = len(family.stages)
    numbers = []
    for stage in range(count) if stages is None else stages:
        known = stage in family.stages if isinstance(stage, str) else -count <= stage < count
        if not known:
            names = ", ".join(f"{s} ({name})" for s, name in enumerate(family.stages))
            raise NestingError(f"no stage {stage!r} in {family.name}; it has {names}")
        numbers.append(family.stages.index(stage) if isinstance(stage, str) else stage % count)
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
    gone = [*net.family.stages[stages:], *net.family.after_stages]
    family = replace(net.family, stages=net.family.stages[:stages], after_stages=(), head=_no_head)
    trunk = DDNN({name: _without(net.nets[name], gone) for name in names}, family, net.norm, net.head)
    if net.norm == "recalibrated":
        trunk.calibrated.copy_(net.calibrated)
    return trunk


def _without(net: nn.Module, gone: Sequence[str]) -> nn.Module:
    """A network that does nothing where `net` has the modules called `gone`, and else consists of its very parts."""
    # `copy.deepcopy` takes from its memo instead of copying, so only what holds one of the modules is made anew.
    memo: dict[int, Any] = {id(module): module for module in children_outside(net, gone)}
    memo.update((id(tensor), tensor) for tensor in [*net.parameters(), *net.buffers()])
    memo.update((id(net.get_submodule(name)), nn.Identity()) for name in gone)
    return copy.deepcopy(net, memo)


def _no_head(net: nn.Module, feature: Tensor) -> Tensor:
    return feature


def _measure(backbone: Backbone, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the features, from a forward that computes no numbers."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in backbone.parameters()}
    memo.update((id(buffer), buffer.to("meta")) for buffer in backbone.buffers())
    ghost = copy.deepcopy(backbone, memo).eval()
    shapes = [tuple(f.shape) for f in ghost(torch.empty(1, 3, size, size, device="meta"), backbone.names[-1])]
    for stage, shape in zip(backbone.stages, shapes, strict=True):
        if len(shape) != 4:
            raise NestingError(
                f"{stage} gives features of shape {shape}; a backbone's are [N, channels, height, width]"
            )
    return tuple(shape[1] for shape in shapes), tuple(round(size / shape[2]) for shape in shapes)
