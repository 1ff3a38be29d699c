"""The bundle: a folder with a graph per depth, one weights file for all, and a manifest (see docs/bundle.md)."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from ddnn.errors import ExportError
from ddnn.evaluate import call_macs, macs, parameters
from ddnn.export import weights as weights_file
from ddnn.export.folder import new_folder
from ddnn.export.graph import cut, trace
from ddnn.export.parity import Array, compare, eager_logits
from ddnn.export.parts import Part, Route, parts
from ddnn.network import DDNN

FORMAT = "ddnn-bundle"
VERSION = 1
PACKAGES = ("ddnn", "torch", "torchvision", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


def export_bundle(
    net: DDNN,
    out: Path,
    images: Tensor,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
    accuracy: Mapping[str, Mapping[str, float]] | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a bundle of all nets and return its manifest. `net` is on the CPU and in eval mode.

    `images`: real ones, normalised, float32 [N, 3, S, S]: every graph must agree with the network on them. `mean` and
    `std` say how they were normalised, `resize` to how many pixels their shorter side was resized before the centre
    crop (default: S). `accuracy`: what is known of every net, such as `{"resnet18": {"top1": 0.7, "top5": 0.9}}`, and
    `source`: where the net comes from; both go into the manifest as they are.

    Raises `ExportError` where `out` exists, a net was never calibrated, or a graph differs from the network; then
    nothing is written.
    """
    check_calibrated(net)
    with new_folder(out) as folder:
        entries = _write_graphs(net, folder, images)
        size = images.shape[-1]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "nets": [entry | dict((accuracy or {}).get(entry["name"], {})) for entry in entries],
            "input": {
                "size": size,
                "resize": size if resize is None else resize,
                "mean": list(mean),
                "std": list(std),
                "channels": 3,
                "interpolation": "bilinear",
            },
            "classes": list(classes),
            "files": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
            "norm": net.norm,
            "precision": "float32",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "source": dict(source or {}),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def check_calibrated(net: DDNN) -> None:
    """`ExportError` if the norm statistics of sub-nets were never computed."""
    if net.norm == "recalibrated" and not net.calibrated:
        raise ExportError(
            f"the norm statistics of {', '.join(list(net.depths)[:-1])} were never calibrated, so what they compute "
            "means nothing; call ddnn.recalibrate(net, batches) before the export"
        )


def _write_graphs(net: DDNN, folder: Path, images: Tensor) -> list[dict[str, Any]]:
    """Write weights and graphs, check them, and return the manifest's entries of all nets, shallow to deep."""
    pieces = parts(net)
    weights = weights_file.Weights()
    for part in reversed(pieces):  # the full-net first, so that shared tensors bear its names
        for name, graph in _graphs(net, part, images[:2]).items():
            weights.take(graph, part.name)
            ir.save(graph, folder / name)
    (folder / weights_file.NAME).write_bytes(weights.content)
    expected = eager_logits(net, images)
    features: dict[str, Array] = {}
    entries = []
    for part in pieces:
        entry = {
            "name": part.name,
            "depths": list(net.depths[part.name]),
            "graph": f"{part.name}.onnx",
            "macs": macs(net.nets[part.name], images.shape[-1]),
            "params": parameters(net.nets[part.name]),
            "cascade": _cascade(net, part, images.shape[-1]),
        }
        logits = run(folder / entry["graph"], {"images": images.numpy()})["logits"]
        entry["parity"] = compare(f"graph {entry['graph']}", expected[part.name], logits)
        step = entry["cascade"]
        made = run(
            folder / step["graph"],
            {tensor: images.numpy() if of == "images" else features[of] for tensor, of in step["inputs"].items()},
        )
        compare(f"graph {step['graph']}", expected[part.name], made["logits"])
        features |= {of: made[tensor] for tensor, of in step["outputs"].items()}
        entries.append(entry)
    return entries


def _graphs(net: DDNN, part: Part, image: Tensor) -> dict[str, ir.Model]:
    """The graph of a net from the images, and that of its part of the cascade, by file name."""
    marks = tuple(sorted({f.blocks for f in part.keeps} | ({part.start.blocks} if part.start else set())))
    model = trace(Route(net, part.name, marks), image, ["logits", *(f"at_{i}" for i in marks)])
    whole = cut(model, ["images"], ["logits"])
    start = "images" if part.start is None else f"at_{part.start.blocks}"
    rest = cut(model, [start], ["logits", *(f"at_{f.blocks}" for f in part.keeps)])
    if part.start is not None:
        rest.graph.inputs[0].name = f"from_{part.start.net}"
    return {f"{part.name}.onnx": whole, f"{part.name}.cascade.onnx": rest}


def _cascade(net: DDNN, part: Part, size: int) -> dict[str, Any]:
    """The manifest's entry of a net's part of the cascade."""
    inputs = {"images": "images"} if part.start is None else {f"from_{part.start.net}": str(part.start)}
    return {
        "graph": f"{part.name}.cascade.onnx",
        "inputs": inputs,
        "outputs": {f"at_{feature.blocks}": str(feature) for feature in part.keeps},
        "macs": part_macs(net, part, size),
    }


def part_macs(net: DDNN, part: Part, size: int) -> int:
    """Multiply-accumulates of what a part adds for one image of side `size`."""
    image = torch.zeros(1, 3, size, size)
    whole = call_macs(Route(net, part.name, ()), image)
    if part.start is None:
        return whole
    before = Route(net, part.name, (part.start.blocks,))
    with torch.no_grad():
        feature = before(image)[1]
    return call_macs(lambda: before.go_on(feature, part.start.blocks if part.start else 0))


def run(graph: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime makes of one batch."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _checksum(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
