"""Families of networks that nest: where each keeps its stem, stages and head, and presets with their depths.

One file per family. A family is all the tree execution has to know about a network; everything else (modules,
parameters, names, forward) stays as the network's own library made it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from ddnn.errors import NestingError, RecipeError
from ddnn.families import cifar_resnet, torchvision_resnet
from ddnn.families.family import Family

FAMILIES: list[Family] = [cifar_resnet.FAMILY, torchvision_resnet.FAMILY]
"""Asked in this order; append your own `Family` to nest a network that is not listed."""


@dataclass(frozen=True)
class Preset:
    """A full-net by name and the blocks kept per stage of each net in it, shallow to deep, the full-net last."""

    full_net: str
    depths: Mapping[str, tuple[int, ...]]


FULL_NETS: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar/resnet{n}": partial(cifar_resnet.resnet, n) for n in cifar_resnet.LAYERS},
    **{f"torchvision/{name}": partial(torchvision_resnet.resnet, name) for name in torchvision_resnet.BLOCKS},
}
"""Networks a recipe can name: called with ``num_classes`` and ``width``, each returns a fresh, initialised one."""


def _cifar(*layers: int) -> Preset:
    return Preset(f"cifar/resnet{layers[-1]}", {f"resnet{n}": cifar_resnet.depths(n) for n in layers})


def _torchvision(*names: str) -> Preset:
    return Preset(f"torchvision/{names[-1]}", {name: torchvision_resnet.BLOCKS[name][1] for name in names})


PRESETS: dict[str, Preset] = {
    "cifar-resnet8-14-20": _cifar(8, 14, 20),
    "cifar-resnet20-32-44": _cifar(20, 32, 44),
    "cifar-resnet20-32-56": _cifar(20, 32, 56),
    "cifar-resnet20-32-44-56-110": _cifar(20, 32, 44, 56, 110),
    "resnet18-34": _torchvision("resnet18", "resnet34"),
    "resnet18-34-50-basic": _torchvision("resnet18", "resnet34", "resnet50_basic"),
    "resnet26-50": _torchvision("resnet26", "resnet50"),
    "resnet50-101": _torchvision("resnet50", "resnet101"),
    "resnet50-101-152": _torchvision("resnet50", "resnet101", "resnet152"),
}


def family_of(net: nn.Module) -> Family:
    """The family of a network; `NestingError` if it belongs to none."""
    for family in FAMILIES:
        if family.matches(net):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise NestingError(
        f"cannot tell where {type(net).__name__} keeps its stages; known families: {known}. "
        "For another network pass family=ddnn.Family(...), which names its stages and classifier"
    )


def build(name: str, num_classes: int, width: int = 16) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """A fresh full-net and its table of depths (empty for a full-net without a preset)."""
    if name in PRESETS:
        preset = PRESETS[name]
        return FULL_NETS[preset.full_net](num_classes=num_classes, width=width), dict(preset.depths)
    if name in FULL_NETS:
        return FULL_NETS[name](num_classes=num_classes, width=width), {}
    raise RecipeError(
        f"network.name: no network {name!r}; presets: {', '.join(PRESETS)}; full-nets: {', '.join(FULL_NETS)}"
    )
