"""The compiler's formulas against the library's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddnn import compiling
from ddnn.autocast import autocast
from ddnn.compiling import batch_norm, batch_norm_backward, check_compiler, compiled, threshold_backward
from ddnn.errors import RunError
from ddnn.families.cifar_resnet import CifarResNet
from ddnn.network import nest
from ddnn.objective import EKD

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_batch_norm_and_its_gradients() -> None:
    x, weight, bias = (drawn(*shape).requires_grad_() for shape in ((4, 6, 5, 3), (6,), (6,)))
    mean, var = drawn(6, seed=1), drawn(6, seed=2).abs()
    after = [mean.clone(), var.clone()]
    theirs = F.batch_norm(x, *after, weight, bias, training=True, momentum=0.3, eps=1e-3)
    ours, own_mean, scale, *running = batch_norm(x, weight, bias, mean, var, True, 0.3, 1e-3)
    for a, b in zip((ours, *running), (theirs, *after), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_mean, x.mean(dim=(0, 2, 3)))
    gradient = drawn(4, 6, 5, 3, seed=3)
    expected = torch.autograd.grad(theirs, (x, weight, bias), gradient)
    saved = (gradient, x, weight, mean, var, own_mean, scale, True, 1e-3)
    found = batch_norm_backward(*saved, [True, True, True])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert [made is None for made in batch_norm_backward(*saved, [False, True, False])] == [True, False, True]


def test_the_variance_survives_a_mean_far_larger_than_it() -> None:
    x = (1000 + 0.1 * drawn(8, 2, 16, 16)).float()
    _, mean, scale, *_ = batch_norm(x, torch.ones(2), torch.zeros(2), torch.zeros(2), torch.ones(2), True, 0.1, 0.0)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(dim=(0, 2, 3)), rtol=1e-7, atol=0)
    deviation = exact.var(dim=(0, 2, 3), correction=0).sqrt()
    torch.testing.assert_close(1 / scale.double(), deviation, rtol=1e-4, atol=0)
    naive = x.square().mean(dim=(0, 2, 3)) - x.mean(dim=(0, 2, 3)).square()
    assert ((naive.clamp_min(0).sqrt() - deviation) / deviation).abs().max() > 0.1, "what the formula is not"


def test_the_gradient_of_relu() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0]).bfloat16().requires_grad_()
    y = x.relu()
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).bfloat16()
    (expected,) = torch.autograd.grad(y, x, gradient)
    found = threshold_backward(gradient, y, 0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_other_cases_are_left_to_the_library() -> None:
    x, one, zero = drawn(4, 6, 5, 3), torch.ones(6).double(), torch.zeros(6).double()
    assert batch_norm(x, one, zero, zero, one, False, 0.1, 1e-5) is NotImplemented, "at rest"
    assert batch_norm(x[..., 0], one, zero, zero, one, True, 0.1, 1e-5) is NotImplemented, "not a map"
    assert batch_norm(x, None, None, zero, one, True, 0.1, 1e-5) is NotImplemented, "without weights"
    for training, weight in ((False, one), (True, None)):
        given = (x, x, weight, zero, one, zero, one, training, 1e-5, [True] * 3)
        assert batch_norm_backward(*given) is NotImplemented
    assert threshold_backward(x, x, 1) is NotImplemented


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(RunError, match=r"needs a C\+\+ compiler .* install g\+\+"):
        compiled(nn.Identity(), CPU)
    with pytest.raises(RunError, match="needs a C"):
        check_compiler(CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own doing
def test_a_compiled_joint_step_is_the_same_within_rounding() -> None:
    torch.manual_seed(0)
    net = nest(CifarResNet((1, 2, 1), 10, width=4), {"small": (1, 1, 1)})
    net.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, target, found = drawn(4, 3, 16, 16), torch.arange(4), []
    for make in (lambda own: own, lambda own: compiled(own, CPU)):
        own = copy.deepcopy(net).train()
        forward = make(own)
        for _ in range(2):
            own.zero_grad()
            outputs = forward(x, energies=True)
            torch.stack(list(EKD()(outputs, target).values())).sum().backward()
        tensors = {f"{name}/{i}": t for name, output in outputs.items() for i, t in enumerate(output.features)}
        tensors |= {name: p.grad for name, p in own.named_parameters()} | dict(own.named_buffers())
        found.append(tensors)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_graphs_compiled_with_other_formulas_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def counted(*given: object) -> object:
        calls.append(given)
        return batch_norm(*given)  # type: ignore[arg-type]

    net, x = nn.Sequential(nn.BatchNorm2d(7), nn.ReLU()), drawn(3, 7, 11, 13).float()
    torch.compile(net)(x).sum().backward()  # is kept in the compiler's caches
    monkeypatch.setattr(compiling, "batch_norm", counted)
    for version in ("a", "b"):
        monkeypatch.setattr(compiling, "_version", f"{tmp_path} {version}")
        calls.clear()
        torch._dynamo.reset()
        compiled(net, CPU)(x).sum().backward()
        assert calls
    calls.clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled(net, CPU)(x).sum().backward()
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, "but that with these is"
    assert not calls


def _times(factor: float) -> type[torch.autograd.Function]:
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0] * factor

    return Times


def test_formulas_that_differ_in_anything_have_another_version() -> None:
    def one(x: float) -> float:
        return 2 * abs(x)

    def same(x: float) -> float:
        return 2 * abs(x)  # elsewhere

    def other(x: float) -> float:
        return 3 * abs(x)

    def calling(x: float) -> float:
        return 2 * round(x)

    def nested(x: float) -> float:
        return sum(2 * each for each in (x,))

    def other_nested(x: float) -> float:
        return sum(3 * each for each in (x,))

    assert compiling._digest(one) == compiling._digest(same)
    every = [compiling._digest(each) for each in (one, other, calling, nested, other_nested)]
    assert len(set(every)) == len(every)
    assert compiling._digest(one, other) != compiling._digest(other, one)


@pytest.mark.slow
def test_a_graph_compiled_with_another_gradient_is_not_taken() -> None:
    """A function with a gradient of its own is kept, too, but known by its formulas and not by its name."""
    counters = torch._dynamo.utils.counters
    for factor in (2.0, 3.0, 2.0):
        function, x = _times(factor), torch.ones(5, requires_grad=True)
        torch._dynamo.reset()
        counters.clear()
        compiled(function.apply, CPU)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [factor] * 5
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, "the last one is as the first"


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [True, False])
def test_products_are_compiled_as_one_graph_however_often_it_is_called(bf16: bool) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 9, 1))
    net, x = nn.Sequential(*layers).to(memory_format=torch.channels_last), drawn(8, 64, 2, 2).float()
    found = []
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for own in (net, copy.deepcopy(net)):
        forward = compiled(own, CPU) if own is not net else own
        with autocast(own, CPU, bf16):
            y = forward(x) + forward(x)
        y.float().square().mean().backward()
        found.append([y, *(p.grad for p in own.parameters())])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **({"rtol": 0.05, "atol": 0.02} if bf16 else {}))
