"""Embedded knowledge distillation (EKD): the full-net teaches its sub-nets inside every training iteration.

For a batch, z_k the logits of net k, K the full-net, F_ks its feature at the end of stage s, T a temperature:

    L = CE(z_K, y)
      + sum over sub-nets k of w_k * [ CE(z_k, y)
          + lambda_kl,k * T^2 * KL( softmax(sg z_K / T) || softmax(z_k / T) )
          + lambda_at,k * mean over stages s of || a(F_ks) - sg a(F_Ks) ||^2 ]

`sg` stops the gradient. The terms are those of arXiv 2103.00793 (KL on class posteriors, attention distillation on
features of the same resolution); formulas and weights are this project's. With a single net, L is cross-entropy.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddnn.energy import energy, precise
from ddnn.errors import DDNNError
from ddnn.network import Output
from ddnn.policies import AttentionMap, Labels

Weight = float | Mapping[str, float]
"""Of a term of the objective: one for all students, or one by name."""


def _is_weight(value: object) -> bool:
    """Whether it is a finite number, and not negative."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf  # type: ignore[operator]


def _times(weight: Weight, factor: float) -> Weight:
    if isinstance(weight, Mapping):
        return {name: factor * value for name, value in weight.items()}
    return factor * weight


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the batch. `target` holds class indices [N] or class probabilities [N, classes].

    Raises `DDNNError` for a target of other classes or another number of images.
    """
    images, classes = logits.shape[:2]
    if logits.ndim == 2 and target.shape not in ((images,), (images, classes)):
        raise DDNNError(
            f"target must hold {images} classes, or probabilities of {classes} classes for {images} images, as many as "
            f"the logits; its shape is {tuple(target.shape)}"
        )
    of_classes = target.ndim < logits.ndim
    if target.is_floating_point() == of_classes:
        wanted = "classes as whole numbers" if of_classes else "probabilities as floating-point numbers"
        raise DDNNError(f"target must hold {wanted}; these are of type {target.dtype}")
    if of_classes:
        target = target.long()  # whichever whole numbers they are
    try:
        return F.cross_entropy(logits.to(precise(logits)), target, label_smoothing=label_smoothing)
    except IndexError:  # on a CPU; a GPU's own message comes later
        raise DDNNError(
            f"target has classes {int(target.min())} to {int(target.max())}, but the network knows 0 to {classes - 1}"
        ) from None


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of logits [N, classes].

    Summed over classes, mean over the batch; T^2 keeps the size of its gradient independent of T (Hinton et al. 2015,
    arXiv 1503.02531). No gradient flows to the teacher. Raises `DDNNError` for logits of other shapes.
    """
    return _kl(student, _log_posterior(teacher.detach(), temperature), temperature)


def _log_posterior(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(precise(logits)) / temperature, dim=1)


def _kl(student: Tensor, log_p: Tensor, temperature: float, name: str = "the student") -> Tensor:
    if student.shape != log_p.shape:
        raise DDNNError(
            f"posteriors can be compared over the same classes only: logits are {list(student.shape)} of {name}, "
            f"{list(log_p.shape)} of the teacher"
        )
    log_q = _log_posterior(student, temperature)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def power_map(feature: Tensor) -> Tensor:
    """Attention map a(F) of a feature [N, C, H, W]: sum over channels of squares, scaled to unit length per image.

    Returns [N, H*W] in float32 or better (Zagoruyko and Komodakis 2017, arXiv 1612.03928).
    """
    return _power(energy(feature))


def softmax_map(feature: Tensor) -> Tensor:
    """Attention map with a spatial softmax instead of unit length (Hou et al. 2019, arXiv 1908.00821): [N, H*W]."""
    return _softmax(energy(feature))


_SHORTEST = 1e-12
"""What the length of a map of zeros is taken for."""


def _power(energies: Tensor) -> Tensor:
    return F.normalize(energies, dim=1, eps=_SHORTEST)


def _softmax(energies: Tensor) -> Tensor:
    return F.softmax(energies, dim=1)


ATTENTION_MAPS: dict[AttentionMap, Callable[[Tensor], Tensor]] = {"power": _power, "softmax": _softmax}
"""Of energies [N, H*W]."""


def _distance(energies: Tensor, theirs: Tensor, attention_map: AttentionMap) -> Tensor:
    """Mean over images of the squared distance between the map of energies [N, H*W] and another map."""
    if attention_map == "power" and not torch.compiler.is_compiling():
        made: Tensor = _PowerDistance.apply(energies, theirs)
        return made
    return (ATTENTION_MAPS[attention_map](energies) - theirs).square().sum(dim=1).mean()


class _PowerDistance(torch.autograd.Function):
    """The distance of power maps with its gradient written out, in seven passes through a map instead of twenty.

    For small networks the small operators on their maps were a hundredth of a step. With u = e / |e| and d = u - t,

        d (|d|^2) / de = 2 (d - (d . u) u) / |e|
    """

    @staticmethod
    def forward(ctx: Any, energies: Tensor, theirs: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(energies, dim=1, keepdim=True).clamp_min(_SHORTEST)
        ours = energies / length
        difference = ours - theirs
        ctx.save_for_backward(ours, difference, length)
        return torch.linalg.vecdot(difference, difference).mean()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        ours, difference, length = ctx.saved_tensors
        along = torch.linalg.vecdot(difference, ours).unsqueeze(1) * (length > _SHORTEST)
        across = torch.addcmul(difference, ours, along, value=-1)
        return across.mul_(gradient[0] * 2 / len(ours) / length), None


def attention_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_map: AttentionMap = "power"
) -> Tensor:
    """Mean over stages and images of the squared distance between attention maps.

    `student` and `teacher` hold one feature [N, C_s, H_s, W_s] per stage; channels may differ, the resolution of a
    stage may not. No gradient flows to the teacher. With `power`, two orthogonal maps are exactly 2 apart.
    """
    return _map_distance(student, _maps([feature.detach() for feature in teacher], attention_map), attention_map)


def _stages(output: Output) -> Sequence[Tensor]:
    """Energies [N, H*W] where they are made already, else features [N, C, H, W]; what follows takes either."""
    return output.energies or output.features


def _energies(stage: Tensor) -> Tensor:
    return stage if stage.ndim == 2 else energy(stage)


def _maps(stages: Sequence[Tensor], attention_map: AttentionMap) -> list[Tensor]:
    return [ATTENTION_MAPS[attention_map](_energies(stage)) for stage in stages]


def _map_distance(student: Sequence[Tensor], teacher_maps: Sequence[Tensor], attention_map: AttentionMap) -> Tensor:
    if len(student) != len(teacher_maps):
        raise DDNNError(
            f"attention needs as many stages in both: {len(student)} in the student, {len(teacher_maps)} in the teacher"
        )
    distances = []
    for stage, theirs in zip(student, teacher_maps, strict=True):
        energies = _energies(stage)
        if energies.shape != theirs.shape:
            raise DDNNError(
                f"attention needs features of the same resolution: {energies.shape[1]} positions in the student, "
                f"{theirs.shape[1]} in the teacher"
            )
        distances.append(_distance(energies, theirs, attention_map))
    return torch.stack(distances).mean()


class EKD:
    """The objective as a callable: `terms = EKD()(net(x), target)`, then `sum(terms.values()).backward()`.

    `net(x, energies=True)` gives the same for less time where there are attention terms.

    Arguments are the weights of the formula above, each one number for all sub-nets or one by name: `kl` is lambda_kl,
    `attention` lambda_at, `subnet_weight` w_k. A term whose weight is 0 is not computed and does not appear. With
    `labels="full-net"` the sub-nets learn by distillation alone, without their cross-entropy. `ramp` holds distillation
    back at first, see `at`.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        kl: Weight = 1.0,
        attention: Weight = 1.0,
        *,
        attention_map: AttentionMap = "power",
        subnet_weight: Weight = 1.0,
        labels: Labels = "all",
        label_smoothing: float = 0.0,
        ramp: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        if not _is_weight(temperature) or temperature == 0:
            raise DDNNError(f"temperature={temperature!r} must be a number above 0")
        weights = [
            number
            for weight in (kl, attention, subnet_weight)
            for number in (weight.values() if isinstance(weight, Mapping) else [weight])
        ]
        if not all(map(_is_weight, weights)):
            raise DDNNError("kl, attention and subnet_weight must be numbers and not negative, one or one by name")
        if not _is_weight(label_smoothing) or label_smoothing > 1:
            raise DDNNError(f"label_smoothing={label_smoothing!r} must be a number from 0 to 1")
        if attention_map not in ATTENTION_MAPS:
            raise DDNNError(f"attention_map={attention_map!r} is not one of {', '.join(get_args(AttentionMap))}")
        shares = list(ramp) if isinstance(ramp, Sequence) else []
        if len(shares) != 2 or not all(map(_is_weight, shares)) or not shares[0] <= shares[1] <= 1:
            raise DDNNError(f"ramp={ramp!r} must be two shares of the training, 0 <= first <= second <= 1")
        if labels not in get_args(Labels):
            raise DDNNError(f"labels={labels!r} is not one of {', '.join(get_args(Labels))}")
        self.temperature = temperature
        self.kl = kl
        self.attention = attention
        self.attention_map: AttentionMap = attention_map
        self.subnet_weight = subnet_weight
        self.labels = labels
        self.label_smoothing = label_smoothing
        self.ramp = ramp

    def attends(self, nets: Iterable[str], *, taught: bool = False) -> bool:
        """Whether attention has a weight for a student, so that it pays to call the network with `energies=True`.

        The last of `nets` is the full-net, which is no student unless they are `taught` by another network.
        """
        names = list(nets)
        return any(self._weight("attention", name) for name in (names if taught else names[:-1]))

    def at(self, progress: float) -> "EKD":
        """The objective when this share of the training is over, from 0 to 1: `kl` and `attention` as `ramp` has them.

        They are 0 before the first of its two shares, whole from the second on, and rise evenly between. A teacher that
        knows little more than its students holds itself back; with the default `(0, 0)` it teaches from the beginning.
        """
        first, second = self.ramp
        if progress >= second:
            return self
        strength = 0.0 if progress <= first else (progress - first) / (second - first)
        now = copy.copy(self)
        now.kl, now.attention = _times(self.kl, strength), _times(self.attention, strength)
        return now

    def __call__(
        self, outputs: Mapping[str, Output], target: Tensor, teacher: Output | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms by name: `full/ce`, `resnet18/ce`, `resnet18/kl`, `resnet18/attention` ...

        `outputs` is what a DDNN returns, the full-net last; `target` holds class indices [N] or probabilities
        [N, classes]. Every term is a float32 scalar, under autocast too. Their sum is the objective.

        With a `teacher`, the output of some other network, every net in `outputs` is its student: two-model knowledge
        distillation, the rival that this method is compared with.
        """
        if not isinstance(target, Tensor):
            raise DDNNError(f"target must be a tensor of classes or of probabilities, not a {type(target).__name__}")
        students = dict(outputs)
        if not students:
            raise DDNNError("the objective needs the outputs of at least one net; there are none")
        for what, output in (*students.items(), ("teacher", teacher)):
            if not isinstance(output, Output | None):
                raise DDNNError(
                    f"{what}: the objective takes outputs as a DDNN gives them, not a {type(output).__name__}"
                )
        terms: dict[str, Tensor] = {}
        with torch.autocast(target.device.type, enabled=False):
            if teacher is None:
                full, teacher = students.popitem()
                terms[f"{full}/ce"] = cross_entropy(teacher.logits, target, self.label_smoothing)
            # what the teacher has to say is the same for all students
            teacher = teacher.detach()
            shown = self.attends(students, taught=True)
            teacher_maps = _maps(_stages(teacher), self.attention_map) if shown else []
            told = any(self._weight("kl", name) for name in students)
            log_p = _log_posterior(teacher.logits, self.temperature) if told else None
            for name, student in students.items():
                weight = self._weight("subnet_weight", name)
                if weight == 0:
                    continue
                if self.labels == "all":
                    terms[f"{name}/ce"] = weight * cross_entropy(student.logits, target, self.label_smoothing)
                kl, attention = self._weight("kl", name), self._weight("attention", name)
                if log_p is not None and kl:
                    terms[f"{name}/kl"] = weight * kl * _kl(student.logits, log_p, self.temperature, name)
                if attention:
                    distance = _map_distance(_stages(student), teacher_maps, self.attention_map)
                    terms[f"{name}/attention"] = weight * attention * distance
        return terms

    def check(self, students: Iterable[str]) -> None:
        """Raise `DDNNError` unless weights by name are of these nets and no others, and each net learns something."""
        wanted = list(students)
        for what in ("kl", "attention", "subnet_weight"):
            weight = getattr(self, what)
            if isinstance(weight, Mapping) and set(weight) != set(wanted):
                raise DDNNError(
                    f"{what} names {', '.join(weight)}, but the nets that are taught are {', '.join(wanted)}"
                )
        for name in wanted if self.labels == "full-net" else ():
            weight, kl, attention = (self._weight(what, name) for what in ("subnet_weight", "kl", "attention"))
            if not weight * (kl + attention):
                raise DDNNError(
                    f"labels=full-net leaves {name} nothing to learn from; give it a weight of kl or attention"
                )

    def _weight(self, what: str, name: str) -> float:
        weight: Weight = getattr(self, what)
        if not isinstance(weight, Mapping):
            return weight
        if name not in weight:
            raise DDNNError(f"{what} names {', '.join(weight)}, but not the net {name}, which is taught too")
        return weight[name]
