"""The manifest: what a device has to know of the graphs beside it (docs/bundle.md lists its fields)."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddnn.errors import ExportError
from ddnn.evaluate import macs, parameters
from ddnn.network import DDNN
from ddnn.runtime.manifest import NAME, VERSION, checksum

PACKAGES = ("ddnn", "torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "executorch")


@dataclass(frozen=True)
class About:
    """What is known of a DDNN beside its weights."""

    classes: Sequence[str]
    """Names, in the order of the logits."""
    mean: Sequence[float]
    """Per channel, of pixels in [0, 1]: what images are normalised by."""
    std: Sequence[float]
    """As `mean`."""
    resize: int | None = None
    """Pixels that an image's shorter side is resized to before the centre crop; None is the size of the crop."""
    accuracy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of every net by name, as far as it is known: `top1` and `top5` on the test set, shares in [0, 1]; and the same
    two under `validation`."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from; taken over as it is."""


def describe(kind: str, net: DDNN, nets: Sequence[Mapping[str, Any]], about: About, size: int) -> dict[str, Any]:
    """A manifest but for `files`; `nets` are the entries of the nets and `size` the side S of their images."""
    return {
        "format": kind,
        "version": VERSION,
        "nets": list(nets),
        "input": {
            "size": size,
            "resize": about.resize or size,
            "mean": list(about.mean),
            "std": list(about.std),
            "channels": 3,
            "interpolation": "bilinear",
        },
        "classes": list(about.classes),
        "norm": net.norm,
        "precision": "float32",
        "versions": {"python": platform.python_version(), **_versions()},
        "source": dict(about.source),
    }


def entry(net: DDNN, name: str, graph: str, about: About, size: int) -> dict[str, Any]:
    """What a manifest says of one net: its size and what is known of its accuracy."""
    return {
        "name": name,
        "depths": list(net.depths[name]),
        "graph": graph,
        "macs": macs(net.nets[name], size),
        "params": parameters(net.nets[name]),
        **about.accuracy.get(name, {}),
    }


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Add sizes and checksums of all files in the folder to the manifest, and put it beside them."""
    manifest["files"] = {path.name: _file(path) for path in sorted(folder.iterdir())}
    manifest["sha256"] = checksum(manifest)
    lines = ",\n".join(f"{json.dumps(key)}: {_block(value)}" for key, value in manifest.items())
    (folder / NAME).write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def check(net: DDNN, about: About, images: Tensor) -> None:
    """`ExportError` if this can't be exported as it is."""
    if net.norm == "recalibrated" and not net.calibrated:
        raise ExportError(
            f"the norm statistics of {', '.join(list(net.depths)[:-1])} were never calibrated, so what they compute "
            "means nothing; call ddnn.recalibrate(net, batches) before the export"
        )
    if net.training or next(net.parameters()).device.type != "cpu":
        raise ExportError("export takes a network on the CPU and in eval mode; call net.cpu().eval() before")
    if images.ndim != 4 or len(images) < 2 or images.dtype != torch.float32 or images.shape[2] != images.shape[3]:
        raise ExportError(
            f"export takes normalised images to check on, float32 [N, 3, S, S] with N of at least 2, not "
            f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        )
    with torch.no_grad():
        classes = net.nets[net.full_name](images[:1]).shape[1]
    if len(about.classes) != classes:
        raise ExportError(f"{len(about.classes)} class names are given for the {classes} outputs of the network")
    if len(set(about.classes)) != classes:
        raise ExportError("two classes have the same name; names must tell them apart")
    if len(about.mean) != 3 or len(about.std) != 3 or min(about.std) <= 0:
        raise ExportError(f"mean and std are numbers for 3 channels, std above 0, not {about.mean} and {about.std}")
    if about.resize is not None and about.resize < images.shape[2]:
        raise ExportError(
            f"resize={about.resize} is less than the {images.shape[2]} pixels that are cut out afterwards"
        )


def _block(value: Any) -> str:
    """JSON, one line for every entry of a list or mapping of entries."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"
    if isinstance(value, dict) and value and isinstance(next(iter(value.values())), dict):
        return "{\n " + ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
    return json.dumps(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
