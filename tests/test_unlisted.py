"""Networks that no family lists: stages found by structure or named by hand, and one sentence where that can't be."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import ddnn
from ddnn.branchwise import branchwise_backward
from ddnn.errors import NestingError
from ddnn.network import DDNN, nest
from ddnn.objective import EKD


def conv(i: int, o: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, 1, bias=False)


class Block(nn.Module):
    """Residual, pre-activated, and with a ReLU that overwrites what the block is given."""

    def __init__(self, i: int, o: int, stride: int = 1, inplace: bool = False) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), conv(i, o, stride)
        self.short = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride)
        self.first = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.short(x) + self.conv(torch.relu(self.norm(x)))


class Named(nn.Module):
    """Blocks that are attributes, a batch size read at the start, a module between stages, functions at the end."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = conv(3, 8, 2)
        self.block1, self.block2, self.block3 = (Block(8, 8, inplace=inplace) for _ in range(3))
        self.pool = nn.AvgPool2d(2)
        self.later = nn.ModuleList([Block(8, 16), Block(16, 16), Block(16, 16)])
        self.norm = nn.BatchNorm2d(16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, _c, _h, _w = x.shape
        x = self.stem(x) * 2
        x = self.block3(self.block2(self.block1(x)))
        x = self.pool(x)
        for block in self.later:
            x = block(x) * 1.5
        return self.out(self.norm(x).mean((2, 3)).view(n, -1))


class Flat(nn.Sequential):
    """A plain network, all in one Sequential: convolution, norm, ReLU, again and again."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [conv(3, 8), nn.ReLU()]
        for width, depth in ((8, 3), (16, 2)):
            for i in range(depth):
                layers += [conv(8 if width == 16 and i == 0 else width, width), nn.BatchNorm2d(width), nn.ReLU(True)]
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.mix(h, h, h, need_weights=False)[0]


class Tokens(nn.Module):
    """A vision transformer by hand; `odd` looks at shapes in a way that can't be followed."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 65, 8))
        self.layers = nn.ModuleList([Attention(8) for _ in range(4)])
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x) if self.odd else x.shape[0], -1, -1), x], 1) + self.place
        if self.odd and math.sqrt(x.shape[1] - 1) != 8:
            raise ValueError("not 8 x 8")
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.norm(x)[:, 0])


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_laws(net: DDNN, size: int = 32) -> None:
    """The tree is bitwise what separate networks give, gradients their sum; extraction keeps it; EKD learns."""
    x, target = images(4, size).double(), torch.tensor([0, 1, 2, 0])
    net = copy.deepcopy(net).double().train()
    separate = copy.deepcopy(net)
    outputs = net(x)
    for name, sub in separate.nets.items():
        logits = sub(x.clone())
        assert torch.equal(outputs[name].logits, logits), name
        nn.functional.cross_entropy(logits, target).backward()
    lean = copy.deepcopy(net)
    sum(nn.functional.cross_entropy(output.logits, target) for output in outputs.values()).backward()
    branchwise_backward(lean, EKD(kl=0, attention=0), x, target)
    expected = {name: p.grad for name, p in separate.named_parameters()}
    slow = {name: p.grad for name, p in lean.named_parameters()}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(slow[name], expected[name], rtol=1e-9, atol=1e-11, msg=name)
    net.zero_grad()
    sum(EKD()(net(x), target).values()).backward()
    net.eval()
    for name, output in net(x).items():
        assert torch.equal(output.logits, net.subnet(name)(x.clone())), name
        assert all(feature.ndim == 4 for feature in output.features)


def test_blocks_that_are_attributes_and_blocks_in_a_list_are_found() -> None:
    net = nest(Named(), {"small": (1, 2)})
    assert net.stages == ("block1..block3", "later")
    assert net.depths == {"small": (1, 2), "full": (3, 3)}
    assert net.whole is None
    check_laws(net)
    small = net.nets["small"]
    assert isinstance(small.block2, nn.Identity)
    assert len(small.later) == 2
    assert small.stem is net.nets["full"].stem
    assert small.norm is not net.nets["full"].norm
    assert small.later[0].conv.weight is net.nets["full"].later[0].conv.weight
    assert [tuple(f.shape[1:]) for f in net(images())["small"].features] == [(8, 16, 16), (16, 8, 8)]


def test_a_sub_net_is_the_network_written_so() -> None:
    net = nest(Named(), {"small": (3, 1)}).eval()
    written = Named()
    del written.later[1:]
    written.load_state_dict(net.subnet("small").state_dict(), strict=True)
    assert torch.equal(written.eval()(images()), net(images())["small"].logits)


def test_blocks_that_overwrite_their_input_get_a_copy() -> None:
    net = nest(Named(inplace=True), {"small": (1, 2), "other": (2, 3)})
    assert net.anatomies["full"].family.clones
    check_laws(net)


def test_a_listed_network_of_somebodys_own_blocks_is_tried_out() -> None:
    """torchvision's ResNet, but its blocks write on what they are given."""

    class Halving(nn.Module):
        expansion = 1

        def __init__(
            self, i: int, o: int, stride: int = 1, downsample: nn.Module | None = None, *_: object, **__: object
        ) -> None:
            super().__init__()
            self.downsample, self.conv, self.norm = downsample, conv(i, o, stride), nn.BatchNorm2d(o)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(0.5)
            return (x if self.downsample is None else self.downsample(x)) + self.norm(self.conv(x))

    net = nest(torchvision.models.ResNet(Halving, [2, 2, 2, 2], num_classes=5), {"a": (1, 2, 1, 1), "b": (2, 1, 1, 1)})
    assert net.anatomies["full"].family.name.startswith("torchvision")
    assert net.anatomies["full"].family.clones
    check_laws(net)


def test_a_forward_that_draws_runs_whole() -> None:
    class Dropping(Named):
        """Whole layers, some of the time."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in (self.block1, self.block2, self.block3, self.pool, *self.later):
                if not self.training or torch.rand(()) > 0.1:
                    x = block(x)
            return self.out(self.norm(x).mean((2, 3)))

    with pytest.warns(UserWarning, match="no work, .* apart: it draws random numbers between its blocks"):
        net = nest(Dropping(), {"small": (1, 2)}, stages=["block1..block3", "later"])
    torch.manual_seed(0)

    def many_steps() -> None:
        with torch.no_grad():
            for _ in range(50):
                net.train()(images())

    with pytest.raises(NestingError, match=r"^net (small|full) did not run (block|later)\S* this time"):
        many_steps()


def test_checkpointing_that_has_no_effect_is_told_of() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=16, num_heads=2, num_classes=5)
    vit.set_grad_checkpointing(True)
    with pytest.warns(UserWarning, match="gradient checkpointing of VisionTransformer has no effect"):
        nest(vit, {"one": (1,)})


@pytest.mark.parametrize("size", [(32, 128), (16, 144), (64, 32), (64, 64)])
def test_tokens_lie_as_in_the_image(size: tuple[int, int]) -> None:
    options = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "num_classes": 5, "dynamic_img_size": True}
    with pytest.warns(UserWarning, match="share weights but no work"):
        net = nest(timm.create_model("vit_tiny_patch16_224", depth=2, **options), {"one": (1,)}).eval()
    x = torch.randn(1, 3, *size)
    theirs = net.nets["full"].forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    assert torch.equal(net(x)["one"].features[0], theirs)
    assert theirs.shape[2:] == (size[0] // 16, size[1] // 16)


def test_patches_need_not_be_square() -> None:
    options = {"img_size": 64, "patch_size": (8, 32), "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    net = nest(timm.create_model("vit_tiny_patch16_224", depth=2, **options), {"one": (1,)}).eval()
    assert net(torch.randn(1, 3, 64, 64))["one"].features[0].shape == (1, 16, 8, 2)


def test_a_flat_network_is_found_by_its_pattern_and_its_layers_move_up() -> None:
    net = nest(Flat(), {"small": (1, 1)})
    assert net.stages == ("[2:11:3]", "[12:18:3]")
    check_laws(net)
    assert isinstance(net.nets["small"][-1], nn.Linear)
    assert [int(name.split(".")[0]) for name in net.subnet("small").state_dict()][-1] == len(net.nets["small"]) - 1


def test_tokens_become_maps() -> None:
    net = nest(Tokens(), {"two": (2,)})
    assert net.stages == ("layers",)
    assert net.whole is None
    check_laws(net)
    assert net(images())["two"].features[0].shape == (2, 8, 8, 8)  # 65 tokens: a class and 8 x 8 places


def test_stages_of_ones_own_choice_renumber_what_is_left() -> None:
    """The first two of each half: blocks 0, 1, 4, 5 of 8, called 0 to 3 in the sub-net."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", depth=8, **options)
    net = nest(vit, {"four": (2, 2)}, stages=["blocks[0:4]", "blocks[4:8]"]).eval()
    check_laws(net)
    library = timm.create_model("vit_tiny_patch16_224", depth=4, **options).eval()
    library.load_state_dict(net.subnet("four").state_dict(), strict=True)
    assert torch.equal(library(images()), net(images())["four"].logits)
    assert net.nets["four"].blocks[2].mlp.fc1.weight is vit.blocks[4].mlp.fc1.weight
    assert [feature.shape for feature in net(images())["four"].features] == [(2, 16, 4, 4)] * 2


def test_a_forward_that_cannot_be_followed_runs_whole_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"nets of Tokens share weights but no work, .* apart: torch.fx can't follow it"
    ):
        net = nest(Tokens(odd=True), {"two": (2,)})
    assert net.whole
    full, two = net.nets["full"], net.nets["two"]
    assert two.layers[0].mix.in_proj_weight is full.layers[0].mix.in_proj_weight
    assert two.layers[0].norm is not full.layers[0].norm
    assert two.fc is full.fc
    check_laws(net)
    with pytest.raises(NestingError, match="these nets run whole and have no stem, blocks and head"):
        net.stem(images())


def test_what_a_block_is_given_beside_the_feature_may_be_a_constant() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return super().forward(x if scale is None else x * scale)

    class Net(nn.Module):
        def __init__(self, from_image: bool) -> None:
            super().__init__()
            self.from_image = from_image
            self.stem, self.scale = conv(3, 8), nn.Parameter(torch.tensor(1.5))
            self.blocks = nn.ModuleList([Scaled(8, 8) for _ in range(3)])
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.mean() if self.from_image else self.scale
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, scale=scale)
            return self.fc(x.mean((2, 3)))

    net = nest(Net(from_image=False), {"one": (1,)})
    check_laws(net)
    with pytest.warns(UserWarning, match=r"blocks.0 is given more than what comes from the block before it"):
        net = nest(Net(from_image=True), {"one": (1,)})
    check_laws(net)


def test_a_subclass_with_another_forward_is_believed() -> None:
    class Gated(torchvision.models.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = torch.sigmoid(self.layer2(self.layer1(x)))
            x = self.layer4(self.layer3(x)) * 2
            return self.fc(self.avgpool(x).flatten(1))

    torch.manual_seed(0)
    net = nest(Gated(torchvision.models.resnet.BasicBlock, [2, 1, 2, 1], num_classes=5), {"small": (1, 1, 1, 1)})
    x = images()
    net.eval()
    for name, output in net(x).items():
        assert torch.equal(output.logits, net.nets[name](x))


@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", "torchvision/mnasnet0_5", "timm/test_convnext3"])
def test_networks_of_the_libraries_that_are_not_listed(name: str) -> None:
    from ddnn.families import build

    torch.manual_seed(0)
    full_net, _ = build(name, 5)
    depths = nest(copy.deepcopy(full_net), {}).depths["full"]
    net = nest(full_net, {"small": tuple(max(1, d // 2) for d in depths)}).eval()
    assert net.whole is None
    x = images(2, 64)
    for output, sub in zip(net(x).values(), net.nets.values(), strict=True):
        assert torch.equal(output.logits, sub(x))


class Skipping(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.later[0](self.pool(self.block1(self.stem(x))))).mean((2, 3)))


class Twice(Named):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.block1(self.stem(x)))
        return self.out(self.norm(self.later[0](self.pool(x))).mean((2, 3)))


class Counting(Named):
    """Its last stage counts on three blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.block3(self.block2(self.block1(self.stem(x)))))
        return self.out(self.norm(self.later[2](self.later[1](self.later[0](x)))).mean((2, 3)))


def tied() -> nn.Module:
    net = Named()
    net.block2.conv.weight = net.block1.conv.weight
    return net


def pair() -> nn.Module:
    class Two(Named):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y, y

    return Two()


def kept() -> nn.Module:
    net = Named()
    net.block1.seen = net.stem(images())
    return net


def in_a_row(*blocks: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


REFUSED: dict[str, tuple[nn.Module, dict[str, object], str]] = {
    "no stages": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        {},
        "cannot find the stages of Sequential: no modules of one class .*; name them, such as ddnn.nest",
    ),
    "no such stage": (
        Named(),
        {"stages": ["layer1"]},
        "'layer1' leads nowhere in this Named; what it has that holds modules: block1, block2, block3, later",
    ),
    "a layer": (Named(), {"stages": ["stem"]}, "stage 'stem' is a Conv2d and holds no blocks"),
    "too long a slice": (Named(), {"stages": ["later[0:4]"]}, r"stage 'later\[0:4\]': later has 3 modules"),
    "two stages in one": (Named(), {"stages": ["later", "later[1:3]"]}, "stages later and later.* both hold later.1"),
    "two kinds": (
        Named(),
        {"stages": ["block1..later"]},
        "stage 'block1..later': its blocks differ in width or resolution: pool takes",
    ),
    "skipped": (
        Skipping(),
        {"stages": ["block1..block3"]},
        "stage 'block1..block3': the forward of Skipping runs block2 never; a block must run once",
    ),
    "twice": (Twice(), {"stages": ["block1..block3"]}, "the forward of Twice runs block1 2 times"),
    "widths": (
        in_a_row(Block(8, 8), Block(8, 16), Block(16, 16), width=16),
        {"stages": ["1"]},
        r"stage '1': its blocks differ in width or resolution: 1.1 takes \[8, .* gives \[16, .* only the first block",
    ),
    "tied": (tied(), {}, "Named has tied weights: block1.conv.weight and block2.conv.weight are one tensor"),
    "a pair": (pair(), {}, r"Two gives 2 values \(Tensor, Tensor\), not logits \[N, classes\]"),
    "no logits": (
        nn.Sequential(conv(3, 8), Block(8, 8), Block(8, 8)),
        {},
        r"Sequential gives a tensor \[2, 8, 64, 64\], not logits",
    ),
    "no images": (Named(), {"example": torch.randn(2, 3)}, r"example must hold images .* not \[2, 3\]"),
    "other images": (
        Named(),
        {"example": torch.randn(2, 1, 8, 8)},
        r"Named can't run on images \[2, 1, 8, 8\]: RuntimeError: .*; give some that it takes",
    ),
    "kept": (kept(), {}, "Named.block1 holds a tensor with a gradient in its attribute 'seen', left by a forward"),
    "lazy": (nn.Sequential(nn.LazyConv2d(8, 3)), {}, "Sequential has layers without a shape yet"),
    "inception": (
        torchvision.models.googlenet(num_classes=5, init_weights=False),
        {"stages": ["inception4b..inception4e"]},
        r"inception4d takes \[512, .* gives \[528",
    ),
}


@pytest.mark.parametrize(("net", "arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_nested_says_why(net: nn.Module, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(NestingError, match=sentence):
        nest(net, {}, **arguments)


def test_a_sub_net_that_cannot_run_says_so() -> None:
    with pytest.raises(NestingError, match=r"net small can't run on images \[2, 3, 64, 64\]: IndexError"):
        nest(Counting(), {"small": (1, 1)})


def test_a_wrapped_network_is_unwrapped_by_its_owner() -> None:
    with pytest.raises(NestingError, match="wrapped in DataParallel; nest the network itself, then wrap the DDNN"):
        nest(nn.DataParallel(Named()), {})


def test_one_family_or_names_not_both() -> None:
    family = ddnn.Family("mine", lambda net: True, stages=("later",))
    with pytest.raises(NestingError, match="give a family or the names of the stages, not both"):
        nest(Named(), {}, family=family, stages=["later"])
    net = nest(Named(), {"one": (1,)}, family=family)
    check_laws(net)
