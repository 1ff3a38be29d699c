"""Measures against known values and written-out counts."""

from collections.abc import Iterator

import pytest
import torch
import torchvision

from ddnn.cost import step_cost
from ddnn.evaluate import accuracy, hits, latency_ms, macs, parameters, ratio, side_by_side
from ddnn.families import build
from ddnn.families.discover import ghost
from ddnn.network import DDNN, nest
from ddnn.objective import EKD


def small() -> DDNN:
    torch.manual_seed(0)
    full_net, table = build("cifar-resnet8-14-20", 10, width=4)
    return nest(full_net, table)


@pytest.mark.parametrize(
    ("name", "gigamacs", "parameter_count"),
    [
        ("resnet18", 1.814073344, 11_689_512),
        ("resnet34", 3.663761408, 21_797_672),
        ("resnet50", 4.089184256, 25_557_032),
    ],
)
def test_macs_and_parameters_are_the_published_ones(name: str, gigamacs: float, parameter_count: int) -> None:
    net = getattr(torchvision.models, name)()
    assert macs(net, 224) == round(gigamacs * 1e9)
    assert parameters(net) == parameter_count


def test_macs_of_a_tree_count_common_beginnings_once() -> None:
    net = small()
    alone = {name: macs(sub, 32) for name, sub in net.nets.items()}
    stem = 9 * 3 * 4 * 32 * 32
    block = 2 * 9 * 4 * 4 * 32 * 32
    # ResNet-8 parts from the others after the first block, ResNet-14 from ResNet-20 after the second.
    assert macs(net, 32) == sum(alone.values()) - (stem + block) - (stem + 2 * block)


def test_hits_are_the_written_out_ones() -> None:
    logits = torch.tensor([[0.0, 5, 1, 2, 3, 4, 9], [9.0, 1, 2, 3, 4, 5, 6]])
    assert hits(logits, torch.tensor([6, 1])).tolist() == [1, 1]
    assert hits(logits, torch.tensor([3, 0])).tolist() == [1, 2]
    assert hits(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([0, 0])).tolist() == [1, 2]  # top-5 of two


def test_accuracy_counts_every_image_once_and_leaves_the_mode() -> None:
    net = small().train()
    x, target = torch.randn(11, 3, 8, 8), torch.arange(11) % 10
    measured = accuracy(net, [(x[:8], target[:8]), (x[8:], target[8:])])
    assert net.training
    net.eval()
    for name, output in net(x).items():
        right = sum(int(output.logits[i].argmax()) == int(target[i]) for i in range(11))
        among = sum(int(target[i]) in output.logits[i].topk(5).indices.tolist() for i in range(11))
        assert measured[name] == {"top1": right / 11, "top5": among / 11}


def test_accuracy_leaves_every_module_as_it_was_whatever_happens() -> None:
    net = small().train()
    net.nets["resnet20"].bn1.eval()  # frozen

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        accuracy(net, batches())
    assert net.training
    assert not net.nets["resnet20"].bn1.training


def test_calls_take_turns_and_none_always_follows_the_same() -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    seconds = side_by_side(calls, torch.device("cpu"), budget_s=30.0, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 50)
    rounds = ["".join(called[i : i + 3]) for i in range(3, len(called), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) == 6


def test_a_slower_round_does_not_move_a_ratio() -> None:
    pace = [1.0, 3.0, 1.0, 7.0, 2.0]
    seconds = {"a": [0.2 * p for p in pace], "b": [0.3 * p for p in pace], "c": [0.1 * p for p in pace]}
    seconds["c"][1] *= 50  # and one that something came between moves it little
    assert ratio(seconds, ["a"], ["b"]) == pytest.approx(2 / 3)
    assert ratio(seconds, ["a"], ["b", "c"]) == pytest.approx(1 / 2)
    assert ratio(seconds, ["a", "b"], ["c"]) == pytest.approx(5)


def test_macs_are_counted_on_a_meta_network_itself_which_stays_as_it_is() -> None:
    net = small().train()
    imagined = ghost(net)
    modules = dict(imagined.named_modules(remove_duplicate=False))
    assert macs(imagined, 32) == macs(net, 32)
    assert dict(imagined.named_modules(remove_duplicate=False)) == modules
    assert all(module.training for module in modules.values())


def test_latency_is_measured_for_every_net() -> None:
    nets = {name: sub.eval() for name, sub in small().nets.items()}
    latencies = latency_ms(nets, 8, torch.device("cpu"))
    assert list(latencies) == list(nets)
    assert all(ms > 0 for ms in latencies.values())


@pytest.mark.parametrize("lean", [False, True])
def test_step_cost_leaves_the_net_as_it_is(lean: bool) -> None:
    net = small().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, state = torch.randn(8, 3, 16, 16), torch.get_rng_state()
    cost = step_cost(net, EKD(), x, torch.arange(8), lean=lean, budget_s=0.0)
    assert cost["bound"] == cost["tree_macs"] / cost["alone_macs"] < 1
    assert cost["measured"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())
