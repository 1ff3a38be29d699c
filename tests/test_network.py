"""Laws that hold for every network: nesting, sharing, tree execution, extraction."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import ddnn
from ddnn.errors import DDNNError, NestingError
from ddnn.evaluate import macs, parameters
from ddnn.families import PRESETS, build
from ddnn.families.cifar_resnet import resnet as cifar_resnet
from ddnn.families.torchvision_resnet import resnet as torchvision_resnet
from ddnn.network import DDNN, nest
from ddnn.objective import EKD
from ddnn.sharing import agreement

CLASSES = 10
RESNETS = [name for name in PRESETS if name.startswith(("cifar-", "resnet"))]
"""The presets these laws are tried on in full; test_families.py holds all others to the same."""
POLICIES = [(norm, head) for norm in ("private", "shared", "recalibrated") for head in ("shared", "private")]


def make(preset: str, norm: str = "private", head: str = "shared", seed: int = 0) -> DDNN:
    torch.manual_seed(seed)
    full_net, table = build(preset, CLASSES, width=4)
    net = nest(full_net, table, norm=norm, head=head)
    # Norms and statistics as after some training, so that a mix-up of private ones can't go unseen.
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def library_net(preset: str, name: str) -> nn.Module:
    """The library's own network of that name, where there is one, else the same class built to these depths."""
    if preset.startswith("cifar"):
        return cifar_resnet(int(name.removeprefix("resnet")), num_classes=CLASSES, width=4)
    if hasattr(torchvision.models, name):
        return getattr(torchvision.models, name)(num_classes=CLASSES)
    return torchvision_resnet(name, num_classes=CLASSES)


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The outputs of these modules while they run."""
    seen: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda _m, _i, out: seen.append(out)) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.fixture(params=RESNETS, scope="module")
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_net_is_bitwise_the_librarys_own_network(preset: str) -> None:
    net = make(preset).eval()
    x = images()
    outputs = net(x)
    for name in net.depths:
        library = library_net(preset, name).eval()
        library.load_state_dict(net.subnet(name).state_dict(), strict=True)
        expected = library(x)
        assert torch.equal(outputs[name].logits, expected), name  # inside the tree
        assert torch.equal(net.subnet(name)(x), expected), name  # taken out


@pytest.mark.parametrize(
    ("preset", "norm", "head"),
    [(preset, "private", "shared") for preset in RESNETS] + [("cifar-resnet8-14-20", *both) for both in POLICIES[1:]],
)
def test_tree_is_bitwise_what_separate_forwards_give(preset: str, norm: str, head: str) -> None:
    net = make(preset, norm, head).train()
    separate = copy.deepcopy(net)
    x = images(4)
    outputs = net(x)
    for name, sub in separate.nets.items():
        assert torch.equal(outputs[name].logits, sub(x)), name


@pytest.mark.parametrize(
    ("preset", "norm", "head"),
    [("cifar-resnet8-14-20", *both) for both in POLICIES]
    + [(preset, "private", "shared") for preset in ("resnet18-34", "resnet26-50")],
)
def test_gradients_of_the_tree_are_the_sum_of_separate_backwards(preset: str, norm: str, head: str) -> None:
    net = make(preset, norm, head).double().train()
    separate = copy.deepcopy(net)
    x, target = images(4).double(), torch.tensor([0, 1, 2, 3])
    sum(nn.functional.cross_entropy(o.logits, target) for o in net(x).values()).backward()
    for sub in separate.nets.values():
        nn.functional.cross_entropy(sub(x), target).backward()
    expected = {name: p.grad for name, p in separate.named_parameters()}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-12)


def test_features_are_the_outputs_of_the_stages(preset: str) -> None:
    net = make(preset).eval()
    outputs = net(images())
    for name, sub in net.nets.items():
        with recorded(*(sub.get_submodule(stage) for stage in net.stages)) as seen:
            sub(images())
        assert all(torch.equal(a, b) for a, b in zip(outputs[name].features, seen, strict=True))


def test_the_common_beginning_runs_once() -> None:
    net = make("resnet50-101-152")
    calls: dict[int, int] = {}
    for module in net.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            module.register_forward_hook(lambda m, *_: calls.__setitem__(id(m), calls.get(id(m), 0) + 1))
    net(images())
    # 50 in 101: 3+4+6 blocks in common; 152 parts from both after 3+4 blocks.
    distinct_nodes = (3 + 8 + 36 + 3) + (6 + 3) + (23 - 6) + 3
    assert set(calls.values()) == {1}
    assert len(calls) == distinct_nodes
    assert macs(net, 32) < sum(macs(sub, 32) for sub in net.nets.values())


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [((3, 4, 6, 3), (3, 4, 23, 3), 13), ((3, 4, 23, 3), (3, 8, 36, 3), 7), ((2, 2), (3, 3), 2), ((2, 1), (2, 1), 3)],
)
def test_agreement_counts_blocks_before_paths_part(a: tuple[int, ...], b: tuple[int, ...], common: int) -> None:
    assert agreement(a, b) == agreement(b, a) == common


def test_sub_nets_need_not_be_a_chain_and_any_number_goes() -> None:
    torch.manual_seed(0)
    table = {"a": (1, 3, 2), "b": (3, 1, 2), "c": (2, 2, 2), "d": (2, 2, 1), "e": (2, 3, 3), "f": (1, 1, 1)}
    net = nest(cifar_resnet(20, num_classes=CLASSES, width=4), table).train()
    separate = copy.deepcopy(net)
    x = images(4)
    outputs = net(x)
    assert list(outputs) == [*table, "full"]
    for name, sub in separate.nets.items():
        assert torch.equal(outputs[name].logits, sub(x))
    # c and d are one path until the last stage, apart from everyone else after the first.
    c, d, e = net.nets["c"], net.nets["d"], net.nets["e"]
    assert c.layer2[1] is d.layer2[1]
    assert c.layer2[1] is e.layer2[1]
    assert c.layer3[0] is d.layer3[0]
    assert c.layer3[0] is not e.layer3[0]


def shared_and_private(net: DDNN, name: str) -> tuple[set[str], set[str]]:
    """Names of the sub-net's parameters that are the full-net's objects, and of those that are not."""
    full = dict(net.nets[net.full_name].named_parameters())
    own = dict(net.nets[name].named_parameters())
    shared = {n for n, p in own.items() if p is full[n]}
    return shared, own.keys() - shared


@pytest.mark.parametrize(("norm", "head"), POLICIES)
@pytest.mark.parametrize("moved", ["made", "deepcopy", "to", "load_state_dict"])
def test_what_is_shared_and_what_is_private(norm: str, head: str, moved: str) -> None:
    net = make("resnet18-34", norm, head)
    if moved == "deepcopy":
        net = copy.deepcopy(net)
    elif moved == "to":
        net = net.to(torch.float64).to(memory_format=torch.channels_last)
    elif moved == "load_state_dict":
        net.load_state_dict(make("resnet18-34", norm, head, seed=1).state_dict())
    shared, private = shared_and_private(net, "resnet18")
    expected = set()
    if norm == "private":
        norms = {f"{m}." for m, module in net.nets["resnet18"].named_modules() if isinstance(module, nn.BatchNorm2d)}
        apart = [n for n in norms if not n.startswith(("bn1.", "layer1.0.", "layer1.1."))]  # before the paths part
        expected |= {f"{n}{p}" for n in apart for p in ("weight", "bias")}
    if head == "private":
        expected |= {"fc.weight", "fc.bias"}
    assert private == expected
    assert "conv1.weight" in shared
    mean = [sub.layer4[0].bn1.running_mean for sub in net.nets.values()]
    assert (mean[0] is mean[1]) == (norm == "shared")
    assert net.nets["resnet18"].layer1[1] is net.nets["resnet34"].layer1[1]


def test_private_norms_cost_next_to_nothing() -> None:
    net = make("resnet18-34")
    alone = parameters(net.nets["resnet34"])
    assert alone < parameters(net) < 1.001 * alone


def test_a_subnet_is_independent() -> None:
    net = make("cifar-resnet8-14-20").eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sub = net.subnet("resnet8")
    with torch.no_grad():
        for p in sub.parameters():
            p.add_(1)
    sub.train()(images())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not net.nets["resnet8"].training


def test_pretrained_weights_of_the_library_load_strictly() -> None:
    torch.manual_seed(3)
    pretrained = torchvision.models.resnet34(num_classes=CLASSES).state_dict()
    net = make("resnet18-34")
    net.nets["resnet34"].load_state_dict(pretrained, strict=True)
    assert torch.equal(net.nets["resnet18"].layer4[1].conv2.weight, pretrained["layer4.1.conv2.weight"])


def test_one_net_is_that_network() -> None:
    torch.manual_seed(0)
    plain = cifar_resnet(8, num_classes=CLASSES, width=4)
    net = nest(copy.deepcopy(plain), {"resnet8": (1, 1, 1)})
    assert list(net.depths) == ["resnet8"]
    x, target = images(4), torch.tensor([0, 1, 2, 3])
    terms = EKD()(net(x), target)
    assert list(terms) == ["resnet8/ce"]
    assert torch.equal(terms["resnet8/ce"], nn.functional.cross_entropy(plain(x), target))


@pytest.mark.parametrize("preset", ["cifar-resnet8-14-20", "resnet18-34", "resnet26-50"])
def test_one_net_of_every_family_reduces_to_cross_entropy(preset: str) -> None:
    full_net, _ = build(preset, CLASSES, width=4)
    plain = copy.deepcopy(full_net)
    net = nest(full_net, {}, full_name="only")
    x, target = images(4), torch.tensor([0, 1, 2, 3])
    terms = EKD()(net(x), target)
    assert list(terms) == ["only/ce"]
    assert torch.equal(terms["only/ce"], nn.functional.cross_entropy(plain(x), target))


@pytest.mark.parametrize("preset", ["cifar-resnet8-14-20", "resnet18-34", "resnet26-50"])
def test_distillation_of_every_family_leaves_full_net_only_blocks_alone(preset: str) -> None:
    net = make(preset).train()
    terms = EKD()(net(images(4)), torch.tensor([0, 1, 2, 3]))
    sum(v for k, v in terms.items() if k.endswith(("/kl", "/attention"))).backward()
    used_by_sub_nets = {id(p) for name in list(net.depths)[:-1] for p in net.nets[name].parameters()}
    only_full = [p for p in net.parameters() if id(p) not in used_by_sub_nets]
    assert len(only_full) > 10
    assert all(p.grad is None for p in only_full)


def test_the_order_of_what_is_asked_for_does_not_matter() -> None:
    net = make("cifar-resnet8-14-20")
    assert list(net(images(), only=["resnet20", "resnet8"])) == ["resnet8", "resnet20"]  # the teacher stays last


def test_only_runs_what_is_asked_for() -> None:
    net = make("cifar-resnet8-14-20").eval()
    x = images()
    some = net(x, only=["resnet14"])
    assert list(some) == ["resnet14"]
    assert torch.equal(some["resnet14"].logits, net(x)["resnet14"].logits)
    with pytest.raises(NestingError, match="no net 'resnet9' in this DDNN; it has resnet8, resnet14, resnet20"):
        net(x, only=["resnet9"])
    assert list(net(x, only="resnet14")) == ["resnet14"]
    with pytest.raises(NestingError, match="only names no net of this DDNN; it has resnet8, resnet14, resnet20"):
        net(x, only=[])
    with pytest.raises(NestingError, match="no net 8 in this DDNN"):
        net(x, only=8)


def test_recalibrated_statistics_are_the_plain_averages() -> None:
    net = make("cifar-resnet8-14-20", "recalibrated")
    with pytest.warns(UserWarning, match="never recalibrated"):
        net.subnet("resnet8")
    batches = [images(8, 16) + i for i in range(3)]
    with pytest.raises(DDNNError, match="recalibrate needs at least one batch of images"):
        ddnn.recalibrate(net, iter([]))
    assert not net.calibrated
    ddnn.recalibrate(net, [[x, torch.zeros(8)] for x in batches])  # as a loader gives them
    net.subnet("resnet8")  # and warns no more
    net.alone("resnet14").subnet("resnet14")
    stem = net.nets["resnet8"].conv1
    means = torch.stack([stem(x).mean(dim=(0, 2, 3)) for x in batches]).mean(dim=0)
    torch.testing.assert_close(net.nets["resnet8"].bn1.running_mean, means)
    for name in ("resnet8", "resnet14"):  # every path has seen its own inputs
        with recorded(net.nets[name].layer3[0].conv1) as seen:
            for x in batches:
                net.train().nets[name](x)
        ddnn.recalibrate(net, batches)
        expected = torch.stack([out.mean(dim=(0, 2, 3)) for out in seen]).mean(dim=0)
        torch.testing.assert_close(net.nets[name].layer3[0].bn1.running_mean, expected)


def test_stages_can_be_named() -> None:
    net = nest(torchvision.models.resnet34(), {"thin": {"layer3": 2}})
    assert net.depths["thin"] == (3, 4, 2, 3)


def test_depths_may_be_numpys_whole_numbers() -> None:
    depths = nest(torchvision.models.resnet34(), {"thin": tuple(np.array([1, 2, 2, 2]))}).depths["thin"]
    assert depths == (1, 2, 2, 2)
    assert all(type(blocks) is int for blocks in depths)


@pytest.mark.parametrize(
    ("subnets", "message"),
    [
        ({"deep": (2, 2, 2, 4)}, "sub-net deep does not nest: it keeps 4 blocks of layer4, .* allowed: 1 to 3"),
        ({"deep": (0, 2, 2, 2)}, "keeps 0 blocks of layer1"),
        ({"deep": (2.0, 2, 2, 2)}, "keeps 2.0 blocks of layer1"),
        ({"short": (2, 2, 2)}, r"\(2, 2, 2\) gives 3 stages, the full-net has 4 \(layer1: 3, layer2: 4"),
        ({"odd": {"layer5": 2}}, "no stage 'layer5' in this full-net, which has layer1: 3"),
        ({"a": (2, 2, 2, 2), "b": (2, 2, 2, 2)}, "a and b are the same network"),
        ({"full": (2, 2, 2, 2)}, "has the full-net's name"),
        ({"a.b": (2, 2, 2, 2)}, "can't name a net"),
        ({"training": (2, 2, 2, 2)}, "can't name a net"),
        ({"resnet50": (3, 4, 6, 3)}, "resnet50 is made of bottleneck blocks and this full-net of basic blocks"),
        ({"a": 2}, r"sub-net a: 2 is no number of blocks for each stage \(layer1: 3"),
        ({1: (2, 2, 2, 2)}, "1 can't name a net"),
        ([(2, 2, 2, 2)], r"by name how many blocks each keeps, such as \{'small': \(1, 1, 1, 1\)\}; .* type list"),
        (None, "of type NoneType"),
    ],
)
def test_depths_that_do_not_nest(subnets: dict[str, object], message: str) -> None:
    with pytest.raises(NestingError, match=message):
        nest(torchvision.models.resnet34(), subnets)


def test_what_is_no_network_is_said_to_be_none() -> None:
    with pytest.raises(NestingError, match=r"must be a network, a torch\.nn\.Module; this is of type str"):
        nest("resnet34", {"resnet18": (2, 2, 2, 2)})


def test_policies_are_checked() -> None:
    with pytest.raises(NestingError, match="norm='own' is not one of private, shared, recalibrated"):
        nest(torchvision.models.resnet18(), {}, norm="own")
    with pytest.raises(NestingError, match="head='own' is not one of shared, private"):
        nest(torchvision.models.resnet18(), {}, head="own")


def test_a_family_of_ones_own() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(4)))
            self.norm = nn.BatchNorm2d(8)
            self.out = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.body(self.first(x))).mean(dim=(2, 3)))

    family = ddnn.Family(
        name="plain",
        matches=lambda net: isinstance(net, Plain),
        stages=("body",),
        stem=lambda net, x: net.first(x),
        head=lambda net, feature: net.out(net.norm(feature).mean(dim=(2, 3))),
        after_stages=("norm", "out"),
        classifier="out",
    )
    net = nest(Plain(), {"small": (2,)}, family=family).train()
    separate = copy.deepcopy(net)
    outputs = net(images())
    for name, sub in separate.nets.items():
        assert torch.equal(outputs[name].logits, sub(images()))
    assert net.nets["small"].norm is not net.nets["full"].norm
    assert net.nets["small"].out is net.nets["full"].out


@pytest.mark.parametrize(("norm", "head"), POLICIES)
def test_the_state_holds_every_tensor_once(norm: str, head: str) -> None:
    net = make("cifar-resnet8-14-20", norm, head)
    kept = net.state_dict()
    assert len({id(t) for t in kept.values()}) == len(kept)
    assert {t.data_ptr() for t in kept.values()} == {t.data_ptr() for t in net.state_dict().values()}
    assert sum(t.numel() for n, t in kept.items() if n in dict(net.named_parameters(remove_duplicate=False))) == (
        parameters(net)
    )
