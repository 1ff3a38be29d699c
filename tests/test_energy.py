"""Energies made in the forward of a network are those made of its features, in value and in gradient."""

import copy

import pytest
import torch

from ddnn.build import build
from ddnn.energy import energy, fork
from ddnn.network import DDNN, nest
from ddnn.objective import EKD
from ddnn.recipe import load
from ddnn.state import State
from nets import images as small_images
from nets import small as three_nets
from small_networks import CLASSES, SMALL, Small, images

generator = torch.Generator().manual_seed(0)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.fixture(params=list(SMALL))
def of_family(request: pytest.FixtureRequest) -> Small:
    return SMALL[request.param]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_fork_is_the_literal_one(layout: torch.memory_format) -> None:
    """In float64, where the order of a sum does not show; and against finite differences."""
    feature = randn(2, 3, 4, 5).double().to(memory_format=layout).requires_grad_()
    of_feature, of_energy = randn(2, 3, 4, 5).double(), randn(2, 20).double()
    literal = feature.detach().clone().requires_grad_()
    square = literal.square().sum(dim=1).flatten(1)
    for use_feature, use_energy in ((1, 0), (0, 1), (1, 1)):
        onward, made = fork(feature)
        assert torch.equal(onward, feature)
        torch.testing.assert_close(made, square)
        kept = []
        for f, e, leaf in ((onward, made, feature), (literal, square, literal)):
            loss = use_feature * (f * of_feature).sum() if use_feature else 0
            loss = loss + (e * of_energy).sum() if use_energy else loss
            kept.append(*torch.autograd.grad(loss, leaf, retain_graph=True))
        torch.testing.assert_close(*kept, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(fork, feature)


@pytest.mark.parametrize("of_a_fork", [False, True])
def test_a_scaled_loss_does_not_exceed_half_precision_on_the_way(of_a_fork: bool) -> None:
    """A factor of 1e5, which float16 has not, times features of 0.01."""
    ours = (0.01 * randn(2, 8, 4, 5)).half().requires_grad_()
    literal = ours.detach().clone().requires_grad_()
    of_energy = 1e5 * randn(2, 20)
    literal.float().square().sum(dim=1).flatten(1).backward(of_energy)
    made = fork(ours)[1] if of_a_fork else energy(ours)
    made.backward(of_energy)
    assert ours.grad is not None
    assert ours.grad.isfinite().all()
    torch.testing.assert_close(ours.grad, literal.grad)


@pytest.mark.parametrize("channels", [2, 16, 64])
def test_layout_does_not_change_a_bit_of_the_gradients(channels: int) -> None:
    value, of_feature = randn(2, channels, 4, 5).bfloat16(), randn(2, channels, 4, 5).bfloat16()
    of_energy = randn(2, 20)
    alone, together = [], []
    for layout in LAYOUTS:
        ours = value.clone(memory_format=layout).requires_grad_()
        energy(ours).backward(of_energy)
        assert ours.grad is not None
        assert ours.grad.is_contiguous(memory_format=layout)
        alone.append(ours.grad)
        ours.grad = None
        torch.autograd.backward(fork(ours), (of_feature.to(memory_format=layout), of_energy))
        together.append(ours.grad)
    assert torch.equal(*alone)
    assert torch.equal(*together)
    assert alone[0].abs().sum() > 0
    torch.testing.assert_close(
        together[0].float(), (alone[0].double() + of_feature.double()).float(), rtol=0.01, atol=0.02
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_outputs_are_bitwise_those_without_energies(precision: torch.dtype) -> None:
    net, x = three_nets().to(memory_format=torch.channels_last), small_images()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        plain, ours = net(x), net(x, energies=True)
    for name, output in ours.items():
        assert plain[name].energies == ()
        assert torch.equal(output.logits, plain[name].logits)
        assert len(output.energies) == len(output.features) == 3
        for feature, its_energy, expected in zip(output.features, output.energies, plain[name].features, strict=True):
            assert torch.equal(feature, expected)
            assert torch.equal(its_energy, energy(expected))
            assert its_energy.dtype == torch.float32


def test_every_familys_gradients_are_those_without_energies(of_family: Small) -> None:
    """In float64, of the whole objective and of each of its terms by itself."""
    torch.manual_seed(0)
    subnets = {f"net{i}": depths for i, depths in enumerate(of_family.subnets)}
    net = nest(of_family.make(of_family.full), subnets).double().eval()
    x, target = images(2, of_family.size).double(), torch.arange(2) % CLASSES
    for only in (None, [*subnets][:1], [*subnets, net.full_name][-2:]):
        found = [gradients(net, x, target, energies=energies, only=only) for energies in (False, True)]
        for term, expected in found[0].items():
            for (name, a), b in zip(expected.items(), found[1][term].values(), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=lambda m, w=f"{term} {name}": f"{w}: {m}")


def gradients(
    net: DDNN, x: torch.Tensor, target: torch.Tensor, *, energies: bool, only: list[str] | None
) -> dict[str, dict[str, torch.Tensor]]:
    terms = EKD(attention=100.0)(net(x, only, energies=energies), target)
    found = {}
    for term, value in {**terms, "all": torch.stack(list(terms.values())).sum()}.items():
        grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True)
        found[term] = dict(zip((name for name, _ in net.named_parameters()), grads, strict=True))
    return found


def test_nets_that_run_whole_have_energies_too() -> None:
    net, x = three_nets(), small_images()
    for name in net.depths:
        output = net.run_whole(name, x).with_energies()
        for ours, expected in zip(output.energies, net(x, energies=True)[name].energies, strict=True):
            assert torch.equal(ours, expected)
        assert output.with_energies() is output
        assert not any(t.requires_grad for part in output.detach() for t in ([part] if part is output[0] else part))


def test_only_a_run_that_attends_makes_energies() -> None:
    def made(*overrides: str, step: int = 0) -> list[int]:
        recipe = load("digits", ["train.threads=1", *overrides])
        state = State.fresh(copy.deepcopy(recipe), build(recipe.network, 10), 5, torch.device("cpu"))
        state.step = step
        return [len(output.energies) for output in state.outputs(torch.randn(4, 3, 8, 8)).values()]

    together = ("train.full_net_share=0", "objective.ramp=[0, 0]")
    assert made(*together) == [3, 3, 3]
    assert made(*together, "objective.attention=0") == [0, 0, 0]
    assert made("network.alone=resnet14") == [0]
    assert made("train.full_net_share=0.5", "objective.ramp=[0, 0]") == [0]  # as long as it is the full-net's alone
    assert made("train.full_net_share=0", "objective.ramp=[0.5, 1]") == [0, 0, 0]
