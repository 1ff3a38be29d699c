"""torchvision's ResNet with basic or bottleneck blocks (He et al. 2016, arXiv 1512.03385, table 1)."""

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ddnn.families.family import Family

BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet26": (Bottleneck, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet50_basic": (BasicBlock, (4, 7, 9, 4)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Block and blocks per stage, by name. `resnet26` and `resnet50_basic` are not torchvision's, the rest are."""


def resnet(name: str, *, num_classes: int, **options: Any) -> ResNet:
    """A freshly initialised ResNet; what torchvision's function of that name returns, where it has one."""
    block, depths = BLOCKS[name]
    return ResNet(block, list(depths), num_classes=num_classes, **options)


def _objection(net: nn.Module, name: str) -> str | None:
    if name not in BLOCKS:
        return None
    ours, theirs = type(net.get_submodule("layer1.0")), BLOCKS[name][0]
    if ours is theirs or ours not in (BasicBlock, Bottleneck):
        return None
    kind = {BasicBlock: "basic blocks", Bottleneck: "bottleneck blocks"}
    return (
        f"{name} is made of {kind[theirs]} and this full-net of {kind[ours]}, so they don't nest; "
        "basic blocks: resnet18, resnet34, resnet50_basic; bottlenecks: resnet26, resnet50, resnet101, resnet152"
    )


def _matches(net: nn.Module) -> bool:
    return isinstance(net, ResNet)


FAMILY = Family(
    name="torchvision ResNet",
    matches=_matches,
    stages=("layer1", "layer2", "layer3", "layer4"),
    objection=_objection,
)
