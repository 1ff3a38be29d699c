"""The state dict of nets that share tensors: every tensor once, under its name in the last net that has it.

Two hooks for a module whose `nets` is a `ModuleDict` of such nets, the full-net last, and a guard of what they share.
Whoever goes through its state dict, to save or to average it, meets no tensor twice, and loading one fills all nets.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from ddnn.errors import NestingError


def keep_each_once(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """After the state dict was made: leave a shared tensor under one name. For `register_state_dict_post_hook`."""
    for name, kept in _kept_names(module).items():
        if name != kept:
            state.pop(prefix + name, None)


def give_to_all(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, object], *_: object
) -> None:
    """Before a state dict is loaded: name a shared tensor for every net. For `register_load_state_dict_pre_hook`."""
    if metadata.get("assign_to_params_buffers"):
        raise NestingError("load_state_dict(assign=True) would part what the nets share; load without assign")
    for name, kept in _kept_names(module).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])


@contextmanager
def kept_shared(module: nn.Module) -> Iterator[None]:
    """Whatever is replaced meanwhile: parameters and buffers that were one tensor are one tensor afterwards."""
    places: dict[int, list[tuple[dict[str, Tensor | None], str]]] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((held, name))  # type: ignore[arg-type]
    yield
    for (held, name), *others in places.values():
        for theirs, its_name in others:
            theirs[its_name] = held[name]


def _kept_names(module: nn.Module) -> dict[str, str]:
    """Name of every parameter and buffer in the nets -> the name its state is kept under."""
    nets = cast(nn.ModuleDict, module.nets)
    kept: dict[int, str] = {}
    names: dict[str, str] = {}
    for net_name in reversed(list(nets)):
        sub = nets[net_name]
        for named in (sub.named_parameters(remove_duplicate=False), sub.named_buffers(remove_duplicate=False)):
            for name, tensor in named:
                here = f"nets.{net_name}.{name}"
                names[here] = kept.setdefault(id(tensor), here)
    return names
