"""timm's families. Those not listed here are found by their structure."""

from typing import Any

from ddnn.families.family import Family, instance_of
from ddnn.families.torchvision_nets import between_pools


def _downscale(subnet: Any, full: Any) -> None:
    """An NFNet divides the input of each block by the deviation expected there, which blocks before it in its stage add
    to; so where a stage is cut, the first block of the next one divides by less.
    """
    variance = 1.0
    for stage in subnet.stages:
        for i, block in enumerate(stage):
            beta = 1.0 / variance**0.5
            if block.beta != beta:
                block.beta = beta
            variance = (1.0 if i == 0 else variance) + block.alpha**2


FAMILIES = [
    Family(
        "timm ResNet",
        instance_of("timm.models.resnet.ResNet", "timm.models.senet.SENet"),
        stages=("layer*",),
    ),
    Family("timm ResNetV2", instance_of("timm.models.resnetv2.ResNetV2"), stages=("stages.*.blocks",)),
    Family("timm RegNet", instance_of("timm.models.regnet.RegNet"), stages=("s1", "s2", "s3", "s4")),
    Family("timm ByobNet", instance_of("timm.models.byobnet.ByobNet"), stages=("stages.*",)),
    Family("timm NFNet", instance_of("timm.models.nfnet.NormFreeNet"), stages=("stages.*",), fit=_downscale),
    Family("timm VGG", instance_of("timm.models.vgg.VGG"), stages=between_pools),
    Family(
        "timm EfficientNet and MobileNet",
        instance_of("timm.models.efficientnet.EfficientNet", "timm.models.mobilenetv3.MobileNetV3"),
        stages=("blocks.*",),
    ),
    Family("timm ConvNeXt", instance_of("timm.models.convnext.ConvNeXt"), stages=("stages.*.blocks",)),
    Family("timm MetaFormer", instance_of("timm.models.metaformer.MetaFormer"), stages=("stages.*.blocks",)),
    Family(
        "timm Swin",
        instance_of(
            "timm.models.swin_transformer.SwinTransformer", "timm.models.swin_transformer_v2.SwinTransformerV2"
        ),
        stages=("layers.*.blocks",),
        axes="NHWC",
    ),
    Family(
        "timm DeiT, distilled",
        instance_of("timm.models.deit.VisionTransformerDistilled"),
        stages=("blocks",),
        axes="NLC",
        classifier=("head", "head_dist"),
    ),
    Family(
        "timm ViT and DeiT",
        instance_of("timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva", "timm.models.beit.Beit"),
        stages=("blocks",),
        axes="NLC",
    ),
    Family(
        "timm MLP-Mixer",
        instance_of("timm.models.mlp_mixer.MlpMixer"),
        stages=("blocks",),
        axes="NLC",
        prefix_tokens=0,
    ),
]
