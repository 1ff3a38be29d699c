"""The memory-saving step against the plain one."""

import copy
from contextlib import nullcontext

import pytest
import torch

from ddnn import branchwise
from ddnn.branchwise import branchwise_backward
from ddnn.errors import NestingError
from ddnn.families import build
from ddnn.families.cifar_resnet import resnet
from ddnn.network import DDNN, nest
from ddnn.objective import EKD

TABLES = {
    "chain": {"a": (1, 1, 1), "b": (2, 2, 2)},
    "late": {"a": (3, 3, 1), "b": (3, 3, 2)},
    "parts twice": {"a": (3, 1, 1), "b": (3, 1, 2), "c": (3, 2, 3)},
    "one": {},
    "deep in common": {"a": (2, 3, 1), "b": (2, 3, 3), "c": (2, 1, 1), "d": (1, 1, 1)},
}


def make(table: dict[str, tuple[int, ...]], head: str = "shared") -> DDNN:
    torch.manual_seed(0)
    return nest(resnet(20, num_classes=10, width=4), table, head=head).double().train()


def test_nets_that_are_not_there_are_named() -> None:
    with pytest.raises(NestingError, match="huge"):
        branchwise_backward(
            make(TABLES["chain"]), EKD(), torch.randn(6, 3, 16, 16), torch.arange(6), only=["huge", "b"]
        )


@pytest.mark.parametrize("labels", ["all", "full-net"])
@pytest.mark.parametrize("head", ["shared", "private"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_it_is_the_plain_step(table: dict[str, tuple[int, ...]], head: str, labels: str) -> None:
    """Terms, logits and running statistics bitwise; gradients in float64, where the order of a sum does not show."""
    lean = make(table, head)
    plain = copy.deepcopy(lean)
    x, target = torch.randn(6, 3, 16, 16).double(), torch.arange(6)
    objective = EKD(attention=5.0, labels=labels)
    outputs = plain(x)
    expected = objective(outputs, target)
    sum(expected.values()).backward()
    terms, logits = branchwise_backward(lean, objective, x, target)
    assert list(terms) == list(expected)
    assert list(logits) == list(outputs)
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    assert all(torch.equal(logits[name], outputs[name].logits) for name in logits)
    for (name, p), (_, q) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)
    for (name, a), (_, b) in zip(lean.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_with_a_separate_teacher_and_a_scale() -> None:
    lean = make(TABLES["chain"])
    plain = copy.deepcopy(lean)
    torch.manual_seed(5)
    teacher = make({})(torch.randn(4, 3, 16, 16).double())["full"]
    x, target = torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    expected = EKD()(plain(x), target, teacher)
    (0.25 * sum(expected.values())).backward()
    terms, _ = branchwise_backward(lean, EKD(), x, target, teacher, scale=0.25)
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in expected.items()}
    for p, q in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_it_holds_one_path_at_a_time() -> None:
    """The most bytes saved for backward at any moment, counted by autograd's own hooks."""

    def peak(table: dict[str, tuple[int, ...]], lean: bool) -> int:
        full_net, _ = build("cifar-resnet8-14-20", 10, width=4)
        net = nest(full_net, table).train()
        parameters = {p.data_ptr() for p in net.parameters()}
        held, most = 0, 0

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal held, most
                self.tensor = tensor
                self.bytes = 0 if tensor.data_ptr() in parameters else tensor.numel() * tensor.element_size()
                held += self.bytes
                most = max(most, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.bytes

        x, target = torch.randn(8, 3, 32, 32), torch.arange(8)
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            if lean:
                branchwise_backward(net, EKD(), x, target)
            else:
                sum(EKD()(net(x), target).values()).backward()
        return most

    table = TABLES["chain"]
    alone = peak({}, lean=False)
    assert peak(table, lean=True) < 1.15 * alone
    assert peak(table, lean=False) > 1.5 * alone


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_weights_cast_anew_change_nothing() -> None:
    """One net, whose sums have one order only, is bitwise the plain step, with its copies of weights and without."""
    x, target, found = torch.randn(6, 3, 16, 16), torch.arange(6), []
    net = nest(resnet(20, num_classes=10, width=4), {}).to(memory_format=torch.channels_last).train()
    for keep in (None, True, False):
        own = copy.deepcopy(net)
        with nullcontext() if keep is None else branchwise._weights_cast_anew(keep=keep), autocast():
            outputs = own(x)
        sum(EKD()(outputs, target).values()).backward()
        found.append([outputs["full"].logits, *(p.grad for p in own.parameters())])
    lean = copy.deepcopy(net)
    _, logits = branchwise_backward(lean, EKD(), x, target, autocast=autocast)
    found.append([logits["full"], *(p.grad for p in lean.parameters())])
    plain, *others = found
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_under_autocast_no_copy_of_a_weight_is_kept_after_the_first_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    real = branchwise._pack

    def pack(saved: torch.Tensor) -> object:
        packed = real(saved)
        if isinstance(packed, torch.Tensor):
            kept.append(packed)
        return packed

    net = nest(resnet(20, num_classes=10, width=4), TABLES["chain"]).to(memory_format=torch.channels_last).train()
    monkeypatch.setattr(branchwise, "_pack", pack)
    branchwise_backward(net, EKD(), torch.randn(6, 3, 16, 16), torch.arange(6), autocast=autocast)
    shapes = {p.shape for p in net.parameters() if p.ndim == 4}
    assert kept
    assert not [t for t in kept if t.dtype == torch.bfloat16 and t.shape in shapes]
