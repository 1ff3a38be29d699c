"""One small network per family of torchvision and timm, made by the library's own class to any depths.

A new line here is held to every law in test_families.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from timm.models import byobnet
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.densenet import DenseNet as TimmDenseNet
from timm.models.eva import Eva
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.regnet import RegNet as TimmRegNet
from timm.models.regnet import RegNetCfg
from timm.models.resnet import BasicBlock as TimmBasicBlock
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vgg import VGG as TimmVGG  # noqa: N811
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision import models
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet, vgg
from torchvision.models.resnet import BasicBlock

from ddnn.families.cifar_resnet import CifarResNet

CLASSES = 3
Depths = tuple[int, ...]


@dataclass(frozen=True)
class Small:
    """A way to make a network of any depths, and depths to try."""

    make: Callable[[Depths], nn.Module]
    full: Depths
    subnets: tuple[Depths, ...]
    size: int = 32


def cifar(depths: Depths) -> nn.Module:
    return CifarResNet(depths, CLASSES, width=4)


def resnet(depths: Depths) -> nn.Module:
    return models.ResNet(BasicBlock, list(depths), num_classes=CLASSES)


def regnet_(depths: Depths) -> nn.Module:
    blocks = regnet.BlockParams(list(depths), [8, 16], [4, 4], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return models.RegNet(blocks, num_classes=CLASSES, stem_width=8)


def _plan(depths: Depths) -> list[str | int]:
    return [entry for width, depth in zip((8, 16), depths, strict=True) for entry in (*[width] * depth, "M")]


def vgg_(depths: Depths, batch_norm: bool) -> nn.Module:
    with torch.device("meta"):  # its own classifier has 10^8 parameters
        net = vgg.VGG(nn.Sequential(), num_classes=1, init_weights=False)
    net.features = vgg.make_layers(_plan(depths), batch_norm)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Sequential(nn.Linear(64, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, CLASSES))
    return net


def mobilenet_v2(depths: Depths) -> nn.Module:
    settings = [[1, 8, depths[0], 1], [2, 16, depths[1], 2], [2, 24, depths[2], 2]]
    return models.MobileNetV2(CLASSES, inverted_residual_setting=settings, dropout=0.0)


def mobilenet_v3(depths: Depths) -> nn.Module:
    block = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    first = [block(16, 3, 16, 16, True, "RE", 2), *[block(16, 3, 24, 16, False, "RE", 1)] * (depths[0] - 1)]
    second = [block(16, 5, 32, 24, True, "HS", 2), *[block(24, 5, 48, 24, True, "HS", 1)] * (depths[1] - 1)]
    return models.MobileNetV3([*first, *second], last_channel=32, num_classes=CLASSES, dropout=0.0)


def efficientnet_(depths: Depths) -> nn.Module:
    settings = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, depths[0]),
        efficientnet.MBConvConfig(4, 3, 2, 8, 16, depths[1]),
    ]
    return models.EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES)


def convnext_(depths: Depths) -> nn.Module:
    block = convnext.CNBlockConfig
    return models.ConvNeXt([block(8, 16, depths[0]), block(16, None, depths[1])], num_classes=CLASSES)


def swin(depths: Depths, v2: bool) -> nn.Module:
    extra = {"block": models.swin_transformer.SwinTransformerBlockV2} if v2 else {}
    if v2:
        extra["downsample_layer"] = models.swin_transformer.PatchMergingV2
    return models.SwinTransformer(
        [4, 4], 8, list(depths), [2, 4], [4, 4], num_classes=CLASSES, stochastic_depth_prob=0.0, **extra
    )


def vit(depths: Depths) -> nn.Module:
    return models.VisionTransformer(32, 8, depths[0], 2, 12, 24, num_classes=CLASSES)


def densenet(depths: Depths) -> nn.Module:
    return models.DenseNet(4, depths, num_init_features=8, num_classes=CLASSES)


def timm_vit(depths: Depths, of: type[nn.Module] = TimmViT, **options: object) -> nn.Module:
    return of(img_size=32, patch_size=8, embed_dim=16, depth=depths[0], num_heads=2, num_classes=CLASSES, **options)


def timm_resnetv2(depths: Depths) -> nn.Module:
    return ResNetV2(
        list(depths),
        (8, 16),
        CLASSES,
        stem_chs=8,
        basic=True,
        bottle_ratio=1.0,
        norm_layer=partial(timm.layers.GroupNormAct, num_groups=4),
    )


def timm_byobnet(depths: Depths) -> nn.Module:
    blocks = [byobnet.ByoBlockCfg("basic", d=depth, c=width, s=2) for depth, width in zip(depths, (8, 16), strict=True)]
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks=tuple(blocks), stem_chs=8), num_classes=CLASSES)


class TimmRegNetOf(TimmRegNet):
    """A RegNet of timm works its depths out from a rule, which is put aside here."""

    def __init__(self, depths: Depths) -> None:
        self.wanted = depths
        super().__init__(RegNetCfg(13, 24, 36.44, 2.49, 8, se_ratio=0.25), num_classes=CLASSES)

    def _get_stage_args(self, *arguments, **options):  # type: ignore[no-untyped-def]
        per_stage, common = super()._get_stage_args(*arguments, **options)
        for stage, depth in zip(per_stage, self.wanted, strict=True):
            stage["depth"], stage["drop_path_rates"] = depth, [0.0] * depth
        return per_stage, common


def timm_efficientnet(depths: Depths, of: str) -> nn.Module:
    """An inverted-residual network of timm has its depths in a text; here in three stages."""
    from timm.models import _efficientnet_builder as builder
    from timm.models import efficientnet as family
    from timm.models import mobilenetv3 as family_v3

    text = [[f"ds_r{depths[0]}_k3_s1_c8"], [f"ir_r{depths[1]}_k3_s2_e2_c16_se0.25"], [f"ir_r{depths[2]}_k5_s2_e2_c24"]]
    make = family.EfficientNet if of == "EfficientNet" else family_v3.MobileNetV3
    return make(builder.decode_arch_def(text), CLASSES, num_features=32, stem_size=8)


SMALL: dict[str, Small] = {
    "CIFAR ResNet": Small(cifar, (3, 3, 2), ((1, 1, 1), (2, 3, 1))),
    "torchvision ResNet": Small(resnet, (1, 2, 2, 1), ((1, 1, 1, 1), (1, 2, 1, 1)), size=16),
    "torchvision RegNet": Small(regnet_, (2, 4), ((1, 2), (2, 2))),
    "torchvision VGG": Small(partial(vgg_, batch_norm=False), (2, 4), ((1, 2), (2, 3))),
    "torchvision VGG-BN": Small(partial(vgg_, batch_norm=True), (2, 4), ((1, 2), (2, 3))),
    "torchvision MobileNetV2": Small(mobilenet_v2, (1, 3, 2), ((1, 1, 1), (1, 2, 2))),
    "torchvision MobileNetV3": Small(mobilenet_v3, (2, 3), ((1, 1), (2, 2))),
    "torchvision EfficientNet": Small(efficientnet_, (2, 3), ((1, 2), (2, 2))),
    "torchvision ConvNeXt": Small(convnext_, (2, 3), ((1, 2), (2, 1))),
    "torchvision Swin": Small(partial(swin, v2=False), (2, 4), ((1, 2), (2, 2))),
    "torchvision SwinV2": Small(partial(swin, v2=True), (2, 4), ((1, 2), (2, 2))),
    "torchvision ViT": Small(vit, (4,), ((2,), (3,))),
    "torchvision DenseNet": Small(densenet, (2, 4, 3), ((1, 2, 3), (2, 4, 2), (2, 3, 2))),
    "timm ResNet": Small(
        partial(TimmResNet, TimmBasicBlock, num_classes=CLASSES, channels=(8, 8, 16, 16)),
        (1, 1, 2, 3),
        ((1, 1, 1, 2), (1, 1, 2, 2)),
    ),
    "timm SE-ResNeXt-D": Small(
        partial(
            TimmResNet,
            TimmBottleneck,
            num_classes=CLASSES,
            channels=(16, 16, 32, 32),
            cardinality=4,
            base_width=4,
            stem_type="deep",
            stem_width=8,
            avg_down=True,
            block_args={"attn_layer": "se"},
        ),
        (1, 1, 2, 3),
        ((1, 1, 1, 2), (1, 1, 2, 2)),
    ),
    "timm ResNetV2": Small(timm_resnetv2, (2, 3), ((1, 2), (2, 2))),
    "timm ByobNet": Small(timm_byobnet, (2, 3), ((1, 2), (2, 2))),
    "timm NFNet": Small(lambda d: NormFreeNet(NfCfg(d, (16, 32), stem_chs=8), CLASSES), (2, 3), ((1, 2), (2, 2))),
    "timm RegNet": Small(TimmRegNetOf, (1, 1, 2, 3), ((1, 1, 1, 2), (1, 1, 2, 2))),
    "timm VGG": Small(
        lambda d: TimmVGG(_plan(d), CLASSES, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d), (2, 4), ((1, 2), (2, 3))
    ),
    "timm DenseNet": Small(lambda d: TimmDenseNet(4, d, CLASSES), (2, 4, 3), ((1, 2, 3), (2, 4, 2), (2, 3, 2))),
    "timm EfficientNet": Small(partial(timm_efficientnet, of="EfficientNet"), (1, 3, 2), ((1, 1, 1), (1, 2, 2))),
    "timm MobileNetV3": Small(partial(timm_efficientnet, of="MobileNetV3"), (1, 3, 2), ((1, 1, 1), (1, 2, 2))),
    "timm ConvNeXt": Small(
        lambda d: TimmConvNeXt(num_classes=CLASSES, depths=d, dims=(8, 8, 16, 16)),
        (1, 1, 2, 3),
        ((1, 1, 1, 2), (1, 1, 2, 1)),
    ),
    "timm ConvNeXtV2": Small(
        lambda d: TimmConvNeXt(num_classes=CLASSES, depths=d, dims=(8, 8, 16, 16), use_grn=True, ls_init_value=None),
        (1, 1, 2, 3),
        ((1, 1, 1, 2), (1, 1, 2, 1)),
    ),
    "timm MetaFormer": Small(
        lambda d: MetaFormer(num_classes=CLASSES, depths=d, dims=(8, 16), use_mlp_head=False), (2, 3), ((1, 2), (2, 1))
    ),
    "timm Swin": Small(
        lambda d: TimmSwin(
            32, 4, 3, CLASSES, embed_dim=8, depths=d, num_heads=(2, 4), window_size=4, drop_path_rate=0.0
        ),
        (2, 4),
        ((1, 2), (2, 2)),
    ),
    "timm SwinV2": Small(
        lambda d: SwinTransformerV2(
            32, 4, 3, CLASSES, embed_dim=8, depths=d, num_heads=(2, 4), window_size=4, drop_path_rate=0.0
        ),
        (2, 4),
        ((1, 2), (2, 2)),
    ),
    "timm ViT": Small(timm_vit, (4,), ((2,), (3,))),
    "timm ViT with registers": Small(
        partial(timm_vit, reg_tokens=3, no_embed_class=True, global_pool="avg"), (4,), ((2,), (3,))
    ),
    "timm DeiT, distilled": Small(partial(timm_vit, of=VisionTransformerDistilled), (4,), ((2,), (3,))),
    "timm BEiT": Small(partial(timm_vit, of=Beit, use_shared_rel_pos_bias=True), (4,), ((2,), (3,))),
    "timm EVA": Small(partial(timm_vit, of=Eva, use_rot_pos_emb=True), (4,), ((2,), (3,))),
    "timm MLP-Mixer": Small(
        lambda d: MlpMixer(CLASSES, 32, patch_size=8, num_blocks=d[0], embed_dim=12), (4,), ((2,), (3,))
    ),
}


def images(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
