"""Features of every net: bitwise those of the extracted network, with channels and strides that hold."""

import copy
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork

import ddnn
from ddnn import Backbone
from ddnn.errors import NestingError
from ddnn.families import EXAMPLES, PRESETS, build
from ddnn.network import DDNN

SOME = [
    "cifar-resnet8-14-20",
    "resnet18-34",
    *(
        pytest.param(preset, marks=pytest.mark.slow)
        for preset in ("resnet26-50", "resnet50-101", "resnet18-34-50-basic")
    ),
]


def make(preset: str = "cifar-resnet8-14-20", norm: str = "private") -> DDNN:
    torch.manual_seed(0)
    full_net, table = build(preset, 10, width=4)
    net = ddnn.nest(full_net, table, norm=norm)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def images(n: int = 2, height: int = 32, width: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def features_of_the_extracted(net: DDNN, name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """By torchvision's own getter, from the network that leaves the DDNN."""
    getter = IntermediateLayerGetter(net.subnet(name), {stage: stage for stage in net.stages})
    return list(getter(x).values())


@pytest.mark.parametrize("preset", SOME)
def test_features_are_bitwise_those_of_the_extracted_network(preset: str) -> None:
    net, x = make(preset), images()
    backbone = Backbone(net)
    assert backbone.names == tuple(net.depths)
    each = backbone.each(x)
    for name in net.depths:
        expected = features_of_the_extracted(net, name, x)
        for found in (backbone(x, name), each[name], backbone.at(name)(x)):
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("preset", SOME)
def test_channels_and_strides_are_those_of_the_features(preset: str) -> None:
    backbone = Backbone(make(preset))
    for feature, channels, stride in zip(
        backbone(images(), backbone.names[0]), backbone.channels, backbone.strides, strict=True
    ):
        assert feature.shape == (2, channels, 32 // stride, 64 // stride)


def test_strides_follow_dilation() -> None:
    full_net = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    backbone = Backbone(ddnn.nest(full_net, {"resnet26": (2, 2, 2, 2)}))
    assert backbone.strides == (4, 8, 8, 8)
    assert backbone.channels == (256, 512, 1024, 2048)


def test_the_same_as_timm_says() -> None:
    timm = pytest.importorskip("timm")
    net = make("resnet18-34")
    backbone = Backbone(net)
    for name in net.depths:
        theirs = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4)).eval()
        theirs.load_state_dict({k: t for k, t in net.subnet(name).state_dict().items() if not k.startswith("fc.")})
        assert tuple(theirs.feature_info.channels()) == backbone.channels
        assert tuple(theirs.feature_info.reduction()) == backbone.strides
        assert all(torch.equal(a, b) for a, b in zip(theirs(images()), backbone(images(), name), strict=True))


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ((1, 2), ("layer2", "layer3")),
        (("layer1", "layer3"), ("layer1", "layer3")),
        ((-1,), ("layer3",)),
        ((0,), ("layer1",)),
    ],
)
def test_stages_are_chosen_by_number_or_name(stages: tuple[int | str, ...], names: tuple[str, ...]) -> None:
    net, x = make(), images()
    backbone = Backbone(net, stages=stages)
    assert backbone.stages == names
    whole = Backbone(net)
    for name in net.depths:
        expected = [whole(x, name)[net.stages.index(stage)] for stage in names]
        for found in (backbone(x, name), backbone.each(x)[name], backbone.at(name)(x)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert backbone.channels == tuple(whole.channels[net.stages.index(stage)] for stage in names)


@pytest.mark.parametrize("stages", [None, (0,), (0, 1)])
def test_every_parameter_gets_a_gradient_and_it_is_the_ddnns(stages: tuple[int, ...] | None) -> None:
    """So that DistributedDataParallel needs no search for unused parameters."""
    net = make("resnet18-34")
    before = {name for name, _ in net.named_parameters()}
    backbone = Backbone(net, stages=stages).train()
    sum(f.square().mean() for features in backbone.each(images()).values() for f in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    ours, theirs = set(backbone.parameters()), set(net.parameters())
    assert ours < theirs
    assert not any(p is q for p in ours for q in net.nets["resnet34"].fc.parameters())
    assert {name for name, _ in net.named_parameters()} == before  # the DDNN itself still has its classifier
    assert net(images())["resnet34"].logits.shape == (2, 10)
    one = backbone.at("resnet18").train()
    assert set(one.parameters()) < ours
    assert not set(one.parameters()) - set(net.nets["resnet18"].parameters())


def test_the_common_beginning_runs_once() -> None:
    backbone = Backbone(make("resnet50-101"))
    calls = []
    for module in backbone.trunk.nets["resnet101"].layer1:
        module.register_forward_hook(lambda *_: calls.append(1))
    backbone.each(images())
    assert len(calls) == 3


def test_some_of_the_nets() -> None:
    net, x = make(), images()
    assert Backbone(net, ["resnet14", "resnet8"]).names == ("resnet8", "resnet14")
    one = Backbone(net, "resnet8")
    assert all(torch.equal(a, b) for a, b in zip(one(x), Backbone(net)(x, "resnet8"), strict=True))


def test_feeds_torchvisions_feature_pyramid() -> None:
    backbone = Backbone(make("resnet18-34"), stages=(1, 2, 3))
    pyramid = FeaturePyramidNetwork(list(backbone.channels), 32)
    maps = pyramid(OrderedDict(zip(backbone.stages, backbone(images(), "resnet18"), strict=True)))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 32, 32 // s, 64 // s) for s in backbone.strides]


def test_keeps_its_state_as_a_part_of_a_detector() -> None:
    detector = nn.ModuleDict({"body": Backbone(make()), "head": nn.Conv2d(16, 2, 1)})
    state = copy.deepcopy(detector.state_dict())
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    other = nn.ModuleDict(
        {"body": Backbone(ddnn.nest(*build("cifar-resnet8-14-20", 3, width=4))), "head": nn.Conv2d(16, 2, 1)}
    )
    other.load_state_dict(state, strict=True)
    for name in detector["body"].names:
        ours, theirs = detector["body"](images(), name), other.eval()["body"](images(), name)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_recalibrated_norms_are_guarded_and_can_be_recomputed_in_place() -> None:
    net = make(norm="recalibrated")
    with pytest.warns(UserWarning, match="never recalibrated"):
        backbone = Backbone(net)
    ddnn.recalibrate(backbone.trunk, [images(), images()])
    ddnn.recalibrate(net, [images(), images()])
    calibrated = Backbone(net)
    assert all(
        torch.equal(a, b) for a, b in zip(backbone(images(), "resnet8"), calibrated(images(), "resnet8"), strict=True)
    )


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda net: Backbone(net, "resnet9"), "no net 'resnet9' in this DDNN; it has resnet8, resnet14, resnet20"),
        (lambda net: Backbone(net, []), "a backbone needs a net; it has resnet8"),
        (lambda net: Backbone(net, stages=(3,)), r"no stage 3 in this DDNN; it has 0 \(layer1\), 1 \(layer2\)"),
        (lambda net: Backbone(net, stages=("layer9",)), "no stage 'layer9' in this DDNN"),
        (lambda net: Backbone(net, stages=(2, 1)), r"stages=\(2, 1\): name at least one stage, each once, shallow to"),
        (lambda net: Backbone(net, stages=()), r"stages=\(\): name at least one stage"),
        (lambda net: Backbone(net)(images()), "which net is to run.* resnet8, resnet14, resnet20"),
        (lambda net: Backbone(net)(images(), "resnet9"), "no net 'resnet9'"),
        (lambda net: Backbone(net).at("resnet9"), "no net 'resnet9'"),
    ],
)
def test_mistakes_end_in_a_sentence(make_it: object, sentence: str) -> None:
    with pytest.raises(NestingError, match=sentence):
        make_it(make())  # type: ignore[operator]


OTHERS = {
    "mobilenet-v2": 64,
    "densenet121-169-201": 64,
    "timm-vit-tiny": 224,
    "regnet-y-400mf": 64,
    "timm-convnext-tiny-small": 64,
    "swin-t-s": 64,
}
"""Networks that end, keep their channels, or grow their stages in other ways; side in pixels of images they take."""


@pytest.mark.slow
@pytest.mark.parametrize("preset", OTHERS)
def test_holds_for_other_families(preset: str) -> None:
    if preset.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    size = OTHERS[preset]
    chosen = EXAMPLES[preset] if preset in EXAMPLES else PRESETS[preset]
    full_net, _ = build(chosen.full_net, 10)
    net = ddnn.nest(full_net, {f"{name}_": depths for name, depths in chosen.depths.items()}).eval()
    assert net.whole is None
    x = images(1, size, size)
    expected = net(x)
    backbone = Backbone(net)
    for name, found in backbone.each(x).items():
        one = backbone.at(name)
        assert len(found) == len(net.stages)
        for ours, theirs, channels, stride in zip(
            found, expected[name].features, one.channels, one.strides, strict=True
        ):
            assert torch.equal(ours, theirs)
            assert ours.shape == (1, channels, size // stride, size // stride)
        assert all(torch.equal(a, b) for a, b in zip(found, one(x), strict=True))
    first = Backbone(net, stages=(0,)).train()
    sum(f.square().mean() for (f,) in first.each(images(2, size, size)).values()).backward()
    assert all(p.grad is not None for p in first.parameters())
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.slow
def test_nets_that_differ_in_channels_are_asked_one_by_one() -> None:
    backbone = Backbone(ddnn.nest(*build("densenet121-169-201", 10)))
    assert backbone.strides == (4, 8, 16, 32)
    with pytest.raises(
        NestingError, match=r"the nets differ in channels: densenet121 \(256, 512, 1024, 1024\), .*at\(name"
    ):
        _ = backbone.channels
    assert backbone.at("densenet169").channels == (256, 512, 1280, 1664)


class Twisted(nn.Module):
    """Its forward can't be taken apart: which way it goes depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stage = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        self.out = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x if x.shape[0] > 99 else self.stage(x)
        return self.out(x.mean((2, 3)))


def test_nets_that_run_whole_give_features_too() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="share weights but no work"):
        net = ddnn.nest(Twisted(), {"small": (1,)}, stages=["stage"]).eval()
    assert net.whole
    x = images()
    backbone = Backbone(net)
    assert (backbone.channels, backbone.strides) == ((8,), (2,))
    for name in net.depths:
        (found,) = backbone(x, name)
        assert torch.equal(found, net(x)[name].features[0])


class Of48(nn.Module):
    """Takes images of 48 px, and has no attribute that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.places = nn.Conv2d(3, 8, 16, 16), nn.Parameter(torch.zeros(1, 8, 3, 3))
        self.stage = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)))
        self.out = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.stage(self.stem(x) + self.places).mean((2, 3)))


def test_networks_of_one_size_say_which() -> None:
    net = ddnn.nest(small_vit(), {"one": (1,)})
    assert Backbone(net).strides == (16,)
    assert Backbone(net, image_size=48).strides == (16,)
    net = ddnn.nest(Of48(), {"one": (1,)}, stages=["stage"], example=torch.randn(2, 3, 48, 48))
    with pytest.raises(NestingError, match=r"does not take images of 256 or 224 or 384 px .*image_size="):
        Backbone(net)
    assert Backbone(net, image_size=48).strides == (16,)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(48, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
