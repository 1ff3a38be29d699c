"""Laws that hold for every family, tried on a small network of each and on every preset."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from benchmarks.families import ALL, committed, lived, row
from torch import nn

from ddnn.branchwise import branchwise_backward
from ddnn.families import FAMILIES, PRESETS, family_of
from ddnn.network import DDNN, nest
from ddnn.objective import EKD
from ddnn.proof import overwrites
from ddnn.sharing import is_norm
from small_networks import CLASSES, SMALL, Small, images


def nested(small: Small, **policies: str) -> DDNN:
    return copy.deepcopy(_nested(small, *policies.items()))


@functools.cache
def _nested(small: Small, *policies: tuple[str, str]) -> DDNN:
    torch.manual_seed(0)
    subnets = {f"net{i}": depths for i, depths in enumerate(small.subnets)}
    return lived(nest(small.make(small.full), subnets, **dict(policies)))


@pytest.fixture(params=list(SMALL))
def small(request: pytest.FixtureRequest) -> Small:
    return SMALL[request.param]


def test_every_family_has_a_small_network() -> None:
    tried = {family_of(small.make(small.full)) for small in SMALL.values()}
    assert tried == set(FAMILIES)


def test_every_net_is_bitwise_the_librarys_own_network(small: Small) -> None:
    net = nested(small).eval()
    assert net.whole is None
    x = images(2, small.size)
    outputs = net(x)
    for name, depths in net.depths.items():
        library = small.make(depths).eval()
        library.load_state_dict(net.subnet(name).state_dict(), strict=True)
        expected = library(x)
        assert torch.equal(outputs[name].logits, expected), name  # inside the tree
        assert torch.equal(net.subnet(name)(x), expected), name  # taken out
        assert outputs[name].logits.shape == (2, CLASSES)


def test_tree_and_gradients_are_those_of_separate_networks(small: Small) -> None:
    net = nested(small).double().train()
    _without_chance(net)
    separate = copy.deepcopy(net)
    x, target = images(4, small.size).double(), torch.tensor([0, 1, 2, 0])
    outputs = net(x)
    for name, sub in separate.nets.items():
        logits = sub(x)
        assert torch.equal(outputs[name].logits, logits), name
        nn.functional.cross_entropy(logits, target).backward()
    sum(nn.functional.cross_entropy(output.logits, target) for output in outputs.values()).backward()
    expected = {name: p.grad for name, p in separate.named_parameters()}
    for name, p in net.named_parameters():
        if expected[name] is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-11)


def test_features_are_maps_of_the_same_resolution(small: Small) -> None:
    net = nested(small).eval()
    outputs = net(images(2, small.size))
    full = outputs[net.full_name].features
    assert len(full) == len(net.stages)
    for output in outputs.values():
        for mine, theirs in zip(output.features, full, strict=True):
            assert mine.ndim == 4
            assert mine.shape[2:] == theirs.shape[2:]
            assert mine.shape[2] == mine.shape[3] <= small.size


def test_no_block_overwrites_what_it_is_given(small: Small) -> None:
    net = nested(small).eval()
    with torch.no_grad():
        for name in net.depths:
            path = [step.block for step in net.path(name)]
            assert not overwrites(net.stem, path, lambda f, name=name: net.head_of(name, f), images(2, small.size))


def test_distillation_teaches_and_leaves_full_net_only_blocks_alone(small: Small) -> None:
    net = nested(small).train()
    _without_chance(net)
    terms = EKD()(net(images(4, small.size)), torch.tensor([0, 1, 2, 0]))
    assert all(torch.isfinite(term) for term in terms.values())
    sum(value for name, value in terms.items() if name.endswith(("/kl", "/attention"))).backward()
    used = {id(p) for name in list(net.depths)[:-1] for p in net.nets[name].parameters()}
    assert all(p.grad is None for p in net.parameters() if id(p) not in used)
    taught = [p for p in net.nets["net0"].parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(taught) > 3


def test_the_lean_step_is_the_plain_step(small: Small) -> None:
    lean = nested(small).double().train()
    _without_chance(lean)
    plain = copy.deepcopy(lean)
    x, target = images(4, small.size).double(), torch.tensor([0, 1, 2, 0])
    expected = EKD()(plain(x), target)
    sum(expected.values()).backward()
    terms, _ = branchwise_backward(lean, EKD(), x, target)
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    for (name, p), (_, q) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_what_is_shared_is_one_object_and_norms_are_private(small: Small) -> None:
    made = nested(small)
    for net in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.deepcopy(made).to(torch.float64)):
        full = net.nets[net.full_name]
        theirs = {id(p) for p in full.parameters()}
        for name in list(net.depths)[:-1]:
            sub = net.nets[name]
            norms = {id(p) for module in sub.modules() if is_norm(module) for p in module.parameters()}
            narrow = net.anatomies[name].family.dense
            private = [p for p in sub.parameters() if id(p) not in theirs]
            assert all(id(p) in norms for p in private) or narrow
            shared = sum(p.numel() for p in sub.parameters() if id(p) in theirs)
            assert shared > (0.3 if narrow else 0.8) * sum(p.numel() for p in sub.parameters())
        x = images(1, small.size).to(next(full.parameters()).dtype)
        net.eval()
        for name, output in net(x).items():
            assert torch.equal(output.logits, net.nets[name](x))


@pytest.mark.parametrize(("norm", "head"), [("shared", "private"), ("recalibrated", "shared")])
def test_other_policies(small: Small, norm: str, head: str) -> None:
    has_statistics = any(isinstance(m, nn.BatchNorm2d) for m in small.make(small.full).modules())
    if norm == "recalibrated" and not has_statistics:
        from ddnn.errors import NestingError

        with pytest.raises(NestingError, match="has no layer that keeps any; use norm='private' or 'shared'"):
            nested(small, norm=norm, head=head)
        return
    net = nested(small, norm=norm, head=head).eval()
    x = images(2, small.size)
    for name, output in net(x).items():
        assert torch.equal(output.logits, net.nets[name](x)), name
    full = net.nets[net.full_name]
    [*layers] = net.anatomies[net.full_name].classifier(full)
    sub = net.nets["net0"]
    if not net.anatomies["net0"].family.dense:
        for layer in layers:
            mine, theirs = sub.get_submodule(layer).weight, full.get_submodule(layer).weight
            assert mine.shape[0] == CLASSES
            assert (mine is theirs) == (head == "shared")


def _without_chance(net: nn.Module) -> None:
    """Without dropout, whose random numbers fall differently in a tree than in separate networks."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


# -- the presets: full size, by the library's own names -------------------------------------------------------------

QUICK = ("timm-resnet18-34", "timm-vit-tiny", "cifar-resnet20-32-44")


@pytest.mark.parametrize("preset", [pytest.param(p, marks=[] if p in QUICK else [pytest.mark.slow]) for p in ALL])
def test_every_preset_is_the_librarys_own_and_as_the_table_says(preset: str) -> None:
    line = row(preset)  # compares every net with the library's own, bitwise
    assert committed()[line.split("`")[1]] == line


def test_the_table_of_families_has_a_line_for_every_preset() -> None:
    assert list(committed()) == [name if name in PRESETS else preset.full_net for name, preset in ALL.items()]


def test_presets_name_each_network_once() -> None:
    for preset in ALL.values():
        assert list(preset.depths)[-1] == preset.full_net.rpartition("/")[2]
        for shallow, deep in itertools.pairwise(preset.depths.values()):
            assert all(a <= b for a, b in zip(shallow, deep, strict=True))
