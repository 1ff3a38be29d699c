"""Propose sub-nets of a full-net for wanted amounts of work or time.

What a sub-net costs to run is the sum of stem, blocks kept and head. What it costs to add to a joint training is what
its path does after it has parted from the full-net's, and the parameters of its own. The same amount of work can be cut
away early or late, so each wish gets up to two answers:

- `late`: paths part as late as possible, which makes the sub-net cheap to add;
- `balanced`: every stage keeps about the same share of its blocks, as ResNet-18 does in ResNet-34.

Both keep at least a quarter of the blocks of every stage, and one. Which of the two learns better is not known
beforehand: `ddnn compare` tells.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddnn.errors import NestingError
from ddnn.evaluate import latency_ms, macs, parameters, side_by_side
from ddnn.families.discover import ghost
from ddnn.network import DDNN, assemble, nest
from ddnn.sharing import Depths

Kind = Literal["late", "balanced"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FLOOR = 0.25
"""Least share of the blocks of a stage that a proposal keeps."""
MOST = 300_000
"""Most sub-nets that are looked at; of a full-net that has more, those that keep steps of a stage."""
NEAR = 0.03
"""How far from the wish a proposal may be, as a share of the full-net."""


@dataclass(frozen=True)
class Proposal:
    """One sub-net and what it costs."""

    name: str
    depths: Depths
    kind: tuple[Kind, ...]
    wanted: str
    """The wish it answers."""
    macs: int
    """Of one image through the sub-net."""
    macs_share: float
    """Of the full-net's."""
    parameters: int
    latency_ms: float | None
    """Measured, where the wish was a latency."""
    added_macs: int
    """Of one image in a joint step, beyond those of the full-net."""
    added_parameters: int
    """Of its own, beyond those of the full-net."""
    parts: str
    """Where its path parts from the full-net's."""
    why: str


@dataclass(frozen=True)
class Suggestion:
    """Proposals for one full-net."""

    full_net: str
    stages: tuple[str, ...]
    depths: Depths
    macs: int
    parameters: int
    latency_ms: float | None
    image_size: int
    proposals: tuple[Proposal, ...]
    bound: dict[str, float]
    """By kind: MACs of the tree of all proposals of that kind and the full-net, over those of training each alone."""


def suggest(
    full_net: nn.Module,
    name: str,
    *,
    shares: Sequence[float] = (),
    latencies: Sequence[float] = (),
    image_size: int,
    device: torch.device,
    stages: Sequence[str] | None = None,
) -> Suggestion:
    """Propose sub-nets with `shares` of the full-net's MACs, and such as take `latencies` milliseconds on `device`.

    Raises `NestingError` for a wish that no sub-net fulfils.
    """
    search = _Search(nest(full_net, {}, full_name=name, stages=stages).eval(), image_size, device)
    proposals = [proposal for share in shares for proposal in search.for_share(share)]
    proposals += [proposal for wish in latencies for proposal in search.for_latency(wish)]
    distinct = list({proposal.depths: proposal for proposal in reversed(proposals)}.values())[::-1]
    return Suggestion(
        full_net=name,
        stages=search.alone.stages,
        depths=search.full,
        macs=search.macs,
        parameters=search.parameters,
        latency_ms=search.latency(search.full) if latencies else None,
        image_size=image_size,
        proposals=tuple(distinct),
        bound={kind: search.bound([p.depths for p in proposals if kind in p.kind]) for kind in KINDS},
    )


@dataclass(frozen=True)
class _Costs:
    """What a sub-net costs: `fixed`, and for every stage what its first 1, 2, ... blocks do."""

    fixed: float
    stages: list[list[float]]
    tree: bool = True
    """Whether paths run their common beginning once."""

    def of(self, depths: Depths) -> float:
        return self.fixed + sum(costs[d - 1] for costs, d in zip(self.stages, depths, strict=True))

    def common(self, depths: Depths) -> float:
        """What the blocks of a sub-net do before its path parts from the full-net's."""
        total = 0.0
        if not self.tree:
            return total
        for costs, d in zip(self.stages, depths, strict=True):
            total += costs[d - 1]
            if d < len(costs):
                break
        return total


class _Search:
    """Looks through the sub-nets of one full-net."""

    def __init__(self, alone: DDNN, image_size: int, device: torch.device) -> None:
        self.alone = alone
        self.ghost = ghost(alone)
        self.name = alone.full_name
        self.full = alone.depths[self.name]
        self.floors = tuple(max(1, math.ceil(FLOOR * blocks)) for blocks in self.full)
        self.image_size = image_size
        self.device = device
        self.macs = macs(alone, image_size)
        self.parameters = parameters(alone)
        self._counted: dict[Depths, int] = {}
        """MACs of the sub-nets looked at so far."""

    # -- wishes -------------------------------------------------------------------------------------------------

    def for_share(self, share: float) -> list[Proposal]:
        """Proposals with this share of the full-net's MACs."""
        label, costs = f"{share:.0%} of the MACs", self.work
        smallest = self._macs_of(self.floors) / self.macs
        if not smallest - NEAR <= share < 1:
            raise NestingError(
                f"no sub-net of {self.name} has {label}: a share must be below 1, and the smallest that keeps a "
                f"quarter of every stage, {self.floors}, has {smallest:.0%}"
            )
        picked = {kind: self._approach(kind, costs, share * self.macs, self._macs_of) for kind in KINDS}
        return self._proposals(f"macs{round(100 * share)}", label, picked, measured=False)

    def for_latency(self, wish: float) -> list[Proposal]:
        """Proposals that take this many milliseconds."""
        label, costs = f"{wish:g} ms", self.time
        full, smallest = costs.of(self.full), costs.of(self.floors)
        if not smallest - NEAR * full <= wish < full:
            raise NestingError(
                f"no sub-net of {self.name} takes {label} here: the full-net takes {full:.3g} ms, and the smallest "
                f"that keeps a quarter of every stage, {self.floors}, about {smallest:.3g} ms"
            )
        picked = {kind: self._approach(kind, costs, wish, self.latency) for kind in KINDS}
        return self._proposals(f"ms{wish:g}".replace(".", "_"), label, picked, measured=True)

    # -- measures -----------------------------------------------------------------------------------------------

    def nested(self, depths: Sequence[Depths]) -> DDNN:
        """These sub-nets in the full-net, on the meta device."""
        return self._assembled(self.ghost.nets[self.name], depths)

    def bound(self, depths: Sequence[Depths]) -> float:
        """MACs of the tree of these sub-nets and the full-net over those of training each alone."""
        alone = sum(self._macs_of(one) for one in dict.fromkeys([*depths, self.full]))
        return macs(self.nested(depths), self.image_size) / alone

    def latency(self, depths: Depths) -> float:
        """Milliseconds of a sub-net on the device."""
        net = self._assembled(self.alone.nets[self.name].to(self.device), [depths]).eval()
        name = next(iter(net.nets))
        return latency_ms({name: net.nets[name]}, self.image_size, self.device)[name]

    def _macs_of(self, depths: Depths) -> int:
        if depths not in self._counted:
            self._counted[depths] = macs(next(iter(self.nested([depths]).nets.values())), self.image_size)
        return self._counted[depths]

    def _assembled(self, full_net: nn.Module, depths: Sequence[Depths]) -> DDNN:
        table = {f"net{i}": d for i, d in enumerate(dict.fromkeys(depths)) if d != self.full}
        return assemble(full_net, {**table, self.name: self.full}, self.alone.anatomies[self.name])

    @functools.cached_property
    def work(self) -> _Costs:
        """In MACs."""

        def counted(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
            with FlopCounterMode(display=False) as counter:
                result = call()
            return result, counter.get_total_flops() / 2

        return self._costs(self.ghost, "meta", counted, self._macs_of)

    @functools.cached_property
    def time(self) -> _Costs:
        """In milliseconds."""

        def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
            seconds = side_by_side({"block": call}, self.device, budget_s=0.1)["block"]
            return call(), 1000 * statistics.median(seconds)

        return self._costs(self.alone.to(self.device), self.device, timed, self.latency)

    @torch.no_grad()
    def _costs(
        self,
        net: DDNN,
        device: str | torch.device,
        measured: Callable[[Callable[[], Tensor]], tuple[Tensor, float]],
        of_subnet: Callable[[Depths], float],
    ) -> _Costs:
        if net.whole:  # from what it saves to cut each stage to its first block, each of the others taken for the same
            full = of_subnet(self.full)
            saved = [
                full - of_subnet((*self.full[:s], 1, *self.full[s + 1 :])) if blocks > 1 else 0.0
                for s, blocks in enumerate(self.full)
            ]
            return _Costs(
                full,
                [
                    [(kept - blocks) * save / max(1, blocks - 1) for kept in range(1, blocks + 1)]
                    for blocks, save in zip(self.full, saved, strict=True)
                ],
                tree=False,
            )
        anatomy, full_net = net.anatomies[self.name], net.nets[self.name].eval()
        x = torch.zeros(1, 3, self.image_size, self.image_size, device=device)
        feature, stem = measured(lambda: anatomy.stem(full_net, x))
        stages = []
        for blocks in anatomy.steps(full_net):
            costs = []
            for block in blocks:
                feature, cost = measured(functools.partial(block, feature))
                costs.append(cost)
            stages.append(list(itertools.accumulate(costs)))
        _, head = measured(lambda: anatomy.head(full_net, feature))
        return _Costs(stem + head, stages)

    # -- choice -------------------------------------------------------------------------------------------------

    def _approach(self, kind: Kind, costs: _Costs, wish: float, exact: Callable[[Depths], float]) -> Depths:
        """The sub-net that comes nearest to the wish by its exact cost; the sum of its parts is only near that."""
        full = costs.of(self.full)
        best: tuple[float, Depths] | None = None
        goal = wish
        for _ in range(4):
            depths = self._pick(kind, costs, goal)
            cost = exact(depths)
            best = min(best or (math.inf, depths), (abs(cost - wish), depths))
            if abs(cost - wish) <= NEAR * full:
                break
            goal *= wish / cost
        assert best is not None
        return best[1]

    def _pick(self, kind: Kind, costs: _Costs, wish: float) -> Depths:
        priced = [(abs(costs.of(depths) - wish), depths) for depths in self._candidates()]
        nearest = min(distance for distance, _ in priced)
        near = [
            (distance, depths) for distance, depths in priced if distance <= max(nearest, NEAR * costs.of(self.full))
        ]
        if kind == "late":
            return max(near, key=lambda one: (costs.common(one[1]) - 2 * one[0], -self._imbalance(one[1])))[1]
        return min(near, key=lambda one: (self._imbalance(one[1]), one[0]))[1]

    def _candidates(self) -> Iterator[Depths]:
        """All sub-nets that keep enough of every stage; where they are too many, only some depths of each stage."""
        options = [range(floor, blocks + 1) for floor, blocks in zip(self.floors, self.full, strict=True)]
        per_stage = max(2, int(MOST ** (1 / len(options))))
        if math.prod(map(len, options)) > MOST:
            options = [option[:: -(-len(option) // per_stage)] for option in options]
        return (depths for depths in itertools.product(*options) if depths != self.full)

    def _imbalance(self, depths: Depths) -> float:
        """How unlike the shares of blocks are that the stages keep, weighted by the blocks they have."""
        even = sum(depths) / sum(self.full)
        return sum((d / blocks - even) ** 2 * blocks for d, blocks in zip(depths, self.full, strict=True))

    def _proposals(self, name: str, wanted: str, picked: dict[Kind, Depths], *, measured: bool) -> list[Proposal]:
        kinds: dict[Depths, list[Kind]] = {}
        for kind, depths in picked.items():
            kinds.setdefault(depths, []).append(kind)
        return [
            self._proposal(name if len(kinds) == 1 else f"{name}-{of[0]}", depths, tuple(of), wanted, measured)
            for depths, of in kinds.items()
        ]

    def _proposal(self, name: str, depths: Depths, kinds: tuple[Kind, ...], wanted: str, measured: bool) -> Proposal:
        net = self.nested([depths])
        subnet = next(iter(net.nets.values()))
        work, added = self._macs_of(depths), macs(net, self.image_size) - self.macs
        kept = [d / blocks for d, blocks in zip(depths, self.full, strict=True) if blocks > 1] or [1.0]
        more = f"{added / self.macs:.0%} more than the full-net's" if added > 0.005 * self.macs else "hardly more"
        reasons = {
            "late": f"its path parts as late as it can: {1 - added / work:.0%} of its work is the full-net's own, so a "
            f"joint step does {more}",
            "balanced": f"the stages keep the most equal shares of their blocks, {min(kept):.0%} to {max(kept):.0%}",
        }
        return Proposal(
            name=name,
            depths=depths,
            kind=kinds,
            wanted=wanted,
            macs=work,
            macs_share=work / self.macs,
            parameters=parameters(subnet),
            latency_ms=self.latency(depths) if measured else None,
            added_macs=added,
            added_parameters=parameters(net) - self.parameters,
            parts=self._parting(depths) if not net.whole else "before the first layer",
            why="; ".join(reasons[kind] for kind in kinds),
        )

    def _parting(self, depths: Depths) -> str:
        for stage, d, blocks in zip(self.alone.stages, depths, self.full, strict=True):
            if d < blocks:
                return f"after block {d} of {blocks} in {stage}"
        raise AssertionError("the full-net is no sub-net")
