"""torchvision's families besides ResNet."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ddnn.families.family import Family, instance_of


def between_pools(net: Any) -> Iterator[str]:
    """Stages of a VGG: between two poolings a block is a convolution, its norm if there is one, and a ReLU."""
    step = 3 if any(isinstance(m, nn.modules.batchnorm._NormBase) for m in net.features) else 2
    first = 0
    for i, module in enumerate(net.features):
        if isinstance(module, nn.MaxPool2d):
            yield f"features[{first}:{i}:{step}]"
            first = i + 1


def _by_residual(net: Any) -> Iterator[str]:
    """Stages of a MobileNet: a block without a residual connection begins a new one."""
    blocks = [i for i, module in enumerate(net.features) if hasattr(module, "use_res_connect")]
    firsts = [i for i in blocks if i == blocks[0] or not net.features[i].use_res_connect]
    for first, last in zip(firsts, [*firsts[1:], blocks[-1] + 1], strict=True):
        yield f"features[{first}:{last}]"


def _residual_stages(net: Any) -> Iterator[str]:
    """Stages of networks with stochastic depth: what in their features holds blocks that have it."""
    for name, module in net.features.named_children():
        if all(hasattr(block, "stochastic_depth") for block in module.children()):
            yield f"features.{name}"


FAMILIES = [
    Family(
        "torchvision RegNet",
        instance_of("torchvision.models.regnet.RegNet"),
        stages=("trunk_output.*",),
    ),
    Family("torchvision VGG", instance_of("torchvision.models.vgg.VGG"), stages=between_pools),
    Family(
        "torchvision MobileNet",
        instance_of("torchvision.models.mobilenetv2.MobileNetV2", "torchvision.models.mobilenetv3.MobileNetV3"),
        stages=_by_residual,
    ),
    Family(
        "torchvision EfficientNet",
        instance_of("torchvision.models.efficientnet.EfficientNet"),
        stages=_residual_stages,
    ),
    Family(
        "torchvision ConvNeXt",
        instance_of("torchvision.models.convnext.ConvNeXt"),
        stages=_residual_stages,
    ),
    Family(
        "torchvision Swin",
        instance_of("torchvision.models.swin_transformer.SwinTransformer"),
        stages=_residual_stages,
        axes="NHWC",
    ),
    Family(
        "torchvision ViT",
        instance_of("torchvision.models.vision_transformer.VisionTransformer"),
        stages=("encoder.layers",),
        axes="NLC",
        prefix_tokens=1,
    ),
]
