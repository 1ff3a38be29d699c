"""Damaged, foreign and malicious bundles: one clear sentence each, never a wrong answer."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import bundles
import ddnn
from ddnn.errors import BundleError, RequestError
from ddnn.runtime.manifest import checksum


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles.make(tmp_path / "bundle")


def manifest(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return content


def truncated(bundle: Path) -> None:
    path = bundle / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])


def flipped(bundle: Path) -> None:
    path = bundle / "weights.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def changed_graph(bundle: Path) -> None:
    path = bundle / "middle.onnx"
    path.write_bytes(path.read_bytes().replace(b"middle2.bias", b"middle2.mean"))


def linked(bundle: Path) -> None:
    (bundle / "weights.bin").rename(bundle.parent / "elsewhere")
    (bundle / "weights.bin").symlink_to(bundle.parent / "elsewhere")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (truncated, r"weights.bin is truncated: \d+ bytes instead of \d+"),
    "longer weights": (
        lambda b: os.truncate(b / "weights.bin", (b / "weights.bin").stat().st_size + 1),
        r"weights.bin is too long: \d+ bytes instead of",
    ),
    "one bit": (flipped, "weights.bin is damaged or was replaced: its checksum differs"),
    "another graph": (changed_graph, "middle.onnx is damaged or was replaced"),
    "no weights": (lambda b: (b / "weights.bin").unlink(), "weights.bin is missing; copy the whole bundle"),
    "no graph": (lambda b: (b / "large.onnx").unlink(), "large.onnx is missing"),
    "no cascade graph": (lambda b: (b / "large.cascade.onnx").unlink(), "large.cascade.onnx is missing"),
    "a link": (linked, "weights.bin is a link"),
    "a folder": (
        lambda b: ((b / "large.onnx").unlink(), (b / "large.onnx").mkdir()),
        "large.onnx is no file; copy the bundle again",
    ),
    "a pipe": (lambda b: ((b / "large.onnx").unlink(), os.mkfifo(b / "large.onnx")), "large.onnx is no file"),
    "a pipe for a manifest": (
        lambda b: ((b / "manifest.json").unlink(), os.mkfifo(b / "manifest.json")),
        "manifest.json is no file",
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is no bundle: it has no manifest.json; make one with"),
    "half a manifest": (
        lambda b: os.truncate(b / "manifest.json", 300),
        "manifest.json is damaged: .*; export the bundle again",
    ),
    "no text": (lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    "a deep manifest": (lambda b: (b / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    "a large manifest": (lambda b: os.truncate(b / "manifest.json", 2**27), "too large for a manifest"),
    "a list": (lambda b: (b / "manifest.json").write_text("[]"), "cannot be used: it must be an object"),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_named(bundle: Path, damage: str, shared: bool) -> None:
    change, sentence = FILES[damage]
    change(bundle)
    with pytest.raises(BundleError, match=sentence):
        ddnn.load(bundle, shared=shared)


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere is no bundle: it has no manifest.json"):
        ddnn.load(tmp_path / "nowhere")


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a value in a manifest at a dotted place; `...` removes it."""

    def change(content: Any) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in place.split("/")]
        for part in way:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (put("version", 2), "is of format 2, made by a newer ddnn; this one, .*, reads up to 1: update ddnn"),
    "newer, with new keys": (
        lambda m: m.update(version=3, layers=[]),
        "is of format 3, made by a newer ddnn",
    ),
    "not a version": (put("version", "1"), "version must be a whole number of at least 1"),
    "another format": (put("format", "other"), "format is 'other', not 'ddnn-bundle'"),
    "unknown key": (put("quantum", 1), "quantum is unknown in format 1; known are format, version"),
    "another precision": (put("precision", "x"), "precision is 'x'; allowed are float32 and int8"),
    "no cascade": (put("nets/1/cascade", 0), r"nets\[1\].cascade must be an object"),
    "a key that a terminal would obey": (put("\033[2J\n", 1), r"'\\x1b\[2J\\n' is unknown in format 1"),
    "unknown key of a net": (put("nets/1/scale", 1), r"nets\[1\].scale is unknown in format 1"),
    "unknown key of the input": (put("input/rotate", 1), "input.rotate is unknown in format 1"),
    "no nets": (put("nets", []), "nets must be a list with at least one entry"),
    "missing": (put("classes", ...), "classes is missing"),
    "two of a name": (put("nets/1/name", "small"), r"nets\[1\].name 'small' is that of another net too"),
    "two of a class": (put("classes/1", "ant"), "classes names a class twice"),
    "path out": (put("nets/0/graph", "../small.onnx"), r"nets\[0\].graph is '../small.onnx', which is no graph"),
    "path out among the files": (
        lambda m: m["files"].update({"../../etc/passwd": m["files"]["weights.bin"]}),
        "files.../../etc/passwd is no plain file name; a bundle's files lie in its own folder",
    ),
    "absolute path": (
        lambda m: m["files"].update({"/etc/passwd": m["files"]["weights.bin"]}),
        "files./etc/passwd is no plain file name",
    ),
    "hidden file": (lambda m: m["files"].update({".x": m["files"]["weights.bin"]}), "files..x is no plain file name"),
    "weights as a graph": (put("nets/0/graph", "weights.bin"), "which is no graph"),
    "no checksum": (put("files/weights.bin/sha256", "12"), "files.weights.bin.sha256 must be 64 hexadecimal digits"),
    "feature from nowhere": (
        put("nets/2/cascade/inputs", {"f1": "huge.1"}),
        r"nets\[2\].cascade.inputs.f1 is the feature 'huge.1', which no shallower net makes",
    ),
    "feature made twice": (
        put("nets/2/cascade/outputs", {"f1": "small.0"}),
        "is the feature 'small.0', which a shallower net makes already",
    ),
    "no cascade inputs": (put("nets/2/cascade/inputs", {}), "inputs must name at least one tensor"),
    "accuracy": (put("nets/0/top1", 63.0), r"nets\[0\].top1 must be a number from 0 to 1"),
    "NaN": (put("nets/0/top1", float("nan")), r"nets\[0\].top1 must be a number from 0 to 1"),
    "grey images": (put("input/channels", 1), "input.channels is 1; this ddnn reads bundles for RGB images"),
    "interpolation": (put("input/interpolation", "bicubic"), "input.interpolation is 'bicubic'"),
    "size": (put("input/size", 0), "input.size must be a whole number of at least 1"),
    "resize below size": (put("input/resize", 7), "input.resize must be a whole number of at least 8"),
    "std": (put("input/std", [0.2, 0, 0.2]), "input.std must be above 0"),
    "mean": (put("input/mean", [0.5, 0.5]), "input.mean must be a list of 3 numbers"),
    "boolean": (put("input/size", True), "input.size must be a whole number"),
    "a huge image": (put("input/size", 1_000_000), "input.size must be a whole number of at most 8192"),
    "a huge resize": (put("input/resize", 1_000_000), "input.resize must be a whole number of at most 8192"),
    "a huge number": (put("nets/0/macs", 10**400), r"nets\[0\].macs must be a whole number of at most"),
    "huge blocks": (put("nets/0/depths/0", 10**400), r"nets\[0\].depths must be a list of whole numbers"),
    "a huge mean": (put("input/mean", [10**400, 0, 0]), "input.mean must be a list of 3 numbers"),
    "a huge accuracy": (put("nets/0/top1", 10**400), r"nets\[0\].top1 must be a number from 0 to 1"),
    "control characters": (put("nets/0/name", "a\x1b[2J"), r"nets\[0\].name is 'a\\x1b\[2J'; a name has no control"),
    "a class of two lines": (put("classes/0", "ant\nbee"), "classes has 'ant.nbee'; a name has no control characters"),
    "half a character": (put("classes/0", "\ud800"), "classes has .*; a name has no control characters"),
}


@pytest.mark.parametrize("mistake", CONTENTS)
def test_manifests_that_cannot_be_are_refused(bundle: Path, mistake: str) -> None:
    change, sentence = CONTENTS[mistake]
    content = manifest(bundle)
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=sentence):
        ddnn.load(bundle)


def test_a_manifest_that_was_changed_is_refused(bundle: Path) -> None:
    """Wherever a digit or a letter is another one, with the checksum that export writes."""
    content = manifest(bundle)
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**content, "sha256": checksum(content)}, indent=3))
    ddnn.load(bundle)
    text = path.read_text()
    for before, after in (("0.25", "0.26"), ('"bee"', '"gee"'), ('"top1": 0.6', '"top1": 0.9')):
        assert before in text
        path.write_text(text.replace(before, after, 1))
        with pytest.raises(BundleError, match="is damaged or was changed: its checksum of itself differs"):
            ddnn.load(bundle)


def test_a_depth_that_is_not_there_is_named(bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"no depth 'huge' in the bundle .*; it has small, middle, large"):
        ddnn.load(bundle, only=["huge"])
    with pytest.raises(RequestError, match="no depth 'huge' in this bundle; it has small, middle, large"):
        ddnn.load(bundle)(bundles.normalised(1), depth="huge")
    with pytest.raises(RequestError, match="only names no depth"):
        ddnn.load(bundle, only=[])
    with pytest.raises(RequestError, match="threads=0 must be a whole number from 1"):
        ddnn.load(bundle, threads=0)
    for threads in (2.5, True, "2"):
        with pytest.raises(RequestError, match=f"threads={threads!r} must be a whole number from 1"):
            ddnn.load(bundle, threads=threads)


def test_weights_outside_of_the_folder_are_not_read(bundle: Path) -> None:
    """A graph that names a file elsewhere, in a bundle whose checksums are all right."""
    (bundle.parent / "weights.bin").write_bytes((bundle / "weights.bin").read_bytes())
    model = onnx.load(bundle / "small.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../weights.bin"
    (bundle / "small.onnx").write_bytes(model.SerializeToString())
    bundles.seal(bundle)
    with pytest.raises(
        BundleError, match=r"small.onnx takes weights from '../weights.bin', which is none of the bundle"
    ):
        ddnn.load(bundle)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", ["initializer", "attribute", "nested"])
def test_weights_that_are_not_checked_are_not_read(bundle: Path, where: str, shared: bool) -> None:
    """A file in the folder that the manifest does not list, wherever a graph may have a tensor."""
    (bundle / "extra").write_bytes((bundle / "weights.bin").read_bytes())
    model = onnx.load(bundle / "small.onnx", load_external_data=False)
    tensor = onnx.TensorProto()
    tensor.CopyFrom(model.graph.initializer[0])
    if where == "initializer":
        tensor = model.graph.initializer[0]
    next(entry for entry in tensor.external_data if entry.key == "location").value = "extra"
    if where == "attribute":
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["more"], value=tensor))
    elif where == "nested":
        branch = onnx.helper.make_graph([], "branch", [], [], initializer=[tensor])
        model.graph.node.append(
            onnx.helper.make_node("If", ["images"], ["more"], then_branch=branch, else_branch=branch)
        )
    (bundle / "small.onnx").write_bytes(model.SerializeToString())
    bundles.seal(bundle)
    with pytest.raises(
        BundleError, match=r"small.onnx takes weights from 'extra', which is none of the bundle's files"
    ):
        ddnn.load(bundle, shared=shared)


def test_a_graph_that_is_none_is_named(bundle: Path) -> None:
    (bundle / "small.onnx").write_bytes(b"no graph")
    bundles.seal(bundle)
    with pytest.raises(BundleError, match=r"small.onnx is no ONNX graph; export the bundle again"):
        ddnn.load(bundle)


def test_a_graph_of_another_size_is_named(bundle: Path) -> None:
    content = manifest(bundle)
    content["input"]["size"] = content["input"]["resize"] = 16
    (bundle / "manifest.json").write_text(json.dumps(content))
    import numpy as np

    with pytest.raises(BundleError, match=r"onnxruntime .* cannot run small.onnx"):
        ddnn.load(bundle)(np.zeros((1, 3, 16, 16), np.float32), "small")


def test_more_classes_than_logits_are_named(bundle: Path) -> None:
    bundles.seal(bundle, classes=[*bundles.CLASSES, "elk"])
    with pytest.raises(BundleError, match=r"small gives \[1, 4\] logits for 1 images of 5 classes"):
        ddnn.load(bundle)(bundles.normalised(1), "small")


def test_a_bundle_without_a_cascade_runs_its_depths(bundle: Path) -> None:
    content = manifest(bundle)
    for net in content["nets"]:
        del net["cascade"]
        del net["top1"]
    (bundle / "manifest.json").write_text(json.dumps(content))
    model = ddnn.load(bundle)
    assert model(bundles.normalised(1), "small").shape == (1, 4)
    with pytest.raises(BundleError, match="the bundle has no cascade"):
        model.cascade(bundles.normalised(1), 0.5)
