"""The joint step in little memory: one branch of the tree at a time, forward and backward.

The plain joint step, `sum(objective(net(x), target).values()).backward()`, holds the activations of all paths until its
backward. But a loss of one net depends on no other net: the teacher's part in it is a constant. So each branch can go
forward and backward by itself, as long as what it has in common with others is kept and goes backward once, at the end,
with the sum of their gradients. The full-net's branch goes first, because its output teaches the rest. What is held at
any moment is one path from the stem to a head, which is about what the full-net alone would hold.

Under autocast a convolution would keep a copy of its weights in 16 bits for its backward, half their size again. Only
the branch of the full-net, which goes first, keeps them; in all others backward casts the weights again.

The result is the same sum of the same gradients, added up in another order. Under the norm policy `shared`, whose
running statistics depend on the order in which paths pass, these differ too.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddnn.network import DDNN, Output, Step
from ddnn.objective import EKD

Terms = dict[str, Tensor]
Logits = dict[str, Tensor]


class End(NamedTuple):
    """What there is at the end of a stage."""

    feature: Tensor
    energy: Tensor | None
    """None where no attention is taken."""


def branchwise_backward(
    net: DDNN,
    objective: EKD,
    x: Tensor,
    target: Tensor,
    teacher: Output | None = None,
    *,
    only: Iterable[str] | None = None,
    scale: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Terms, Logits]:
    """Add the gradients of `scale` x the objective to the parameters; return its terms and the logits, detached.

    `only` names the nets to run, by default all. `autocast()` is entered around every piece of forward. Saved-tensor
    hooks of the caller's own belong into it: from outside of this call they would see nothing.
    """
    names = net.chosen(only)[::-1]  # the full-net first
    paths = {} if net.whole else {name: net.path(name) for name in names}
    energies = objective.attends(reversed(names), taught=teacher is not None)
    walk = _Walk(net, paths, objective, x, target, teacher, scale, autocast, energies)
    if net.whole:
        for name in names:
            walk.whole(name)
    else:
        walk.grow(names, 0, x, dict.fromkeys(names, ()))
    return (
        {term: value for name in _terms_order(names, teacher) for term, value in walk.terms[name].items()},
        {name: walk.logits[name] for name in reversed(names)},
    )


def _terms_order(names: list[str], teacher: Output | None) -> list[str]:
    deepest, *others = names
    return [deepest, *reversed(others)] if teacher is None else list(reversed(names))


@contextmanager
def _weights_cast_anew(*, keep: bool) -> Iterator[None]:
    """Leave no copies of parameters in autocast's cache, and, unless `keep`, none for backward, which makes them again.

    Bit for bit. Entered before autocast, so that hooks of a caller's own go on seeing what is saved: the innermost ones
    count.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with nullcontext() if keep else torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _pack(saved: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
    """The parameter of which this is a copy, and the copy's type; anything else as it is."""
    node = saved.grad_fn
    if node is not None and node.name() == "ToCopyBackward0":
        [(origin, _)] = node.next_functions
        parameter = getattr(origin, "variable", None)  # of the node that adds up a leaf's gradient
        if parameter is not None and parameter.device == saved.device:
            return parameter, saved.dtype
    return saved


def _unpack(packed: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed[0].detach().to(packed[1])


@dataclass
class _Walk:
    """One walk over the tree, depth first."""

    net: DDNN
    paths: dict[str, list[Step]]
    objective: EKD
    images: Tensor
    target: Tensor
    teacher: Output | None
    scale: float
    autocast: Callable[[], AbstractContextManager[object]]
    energies: bool
    terms: dict[str, Terms] = field(default_factory=dict)
    logits: Logits = field(default_factory=dict)

    def grow(self, names: list[str], i: int, feature: Tensor, before: dict[str, tuple[End, ...]]) -> None:
        """Forward and backward of all that `names` do from their i-th block on, with `feature` as its input.

        `before` are the ends of the stages each has passed so far. When this returns, the gradients of what came in are
        in the `.grad` of `feature` and of `before`, where these are leaves that want one.
        """
        passed: dict[str, tuple[End, ...]] = dict.fromkeys(names, ())  # stages that end in this piece
        # The first piece that goes backward does so while there are no other gradients, and has room for copies.
        first = len(names) == 1 and not self.logits
        with _weights_cast_anew(keep=first), self.autocast():
            if i == 0:
                feature = self.net.stem(feature)
            while len({self._node(name, i) for name in names}) == 1 and i < len(self.paths[names[0]]):
                feature = self.paths[names[0]][i].block(feature)
                # the same block may end a stage for one and not for another
                ending = [name for name in names if self.paths[name][i].ends_stage]
                if ending:
                    end = self._end(ending[0], feature)
                    feature = end.feature
                    passed |= {name: (*passed[name], end) for name in ending}
                i += 1
            logits = self.net.head_of(names[0], feature) if len(names) == 1 else None
        if logits is not None:
            [name] = names
            self._backward(name, self._output(name, logits, before[name] + passed[name]))
            return

        parts = [feature, *(part for name in names for end in passed[name] for part in end if part is not None)]
        ends = {id(part): part for part in parts}
        leaves = {key: part.detach().requires_grad_() for key, part in ends.items()}

        def leaf_of(end: End) -> End:
            return End(leaves[id(end.feature)], None if end.energy is None else leaves[id(end.energy)])

        inside = {name: before[name] + tuple(map(leaf_of, passed[name])) for name in names}
        branches: dict[object, list[str]] = {}
        for name in names:
            branches.setdefault(self._node(name, i), []).append(name)
        for branch in branches.values():
            self.grow(branch, i, leaves[id(feature)], inside)
        # A stage that no loss looks at gets its gradient through the blocks after it only, and none of its own.
        wanted = [(ends[key], leaf.grad) for key, leaf in leaves.items() if leaf.grad is not None]
        wanted = [(end, gradient) for end, gradient in wanted if end.requires_grad]  # a frozen stem wants none
        torch.autograd.backward([end for end, _ in wanted], [gradient for _, gradient in wanted])

    def _end(self, name: str, feature: Tensor) -> End:
        return End(*self.net.fork(name, feature, self.images)) if self.energies else End(feature, None)

    def _output(self, name: str, logits: Tensor, ends: tuple[End, ...]) -> Output:
        features = self.net.maps(name, (end.feature for end in ends), self.images)
        return Output(logits, features, tuple(end.energy for end in ends if end.energy is not None))

    def whole(self, name: str) -> None:
        """Forward and backward of one net that has nothing in common with others."""
        with _weights_cast_anew(keep=not self.logits), self.autocast():
            output = self.net.run_whole(name, self.images)
        self._backward(name, output)

    def _node(self, name: str, i: int) -> object:
        return self.paths[name][i].node if i < len(self.paths[name]) else None

    def _backward(self, name: str, output: Output) -> None:
        """The terms of one net and their backward; the full-net's output is then the teacher."""
        terms = self.objective({name: output}, self.target, self.teacher)
        if terms:
            (torch.stack(list(terms.values())).sum() * self.scale).backward()
        self.terms[name] = {term: value.detach() for term, value in terms.items()}
        self.logits[name] = output.logits.detach()
        if self.teacher is None:
            self.teacher = output.detach()
