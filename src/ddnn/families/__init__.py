"""Families of networks that nest: where each keeps its stem, stages and head, and presets with their depths.

One file per family. A family is all the tree execution has to know about a network; everything else (modules,
parameters, names, forward) stays as the network's own library made it.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn

from ddnn.errors import NestingError
from ddnn.families import cifar_resnet, densenet, timm_nets, torchvision_nets, torchvision_resnet
from ddnn.families.family import Anatomy, Family
from ddnn.families.presets import EXAMPLES, PRESETS, Preset, build
from ddnn.families.split import IndivisibleError
from ddnn.families.unlisted import examine, images_for

__all__ = ["EXAMPLES", "FAMILIES", "PRESETS", "Family", "Preset", "anatomy_of", "build", "family_of"]

FAMILIES: list[Family] = [
    cifar_resnet.FAMILY,
    torchvision_resnet.FAMILY,
    densenet.FAMILY,
    *torchvision_nets.FAMILIES,
    *timm_nets.FAMILIES,
]
"""Asked in this order; append your own `Family` to nest a network that is not listed."""


TESTED = ("torch", "torchvision", "timm", "ddnn")
"""Libraries whose networks our tests take apart and compare, bitwise."""


def family_of(net: nn.Module) -> Family | None:
    """The family that lists this network, if one does."""
    return next((family for family in FAMILIES if family.matches(net)), None)


def _is_its_librarys(net: nn.Module) -> bool:
    """Whether every module in it is of a class that our tests know, and not somebody's own block or layer."""
    return all(type(module).__module__.partition(".")[0] in TESTED for module in net.modules())


def anatomy_of(
    net: nn.Module, family: Family | None = None, stages: Sequence[str] | None = None, example: Tensor | None = None
) -> tuple[Anatomy, Tensor | None]:
    """Where a network keeps its stem, stages and head; and images to prove that with, where no test of ours has.

    The family given, else the stages named, else the family that lists it, else what its structure shows. If its
    forward can't be taken apart its nets run whole; `NestingError` if it has no stages at all.
    """
    listed = None if family is not None else family_of(net)
    if family is not None and stages is not None:
        raise NestingError("give a family or the names of the stages, not both")
    known = family or listed
    if known is None or stages is not None:
        anatomy, images = examine(net, stages, example, like=listed)
    else:
        try:
            anatomy = known.anatomy(net)
        except IndivisibleError as indivisible:
            anatomy = replace(known, whole=str(indivisible)).anatomy(net)
        images = None
        if listed is None or not _is_its_librarys(net):
            with suppress(NestingError):
                images = images_for(net, example)
    return anatomy, None if images is None or images.is_meta else images
