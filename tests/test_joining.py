"""The full-net by itself in the first epochs; then its sub-nets join it."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import TINY, Quiet, exact
from ddnn import recipe as recipes
from ddnn.branchwise import branchwise_backward
from ddnn.build import build
from ddnn.checkpoint import RunFolder
from ddnn.compare.plan import alone
from ddnn.errors import RecipeError
from ddnn.families.cifar_resnet import resnet
from ddnn.network import DDNN, nest
from ddnn.objective import EKD
from ddnn.policies import HeadPolicy, NormPolicy
from ddnn.state import State
from ddnn.trainer import train

Make = Callable[..., RunFolder]
TABLE = {"resnet8": (1, 1, 1), "resnet14": (2, 2, 2)}
LATE = ("train.epochs=3", "train.full_net_share=0.6")


def disturbed(full_net: nn.Module) -> None:
    """Other weights, norms and statistics than it had."""
    with torch.no_grad():
        for tensor in full_net.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand_like(tensor)


@pytest.mark.parametrize("norm", ["private", "shared", "recalibrated"])
@pytest.mark.parametrize("head", ["shared", "private"])
def test_who_follows_is_as_if_nested_anew(norm: NormPolicy, head: HeadPolicy) -> None:
    net = nest(resnet(20, num_classes=10, width=4), TABLE, norm=norm, head=head)
    kept = {name: id(p) for name, p in net.named_parameters()}
    disturbed(net.nets["full"])
    anew = nest(copy.deepcopy(net.nets["full"]), TABLE, norm=norm, head=head)
    net.follow_full_net()
    assert {name: id(p) for name, p in net.named_parameters()} == kept  # which an optimiser knows them by
    ours, theirs = net.state_dict(), anew.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "network",
    [
        "convnext-tiny-small",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("densenet121-169-201", "vgg11-13-16-19-bn")),
    ],
)
def test_other_families_follow_too(network: str) -> None:
    net = build(recipes.Network(name=network), 10, 32)
    full_net = net.nets[net.full_name]
    disturbed(full_net)
    anew = nest(copy.deepcopy(full_net), net.depths, full_name=net.full_name, example=torch.randn(2, 3, 32, 32))
    net.follow_full_net()
    ours, theirs = net.state_dict(), anew.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("how", [(), ("train.lean=true",), ("train.ema=0.5", "train.accumulate=2")], ids=str)
def test_until_they_join_it_learns_as_if_alone(tiny: Make, how: tuple[str, ...]) -> None:
    """Bitwise, whatever the objective says of its sub-nets."""
    run = tiny("run", *LATE, *how, "objective.ramp=[0.1,0.5]")
    alone = tiny("alone", "train.epochs=3", "network.alone=resnet20", *how)
    train(run, Quiet())
    train(alone, Quiet())
    ours, theirs = exact(run), exact(alone)
    assert ours[:2] == theirs[:2]
    assert set(ours[0]["validation"]) == set(ours[0]["train_top1"]) == {"resnet20"}
    assert set(ours[2]["validation"]) == set(ours[2]["train_top1"]) == {"resnet8", "resnet14", "resnet20"}
    assert {"resnet8/kl", "resnet14/attention", "resnet20/ce"} < set(ours[2]["terms"])


def test_they_join_with_what_it_has_learned(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, DDNN]] = []
    join = State.join

    def watched(state: State) -> None:
        join(state)
        met.append((state.step, copy.deepcopy(state.net)))

    monkeypatch.setattr(State, "join", watched)
    run = tiny("run", *LATE)
    train(run, Quiet())
    [(step, net)] = met
    assert step == run.metrics()[1]["step"]
    full = net.nets["resnet20"].state_dict()
    for name in TABLE:
        assert all(torch.equal(tensor, full[key]) for key, tensor in net.nets[name].state_dict().items())


def test_all_begin_together_unless_told_otherwise(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: State) -> None:
        raise AssertionError("there is nothing to join")

    monkeypatch.setattr(State, "join", never)
    run = tiny("run")
    train(run, Quiet())
    assert set(run.metrics()[0]["train_top1"]) == {"resnet8", "resnet14", "resnet20"}


def test_the_lean_step_runs_whom_it_is_told_to() -> None:
    torch.manual_seed(0)
    net = nest(resnet(20, num_classes=10, width=4), TABLE).train()
    plain = copy.deepcopy(net)
    x, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    for only in (["full"], ["resnet8", "full"]):
        net.zero_grad()
        plain.zero_grad()
        terms, logits = branchwise_backward(net, EKD(), x, target, only=only)
        outputs = plain(x, only=only)
        expected = EKD()(outputs, target)
        torch.stack(list(expected.values())).sum().backward()
        assert list(terms) == list(expected)
        assert list(logits) == list(outputs)
        for (name, p), (_, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.full_net_share=1"], "full_net_share: input should be less than 1"),
        (["train.alone_share=0"], "alone_share: input should be greater than 0"),
        (
            ["train.epochs=9", "train.alone_share=0.3", "schedule.warmup_epochs=3"],
            r"warmup_epochs=3 must be below train\.epochs=9, of which a net alone has 3",
        ),
        (["objective.teacher=x", "objective.labels=full-net"], "labels=full-net leaves no net with labels"),
    ],
)
def test_what_does_not_fit_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load("digits", overrides)


def test_a_net_alone_has_its_own_epochs(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    own = ("train.epochs=4", "train.full_net_share=0.5", "train.alone_share=0.25", "network.alone=resnet8")
    code, _, err = ddnn("train", *TINY, *own, "--out", tmp_path / "run")
    assert code == 0, err
    run = RunFolder.open(tmp_path / "run")
    assert len(run.metrics()) == 1
    assert run.recipe == alone(recipes.load("digits", [*TINY, *own]), "resnet8")


@pytest.mark.parametrize(
    ("epochs", "share", "first"), [(1, 0.5, 0), (2, 0.5, 1), (18, 0.5, 9), (3, 0.99, 2), (10, 0.0, 0), (7, 0.34, 2)]
)
def test_shares_are_rounded_to_epochs_and_leave_one_for_all_nets(epochs: int, share: float, first: int) -> None:
    train = recipes.Train(epochs=epochs, full_net_share=share, alone_share=max(share, 0.01))
    assert train.full_net_epochs == first
    assert 1 <= train.alone_epochs <= epochs
