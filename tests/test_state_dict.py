"""A DDNN's state dict holds every tensor once, and loading one fills all nets."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ddnn.errors import NestingError
from ddnn.families.cifar_resnet import resnet
from ddnn.network import DDNN, nest

POLICIES = [(norm, head) for norm in ("private", "shared", "recalibrated") for head in ("shared", "private")]
TABLE = {"resnet8": (1, 1, 1), "odd": (2, 1, 2), "resnet14": (2, 2, 2)}


def make(norm: str = "private", head: str = "shared", seed: int = 0) -> DDNN:
    torch.manual_seed(seed)
    net = nest(resnet(20, num_classes=10, width=4), TABLE, norm=norm, head=head)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
    return net


def same_everywhere(a: DDNN, b: DDNN) -> bool:
    """Whether every net of `a` holds bitwise what that of `b` does, seen net by net as its library would."""
    states = [(a.nets[name].state_dict(), b.nets[name].state_dict()) for name in a.depths]
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours) for ours, theirs in states
    )


@pytest.mark.parametrize(("norm", "head"), POLICIES)
def test_holds_every_tensor_once(norm: str, head: str) -> None:
    net = make(norm, head)
    held = [t.data_ptr() for t in net.state_dict().values()]
    assert len(held) == len(set(held))
    assert set(held) == {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
    assert "nets.full.conv1.weight" in net.state_dict()
    assert "nets.resnet8.conv1.weight" not in net.state_dict()


@pytest.mark.parametrize(("norm", "head"), POLICIES)
def test_goes_through_safetensors_and_back_bitwise(norm: str, head: str, tmp_path: Path) -> None:
    net, other = make(norm, head), make(norm, head, seed=1)
    save_file(net.state_dict(), tmp_path / "a.safetensors")  # which refuses tensors that share memory
    assert not same_everywhere(net, other)
    parameters = [id(p) for p in other.parameters()]
    other.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    assert same_everywhere(net, other)
    assert [id(p) for p in other.parameters()] == parameters  # the ties are those that were there


def test_works_inside_another_module_and_in_a_copy() -> None:
    outer, other = nn.ModuleDict({"net": make()}), copy.deepcopy(nn.ModuleDict({"net": make(seed=1)}))
    assert set(outer.state_dict()) == {f"net.{name}" for name in outer["net"].state_dict()}
    other.load_state_dict(outer.state_dict(), strict=True)
    assert same_everywhere(outer["net"], other["net"])
    assert not same_everywhere(outer["net"], make(seed=1))


def test_a_state_that_names_shared_tensors_again_and_again_loads_too() -> None:
    net, other = make(), make(seed=1)
    everything = {f"nets.{name}.{key}": t for name, sub in net.nets.items() for key, t in sub.state_dict().items()}
    assert len(everything) > len(net.state_dict())
    other.load_state_dict(everything, strict=True)
    assert same_everywhere(net, other)


def test_what_is_missing_or_too_much_is_still_reported() -> None:
    state = make().state_dict()
    del state["nets.full.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*nets\.full\.conv1\.weight"):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus"):
        make().load_state_dict({**make().state_dict(), "surplus": torch.zeros(1)})


def test_assigning_would_part_the_nets_and_is_refused() -> None:
    with pytest.raises(NestingError, match=r"assign=True\) would part what the nets share"):
        make().load_state_dict(make().state_dict(), assign=True)


def test_new_parameters_are_shared_as_before() -> None:
    with torch.device("meta"):
        net = make()
    names, held = list(net.state_dict()), [p.shape for p in net.parameters()]
    net.to_empty(device="cpu")
    assert [p.shape for p in net.parameters()] == held
    assert list(net.state_dict()) == names
    state = make().state_dict()
    net.load_state_dict(state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_an_average_over_state_dicts_averages_each_tensor_once() -> None:
    net, average = make(), make(seed=1)
    theirs = net.state_dict()
    expected = {name: 0.75 * ours + 0.25 * theirs[name] for name, ours in average.state_dict().items()}
    with torch.no_grad():
        for ours, theirs in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
            if ours.is_floating_point():
                ours.mul_(0.75).add_(0.25 * theirs)
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, expected[name]), name
