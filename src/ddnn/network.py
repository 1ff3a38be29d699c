"""A depth-level dynamic network (DDNN): ordinary networks, shallow to deep, that share what they name alike.

`nest` takes an ordinary full-net. Each sub-net is a network of the same class with its stages cut to their first
blocks, whose parameters *are* the full-net's. Running the DDNN walks the paths of its nets; where paths have a common
beginning the blocks are the same modules and run once. No layer knows about depth, and no state selects one.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ddnn.energy import energy, fork
from ddnn.errors import DDNNError, NestingError
from ddnn.families import anatomy_of
from ddnn.families.family import Anatomy, Family
from ddnn.families.split import IndivisibleError
from ddnn.policies import HeadPolicy, NormPolicy
from ddnn.proof import at_rest, logits_of, overwrites
from ddnn.sharing import Depths, agreement, nested, owner
from ddnn.table import Wanted, check_network, check_policies, table_of
from ddnn.tied import give_to_all, keep_each_once, kept_shared


class Output(NamedTuple):
    """What one net makes of a batch of N images."""

    logits: Tensor
    """[N, classes]"""
    features: tuple[Tensor, ...]
    """The output of every stage, shallow to deep, each as a map [N, channels, height, width]; see
    `Anatomy.feature_map` for networks that work on tokens or with channels last."""
    energies: tuple[Tensor, ...] = ()
    """Of every feature the sum over channels of squares [N, height * width], where they were asked for."""

    def with_energies(self) -> "Output":
        """The same with energies, made now if they are missing."""
        return self if self.energies else self._replace(energies=tuple(map(energy, self.features)))

    def detach(self) -> "Output":
        """The same without gradient."""
        features, energies = (tuple(t.detach() for t in part) for part in (self.features, self.energies))
        return Output(self.logits.detach(), features, energies)


Node = tuple[str, int]
"""A node of the tree of paths: the i-th block of the path of the net it belongs to. See `owner`."""


class Step(NamedTuple):
    """One block of a path. Steps of two paths with the same node are the same computation on the same input."""

    node: Node
    block: Callable[[Tensor], Tensor]
    """The block, with what its network does just before it; mostly the module itself."""
    ends_stage: bool


class DDNN(nn.Module):
    """Nested networks that share their weights, made by `nest`.

    `net(x)` runs them all, what their paths have in common once, and returns an `Output` by name, the full-net last.
    `net(x, only=["resnet18"])` runs some of them. `net.subnet(name)` takes one out as an ordinary network.

    Its state dict holds every tensor once, a shared one under its name in the deepest net that has it; loading one
    fills them all. So whoever goes through a state dict, to save or to average it, meets no tensor twice.
    """

    def __init__(
        self, nets: Mapping[str, nn.Module], anatomies: Mapping[str, Anatomy], norm: NormPolicy, head: HeadPolicy
    ) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)
        self.anatomies = {name: anatomies[name] for name in nets}
        self.norm = norm
        self.head = head
        self.depths = {name: anatomy.depths for name, anatomy in self.anatomies.items()}
        self.nodes: dict[str, list[Node]] = {
            name: [(owner(self.depths, name, i), i) for i in range(sum(depths))] for name, depths in self.depths.items()
        }
        if norm == "recalibrated":
            # Kept with the weights: a net whose statistics were never recomputed must not pass for a finished one.
            self.register_buffer("calibrated", torch.tensor(False))
            self.calibrated: Tensor
        self.register_state_dict_post_hook(keep_each_once)
        self.register_load_state_dict_pre_hook(give_to_all)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DDNN":
        """What `to` and `to_empty` come down to: where torch makes new parameters, they are shared as before."""
        with kept_shared(self):
            return super()._apply(fn, recurse)

    @property
    def full_name(self) -> str:
        """Name of the full-net."""
        return next(reversed(self.depths))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, shallow to deep."""
        return tuple(stage.name for stage in self.anatomies[self.full_name].stages)

    @property
    def whole(self) -> str | None:
        """Why the nets run whole, sharing weights but no work; None if they don't."""
        return self.anatomies[self.full_name].family.whole

    def chosen(self, only: Iterable[str] | None) -> list[str]:
        """The nets of these names, shallow to deep; all of them for None. Raises `NestingError` for other names."""
        if isinstance(only, str) or not isinstance(only, Iterable | None):
            only = [only]
        wanted = set(self.depths if only is None else map(self._known, only))
        if not wanted:
            raise NestingError(f"only names no net of this DDNN; it has {', '.join(self.depths)}")
        return [name for name in self.depths if name in wanted]

    def forward(self, x: Tensor, only: Iterable[str] | None = None, *, energies: bool = False) -> dict[str, Output]:
        """Run the tree of paths on images [N, C, H, W].

        With `energies`, outputs have those of their features as well. An objective with attention terms makes them
        itself where they are missing; made here they cost less, forward and backward. See `ddnn.energy`.
        """
        names = self.chosen(only)
        if self.whole:
            outputs = {name: self.run_whole(name, x) for name in names}
            return {name: output.with_energies() for name, output in outputs.items()} if energies else outputs
        paths = {name: self.path(name) for name in names}
        # Paths part only where a stage of one of them ends, so nothing else has to be kept for another path.
        ends = {step.node for path in paths.values() for step in path if step.ends_stage}
        stem = self.stem(x)
        ran: dict[Node, Tensor] = {}
        made: dict[Node, Tensor] = {}
        outputs = {}
        for name, path in paths.items():
            common = max((agreement(self.depths[name], self.depths[other]) for other in outputs), default=0)
            feature = ran[path[common - 1].node] if common else stem
            for step in path[common:]:
                feature = step.block(feature)
                if step.node in ends:
                    if energies:
                        feature, made[step.node] = self.fork(name, feature, x)
                    ran[step.node] = feature
            passed = [step.node for step in path if step.ends_stage]
            features = self.maps(name, [ran[node] for node in passed], x)
            outputs[name] = Output(
                self.head_of(name, feature), features, tuple(made[node] for node in passed) if energies else ()
            )
        return outputs

    def path(self, name: str) -> list["Step"]:
        """The blocks that a net runs between stem and head, in order."""
        steps: list[Step] = []
        for blocks in self.anatomies[self._known(name)].steps(self.nets[name]):
            for b, block in enumerate(blocks):
                steps.append(Step(self.nodes[name][len(steps)], block, ends_stage=b == len(blocks) - 1))
        return steps

    def stem(self, x: Tensor) -> Tensor:
        """What all nets begin with: images [N, C, H, W] -> input of the first stage."""
        return self.anatomies[self.full_name].stem(self.nets[self.full_name], x)

    def head_of(self, name: str, feature: Tensor) -> Tensor:
        """Output of a net's last stage, as its last block gives it -> its logits [N, classes]."""
        return self.anatomies[name].head(self.nets[name], feature)

    def maps(self, name: str, features: Iterable[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of a net's stages for the images `x`, as their blocks give them -> maps [N, channels, height, width].

        Of the images only their size matters.
        """
        anatomy, net, image = self.anatomies[name], self.nets[name], x.shape[-2:]
        return tuple(anatomy.feature_map(net, feature, image) for feature in features)

    def fork(self, name: str, feature: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output of a stage for the images `x` -> the same to go on with, and its map's energy [N, H*W]."""
        (its_map,) = self.maps(name, [feature], x)
        return fork(feature) if its_map is feature else (feature, energy(its_map))

    def run_whole(self, name: str, x: Tensor) -> Output:
        """Run one net by its own forward; bitwise what `self(x)` gives of it."""
        seen: dict[str, Tensor] = {}
        sub, anatomy = self.nets[self._known(name)], self.anatomies[name]
        ends = [stage.blocks[-1][-1] for stage in anatomy.stages]

        def keep(end: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _given: object, result: Tensor | Sequence[Tensor]) -> None:
                feature = result if isinstance(result, Tensor) else result[0]
                seen[end] = feature.clone() if anatomy.family.clones else feature

            return hook

        hooks = [sub.get_submodule(end).register_forward_hook(keep(end)) for end in ends]
        try:
            logits = sub(x)
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [end for end in ends if end not in seen]:
            raise NestingError(f"net {name} did not run {missing[0]} this time, and so has no output of that stage")
        return Output(logits, self.maps(name, [seen[end] for end in ends], x))

    def subnet(self, name: str) -> nn.Module:
        """A copy of one net as an ordinary network of its library, independent of this DDNN.

        Its state dict is that of the library's own network of these depths. Raises `NestingError` for an unknown
        name; warns where the norm statistics were never recalibrated.
        """
        self._known(name)
        if self.norm == "recalibrated" and not self.calibrated:
            warnings.warn(
                f"the norm statistics of {name} were never recalibrated; call ddnn.recalibrate(net, batches) first",
                stacklevel=2,
            )
        return copy.deepcopy(self.nets[name])

    def alone(self, name: str) -> "DDNN":
        """A copy of one net as a DDNN of its own, which has no other."""
        nets = {name: copy.deepcopy(self.nets[self._known(name)])}
        alone = DDNN(nets, self.anatomies, self.norm, self.head)
        if self.norm == "recalibrated":
            alone.calibrated.copy_(self.calibrated)
        return alone

    def follow_full_net(self) -> None:
        """Give the sub-nets' own norms and classifiers the values they have in the full-net now, as `nest` does."""
        full = self.anatomies[self.full_name]
        fresh = assemble(self.nets[self.full_name], self.depths, full, self.norm, self.head)
        self.load_state_dict(fresh.state_dict())

    def _known(self, name: str) -> str:
        if name not in self.depths:
            raise NestingError(f"no net {name!r} in this DDNN; it has {', '.join(self.depths)}")
        return name


def nest(
    full_net: nn.Module,
    subnets: Wanted,
    *,
    full_name: str = "full",
    norm: NormPolicy = "private",
    head: HeadPolicy = "shared",
    family: Family | None = None,
    stages: Sequence[str] | None = None,
    example: Tensor | None = None,
) -> DDNN:
    """Nest sub-nets in a network and return the DDNN.

    `subnets` says by name how many blocks a sub-net keeps per stage: a tuple with one number per stage, or a mapping
    from names of stages to numbers (a stage not named is kept whole). An entry with all blocks names the full-net.
    `full_net` itself becomes the full-net: it is used, not copied, and any weights it has are kept.

    `norm` says what the normalisation layers do once two paths have diverged: `private`, each path has its own;
    `shared`, one for all; `recalibrated`, one for all but with own running statistics, to be recomputed by
    `recalibrate` after training. `head` says the same of the classifier.

    The stages of a network that no family lists are found by its structure, or named by `stages`: `"layer1"` (every
    module in it is a block), `"blocks[0:4]"`, `"block1..block3"`, `"stages.*.blocks"`. `example`, images [N, C, H, W]
    that the network takes, is needed only where it can't be guessed. The nets are then run on it once and compared with
    the tree, bitwise. Where the forward can't be taken apart at its stages, the nets share weights but no work, and a
    warning says why.

    Raises `NestingError` for depths that don't nest and for stages that can't be found.
    """
    check_network(full_net)
    anatomy, example = anatomy_of(full_net, family, stages, example)
    check_policies(full_net, anatomy, norm, head)
    table = table_of(full_net, subnets, full_name, anatomy)
    if anatomy.family.whole is None:
        if any(getattr(module, "grad_checkpointing", None) is True for module in full_net.modules()):
            warnings.warn(
                f"gradient checkpointing of {type(full_net).__name__} has no effect, as a DDNN runs its blocks one by "
                "one; ddnn.branchwise.branchwise_backward (train.lean in a recipe) saves memory instead",
                stacklevel=2,
            )
        try:
            net = assemble(full_net, table, anatomy, norm, head)
            if example is None:
                return net
            if _overwrites(net, example):  # its input must then be a copy
                anatomy = anatomy.as_if(full_net, clones=True)
                net = assemble(full_net, table, anatomy, norm, head)
            differing = _differing(net, example)
            if differing is None:
                return net
            anatomy = anatomy.as_if(full_net, whole=f"taken apart, {differing} gives other logits than by its forward")
        except IndivisibleError as indivisible:
            anatomy = anatomy.as_if(full_net, whole=f"in a sub-net, {indivisible}")
    net = assemble(full_net, table, anatomy, norm, head)
    if example is not None:
        _differing(net, example)  # whether they can run at all
    warnings.warn(
        f"the nets of {type(full_net).__name__} share weights but no work, as its forward can't be taken apart: "
        f"{anatomy.family.whole}",
        stacklevel=2,
    )
    return net


def assemble(
    full_net: nn.Module,
    table: Mapping[str, Depths],
    anatomy: Anatomy,
    norm: NormPolicy = "private",
    head: HeadPolicy = "shared",
) -> DDNN:
    """`nest` without its checks: a table with the full-net last, of a network whose anatomy is known."""
    *names, full_name = table
    nets, anatomies = {full_name: full_net}, {full_name: anatomy}
    for name in reversed(names):  # deep to shallow, so that each sub-net finds those it shares a beginning with
        nets[name], anatomies[name] = nested(name, table, nets, anatomies, norm, head)
    return DDNN({name: nets[name] for name in table}, anatomies, norm, head)


def _overwrites(net: DDNN, x: Tensor) -> bool:
    with at_rest(net):
        return any(
            overwrites(net.stem, [step.block for step in net.path(name)], partial(net.head_of, name), x)
            for name in net.nets
        )


def _differing(net: DDNN, x: Tensor) -> str | None:
    """The first net whose logits in the tree are not those of its own forward; `NestingError` if one can't run."""
    with at_rest(net):
        expected = logits_of(dict(net.nets.items()), x)
        outputs = net(x)
        return next((name for name in net.nets if not torch.equal(outputs[name].logits, expected[name])), None)


def recalibrate(net: DDNN, batches: Iterable[Tensor | Sequence[Any]]) -> None:
    """Recompute the running norm statistics of every net from batches of images [N, C, H, W], as plain averages.

    A batch may also be a list or tuple that begins with the images, as a `DataLoader` gives them. Raises `DDNNError`
    where there is no batch.
    """
    coming = iter(batches)
    first = next(coming, None)
    if first is None:
        raise DDNNError("recalibrate needs at least one batch of images; it was given none")
    kind = next(net.parameters()).dtype
    images = (batch if isinstance(batch, Tensor) else batch[0] for batch in itertools.chain([first], coming))
    update_bn((x.to(kind) for x in images), net)
    if net.norm == "recalibrated":
        net.calibrated.fill_(True)
