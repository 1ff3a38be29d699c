"""Full-nets with the depths of the sub-nets that their library has a name for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddnn.errors import RecipeError
from ddnn.families import cifar_resnet, torchvision_resnet
from ddnn.families.library import Options, create

Depths = tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """A full-net by name and the blocks kept per stage of each net in it, shallow to deep, the full-net last.

    The nets are called as their library calls its own network of these depths, which each of them equals bitwise.
    """

    full_net: str
    depths: Mapping[str, Depths]


def _cifar(*layers: int) -> Preset:
    return Preset(f"cifar/resnet{layers[-1]}", {f"resnet{n}": cifar_resnet.depths(n) for n in layers})


def _resnet(*names: str) -> Preset:
    return Preset(f"torchvision/{names[-1]}", {name: torchvision_resnet.BLOCKS[name][1] for name in names})


def _of(library: str, **depths: Depths) -> Preset:
    return Preset(f"{library}/{list(depths)[-1]}", depths)


_18, _50, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
_TINY, _SMALL = (3, 3, 9, 3), (3, 3, 27, 3)
_SWIN_T, _SWIN_S = (2, 2, 6, 2), (2, 2, 18, 2)
_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_DENSE = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
_B0, _B1 = (1, 2, 2, 3, 3, 4, 1), (2, 3, 3, 4, 4, 5, 2)

PRESETS: dict[str, Preset] = {
    "cifar-resnet8-14-20": _cifar(8, 14, 20),
    "cifar-resnet20-32-44": _cifar(20, 32, 44),
    "cifar-resnet20-32-56": _cifar(20, 32, 56),
    "cifar-resnet20-32-44-56-110": _cifar(20, 32, 44, 56, 110),
    "resnet18-34": _resnet("resnet18", "resnet34"),
    "resnet18-34-50-basic": _resnet("resnet18", "resnet34", "resnet50_basic"),
    "resnet26-50": _resnet("resnet26", "resnet50"),
    "resnet50-101": _resnet("resnet50", "resnet101"),
    "resnet50-101-152": _resnet("resnet50", "resnet101", "resnet152"),
    "wide-resnet50-101": _of("torchvision", wide_resnet50_2=_50, wide_resnet101_2=_101),
    "vgg11-13-16-19-bn": _of("torchvision", **{f"vgg{n}_bn": depths for n, depths in _VGG.items()}),
    "vgg11-13-16-19": _of("torchvision", **{f"vgg{n}": depths for n, depths in _VGG.items()}),
    "densenet121-169-201": _of("torchvision", **{f"densenet{n}": depths for n, depths in _DENSE.items()}),
    "efficientnet-b0-b1": _of("torchvision", efficientnet_b0=_B0, efficientnet_b1=_B1),
    "convnext-tiny-small": _of("torchvision", convnext_tiny=_TINY, convnext_small=_SMALL),
    "swin-t-s": _of("torchvision", swin_t=_SWIN_T, swin_s=_SWIN_S),
    "swin-v2-t-s": _of("torchvision", swin_v2_t=_SWIN_T, swin_v2_s=_SWIN_S),
    "timm-resnet18-34": _of("timm", resnet18=_18, resnet34=_50),
    "timm-resnet18d-34d": _of("timm", resnet18d=_18, resnet34d=_50),
    "timm-resnet26d-50d-101d": _of("timm", resnet26d=_18, resnet50d=_50, resnet101d=_101),
    "timm-resnet14t-26t-50t": _of("timm", resnet14t=(1, 1, 1, 1), resnet26t=_18, resnet50t=_50),
    "timm-resnext50-101": _of("timm", resnext50_32x4d=_50, resnext101_32x4d=_101),
    "timm-wide-resnet50-101": _of("timm", wide_resnet50_2=_50, wide_resnet101_2=_101),
    "timm-seresnet18-34": _of("timm", seresnet18=_18, seresnet34=_50),
    "timm-seresnet50-101-152": _of("timm", seresnet50=_50, seresnet101=_101, seresnet152=_152),
    "timm-resnetv2-18-34": _of("timm", resnetv2_18=_18, resnetv2_34=_50),
    "timm-resnetv2-50-101": _of("timm", resnetv2_50=_50, resnetv2_101=_101),
    "timm-vgg11-13-16-19-bn": _of("timm", **{f"vgg{n}_bn": depths for n, depths in _VGG.items()}),
    "timm-densenet121-169-201": _of("timm", **{f"densenet{n}": depths for n, depths in _DENSE.items()}),
    "timm-efficientnet-b0-b1": _of("timm", efficientnet_b0=_B0, efficientnet_b1=_B1),
    "timm-efficientnetv2-b0-b1": _of(
        "timm", tf_efficientnetv2_b0=(1, 2, 2, 3, 5, 8), tf_efficientnetv2_b1=(2, 3, 3, 4, 6, 9)
    ),
    "timm-convnext-tiny-small": _of("timm", convnext_tiny=_TINY, convnext_small=_SMALL),
    "timm-convnextv2-tiny-small": _of("timm", convnextv2_tiny=_TINY, convnextv2_small=_SMALL),
    "timm-poolformer-s12-24-36": _of(
        "timm", poolformer_s12=(2, 2, 6, 2), poolformer_s24=(4, 4, 12, 4), poolformer_s36=(6, 6, 18, 6)
    ),
    "timm-swin-tiny-small": _of("timm", swin_tiny_patch4_window7_224=_SWIN_T, swin_small_patch4_window7_224=_SWIN_S),
    "timm-swinv2-tiny-small": _of("timm", swinv2_tiny_window8_256=_SWIN_T, swinv2_small_window8_256=_SWIN_S),
    "timm-resmlp12-24-36": _of("timm", resmlp_12_224=(12,), resmlp_24_224=(24,), resmlp_36_224=(36,)),
}

EXAMPLES: dict[str, Preset] = {
    "regnet-y-400mf": _of("torchvision", half_depth=(1, 2, 3, 3), regnet_y_400mf=(1, 3, 6, 6)),
    "mobilenet-v2": _of("torchvision", half_depth=(1, 1, 2, 2, 2, 2, 1), mobilenet_v2=(1, 2, 3, 4, 3, 3, 1)),
    "mobilenet-v3-large": _of("torchvision", half_depth=(1, 1, 2, 2, 1, 2), mobilenet_v3_large=(1, 2, 3, 4, 2, 3)),
    "vit-b-16": _of("torchvision", half_depth=(6,), vit_b_16=(12,)),
    "timm-regnety-004": _of("timm", half_depth=(1, 2, 3, 3), regnety_004=(1, 3, 6, 6)),
    "timm-mobilenetv2-100": _of("timm", half_depth=(1, 1, 2, 2, 2, 2, 1), mobilenetv2_100=(1, 2, 3, 4, 3, 3, 1)),
    "timm-mobilenetv3-large-100": _of(
        "timm", half_depth=(1, 1, 2, 2, 1, 2, 1), mobilenetv3_large_100=(1, 2, 3, 4, 2, 3, 1)
    ),
    "timm-vit-tiny": _of("timm", half_depth=(6,), vit_tiny_patch16_224=(12,)),
    "timm-deit-tiny": _of("timm", half_depth=(6,), deit_tiny_patch16_224=(12,)),
    "timm-deit-tiny-distilled": _of("timm", half_depth=(6,), deit_tiny_distilled_patch16_224=(12,)),
}
"""Families of which the libraries have no two networks that differ in depth alone, each with depths one can choose."""


def build(
    name: str,
    num_classes: int,
    width: int = 16,
    *,
    image_size: int | None = None,
    pretrained: bool = False,
    options: Options | None = None,
) -> tuple[nn.Module, dict[str, Depths]]:
    """The full-net of a preset or of this name, and its table of depths (empty for a full-net without a preset)."""
    preset = PRESETS.get(name)
    made: dict[str, Any] = {"width": width, "image_size": image_size, "pretrained": pretrained, "options": options}
    if preset is None:
        if "/" not in name:
            raise RecipeError(
                f"network.name: no network {name!r}; presets: {', '.join(PRESETS)}; full-nets: cifar/resnetN, "
                "torchvision/NAME, timm/NAME"
            )
        return create(name, num_classes=num_classes, **made), {}
    return create(preset.full_net, num_classes=num_classes, **made), dict(preset.depths)
