"""From what a user asks for to a table of depths, and what can't be nested: one sentence each."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from ddnn.errors import NestingError
from ddnn.families.family import Anatomy
from ddnn.policies import HeadPolicy, NormPolicy
from ddnn.sharing import Depths, has_running_statistics

Wanted = Mapping[str, Sequence[int] | Mapping[str, int]]


def check_policies(net: nn.Module, anatomy: Anatomy, norm: NormPolicy, head: HeadPolicy) -> None:
    """`NestingError` for a policy that does not exist or that this network has nothing for."""
    for value, allowed, what in ((norm, NormPolicy, "norm"), (head, HeadPolicy, "head")):
        if value not in get_args(allowed):
            raise NestingError(f"{what}={value!r} is not one of {', '.join(get_args(allowed))}")
    if norm == "recalibrated" and not has_running_statistics(net):
        raise NestingError(
            f"norm='recalibrated' recomputes running statistics, and {type(net).__name__} has no layer that keeps any; "
            "use norm='private' or 'shared'"
        )
    if head == "private" and not anatomy.classifier(net):
        raise NestingError(
            f"head='private': {type(net).__name__} has no layer after its last stage that could be each net's own; "
            "use head='shared'"
        )


def check_network(net: nn.Module) -> None:
    """`NestingError` for a network that can't be nested whatever its stages are."""
    kind = type(net).__name__
    if not isinstance(net, nn.Module):
        raise NestingError(f"the full-net must be a network, a torch.nn.Module; this is of type {kind}")
    if kind == "OptimizedModule" or kind in ("DistributedDataParallel", "DataParallel"):
        raise NestingError(f"the network is wrapped in {kind}; nest the network itself, then wrap the DDNN")
    lazy = next((name for name, p in net.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise NestingError(f"{kind} has layers without a shape yet ({lazy}); run it on a batch once, then nest it")
    for name, module in net.named_modules():
        held = next((k for k, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is not None), None)
        if held is not None:
            whose = f"{kind}.{name}" if name else kind
            raise NestingError(
                f"{whose} holds a tensor with a gradient in its attribute {held!r}, left by a forward or by old weight "
                "or spectral norms or pruning, and can't be copied; delete it, or use torch.nn.utils.parametrizations"
            )
    names: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        twin = names.setdefault(id(parameter), name)
        if twin != name:
            raise NestingError(
                f"{kind} has tied weights: {twin} and {name} are one tensor, but sub-nets share tensors by name, one "
                "for one; untie them, such as by a copy of the layer"
            )


def table_of(net: nn.Module, wanted: Wanted, full_name: str, anatomy: Anatomy) -> dict[str, Depths]:
    """The table of depths by name, the full-net last, or `NestingError`."""
    full = anatomy.depths
    names = [stage.name for stage in anatomy.stages]
    has = ", ".join(f"{stage}: {blocks}" for stage, blocks in zip(names, full, strict=True))
    table: dict[str, Depths] = {}
    if not isinstance(wanted, Mapping):
        raise NestingError(
            f"subnets must say by name how many blocks each keeps, such as {{'small': {(1,) * len(full)}}}; "
            f"this is of type {type(wanted).__name__}"
        )
    for name, given in wanted.items():
        check_name(name)
        if objection := anatomy.family.objection(net, name):
            raise NestingError(f"sub-net {name}: {objection}")
        if isinstance(given, Mapping):
            unknown = [stage for stage in given if stage not in names]
            if unknown:
                raise NestingError(f"sub-net {name}: no stage {unknown[0]!r} in this full-net, which has {has}")
            given = [given.get(stage, blocks) for stage, blocks in zip(names, full, strict=True)]
        if not isinstance(given, Sequence):
            raise NestingError(f"sub-net {name}: {given!r} is no number of blocks for each stage ({has})")
        depths = tuple(map(_as_int, given))
        if len(depths) != len(full):
            raise NestingError(
                f"sub-net {name}: {depths} gives {len(depths)} stages, the full-net has {len(full)} ({has})"
            )
        for stage, kept, blocks in zip(names, depths, full, strict=True):
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
        check_name(full_name)
        if full_name in table:
            raise NestingError(f"sub-net {full_name} has the full-net's name; give another full_name")
        return {**table, full_name: full}
    return {**{name: depths for name, depths in table.items() if name != named}, named: full}


def _as_int(number: Any) -> Any:
    """An `int` for whatever counts as one, such as NumPy's; anything else as it is."""
    try:
        return number if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return number


def check_name(name: str) -> None:
    """`NestingError` unless a net can be called so."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise NestingError(f"{name!r} can't name a net: use letters, digits, '-' and '_', and no word of torch's own")
