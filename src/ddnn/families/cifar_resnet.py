"""ResNet for images of about 32 px (He et al. 2016, arXiv 1512.03385, section 4.2): 6n + 2 layers in three stages.

Blocks are torchvision's `BasicBlock`, so names of parameters are those of torchvision's ResNet; where the resolution
changes the shortcut is a 1x1 convolution (their option B), as is usual in distillation benchmarks.
"""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from ddnn.families.family import Family

LAYERS = (8, 14, 20, 32, 44, 56, 110)


def depths(layers: int) -> tuple[int, int, int]:
    """Blocks per stage of the network with 6n + 2 `layers`."""
    n = (layers - 2) // 6
    return (n, n, n)


class CifarResNet(nn.Module):
    """Stem of one 3x3 convolution, three stages of `width`, 2 and 4 x `width` channels, pooling, one linear layer."""

    def __init__(self, blocks: tuple[int, int, int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def resnet(layers: int, *, num_classes: int, width: int = 16) -> CifarResNet:
    """A freshly initialised ResNet-`layers`, one of `LAYERS`."""
    return CifarResNet(depths(layers), num_classes, width)


def _matches(net: nn.Module) -> bool:
    return isinstance(net, CifarResNet)


FAMILY = Family(
    name="CIFAR ResNet",
    matches=_matches,
    stages=("layer1", "layer2", "layer3"),
)
