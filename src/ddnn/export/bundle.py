"""The bundle: a folder with a graph per depth, one weights file for all, and a manifest (see docs/bundle.md)."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ddnn.evaluate import call_macs
from ddnn.export import manifest as manifests
from ddnn.export.graph import cut, trace
from ddnn.export.int8 import Sharing, quantise, start_of
from ddnn.export.manifest import About
from ddnn.export.parity import Array, Parity, compare, eager_logits, measure, run
from ddnn.export.parts import Part, Route, parts
from ddnn.export.trial import Int8, try_out
from ddnn.export.weights import Weights
from ddnn.files import new_folder
from ddnn.network import DDNN
from ddnn.runtime.manifest import FORMAT, read

Graphs = Mapping[str, ir.Model]
"""By name of the net, the full-net first: from `images` to `logits` and to every feature where paths part."""


def export_bundle(net: DDNN, out: Path, images: Tensor, about: About, int8: Int8 | None = None) -> dict[str, Any]:
    """Write a bundle of all nets and return its manifest. `net` is on the CPU and in eval mode.

    `images`: real ones, normalised, float32 [N, 3, S, S], at least two; every graph must agree with the network on
    them. With `int8` the bundle holds int8 graphs.

    Raises `ExportError` where `out` exists, the net was never calibrated, a graph differs from the network, or int8
    costs more accuracy than is allowed; then nothing is written.
    """
    about = manifests.check(net, about, images)
    pieces, size = parts(net), images.shape[-1]
    with new_folder(out) as folder:
        graphs = {part.name: _traced(net, part, images[:2]) for part in reversed(pieces)}
        if int8 is None:
            _write(pieces, graphs, folder)
            parity = _check(net, pieces, images, folder)
        else:
            _write(pieces, _quantised(graphs, int8), folder)
            parity = _check_int8(net, pieces, images, folder)
        entries = [
            manifests.entry(net, part.name, _whole(part), about, size)
            | {"parity": parity[part.name], "cascade": _cascade(net, part, size)}
            for part in pieces
        ]
        manifest = manifests.describe(FORMAT, net, entries, about, size)
        if int8 is not None:
            with tempfile.TemporaryDirectory(prefix="ddnn-float32-") as float32:
                _write(pieces, graphs, Path(float32))
                tried = try_out(net, {part.name: _whole(part) for part in pieces}, folder, Path(float32), int8)
            manifest |= {"precision": "int8", "int8": tried}
            for each in manifest["nets"]:
                each.pop("validation", None)  # what is known of float32 says nothing of int8
                each |= tried["nets"][each["name"]]["after"]
        manifests.write(folder, manifest)
        read(folder)  # as a device will
    return manifest


def _whole(part: Part) -> str:
    return f"{part.name}.onnx"


def _rest(part: Part) -> str:
    return f"{part.name}.cascade.onnx"


def _tensor(blocks: int) -> str:
    return f"at_{blocks}"


def _traced(net: DDNN, part: Part, image: Tensor) -> ir.Model:
    marks = sorted({feature.blocks for feature in (*part.keeps, part.start) if feature is not None})
    return trace(Route(net, part.name, tuple(marks)), image, ["logits", *map(_tensor, marks)])


def _quantised(graphs: Graphs, int8: Int8) -> Graphs:
    calibration = [batch.numpy() for batch in int8.calibration.split(Int8.BATCH)]
    sharing = Sharing()
    quantised = {}
    for name, graph in graphs.items():
        quantised[name], weights = quantise(graph, calibration)
        sharing.take(quantised[name], weights)
    return quantised


def _write(pieces: Sequence[Part], graphs: Graphs, folder: Path) -> None:
    """Write for every net the graph from the images and that of its part of the cascade, and the weights of all."""
    weights = Weights()
    by_name = {part.name: part for part in pieces}
    for name, graph in graphs.items():
        part = by_name[name]
        start = "images" if part.start is None else start_of(graph, _tensor(part.start.blocks))
        rest = cut(graph, [start], ["logits", *(_tensor(feature.blocks) for feature in part.keeps)])
        rest.graph.inputs[0].name = next(iter(_inputs(part)))
        for model, file in ((cut(graph, ["images"], ["logits"]), _whole(part)), (rest, _rest(part))):
            weights.take(model, name)
            ir.save(model, folder / file)
    weights.write(folder)


def _inputs(part: Part) -> dict[str, str]:
    """The input of a net's part of the cascade, and the feature it is."""
    return {"images": "images"} if part.start is None else {f"from_{part.start.net}": str(part.start)}


def _cascade(net: DDNN, part: Part, size: int) -> dict[str, Any]:
    return {
        "graph": _rest(part),
        "inputs": _inputs(part),
        "outputs": {_tensor(feature.blocks): str(feature) for feature in part.keeps},
        "macs": _macs(net, part, size),
    }


def _macs(net: DDNN, part: Part, size: int) -> int:
    """Multiply-accumulates of what a part adds for one image of side `size`."""
    image = torch.zeros(1, 3, size, size)
    if part.start is None:
        return call_macs(Route(net, part.name, ()), image)
    done = part.start.blocks
    before = Route(net, part.name, (done,))
    with torch.no_grad():
        _, feature = before(image)
    return call_macs(before.go_on, feature, done)


def _check(net: DDNN, pieces: Sequence[Part], images: Tensor, folder: Path) -> dict[str, Parity]:
    """Compare every graph, and the cascade graph after graph, with the network by name."""
    expected = eager_logits(net, images)
    for name, logits in _chain(pieces, images, folder).items():
        compare(f"the cascade up to {name}", expected[name], logits)
    return {
        part.name: compare(f"graph {_whole(part)}", expected[part.name], _logits(part, images, folder))
        for part in pieces
    }


def _check_int8(net: DDNN, pieces: Sequence[Part], images: Tensor, folder: Path) -> dict[str, Parity]:
    """Compare the cascade with the graphs, and measure how far these are from the network, which nothing bounds."""
    expected = eager_logits(net, images)
    whole = {part.name: _logits(part, images, folder) for part in pieces}
    for name, logits in _chain(pieces, images, folder).items():
        compare(f"the int8 cascade up to {name}", whole[name], logits)
    return {part.name: measure(expected[part.name], whole[part.name], None) for part in pieces}


def _logits(part: Part, images: Tensor, folder: Path) -> Array:
    return run(folder / _whole(part), {"images": images.numpy()})["logits"]


def _chain(pieces: Sequence[Part], images: Tensor, folder: Path) -> dict[str, Array]:
    """The logits of all nets, each computed from what those before it have left."""
    features: dict[str, Array] = {"images": images.numpy()}
    logits = {}
    for part in pieces:
        made = run(folder / _rest(part), {tensor: features[of] for tensor, of in _inputs(part).items()})
        logits[part.name] = made["logits"]
        features |= {str(feature): made[_tensor(feature.blocks)] for feature in part.keeps}
    return logits
