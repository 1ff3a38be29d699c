"""What the tree execution has to know about a kind of network, and about one network of that kind."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from ddnn.errors import NestingError
from ddnn.families.anatomy import Chain, Modules, Stage, named_stages
from ddnn.families.split import Piece, Pieces, split

Axes = Literal["NCHW", "NHWC", "NLC"]
Step = Callable[[Tensor], Tensor]


def _no_objection(net: nn.Module, name: str) -> str | None:
    return None


@dataclass(frozen=True)
class InstanceOf:
    """Whether a network is of one of these classes, by their dotted names: no library is imported to find out."""

    classes: tuple[str, ...]

    def __call__(self, net: nn.Module) -> bool:
        """Whether the network is."""
        return any(f"{c.__module__}.{c.__qualname__}" in self.classes for c in type(net).__mro__)


def instance_of(*classes: str) -> InstanceOf:
    """`matches` of a family that is all networks of these classes, such as ``torchvision.models.resnet.ResNet``."""
    return InstanceOf(classes)


@dataclass(frozen=True)
class Family:
    """Where a kind of network keeps its stages.

    That is enough: stem and head are what the network's own forward does before its first and after its last block,
    and are taken from it. Where that can't be done, its nets run whole, unless the family gives `stem` and `head`.
    """

    name: str
    """How errors and tables call it."""
    matches: Callable[[nn.Module], bool]
    """Whether a network belongs to the family."""
    stages: tuple[str, ...] | Callable[[Any], Iterable[str]]
    """Names of the stages, shallow to deep, in the notation of `named_stages`: `layer1`, `stages.*.blocks`,
    `features[2:4]`; or a function of the network that gives them."""
    axes: Axes = "NCHW"
    """What the outputs of blocks are: maps with channels first or last, or tokens [N, L, C]."""
    prefix_tokens: int | None = None
    """How many tokens before the others are no places of the image (class, registers); if not given, the network's
    `num_prefix_tokens`, else as many as there are beyond the largest square."""
    classifier: Modules | str | None = None
    """Dotted name or names of the layers that make the logits; if not given, the last layer of the head."""
    stem: Callable[[Any, Tensor], Tensor] | None = None
    """`stem(net, x)`: images -> input of the first block. With `head`, for a forward that can't be taken apart; the
    blocks must then run one after the other with nothing between them."""
    head: Callable[[Any, Tensor], Tensor] | None = None
    """`head(net, feature)`: output of the last block -> logits [N, classes]."""
    after_stages: Modules = ()
    """With `head`: names of the modules it runs."""
    objection: Callable[[nn.Module, str], str | None] = field(default=_no_objection)
    """Why a sub-net of this full-net can't bear this name (the library's net of that name is another), or None."""
    dense: bool = False
    """Whether every block adds its output to its input as further channels, the whole of a stage in one module."""
    fit: Callable[[nn.Module, nn.Module], None] | None = None
    """`fit(subnet, full_net)`: after its stages were cut, give a sub-net the widths that its library gives it."""
    clones: bool = False
    """Whether some block, or the head, overwrites its input, which must then be a copy."""
    whole: str | None = None
    """Why the networks run whole: their forward is never taken apart, and their paths share weights but no work."""

    def anatomy(self, net: nn.Module) -> "Anatomy":
        """Where `net` keeps what; `NestingError` if the stages lead nowhere."""
        names = self.stages(net) if callable(self.stages) else self.stages
        return self.taken_apart(net, named_stages(net, names))

    def taken_apart(self, net: nn.Module, stages: Sequence[Stage]) -> "Anatomy":
        """The anatomy of a network of this family with these stages. Raises `IndivisibleError`."""
        blocks = [block for stage in stages for block in stage.blocks]
        pieces = None
        if self.whole is None:
            if self.stem is not None and self.head is not None:
                pieces = Pieces(self.stem, (None,) * len(blocks), self.head, self.after_stages)
            elif self.dense:
                pieces = split(net, [(_holder(stage),) for stage in stages])
            else:
                pieces = split(net, blocks)
        return Anatomy(self, tuple(stages), pieces)


class Dense:
    """A block that adds its output to its input as further channels."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + growth, H, W]."""
        return torch.cat([x, self.block(x)], 1)


@dataclass(frozen=True)
class Anatomy:
    """Where one network keeps its stem, stages and head."""

    family: Family
    stages: tuple[Stage, ...]
    pieces: Pieces | None
    """None if the network runs whole."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks in every stage."""
        return tuple(len(stage) for stage in self.stages)

    def as_if(self, net: nn.Module, **changes: Any) -> "Anatomy":
        """The same stages in a family that differs in these fields."""
        return replace(self.family, **changes).taken_apart(net, self.stages)

    def stem(self, net: nn.Module, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> what the first block takes."""
        return self._pieces().stem(net, x)

    def head(self, net: nn.Module, feature: Tensor) -> Tensor:
        """What the last block gives -> logits [N, classes]."""
        return self._pieces().head(net, feature.clone() if self.family.clones else feature)

    def steps(self, net: nn.Module) -> list[list[Step]]:
        """Of every stage its blocks as functions of what the block before gave."""
        holders = {holder: net.get_submodule(holder)._modules for holder in self._holders()}
        steps: list[list[Step]] = []
        for stage, pieces in zip(self.stages, self._before(), strict=True):
            steps.append([])
            for names, piece in zip(stage.blocks, pieces, strict=True):
                parts: list[Any] = [holders[_parent(name)][_child(name)] for name in names]
                if self.family.dense:
                    parts = [Dense(block) for block in parts]
                if piece is not None and piece.runs_unit:
                    parts = [partial(piece, net)]
                elif piece is not None:
                    parts = [
                        *(map(net.get_submodule, piece.modules) if piece.in_line else [partial(piece, net)]),
                        *parts,
                    ]
                if self.family.clones:
                    parts = [torch.clone, *parts]
                steps[-1].append(parts[0] if len(parts) == 1 else Chain(parts))
        return steps

    def step_modules(self) -> list[list[Modules]]:
        """Of every stage the names of the modules that each step runs, the block's own last."""
        return [
            [
                (*((m for m in piece.modules if m not in names) if piece else ()), *names)
                for names, piece in zip(stage.blocks, pieces, strict=True)
            ]
            for stage, pieces in zip(self.stages, self._before(), strict=True)
        ]

    def _before(self) -> list[list[Piece | None]]:
        """Of every stage what leads to each of its blocks."""
        nothing: list[list[Piece | None]] = [[None] * len(stage) for stage in self.stages]
        if self.pieces is None:
            return nothing
        pieces = iter(self.pieces.before)
        if self.family.dense:  # a unit is a stage
            return [[next(pieces), *rest[1:]] for rest in nothing]
        return [[next(pieces) for _ in rest] for rest in nothing]

    def head_modules(self) -> Modules:
        """The names of the modules that the head runs."""
        return () if self.pieces is None else self.pieces.head_modules

    def classifier(self, net: nn.Module) -> Modules:
        """The names of the layers that make the logits; none if there is nothing after the last stage."""
        if self.family.classifier is not None:
            return (self.family.classifier,) if isinstance(self.family.classifier, str) else self.family.classifier
        if self.pieces is None:  # the order in which things run is not known
            layer = _last_layer(net)
            inside = layer and any(
                m == layer[0] or layer[0].startswith(m + ".")
                for stage in self.stages
                for block in stage.blocks
                for m in block
            )
            return () if inside else tuple(layer)
        for name in reversed(self.head_modules()):
            if layer := _last_layer(net.get_submodule(name)):
                return (f"{name}.{layer[0]}".rstrip("."),)
        return ()

    def feature_map(self, net: nn.Module, feature: Tensor, image: Sequence[int]) -> Tensor:
        """What a block gives, as a map [N, C, H, W]; `image` is the height and width of the images it comes from.

        Tokens that are no places in the image (class, registers) are left out, the others laid out as the grid they
        come from.
        """
        if feature.ndim == 4:
            return feature.permute(0, 3, 1, 2) if self.family.axes == "NHWC" else feature
        if feature.ndim == 3:
            tokens = feature[:, self._prefix(net, feature.shape[1]) :]
            height, width = _grid(net, tokens.shape[1], image)
            return tokens.transpose(1, 2).unflatten(2, (height, width))
        if feature.ndim == 2:
            return feature[:, :, None, None]
        raise NestingError(f"a stage of {type(net).__name__} gives {list(feature.shape)}, which is no map of an image")

    def _prefix(self, net: nn.Module, tokens: int) -> int:
        if self.family.prefix_tokens is not None:
            return self.family.prefix_tokens
        declared = getattr(net, "num_prefix_tokens", None)
        return declared if isinstance(declared, int) else tokens - math.isqrt(tokens) ** 2

    def _pieces(self) -> Pieces:
        if self.pieces is None:
            raise NestingError(f"these nets run whole and have no stem, blocks and head: {self.family.whole}")
        return self.pieces

    def _holders(self) -> set[str]:
        return {_parent(name) for stage in self.stages for block in stage.blocks for name in block}


def _last_layer(module: nn.Module) -> list[str]:
    """The name of the last layer in it that has parameters, if there is one."""
    return [name for name, part in module.named_modules() if next(part.parameters(recurse=False), None) is not None][
        -1:
    ]


def _grid(net: nn.Module, places: int, image: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of so many places: the image's patches, its proportions, or what the net declares.

    What fits none of these is a square or, at worst, a row.
    """
    height, width = image
    embedding = getattr(net, "patch_embed", None)
    grids: list[tuple[int, int]] = []
    if _is_pair(patch := getattr(embedding, "patch_size", None)):
        grids += [(height // patch[0], width // patch[1]), (-(-height // patch[0]), -(-width // patch[1]))]
    rows = math.isqrt(places * height // width)
    grids += [(rows, rows * width // height)] if rows * width % height == 0 else []
    if _is_pair(declared := getattr(embedding, "grid_size", None)):
        grids.append(declared)
    side = math.isqrt(places)
    return next((grid for grid in [*grids, (side, side)] if math.prod(grid) == places), (1, places))


def _is_pair(found: object) -> TypeGuard[tuple[int, int]]:
    return isinstance(found, tuple) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found)


def _holder(stage: Stage) -> str:
    return _parent(stage.blocks[0][0])


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _child(name: str) -> str:
    return name.rpartition(".")[2]
