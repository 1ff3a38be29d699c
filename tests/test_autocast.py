"""Convolutions as matrix products against the library's."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import ddnn.autocast
from ddnn.autocast import NONE, Convolution, MatrixProducts, Parts, _as_products, _as_products_in_float32, autocast
from ddnn.branchwise import branchwise_backward
from ddnn.families import build
from ddnn.network import DDNN, nest
from ddnn.objective import EKD

CPU = torch.device("cpu")

CASES = {
    # name: (images, channels, size, outputs, kernel, stride, padding), which parts are products: forward, image, weight
    "weight only": ((2, 24, 4, 32, (3, 3), 1, 1), (False, False, True)),
    "1 x 1": ((2, 8, 4, 16, (1, 1), 1, 0), (True, True, True)),
    "1 x 1 in strides": ((2, 8, 5, 16, (1, 1), 2, 0), (True, False, True)),
    "1 x 1 in a margin": ((1, 128, 3, 128, (1, 1), 1, 1), (True, False, True)),
    "3 x 3": ((2, 64, 4, 64, (3, 3), 1, 1), (True, True, True)),
    "3 x 3 without margin": ((3, 64, 4, 64, (3, 3), 1, 0), (True, True, True)),
    "3 x 3 in strides": ((2, 8, 4, 64, (3, 3), 2, 1), (True, False, True)),
    "1 x 3 in strides": ((1, 64, 7, 64, (1, 3), (2, 3), (0, 1)), (True, False, True)),
    "3 x 1": ((1, 30, 3, 30, (3, 1), 1, (1, 0)), (True, True, True)),
    "5 x 5": ((1, 64, 4, 64, (5, 5), 1, 2), (True, True, True)),
    "margin wider than the kernel": ((1, 128, 1, 128, (2, 2), 1, 3), (True, False, True)),
    "many positions": ((4, 8, 32, 8, (3, 3), 1, 1), (False, False, False)),
}


def pair(given: int | tuple[int, int]) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else given


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def made(call: object, *tensors: Tensor) -> list[Tensor]:
    """The output, and the gradients of the tensors for one and the same gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, leaves, drawn(*y.shape).to(y.dtype))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_products_are_the_convolution_and_its_gradients(name: str, layout: torch.memory_format) -> None:
    (n, channels, size, outputs, kernel, stride, padding), parts = CASES[name]
    s, p = pair(stride), pair(padding)
    x, w = (
        drawn(*shape).to(memory_format=layout) for shape in ((n, channels, size, size), (outputs, channels, *kernel))
    )
    assert _as_products(x.shape, w.shape, s, p) == parts
    ours = made(lambda x, w: Convolution.apply(x, w, s, p, Parts(*parts)), x, w)
    theirs = made(lambda x, w: torch.conv2d(x, w, None, s, p), x, w)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours[0].is_contiguous() == theirs[0].is_contiguous(), "what comes next may count on it"


def test_they_can_be_differentiated_twice_and_by_transforms() -> None:
    x, w = drawn(1, 32, 2, 2).requires_grad_(), drawn(32, 32, 3, 3).requires_grad_()

    def penalty(convolution: object) -> list[Tensor]:
        y = convolution(x, w).tanh()  # type: ignore[operator]
        gradients = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, w)))

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return Convolution.apply(x, w, (1, 1), (1, 1), Parts(True, True, True))  # type: ignore[no-any-return]

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, None, 1, 1)

    for a, b in zip(penalty(ours), penalty(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    found, expected = (torch.func.grad(lambda w, c=c: c(x, w).square().sum())(w) for c in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_what_is_wrong_is_said_by_the_library() -> None:
    x = drawn(2, 3, 2, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), MatrixProducts():
        with pytest.raises(RuntimeError, match="to have 64 channels"):
            torch.conv2d(x, drawn(256, 64, 1, 1, dtype=torch.float32))
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            torch.conv2d(x, drawn(256, 3, 5, 5, dtype=torch.float32))
        weight = drawn(256, 3, 1, 1, dtype=torch.float32)
        with pytest.raises(RuntimeError, match="negative padding"):
            torch.conv2d(x, weight, padding=-1)
        with pytest.raises(RuntimeError, match="stride"):
            torch.conv2d(x, weight, stride=0)
        with pytest.raises(RuntimeError, match="to match the convolution dimensions"):
            torch.conv2d(x, weight[0])
        with pytest.raises(RuntimeError, match="type"):
            torch.conv2d(x, weight.double())


@pytest.mark.parametrize("name", [name for name, (_, parts) in CASES.items() if any(parts)])
def test_in_16_bits_they_are_no_farther_from_the_truth_than_the_library(name: str) -> None:
    (n, channels, size, outputs, kernel, stride, padding), _ = CASES[name]
    x = drawn(n, channels, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = drawn(outputs, channels, *kernel, dtype=torch.bfloat16)

    def conv(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, None, stride, padding)

    true = made(conv, x.double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = made(conv, x, w.float())
        with MatrixProducts():
            ours = made(conv, x, w.float())
    for exact, a, b in zip(true, ours, theirs, strict=True):
        assert a.dtype == b.dtype
        far, limit = ((t.double() - exact).norm() / exact.norm() for t in (a, b))
        assert far < 1.2 * limit + 1e-4


def test_what_is_no_plain_convolution_in_16_bits_is_left_to_the_library() -> None:
    x = drawn(2, 64, 4, 4, dtype=torch.float32)
    w, grouped, bias = (drawn(*shape, dtype=torch.float32) for shape in ((64, 64, 3, 3), (64, 32, 3, 3), (64,)))
    calls = {
        "groups": lambda: torch.conv2d(x, grouped, padding=1, groups=2),
        "dilation": lambda: torch.conv2d(x, w, padding=2, dilation=2),
        "bias": lambda: torch.conv2d(x, w, bias, padding=1),
        "same": lambda: torch.conv2d(x, w, padding="same"),
        "no batch": lambda: torch.conv2d(x[0], w, padding=1),
    }
    for call in calls.values():
        with torch.autocast("cpu", torch.bfloat16):
            theirs = call()
            with MatrixProducts():
                assert torch.equal(call(), theirs)


@pytest.mark.parametrize("avx2", [True, False], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize("name", CASES)
def test_in_float32_the_gradient_of_weights_is_a_product_and_nothing_else(
    name: str, avx2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddnn.autocast, "AVX2", avx2)
    (n, channels, size, outputs, kernel, stride, padding), _ = CASES[name]
    x, w = (drawn(*shape, dtype=torch.float32) for shape in ((n, channels, size, size), (outputs, channels, *kernel)))

    def conv(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, None, stride, padding)

    theirs = made(conv, x, w)
    with MatrixProducts():
        ours = made(conv, x, w)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(a, b)
    exact = made(conv, x.double(), w.double())[2]
    assert (ours[2].double() - exact).norm() < 1e-5 * exact.norm()
    positions = ours[0][:, 0].numel()
    chosen = _as_products_in_float32(x.shape, w.shape, pair(stride), pair(padding))
    assert chosen == NONE._replace(of_weight=positions <= (8 * outputs if avx2 else outputs // 2))


def test_a_weight_is_halved_once_and_its_gradient_is_not_lost() -> None:
    x, w = drawn(1, 64, 2, 2, dtype=torch.float32), drawn(64, 64, 3, 3, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), MatrixProducts() as products:
        with torch.no_grad():
            torch.conv2d(x, w, padding=1)
        first = torch.conv2d(x, w, padding=1)
        second = torch.conv2d(x, w, padding=1)
        assert len(products.halved) == 2, "one without gradient, one with"
    (once,) = torch.autograd.grad(first.sum(), w, retain_graph=True)
    (twice,) = torch.autograd.grad((first + second).sum(), w)
    assert once.dtype == torch.float32
    assert torch.equal(twice, 2 * once)


def test_a_frozen_weight_is_halved_anew_as_autocast_does() -> None:
    x, w = drawn(1, 64, 2, 2, dtype=torch.float32), drawn(64, 64, 3, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), MatrixProducts():
        before = torch.conv2d(x, w, padding=1)
        w.mul_(2)
        assert torch.equal(torch.conv2d(x, w, padding=1), 2 * before)


def wide() -> DDNN:
    torch.manual_seed(0)
    full_net, table = build("resnet18-34", 10, width=32)  # its last stage has 256 channels
    return nest(full_net, table).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def gradients(net: DDNN, *, lean: bool, ours: bool) -> dict[str, Tensor]:
    x, target = drawn(4, 3, 32, 32, dtype=torch.float32), torch.arange(4)
    net.zero_grad()

    def halved() -> object:
        return autocast(net, CPU) if ours else torch.autocast("cpu", torch.bfloat16)

    if lean:
        branchwise_backward(net, EKD(), x, target, autocast=halved)  # type: ignore[arg-type]
    else:
        with halved():  # type: ignore[attr-defined]
            outputs = net(x, energies=True)
        torch.stack(list(EKD()(outputs, target).values())).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_a_joint_step_with_products_is_as_near_to_the_truth_as_one_without() -> None:
    # norms of four values make rounding large: at rest they are constants
    net = wide().eval()
    x, target = drawn(4, 3, 32, 32), torch.arange(4)
    net.double()
    torch.stack(list(EKD()(net(x), target).values())).sum().backward()
    true = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.float()
    found = [gradients(net, lean=lean, ours=ours) for lean, ours in ((False, False), (False, True), (True, True))]
    theirs, *ours = (
        torch.stack([(some[name].double() - exact).norm() / exact.norm() for name, exact in true.items()]).mean()
        for some in found
    )
    assert max(ours) < 1.2 * theirs < 0.2
    assert any(not torch.equal(found[0][name], found[1][name]) for name in true), "they were made otherwise"


def test_a_joint_step_in_float32_differs_in_the_gradients_of_weights_alone() -> None:
    net = wide().eval()
    x, target = drawn(4, 3, 32, 32, dtype=torch.float32), torch.arange(4)

    def step(products: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        net.zero_grad()
        with autocast(net, CPU, enabled=False) if products else nullcontext():
            outputs = net(x, energies=True)
        torch.stack(list(EKD()(outputs, target).values())).sum().backward()
        logits = {name: output.logits for name, output in outputs.items()}
        return logits, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    (logits, ours), (expected, theirs) = step(True), step(False)
    assert all(torch.equal(logits[name], expected[name]) for name in logits)
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert differing, "they were made otherwise"
    assert all(theirs[name].ndim == 4 for name in differing)
    for name in differing:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_a_narrow_network_is_left_alone_and_so_is_float64() -> None:
    narrow = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    x = drawn(1, 64, 2, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = narrow(x)
    with autocast(narrow, CPU):
        assert torch.equal(narrow(x), theirs)
    broad = nn.Conv2d(64, 128, 3, padding=1, bias=False).double()
    x = x.double()

    def gradient() -> Tensor:
        return torch.autograd.grad(broad(x).square().sum(), broad.weight)[0]

    theirs = gradient()
    with autocast(broad, CPU, enabled=False):
        assert torch.equal(gradient(), theirs)
