"""A DDNN to a folder and back."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ddnn.checkpoint import fill, weights_of
from ddnn.errors import DDNNError, HubError, NestingError, RunError, first_line
from ddnn.families import build as build_full_net
from ddnn.families import family_of
from ddnn.families.discover import example_for, ghost
from ddnn.families.family import Family
from ddnn.files import write_atomic
from ddnn.hub.config import Config, Network, Preprocessing, checked, read
from ddnn.hub.evidence import Evidence
from ddnn.hub.remote import fetch
from ddnn.network import DDNN, nest

WEIGHTS = "model.safetensors"


def save_pretrained(
    net: DDNN,
    folder: str | Path,
    *,
    network: str | Network | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    evidence: Evidence | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Config:
    """Write a DDNN to a folder as the Hugging Face hub keeps models, and return what `config.json` says.

    `network` is the full-net by the name that a recipe would give it, `torchvision/resnet34`, or with width or options
    beside the name as `ddnn.hub.Network`; whether that builds this very network is tried out. A network made by code
    has no such name, and `from_pretrained` then has to be given one like it. `classes` are the names of the classes in
    the order of the logits, `preprocessing` says how an image becomes the input, `evidence` what was measured: the card
    holds it all. `license` is an identifier of the hub's list, such as `apache-2.0`; `repo_id` what the card calls the
    model.

    A `README.md` that is there already is written anew only if it still has the line that says ddnn wrote it. Raises
    `HubError` where `network`, `classes` or `evidence` are not this net's.
    """
    from ddnn.hub.card import About, write_card

    folder = Path(folder)
    content = weights_of(net)
    size = side_of(net.nets[net.full_name], preprocessing)
    config = checked(
        {
            "network": {"name": network} if isinstance(network, str) else network,
            "stages": net.stages,
            "num_classes": _num_classes(net.nets[net.full_name], size),
            "depths": net.depths,
            "norm": net.norm,
            "head": net.head,
            "classes": None if classes is None else tuple(classes),
            "preprocessing": preprocessing,
            "weights_sha256": hashlib.sha256(content).hexdigest(),
        },
        "what is to be saved",
    )
    if network is not None:
        _check_name(net, config, size)
    if evidence is not None:
        evidence.check(net)
    write_atomic(folder / WEIGHTS, content)
    about = About(
        repo_id or folder.resolve().name, config.classes, preprocessing, evidence, license, by_code=network is None
    )
    write_card(folder, net, about)
    write_atomic(folder / "config.json", config.to_json())
    return config


def from_pretrained(
    name: str | Path,
    *,
    full_net: nn.Module | None = None,
    family: Family | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> DDNN:
    """The DDNN in a folder that `save_pretrained` wrote, or in a repository of the hub, on the CPU and in eval mode.

    All that is read is JSON and safetensors; nothing is unpickled and no code of the repository runs. `full_net` is
    for a DDNN whose full-net was made by code: a network like it, which is used, not copied; `family` as for `nest`.
    `revision`, `token` and `cache_dir` are those of `huggingface_hub`.

    Raises `HubError` for what is no such folder or repository, damaged, or of another network.
    """
    folder = fetch(name, ("config.json", WEIGHTS), revision=revision, token=token, cache_dir=cache_dir)
    config = read(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = next((f.name for f in sorted(folder.glob("*")) if f.suffix in (".bin", ".pt", ".pth", ".ckpt")), None)
        never = f"; {pickled} may hold pickled code and is never loaded" if pickled else ""
        raise HubError(f"{folder} holds no weights: it has no {WEIGHTS}{never}")
    try:
        net = _rebuild(config, full_net, family, folder)
        fill(net, folder / WEIGHTS, config.weights_sha256, stated="config.json", source=folder / "config.json")
    except RunError as error:
        raise HubError(str(error)) from None
    return net.eval()


def load_config(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Config:
    """What is known of a model besides its weights: depths, names of the classes, preprocessing; see `Config`."""
    return read(fetch(name, ("config.json",), revision=revision, token=token, cache_dir=cache_dir))


def _rebuild(config: Config, full_net: nn.Module | None, family: Family | None, place: Path) -> DDNN:
    """The net with weights as they come."""
    if full_net is None and config.network is None:
        raise HubError(
            f"the full-net of {place} was made by code, which is not kept with it; give a network like it: "
            "from_pretrained(..., full_net=...)"
        )
    try:
        full_net = _named(config) if full_net is None else full_net
        return _nested(config, _full_net(config, full_net, family), config.depths, family)
    except DDNNError as error:
        raise HubError(f"{place / 'config.json'}: {error}") from None


def _named(config: Config) -> nn.Module:
    """The network that a config names, with fresh weights."""
    assert config.network is not None
    size = config.preprocessing.size if config.preprocessing else None
    network, _ = build_full_net(
        config.network.name,
        config.num_classes,
        config.network.width,
        image_size=size,
        options=config.network.options,
    )
    return network


def _full_net(config: Config, given: nn.Module, family: Family | None = None) -> nn.Module:
    """The full-net of a config: the network given, or cut from it where it is a larger one."""
    name = list(config.depths)[-1]
    whole = _nested(config, given, {name: config.depths[name]}, family, full_name=f"{name}-whole")
    return given if whole.full_name == name else whole.alone(name).nets[name]


def _nested(
    config: Config,
    full_net: nn.Module,
    table: Mapping[str, tuple[int, ...]],
    family: Family | None,
    full_name: str = "full",
) -> DDNN:
    stages = config.network.stages if config.network else None
    if family is None and family_of(full_net) is None:
        stages = config.stages
    size = config.preprocessing.size if config.preprocessing else None
    example = None if size is None else _images(2, size)
    return nest(
        full_net, table, full_name=full_name, norm=config.norm, head=config.head, family=family, stages=stages,
        example=example,
    )  # fmt: skip


def side_of(net: nn.Module, preprocessing: Preprocessing | None) -> int:
    """Side in pixels of square images that the network takes: as it is said, else found out by trying."""
    try:
        return preprocessing.size if preprocessing else example_for(net).shape[-1]
    except NestingError:
        raise HubError(
            f"cannot tell what images {type(net).__name__} takes; say by preprocessing which it takes"
        ) from None


@torch.no_grad()
def _num_classes(net: nn.Module, size: int) -> int:
    try:
        return int(ghost(net).eval()(torch.empty(1, 3, size, size, device="meta")).shape[1])
    except Exception as error:  # whatever a forward may raise on images that are not of its size
        raise HubError(
            f"the network does not take images of 3 x {size} x {size} ({first_line(error)}); say by preprocessing "
            "which it takes"
        ) from None


@torch.no_grad()
def _check_name(net: DDNN, config: Config, size: int) -> None:
    """`HubError` unless the network that the config names computes what the full-net computes, bit by bit."""
    assert config.network is not None
    ours = copy.deepcopy(net.nets[net.full_name]).cpu().eval()
    try:
        named = _full_net(config, _named(config)).eval()
    except DDNNError as error:
        raise HubError(str(error)) from None
    if other := difference(ours, named, size):
        raise HubError(f"network={config.network.name!r} is not the full-net of this DDNN: {other}")


@torch.no_grad()
def difference(ours: nn.Module, theirs: nn.Module, size: int) -> str | None:
    """Why `theirs`, once it has the weights of `ours`, is another function of images of this size; None if it's not.

    Both are on the CPU and in eval mode; `theirs` gets the weights.
    """
    mine, other = ours.state_dict(), theirs.state_dict()
    for name in [*other, *mine]:
        if name not in mine or name not in other:
            return f"it {'lacks' if name in mine else 'has'} {name}"
        if mine[name].shape != other[name].shape:
            return f"its {name} is of shape {tuple(other[name].shape)} instead of {tuple(mine[name].shape)}"
    theirs.load_state_dict(mine)
    x = _images(1, size)
    return None if torch.equal(ours(x), theirs(x)) else "with the same weights it computes something else"


def _images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
