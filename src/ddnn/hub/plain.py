"""One sub-net as an ordinary network, in the form in which timm keeps networks on the hub and in folders."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddnn.errors import HubError
from ddnn.families.cifar_resnet import CifarResNet
from ddnn.files import write_atomic
from ddnn.hub.card import About, write_card
from ddnn.hub.config import Preprocessing
from ddnn.hub.evidence import Evidence
from ddnn.hub.folder import difference, side_of
from ddnn.network import DDNN

FILES = ("model.safetensors", "config.json")
NOT_OF_A_CHECKPOINT = (
    "architecture", "classifier", "crop_mode", "crop_pct", "first_conv", "fixed_input_size", "input_size",
    "interpolation", "mean", "min_input_size", "num_classes", "pool_size", "std",
)  # fmt: skip
"""What timm's configuration says of a network, not of the weights that timm has for it."""
DEPTHS_ARE_CALLED = ("layers", "depths")
"""By those networks of timm that take blocks per stage as an argument; others take `depth`."""


def save_for_timm(
    net: DDNN,
    name: str,
    folder: str | Path,
    *,
    architecture: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    evidence: Evidence | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> str:
    """Write one net so that `timm.create_model("local-dir:FOLDER", pretrained=True)` is it; timm's name for it.

    `architecture` is timm's name of a network of this kind, or several to try, by default the net's own name. The
    network's depths may be others than the name's; `options` say what else is, as to `timm.create_model`. What is
    written is tried out first: it loads strictly and gives bitwise the same logits. torchvision's ResNets are timm's
    too. The other arguments are those of `save_pretrained`.

    Raises `HubError` where timm has no such network, or is not installed.
    """
    try:
        from timm.models import save_for_hf
    except ImportError:
        raise HubError("timm is not installed; it comes with: pip install 'ddnn[timm]'") from None
    folder = Path(folder)
    subnet = net.subnet(name).cpu().eval()
    tried = [architecture] if isinstance(architecture, str) else list(architecture or [name])
    size = side_of(subnet, preprocessing)
    found, theirs = _in_timm(subnet, net.depths[name], tried, dict(options or {}), size)
    settings: dict[str, Any] = {}
    if classes is not None:
        settings["label_names"] = list(classes)
    if preprocessing is not None:
        settings["pretrained_cfg"] = {
            "input_size": (3, size, size),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "crop_pct": size / preprocessing.resize,
            "interpolation": "bilinear",
        }
    if evidence is not None:
        evidence.check(net)
    theirs.pretrained_cfg = {key: value for key, value in theirs.pretrained_cfg.items() if key in NOT_OF_A_CHECKPOINT}
    with tempfile.TemporaryDirectory() as beside:
        save_for_hf(theirs, beside, model_config=settings, safe_serialization=True)
        for file in FILES:
            write_atomic(folder / file, (Path(beside) / file).read_bytes())
    write_card(
        folder, net, About(repo_id or folder.resolve().name, classes, preprocessing, evidence, license, alone=name)
    )
    return found


def _in_timm(
    subnet: nn.Module, depths: tuple[int, ...], architectures: Sequence[str], options: dict[str, Any], size: int
) -> tuple[str, Any]:
    """timm's name of the sub-net, and timm's network of that name with its weights."""
    import timm

    with torch.no_grad():
        num_classes = subnet(torch.zeros(1, 3, size, size)).shape[1]
    why = ""
    for architecture in architectures:
        if not timm.is_model(architecture):
            why = why or f"timm has no network {architecture!r}"
            continue
        deep: list[dict[str, Any]] = [{}, *({key: list(depths)} for key in DEPTHS_ARE_CALLED)]
        deep += [{"depth": depths[0]}] if len(depths) == 1 else []
        choices = [{**options, **sized, **both} for sized in ({}, {"img_size": size}) for both in deep]
        for arguments in choices:
            try:
                theirs = timm.create_model(architecture, num_classes=num_classes, **arguments).eval()
            except (TypeError, ValueError, AssertionError):  # it has no such argument, or not for these depths
                continue
            if (other := difference(subnet, theirs, size)) is None:
                return architecture, theirs
            if arguments == options:
                why = f"timm's {architecture} is another network: {other}"
    if isinstance(subnet, CifarResNet):
        raise HubError(f"{why}; timm has no ResNets for CIFAR, so this one goes out by ddnn extract only")
    raise HubError(f"{why}; give the name of one that is the same at these depths, as architecture")
