"""A depth-level dynamic network (DDNN): ordinary networks, shallow to deep, that share what they name alike.

`nest` takes an ordinary full-net. Each sub-net is a network of the same class with its stages cut to their first
blocks, whose parameters *are* the full-net's. Running the DDNN walks the paths of its nets; where paths have a common
beginning the blocks are the same modules and run once. No layer knows about depth, and no state selects one.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ddnn.errors import NestingError
from ddnn.families import family_of
from ddnn.families.family import Family, children_outside

NormPolicy = Literal["private", "shared", "recalibrated"]
HeadPolicy = Literal["shared", "private"]
Depths = tuple[int, ...]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Output(NamedTuple):
    """What one net makes of a batch of N images."""

    logits: Tensor
    """[N, classes]"""
    features: tuple[Tensor, ...]
    """The output of every stage, shallow to deep, each [N, channels, height, width]."""


Node = tuple[str, int]
"""A node of the tree of paths: the i-th block of the path of the net it belongs to. See `owner`."""


class Step(NamedTuple):
    """One block of a path. Steps of two paths with the same node are the same computation on the same input."""

    node: Node
    block: nn.Module
    ends_stage: bool


class DDNN(nn.Module):
    """Nested networks that share their weights, made by `nest`.

    `net(x)` runs them all, what their paths have in common once, and returns an `Output` by name, the full-net last.
    `net(x, only=["resnet18"])` runs some of them. `net.subnet(name)` takes one out as an ordinary network.

    Its state dict holds every tensor once, a shared one under its name in the deepest net that has it; loading one
    fills them all. So whoever goes through a state dict, to save or to average it, meets no tensor twice.
    """

    def __init__(self, nets: Mapping[str, nn.Module], family: Family, norm: NormPolicy, head: HeadPolicy) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)
        self.family = family
        self.norm = norm
        self.head = head
        self.depths = {name: family.depths(net) for name, net in nets.items()}
        if norm == "recalibrated":
            # Kept with the weights: a net whose statistics were never recomputed must not pass for a finished one.
            self.register_buffer("calibrated", torch.tensor(False))
            self.calibrated: Tensor
        self.register_state_dict_post_hook(_keep_each_once)
        self.register_load_state_dict_pre_hook(_give_to_all)

    @property
    def full_name(self) -> str:
        """Name of the full-net."""
        return next(reversed(self.depths))

    def forward(self, x: Tensor, only: Iterable[str] | None = None) -> dict[str, Output]:
        """Run the tree of paths on images [N, C, H, W]."""
        wanted = set(self.depths if only is None else map(self._known, only))
        names = [name for name in self.depths if name in wanted]
        paths = {name: self.path(name) for name in names}
        # Paths part only where a stage of one of them ends, so nothing else has to be kept for another path.
        ends = {step.node for path in paths.values() for step in path if step.ends_stage}
        stem = self.stem(x)
        ran: dict[Node, Tensor] = {}
        outputs: dict[str, Output] = {}
        for name, path in paths.items():
            common = max((agreement(self.depths[name], self.depths[other]) for other in outputs), default=0)
            feature = ran[path[common - 1].node] if common else stem
            for step in path[common:]:
                feature = step.block(feature)
                if step.node in ends:
                    ran[step.node] = feature
            features = tuple(ran[step.node] for step in path if step.ends_stage)
            outputs[name] = Output(self.head_of(name, feature), features)
        return outputs

    def path(self, name: str) -> list["Step"]:
        """The blocks that a net runs between stem and head, in order."""
        steps: list[Step] = []
        for blocks in self.family.blocks(self.nets[self._known(name)]):
            for b, block in enumerate(blocks):
                i = len(steps)
                steps.append(Step((owner(self.depths, name, i), i), block, ends_stage=b == len(blocks) - 1))
        return steps

    def stem(self, x: Tensor) -> Tensor:
        """What all nets begin with: images [N, C, H, W] -> input of the first stage."""
        return self.family.stem(self.nets[self.full_name], x)

    def head_of(self, name: str, feature: Tensor) -> Tensor:
        """Output of a net's last stage -> its logits [N, classes]."""
        return self.family.head(self.nets[name], feature)

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

    def _known(self, name: str) -> str:
        if name not in self.depths:
            raise NestingError(f"no net {name!r} in this DDNN; it has {', '.join(self.depths)}")
        return name


def nest(
    full_net: nn.Module,
    subnets: Mapping[str, Sequence[int] | Mapping[str, int]],
    *,
    full_name: str = "full",
    norm: NormPolicy = "private",
    head: HeadPolicy = "shared",
    family: Family | None = None,
) -> DDNN:
    """Nest sub-nets in a network and return the DDNN.

    `subnets` says by name how many blocks a sub-net keeps per stage: a tuple with one number per stage, or a mapping
    from names of stages to numbers (a stage not named is kept whole). An entry with all blocks names the full-net.
    `full_net` itself becomes the full-net: it is used, not copied, and any weights it has are kept.

    `norm` says what the normalisation layers do once two paths have diverged: `private`, each path has its own;
    `shared`, one for all; `recalibrated`, one for all but with own running statistics, to be recomputed by
    `recalibrate` after training. `head` says the same of the classifier.

    Raises `NestingError` for depths that don't nest.
    """
    for value, allowed, what in ((norm, NormPolicy, "norm"), (head, HeadPolicy, "head")):
        if value not in get_args(allowed):
            raise NestingError(f"{what}={value!r} is not one of {', '.join(get_args(allowed))}")
    family = family_of(full_net) if family is None else family
    table = _check(full_net, subnets, full_name, family)
    nets = {name: full_net for name, depths in table.items() if depths == family.depths(full_net)}
    for name in list(table)[-2::-1]:  # deep to shallow, so that each sub-net finds those it shares a beginning with
        nets[name] = _cut(name, table, nets, family, norm, head)
    return DDNN({name: nets[name] for name in table}, family, norm, head)


def recalibrate(net: DDNN, batches: Iterable[Tensor]) -> None:
    """Recompute the running norm statistics of every net from batches of images [N, C, H, W], as plain averages."""
    update_bn(batches, net)
    if net.norm == "recalibrated":
        net.calibrated.fill_(True)


def _kept_names(net: DDNN) -> dict[str, str]:
    """Name of every parameter and buffer in the nets -> the name its state is kept under."""
    kept: dict[int, str] = {}
    names: dict[str, str] = {}
    for net_name in reversed(net.depths):
        sub = net.nets[net_name]
        for named in (sub.named_parameters(remove_duplicate=False), sub.named_buffers(remove_duplicate=False)):
            for name, tensor in named:
                here = f"nets.{net_name}.{name}"
                names[here] = kept.setdefault(id(tensor), here)
    return names


def _keep_each_once(net: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    assert isinstance(net, DDNN)
    for name, kept in _kept_names(net).items():
        if name != kept:
            state.pop(prefix + name, None)


def _give_to_all(
    net: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, object], *_: object
) -> None:
    assert isinstance(net, DDNN)
    if metadata.get("assign_to_params_buffers"):
        raise NestingError("load_state_dict(assign=True) would part what the nets share; load without assign")
    for name, kept in _kept_names(net).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])


def agreement(a: Depths, b: Depths) -> int:
    """Number of blocks that two paths run in common before they diverge."""
    count = 0
    for in_a, in_b in zip(a, b, strict=True):
        count += min(in_a, in_b)
        if in_a != in_b:
            break
    return count


def owner(table: dict[str, Depths], name: str, i: int) -> str:
    """Whose node of the tree the i-th block of `name`'s path is: the last net listed that runs it in common with it."""
    return next(other for other in reversed(table) if agreement(table[other], table[name]) > i)


def _cut(
    name: str, table: dict[str, Depths], nets: dict[str, nn.Module], family: Family, norm: NormPolicy, head: HeadPolicy
) -> nn.Module:
    """The sub-net: a copy of the full-net in which everything shared is the same object, then cut to its depths.

    `copy.deepcopy` takes from its memo instead of copying. What the memo holds, module or parameter, is shared.
    """
    full = nets[next(reversed(table))]
    memo: dict[int, object] = {}

    def share(module: nn.Module, instead: nn.Module | None = None) -> None:
        memo[id(module)] = module if instead is None else instead

    def share_parameters(module: nn.Module) -> None:
        for part in module.modules():
            if norm != "private" or not isinstance(part, _NORMS):
                memo.update((id(p), p) for p in part.parameters(recurse=False))

    memo.update((id(p), p) for p in full.parameters(recurse=False))  # such as a position embedding
    for module in children_outside(full, [*family.stages, *family.after_stages]):
        share(module)
    i = 0
    for s, blocks in enumerate(family.blocks(full)):
        for b, block in enumerate(blocks):
            if b >= table[name][s]:
                share(block)  # cut off below; sharing spares the copy
                continue
            first = owner({k: table[k] for k in table if k in nets or k == name}, name, i)
            if first != name:
                share(block, family.blocks(nets[first])[s][b])
            elif norm == "shared":
                share(block)
            else:
                share_parameters(block)
            i += 1
    classifier = full.get_submodule(family.classifier)
    for module in map(full.get_submodule, family.after_stages):
        if norm == "shared" and classifier not in module.modules():
            share(module)
        share_parameters(module)
    if head == "shared":
        share(classifier)
    else:
        for parameter in classifier.parameters():
            memo.pop(id(parameter), None)

    subnet = copy.deepcopy(full, memo)
    for stage, kept in zip(family.stages, table[name], strict=True):
        del family.stage(subnet, stage)[kept:]
    return subnet


def _check(
    full_net: nn.Module, subnets: Mapping[str, Sequence[int] | Mapping[str, int]], full_name: str, family: Family
) -> dict[str, Depths]:
    """The table of depths by name, the full-net last, or `NestingError`."""
    full = family.depths(full_net)
    has = ", ".join(f"{stage}: {blocks}" for stage, blocks in zip(family.stages, full, strict=True))
    table: dict[str, Depths] = {}
    for name, given in subnets.items():
        _check_name(name)
        if objection := family.objection(full_net, name):
            raise NestingError(f"sub-net {name}: {objection}")
        if isinstance(given, Mapping):
            unknown = [stage for stage in given if stage not in family.stages]
            if unknown:
                raise NestingError(f"sub-net {name}: no stage {unknown[0]!r} in this full-net, which has {has}")
            given = [given.get(stage, blocks) for stage, blocks in zip(family.stages, full, strict=True)]
        depths = tuple(given)
        if len(depths) != len(full):
            raise NestingError(
                f"sub-net {name}: {depths} gives {len(depths)} stages, the full-net has {len(full)} ({has})"
            )
        for stage, kept, blocks in zip(family.stages, depths, full, strict=True):
            if type(kept) is not int or not 1 <= kept <= blocks:
                raise NestingError(
                    f"sub-net {name} does not nest: it keeps {kept!r} blocks of {stage}, "
                    f"where the full-net has {blocks}; allowed: 1 to {blocks}"
                )
        twin = next((other for other, theirs in table.items() if theirs == depths), None)
        if twin is not None:
            raise NestingError(f"sub-nets {twin} and {name} are the same network, {depths}; leave one out")
        table[name] = depths
    named = next((name for name, depths in table.items() if depths == full), None)
    if named is None:
        _check_name(full_name)
        if full_name in table:
            raise NestingError(f"sub-net {full_name} has the full-net's name; give another full_name")
        return {**table, full_name: full}
    return {**{name: depths for name, depths in table.items() if name != named}, named: full}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise NestingError(f"{name!r} can't name a net: use letters, digits, '-' and '_', and no word of torch's own")
