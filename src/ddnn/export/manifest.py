"""The manifest: what a device has to know of the graphs beside it (docs/bundle.md lists its fields)."""

import json
import math
import operator
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddnn.errors import ExportError
from ddnn.evaluate import macs, parameters
from ddnn.files import fingerprint
from ddnn.network import DDNN
from ddnn.runtime.manifest import MOST_PIXELS, NAME, VERSION, checksum, printable

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
    manifest["files"] = {path.name: fingerprint(path) for path in sorted(folder.iterdir())}
    manifest["sha256"] = checksum(manifest)
    lines = ",\n".join(f"{_json(key)}: {_block(value)}" for key, value in manifest.items())
    (folder / NAME).write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def check(net: DDNN, about: About, images: Tensor) -> About:
    """What is known of a net in plain texts and numbers; `ExportError` if this can't be exported as it is."""
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
    if images.shape[2] > MOST_PIXELS:
        raise ExportError(f"images of {images.shape[2]} pixels are larger than the {MOST_PIXELS} that bundles allow")
    with torch.no_grad():
        classes = net.nets[net.full_name](images[:1]).shape[1]
    return replace(
        about,
        classes=_classes(about.classes, classes),
        mean=_channels("mean", about.mean),
        std=_channels("std", about.std),
        resize=None if about.resize is None else _resize(about.resize, images.shape[2]),
        accuracy=_accuracy(about.accuracy, net),
        source=_source(about.source),
    )


def _classes(given: Any, count: int) -> tuple[str, ...]:
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ExportError(f"classes is a list of names, not {given!r}")
    names = tuple(given)
    for name in names:
        if not isinstance(name, str) or not printable(name):
            raise ExportError(f"class names are texts without control characters, not {name!r}")
    if len(names) != count:
        raise ExportError(f"{len(names)} class names are given for the {count} outputs of the network")
    if len(set(names)) != count:
        raise ExportError("two classes have the same name; names must tell them apart")
    return tuple(map(str, names))


def _channels(what: str, given: Any) -> tuple[float, ...]:
    """Mean or std, from a sequence, an array or a tensor."""
    try:
        numbers = tuple(float(each) for each in given)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (what == "std" and min(numbers) <= 0):
        raise ExportError(f"mean and std are numbers for 3 channels, std above 0, not {what}={given}")
    return numbers


def _resize(given: Any, size: int) -> int:
    try:
        resize = operator.index(given)
    except TypeError:
        raise ExportError(f"resize={given!r} is no whole number of pixels") from None
    if resize < size:
        raise ExportError(f"resize={resize} is less than the {size} pixels that are cut out afterwards")
    if resize > MOST_PIXELS:
        raise ExportError(f"resize={resize} is more than the {MOST_PIXELS} pixels that bundles allow")
    return resize


def _accuracy(given: Mapping[str, Mapping[str, Any]], net: DDNN) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, known in given.items():
        if name not in net.depths:
            raise ExportError(f"an accuracy is given of {name!r}, which is no net; there are {', '.join(net.depths)}")
        if not isinstance(known, Mapping):
            raise ExportError(f"the accuracy of {name} is top1, top5 and validation, not {known!r}")
        if strange := [key for key in known if key not in ("top1", "top5", "validation")]:
            raise ExportError(f"the accuracy of {name} is top1, top5 and validation, not {strange[0]!r}")
        found[name] = _shares(name, known)
        if not isinstance(known.get("validation", {}), Mapping):
            raise ExportError(f"the accuracy of {name} is top1, top5 and validation, not {known['validation']!r}")
        if "validation" in known:
            found[name]["validation"] = _shares(name, known["validation"])
    return found


def _shares(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("top1", "top5"):
        if known.get(key) is None:
            continue
        try:
            found[key] = float(known[key])
        except (TypeError, ValueError, OverflowError):
            found[key] = math.nan
        if not 0 <= found[key] <= 1:
            raise ExportError(f"the {key} of {name} is {known[key]!r}; it is a share from 0 to 1")
    return found


def _source(given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(given), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ExportError(f"source can't be written as JSON: {error}") from None


def _block(value: Any) -> str:
    """JSON, one line for every entry of a list or mapping of entries."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(map(_json, value)) + "\n]"
    if isinstance(value, dict) and value and isinstance(next(iter(value.values())), dict):
        return "{\n " + ",\n ".join(f"{_json(k)}: {_json(v)}" for k, v in value.items()) + "\n}"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
