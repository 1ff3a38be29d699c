"""The objective against sums written out, and its traps."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddnn
from ddnn.errors import DDNNError
from ddnn.families import build
from ddnn.network import DDNN, Output, nest
from ddnn.objective import (
    EKD,
    AttentionMap,
    attention_distance,
    cross_entropy,
    kl_divergence,
    power_map,
    softmax_map,
)

generator = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def test_kl_is_the_written_out_sum() -> None:
    student, teacher, t = randn(3, 4), randn(3, 4), 2.5
    expected = 0.0
    for n in range(3):
        p = [math.exp(z / t) for z in teacher[n].tolist()]
        q = [math.exp(z / t) for z in student[n].tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_divergence(student, teacher, t).item() == pytest.approx(t**2 * expected / 3, rel=1e-5)
    assert kl_divergence(teacher, teacher, t).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["power", "softmax"])
def test_attention_is_the_written_out_sum(kind: str) -> None:
    shapes = [(2, 3, 2, 2), (2, 5, 1, 3)]
    student, teacher = [randn(*s) for s in shapes], [randn(*s) for s in shapes]

    def written_out(feature: torch.Tensor) -> list[float]:  # of one image [C, H, W]
        c, h, w = feature.shape
        energy = [sum(float(feature[k, i, j]) ** 2 for k in range(c)) for i in range(h) for j in range(w)]
        if kind == "power":
            return [e / math.sqrt(sum(v * v for v in energy)) for e in energy]
        return [math.exp(e) / sum(math.exp(v) for v in energy) for e in energy]

    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for n in range(2):
            pairs = zip(written_out(ours[n]), written_out(theirs[n]), strict=True)
            expected += sum((a - b) ** 2 for a, b in pairs) / 2 / len(shapes)
    assert attention_distance(student, teacher, kind).item() == pytest.approx(expected, rel=1e-5)


def test_attention_of_orthogonal_maps_is_two_and_of_proportional_ones_zero() -> None:
    left, right = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    left[0, :, 0, 1], right[0, :, 1, 1] = 3.0, 0.5
    assert attention_distance([left], [right]).item() == 2.0
    feature = randn(2, 3, 4, 4)
    assert attention_distance([feature], [2 * feature]).item() == 0.0


def test_maps_have_unit_length_or_unit_sum() -> None:
    feature = randn(2, 3, 4, 4)
    torch.testing.assert_close(power_map(feature).norm(dim=1), torch.ones(2))
    torch.testing.assert_close(softmax_map(feature).sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fast_map_is_the_literal_one(layout: torch.memory_format) -> None:
    """In float64, where the order of a sum does not show; and its gradient against finite differences."""
    feature = randn(2, 3, 4, 5).double().to(memory_format=layout).requires_grad_()
    weights = randn(2, 20).double()
    (power_map(feature) * weights).sum().backward()
    literal = feature.detach().clone().requires_grad_()
    (F.normalize(literal.square().sum(dim=1).flatten(1), dim=1) * weights).sum().backward()
    torch.testing.assert_close(power_map(feature), F.normalize(literal.square().sum(dim=1).flatten(1), dim=1))
    torch.testing.assert_close(feature.grad, literal.grad, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(power_map, feature.detach().requires_grad_())
    assert torch.autograd.gradcheck(softmax_map, feature.detach().requires_grad_())


def test_the_fast_distance_is_the_literal_one() -> None:
    """In float64, also where a map has no length; and its gradient against finite differences."""
    ours, theirs = (randn(5, 12).double().abs() for _ in range(2))
    ours[1], theirs[2], ours[3] = 0, 0, 1e-14
    fast, slow = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    found = attention_distance([fast, 2 * fast], [theirs, theirs.flip(1)])  # of energies that are made already
    literal = [
        (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(dim=1).mean()
        for student, teacher in ((slow, theirs), (2 * slow, theirs.flip(1)))
    ]
    torch.testing.assert_close(found, torch.stack(literal).mean(), rtol=1e-14, atol=0)
    (3 * found).backward()
    (3 * torch.stack(literal).mean()).backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-12, atol=1e-15)
    some = randn(3, 12).double().abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda energies: attention_distance([energies], [theirs[:3]]), some)


def test_a_feature_of_zeros_has_a_finite_gradient() -> None:
    feature = torch.zeros(1, 2, 2, 2, requires_grad=True)
    attention_distance([feature], [randn(1, 2, 2, 2)]).backward()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()


def test_no_nets_are_an_error() -> None:
    with pytest.raises(DDNNError, match="at least one net"):
        EKD()({}, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 10]), "target has classes 0 to 10, but the network knows 0 to 9"),
        (torch.tensor([0, 1]), r"must hold 3 classes, or probabilities of 10 .* its shape is \(2,\)"),
        (torch.rand(3, 7), r"must hold 3 classes, or probabilities of 10 .* its shape is \(3, 7\)"),
        (torch.rand(3), "must hold classes as whole numbers; these are of type torch.float32"),
        (torch.ones(3, 10, dtype=torch.int32), "must hold probabilities as floating-point .* of type torch.int32"),
        ([0, 1, 2], "must be a tensor of classes or of probabilities, not a list"),
    ],
)
def test_a_target_of_other_classes_is_named(target: Tensor, message: str) -> None:
    with pytest.raises(DDNNError, match=message):
        EKD()({"full": Output(randn(3, 10), ())}, target)


def test_classes_may_be_of_any_whole_numbers() -> None:
    logits, target = randn(3, 10), torch.tensor([0, 9, 4])
    for kind in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(cross_entropy(logits, target.to(kind)), cross_entropy(logits, target))


def test_a_teacher_of_other_classes_is_named() -> None:
    student, teacher = Output(randn(3, 10), (randn(3, 2, 4, 4),)), Output(randn(3, 7), (randn(3, 2, 4, 4),))
    message = r"same classes only: logits are \[3, 10\] of {}, \[3, 7\] of the teacher"
    with pytest.raises(DDNNError, match=message.format("resnet8")):
        EKD()({"resnet8": student}, torch.arange(3), teacher)
    with pytest.raises(DDNNError, match=message.format("the student")):
        kl_divergence(student.logits, teacher.logits, 3.0)
    with pytest.raises(DDNNError, match="teacher: the objective takes outputs as a DDNN gives them, not a dict"):
        EKD()({"resnet8": student}, torch.arange(3), {"full": teacher})
    with pytest.raises(DDNNError, match="resnet8: the objective takes outputs as a DDNN gives them, not a Tensor"):
        EKD()({"resnet8": student.logits}, torch.arange(3))


def test_attention_of_another_resolution_is_an_error() -> None:
    with pytest.raises(DDNNError, match="same resolution: 16 positions in the student, 4 in the teacher"):
        attention_distance([randn(1, 2, 4, 4)], [randn(1, 2, 2, 2)])
    with pytest.raises(DDNNError, match="as many stages in both: 1 in the student, 2 in the teacher"):
        attention_distance([randn(1, 2, 4, 4)], [randn(1, 2, 4, 4)] * 2)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = randn(3, 4).requires_grad_(), randn(3, 4).requires_grad_()
    kl_divergence(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None
    ours, theirs = randn(1, 2, 2, 2).requires_grad_(), randn(1, 2, 2, 2).requires_grad_()
    attention_distance([ours], [theirs]).backward()
    assert ours.grad is not None
    assert theirs.grad is None


def small() -> DDNN:
    torch.manual_seed(0)
    full_net, table = build("cifar-resnet8-14-20", 10, width=4)
    return nest(full_net, table)


def test_terms_are_the_formula_of_the_method() -> None:
    outputs, target = small()(randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])
    weight = {"resnet8": 0.5, "resnet14": 2.0}
    terms = EKD(temperature=3.0, kl=0.7, attention=11.0, subnet_weight=weight)(outputs, target)
    teacher = outputs["resnet20"]
    expected = {"resnet20/ce": F.cross_entropy(teacher.logits, target)}
    for name, w in weight.items():
        student = outputs[name]
        expected[f"{name}/ce"] = w * F.cross_entropy(student.logits, target)
        expected[f"{name}/kl"] = w * 0.7 * kl_divergence(student.logits, teacher.logits, 3.0)
        expected[f"{name}/attention"] = w * 11.0 * attention_distance(student.features, teacher.features)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_every_weight_may_be_given_by_name() -> None:
    outputs, target = small()(randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])
    terms = EKD(
        kl={"resnet8": 0.7, "resnet14": 0},
        attention={"resnet8": 0, "resnet14": 2},
        subnet_weight={"resnet14": 3, "resnet8": 5},
    )(outputs, target)
    assert list(terms) == ["resnet20/ce", "resnet8/ce", "resnet8/kl", "resnet14/ce", "resnet14/attention"]
    whole = EKD()(outputs, target)
    for name, factor in {"resnet8/kl": 3.5, "resnet14/ce": 3, "resnet14/attention": 6}.items():
        torch.testing.assert_close(terms[name], factor * whole[name])
    with_ramp = EKD(kl={"resnet8": 0.8, "resnet14": 0.4}, attention=0, ramp=(0.0, 1.0))
    assert with_ramp.at(0.25).kl == {"resnet8": 0.2, "resnet14": 0.1}
    assert with_ramp.at(0.25).attention == 0


def test_distillation_gives_no_gradient_to_blocks_only_the_full_net_has() -> None:
    net = small()
    terms = EKD()(net(randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3]))
    sum(v for k, v in terms.items() if k.endswith(("/kl", "/attention"))).backward()
    full = net.nets["resnet20"]
    only_full = [p for stage in (full.layer1, full.layer2, full.layer3) for p in stage[2].parameters()]
    assert only_full
    assert all(p.grad is None for p in only_full)
    private = [full.layer3[0].bn1.weight, full.layer2[1].bn2.bias]  # the full-net's own norms
    assert all(p.grad is None for p in private)
    assert net.nets["resnet8"].layer3[0].conv1.weight.grad.abs().sum() > 0


def test_terms_of_weight_zero_are_left_out() -> None:
    outputs, target = small()(randn(2, 3, 16, 16)), torch.tensor([0, 1])
    joint = EKD(kl=0, attention=0)(outputs, target)
    assert list(joint) == ["resnet20/ce", "resnet8/ce", "resnet14/ce"]
    assert list(EKD(subnet_weight={"resnet8": 0, "resnet14": 1})(outputs, target)) == [
        "resnet20/ce",
        "resnet14/ce",
        "resnet14/kl",
        "resnet14/attention",
    ]


def test_a_separate_teacher_teaches_every_net() -> None:
    outputs, target = small()(randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(7)
    teacher = small()(randn(4, 3, 16, 16))["resnet20"]
    terms = EKD(temperature=2.0, kl=0.5, attention=3.0)(outputs, target, teacher)
    expected = {}
    for name, student in outputs.items():
        expected[f"{name}/ce"] = F.cross_entropy(student.logits, target)
        expected[f"{name}/kl"] = 0.5 * kl_divergence(student.logits, teacher.logits, 2.0)
        expected[f"{name}/attention"] = 3.0 * attention_distance(student.features, teacher.features)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_sub_nets_may_learn_by_distillation_alone() -> None:
    outputs, target = small()(randn(2, 3, 16, 16)), torch.tensor([0, 1])
    assert list(EKD(attention=0, labels="full-net")(outputs, target)) == ["resnet20/ce", "resnet8/kl", "resnet14/kl"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own doing
@pytest.mark.parametrize(("attention_map", "energies"), [("power", False), ("softmax", True)])
def test_compiled_terms_and_gradients_are_the_same_within_rounding(attention_map: AttentionMap, energies: bool) -> None:
    """In a loop that compiles the objective too, where formulas stand as they are."""
    x, target, found = randn(4, 3, 16, 16).double(), torch.tensor([0, 1, 2, 3]), []
    objective = EKD(attention_map=attention_map)
    for call in (objective, torch.compile(objective.__call__)):
        net = small().double()
        terms = call(net(x, energies=energies), target)
        torch.stack(list(terms.values())).sum().backward()
        found.append({**terms, **{name: p.grad for name, p in net.named_parameters()}})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_terms_are_float32_under_autocast() -> None:
    net, x = small(), randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(x)
        inside = EKD()(outputs, torch.tensor([0, 1, 2, 3]))
    outside = EKD()(outputs, torch.tensor([0, 1, 2, 3]))
    assert outputs["resnet8"].logits.dtype == torch.bfloat16
    for name, term in inside.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, outside[name]), name


def test_labels_may_be_mixed_or_smoothed() -> None:
    logits = randn(3, 4)
    mixed = torch.tensor([[0.3, 0.7, 0, 0], [0, 1, 0, 0], [0.5, 0, 0, 0.5]])
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, mixed), expected)
    smooth = torch.full((3, 4), 0.025) + 0.9 * F.one_hot(torch.tensor([2, 0, 1]), 4)
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([2, 0, 1]), 0.1), cross_entropy(logits, smooth))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
        ({"temperature": float("inf")}, "temperature=inf must be a number above 0"),
        ({"kl": -1}, "must be numbers and not negative"),
        ({"kl": float("nan")}, "must be numbers and not negative"),
        ({"attention": {"resnet8": 1, "resnet14": -1}}, "must be numbers and not negative"),
        ({"attention_map": "mean"}, "'mean' is not one of power, softmax"),
        ({"kl": None}, "must be numbers and not negative"),
        ({"attention": {"resnet8": "1"}}, "must be numbers and not negative"),
        ({"temperature": "3"}, "temperature='3' must be a number above 0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must be a number from 0 to 1"),
        ({"ramp": 0.5}, "ramp=0.5 must be two shares of the training"),
        ({"ramp": (0, 0.5, 1)}, "must be two shares of the training"),
    ],
)
def test_bad_weights(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DDNNError, match=message):
        EKD(**arguments)


def test_a_sub_net_without_a_weight_is_named() -> None:
    for what in ("kl", "attention", "subnet_weight"):
        with pytest.raises(DDNNError, match=f"{what} names resnet8, but not the net resnet14, which is taught too"):
            EKD(**{what: {"resnet8": 1.0}})(small()(randn(2, 3, 16, 16)), torch.tensor([0, 1]))


def test_a_net_without_anything_to_learn_from_is_named() -> None:
    for weights in ({"kl": {"resnet8": 1, "resnet14": 0}}, {"subnet_weight": {"resnet8": 1, "resnet14": 0}}):
        objective = EKD(**{"kl": 1, "attention": 0, "labels": "full-net", **weights})
        with pytest.raises(DDNNError, match="labels=full-net leaves resnet14 nothing to learn from"):
            objective.check(["resnet8", "resnet14"])


def test_in_somebody_elses_loop() -> None:
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, target, losses = randn(16, 3, 16, 16), torch.arange(16) % 10, []
    for _ in range(15):
        outputs = net(x)
        terms = ddnn.EKD(temperature=4.0, kl=1.0, attention=1.0)(outputs, target)
        loss = sum(terms.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert isinstance(outputs["resnet8"], Output)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("ramp", "progress", "strength"),
    [
        ((0.0, 0.0), 0.0, 1.0),
        ((0.5, 1.0), 0.2, 0.0),
        ((0.5, 1.0), 0.5, 0.0),
        ((0.5, 1.0), 0.75, 0.5),
        ((0.5, 1.0), 1.0, 1.0),
        ((0.3, 0.3), 0.29, 0.0),
        ((0.3, 0.3), 0.3, 1.0),
    ],
)
def test_ramp_holds_distillation_back(ramp: tuple[float, float], progress: float, strength: float) -> None:
    outputs = {name: Output(randn(2, 4), (randn(2, 3, 4, 4),)) for name in ("sub", "full")}
    target = torch.tensor([0, 1])
    whole = EKD(kl=2.0, attention=3.0)(outputs, target)
    now = EKD(kl=2.0, attention=3.0, ramp=ramp).at(progress)(outputs, target)
    for term, value in whole.items():
        expected = value if term.endswith("/ce") else strength * value
        if expected:
            torch.testing.assert_close(now[term], expected)
        else:
            assert term not in now  # not computed at all


def test_ramp_that_falls_is_refused() -> None:
    with pytest.raises(DDNNError, match="0 <= first <= second <= 1"):
        EKD(ramp=(0.8, 0.2))
