"""Proposals of sub-nets: what they claim is what nesting them gives."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddnn.errors import NestingError
from ddnn.evaluate import macs, parameters
from ddnn.families import build
from ddnn.families.cifar_resnet import CifarResNet
from ddnn.network import nest
from ddnn.sharing import agreement
from ddnn.suggest import Suggestion, suggest
from small_networks import SMALL
from test_unlisted import Tokens

CPU = torch.device("cpu")


def deep() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet((4, 4, 4), 10, width=4)


@pytest.fixture(scope="module")
def suggestion() -> Suggestion:
    return suggest(deep(), "deep", shares=[0.5, 0.7], image_size=32, device=CPU)


def test_a_proposal_has_about_the_work_wanted(suggestion: Suggestion) -> None:
    assert [proposal.wanted for proposal in suggestion.proposals] == ["50% of the MACs"] * 2 + ["70% of the MACs"] * 2
    for proposal in suggestion.proposals:
        wanted = float(proposal.wanted.split("%")[0]) / 100
        assert abs(proposal.macs_share - wanted) < 0.05  # the blocks of so small a network are a twelfth each
        assert proposal.latency_ms is None
        assert all(1 <= kept <= 4 for kept in proposal.depths)


def test_its_figures_are_those_of_the_nested_networks(suggestion: Suggestion) -> None:
    alone = deep()
    for proposal in suggestion.proposals:
        net = nest(deep(), {"small": proposal.depths})
        small = net.subnet("small")
        assert proposal.macs == macs(small, 32)
        assert proposal.macs_share == macs(small, 32) / macs(alone, 32)
        assert proposal.parameters == parameters(small)
        assert proposal.added_macs == macs(net, 32) - macs(alone, 32)
        assert proposal.added_parameters == parameters(net) - parameters(alone)
        common = agreement(proposal.depths, (4, 4, 4))
        stage, block = divmod(common - 1, 4)
        assert proposal.parts == f"after block {block + 1} of 4 in layer{stage + 1}"
    for kind, bound in suggestion.bound.items():
        table = {p.name: p.depths for p in suggestion.proposals if kind in p.kind}
        net = nest(deep(), table)
        assert bound == macs(net, 32) / sum(macs(sub, 32) for sub in net.nets.values())


def test_late_parts_latest_and_balanced_is_most_even(suggestion: Suggestion) -> None:
    """Against every sub-net of about this size, one by one."""
    near: dict[tuple[int, ...], int] = {}
    full = macs(deep(), 32)
    for depths in itertools.product(range(1, 5), repeat=3):
        work = macs(CifarResNet(depths, 10, width=4), 32)
        if abs(work / full - 0.5) <= 0.03:
            near[depths] = work
    late, balanced = suggestion.proposals[:2]
    assert {late.kind, balanced.kind} == {("late",), ("balanced",)}
    assert agreement(late.depths, (4, 4, 4)) == max(agreement(depths, (4, 4, 4)) for depths in near)
    spread = {depths: max(depths) - min(depths) for depths in near}
    assert spread[balanced.depths] == min(spread.values())
    assert late.added_macs < balanced.added_macs
    assert "as late as it can" in late.why
    assert "most equal shares" in balanced.why


@pytest.mark.parametrize(
    "family",
    [
        "torchvision DenseNet",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("torchvision MobileNetV2", "timm Swin", "timm ViT")),
    ],
)
def test_any_family(family: str) -> None:
    small = SMALL[family]
    made = suggest(small.make(small.full), "net", shares=[0.9], image_size=small.size, device=CPU)
    assert made.depths == small.full
    for proposal in made.proposals:
        net = nest(small.make(small.full), {"small": proposal.depths})
        assert proposal.macs == macs(net.nets["small"], small.size)


def test_a_network_whose_nets_run_whole() -> None:
    with pytest.warns(UserWarning, match="share weights but no work"):
        made = suggest(Tokens(odd=True), "odd", shares=[0.6], image_size=32, device=CPU)
    [proposal] = made.proposals
    assert proposal.parts == "before the first layer"
    assert proposal.added_macs == proposal.macs
    assert abs(proposal.macs_share - 0.6) < 0.2


def test_stages_of_ones_own() -> None:
    full_net, _ = build("timm/test_vit", 5, image_size=32, options={"dynamic_img_size": False})
    made = suggest(full_net, "vit", shares=[0.7], image_size=32, device=CPU, stages=["blocks[0:3]", "blocks[3:6]"])
    assert made.depths == (3, 3)
    assert {len(proposal.depths) for proposal in made.proposals} == {2}


def test_a_latency_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proposed was timed; that the time is the wished one would be a claim about the machine."""
    full = suggest(deep(), "deep", latencies=[], shares=[0.5], image_size=32, device=CPU)
    assert full.latency_ms is None
    with pytest.raises(NestingError, match=r"no sub-net of deep takes 10000 ms here: the full-net takes .* ms"):
        suggest(deep(), "deep", latencies=[10000], image_size=32, device=CPU)
    with pytest.raises(
        NestingError, match=r"no sub-net of deep takes 0.0001 ms here: .* smallest .*\(1, 1, 1\), about"
    ):
        suggest(deep(), "deep", latencies=[1e-4], image_size=32, device=CPU)
    from ddnn.suggest import _Search

    time = _Search(nest(deep(), {}, full_name="deep").eval(), 32, CPU).time
    monkeypatch.setattr(_Search, "time", time)  # measured anew, the whole might take less than half of it does here
    made = suggest(deep(), "deep", latencies=[time.of((2, 2, 2))], image_size=32, device=CPU)
    assert made.latency_ms > 0
    assert all(proposal.latency_ms > 0 for proposal in made.proposals)
    assert all(proposal.name.startswith("ms") for proposal in made.proposals)


@pytest.mark.parametrize(("share", "has"), [(1.0, "below 1"), (0.01, r"\(1, 1, 1\), has \d\d%")])
def test_a_wish_that_no_sub_net_fulfils(share: float, has: str) -> None:
    with pytest.raises(NestingError, match=f"no sub-net of deep has {share:.0%} of the MACs: .*{has}"):
        suggest(deep(), "deep", shares=[share], image_size=32, device=CPU)


def test_the_command_line(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = ddnn("suggest", "cifar/resnet20", "--macs", "0.6", "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["full_net"] == "resnet20"
    assert made["image_size"] == 32
    code, out, _ = ddnn("suggest", "cifar/resnet20", "--macs", "0.6")
    for text in ("sub-nets of resnet20", "full-net", "3-3-3", "adds MACs", "of the MACs of training each alone"):
        assert text in out
    command = next(line for line in out.splitlines() if line.startswith("  ddnn train RECIPE"))
    arguments = command.split()[3:]
    quick = ["data.limit=40", "train.epochs=1", "train.batch_size=16", "network.width=8"]
    code, out, err = ddnn("train", "digits", *arguments, *quick, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    for proposal in made["proposals"]:
        if proposal["name"] in command:
            assert "-".join(map(str, proposal["depths"])) in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("torchvision/resnet19",), "torchvision has no network 'resnet19'"),
        (("cifar/resnet20", "--macs", "half"), "--macs half: give numbers above 0, such as 0.5,0.7"),
        (("cifar/resnet20", "--device", "tpu"), "choose auto, cpu or cuda"),
        (("cifar/resnet20", "--stages", "layer9"), "stage 'layer9' leads nowhere in this CifarResNet"),
    ],
)
def test_what_the_command_line_refuses(
    ddnn: Callable[..., tuple[int, str, str]],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    code, out, err = ddnn("suggest", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err.replace("\n", " ").replace("│ ", "").replace(" │", "")
