"""What nested networks share: where their paths part, and how a sub-net is made whose tensors are the full-net's."""

import copy
from collections.abc import Mapping

from torch import nn

from ddnn.families.anatomy import cut, joined
from ddnn.families.family import Anatomy
from ddnn.families.split import holders
from ddnn.policies import HeadPolicy, NormPolicy

Depths = tuple[int, ...]
Table = Mapping[str, Depths]
"""Depths by name of the net, the full-net last."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def agreement(a: Depths, b: Depths) -> int:
    """Number of blocks that two paths run in common before they diverge."""
    count = 0
    for in_a, in_b in zip(a, b, strict=True):
        count += min(in_a, in_b)
        if in_a != in_b:
            break
    return count


def owner(table: Table, name: str, i: int) -> str:
    """Whose node of the tree the i-th block of `name`'s path is: the last net listed that runs it in common with it."""
    return next(other for other in reversed(list(table)) if agreement(table[other], table[name]) > i)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's, or one that is called so and scales and shifts channels."""
    if isinstance(module, _NORMS):
        return True
    named = "norm" in type(module).__name__.lower() and next(module.children(), None) is None
    return named and all(p is None or p.numel() == max(p.shape, default=1) for p in module._parameters.values())


def has_running_statistics(net: nn.Module) -> bool:
    """Whether some norm of the network keeps statistics of the batches it saw."""
    return any(
        isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
        for module in net.modules()
    )


def nested(
    name: str,
    table: Table,
    nets: Mapping[str, nn.Module],
    anatomies: Mapping[str, Anatomy],
    norm: NormPolicy,
    head: HeadPolicy,
) -> tuple[nn.Module, Anatomy]:
    """The sub-net of this name: a copy of the full-net in which everything shared is the same object, then cut.

    `nets` and `anatomies` are those made so far, deeper ones, the full-net among them. `copy.deepcopy` takes from its
    memo instead of copying: what the memo holds, module or parameter, is shared.
    """
    full_name = list(table)[-1]
    full, anatomy = nets[full_name], anatomies[full_name]
    memo: dict[int, object] = {id(p): p for p in full.parameters()}

    def share(module: str, instead: nn.Module | None = None) -> None:
        ours = full.get_submodule(module)
        memo[id(ours)] = ours if instead is None else instead

    def part(module: str) -> None:
        """Give the sub-net norms of its own in there, as the policy says."""
        if norm == "shared" and anatomy.family.fit is None:
            share(module)
        elif norm == "shared":  # layer by layer, as a sub-net may need some of them narrower
            memo.update((id(m), m) for m in full.get_submodule(module).modules() if next(m.children(), None) is None)
        elif norm == "private":
            for layer in filter(is_norm, full.get_submodule(module).modules()):
                for parameter in layer.parameters(recurse=False):
                    memo.pop(id(parameter), None)

    steps = anatomy.step_modules()
    behind = anatomy.head_modules()
    for module in _outside(full, [*(m for stage in steps for step in stage for m in step), *behind]):
        if anatomy.pieces is None:
            part(module)  # the nets run whole, so they part before their first layer
        else:
            share(module)
    reached = {k: table[k] for k in table if k in nets or k == name}
    i = 0
    for s, stage in enumerate(steps):
        for b, modules in enumerate(stage):
            if b >= table[name][s]:
                for module in anatomy.stages[s].blocks[b]:
                    share(module)  # cut off below; sharing spares the copy
                continue
            first = owner(reached, name, i) if anatomy.pieces is not None else name
            if first == name:
                for module in modules:
                    part(module)
            else:
                for module, theirs in zip(modules, anatomies[first].step_modules()[s][b], strict=True):
                    share(module, nets[first].get_submodule(theirs))
            i += 1
    classifier = anatomy.classifier(full)
    for module in behind:
        if norm != "shared" or not any(layer == module or layer.startswith(module + ".") for layer in classifier):
            part(module)
    for layer in classifier:
        if head == "shared":
            share(layer)
        else:
            for parameter in full.get_submodule(layer).parameters():
                memo.pop(id(parameter), None)

    subnet = copy.deepcopy(full, memo)
    stages = cut(subnet, anatomy.stages, table[name])
    if anatomy.family.fit is not None:
        anatomy.family.fit(subnet, full)
    return subnet, anatomy.family.taken_apart(subnet, stages)


def _outside(net: nn.Module, names: list[str]) -> list[str]:
    """The outermost modules of `net` that neither are, hold, nor lie in the modules called `names`."""
    around = holders(names)
    inside = set(names)

    def walk(holder: str) -> list[str]:
        found = []
        for child in net.get_submodule(holder)._modules:
            name = joined(holder, child)
            if name in inside:
                continue
            found += walk(name) if name in around else [name]
        return found

    return walk("")
