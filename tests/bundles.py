"""A small bundle, made with onnx alone, and what its nets compute, written out with torch.

    small:            stem - block 1 (own norm) - head
    middle:           stem - block 1 - block 2 - head
    large:  what middle has after block 1 - block 2 (own norm) - block 3 - head

Convolutions and the head are shared, norms are not, but that of block 1 between middle and large.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

SIZE = 8
CLASSES = ("ant", "bee", "cat", "dog")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
WIDTH = 16
FEATURES = WIDTH * (SIZE // 2) ** 2

PATHS = {
    "small": [("w1", "small1")],
    "middle": [("w1", "middle1"), ("w2", "middle2")],
    "large": [("w1", "middle1"), ("w2", "large2"), ("w3", "large3")],
}
"""Of each net the blocks: convolution and norm."""
STARTS: dict[str, tuple[str, int] | None] = {"small": None, "middle": ("small.0", 0), "large": ("middle.1", 1)}
"""Where each part of the cascade starts: feature, and number of blocks before it."""
KEEPS = {"small": {"small.0": 0}, "middle": {"middle.1": 1}, "large": {}}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> np.ndarray:
        return (around + scale * random.standard_normal(shape)).astype(np.float32)

    tensors = {"stem": normal(WIDTH, 3, 3, 3, scale=0.3), "head.weight": normal(len(CLASSES), FEATURES, scale=0.15)}
    tensors["head.bias"] = normal(len(CLASSES))
    for name in ("w1", "w2", "w3"):
        tensors[name] = normal(WIDTH, WIDTH, 3, 3, scale=0.12)
    for norm in ("small1", "middle1", "middle2", "large2", "large3"):
        tensors[f"{norm}.scale"] = normal(WIDTH, scale=0.2, around=1)
        tensors[f"{norm}.bias"] = normal(WIDTH, scale=0.2)
        tensors[f"{norm}.mean"] = normal(WIDTH, scale=0.2)
        tensors[f"{norm}.var"] = np.abs(normal(WIDTH, scale=0.2, around=1))
    return tensors


def reference(name: str, images: np.ndarray, tensors: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Logits of a net, in float64."""
    t = {key: torch.from_numpy(value).double() for key, value in (tensors or weights()).items()}
    x = F.conv2d(torch.from_numpy(images).double(), t["stem"], stride=2, padding=1).relu()
    for conv, norm in PATHS[name]:
        y = F.conv2d(x, t[conv], padding=1)
        parts = (t[f"{norm}.{each}"] for each in ("mean", "var", "scale", "bias"))
        x = (x + F.batch_norm(y, *parts)).relu()
    return (x.flatten(1) @ t["head.weight"].T + t["head.bias"]).numpy()


def _nodes(name: str, start: int) -> list[onnx.NodeProto]:
    """Of a net from the feature after `start` blocks on, which is called f<start>; -1 is from the images."""
    nodes = []
    if start < 0:
        nodes = [
            helper.make_node("Conv", ["images", "stem"], ["s"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["s"], ["f0"]),
        ]
    for i, (conv, norm) in enumerate(PATHS[name]):
        if i < start:
            continue
        norms = [f"{norm}.{each}" for each in ("scale", "bias", "mean", "var")]
        nodes += [
            helper.make_node("Conv", [f"f{i}", conv], [f"c{i}"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", [f"c{i}", *norms], [f"n{i}"], epsilon=1e-5),
            helper.make_node("Add", [f"f{i}", f"n{i}"], [f"a{i}"]),
            helper.make_node("Relu", [f"a{i}"], [f"f{i + 1}"]),
        ]
    last = f"f{len(PATHS[name])}"
    return [
        *nodes,
        helper.make_node("Flatten", [last], ["v"]),
        helper.make_node("Gemm", ["v", "head.weight", "head.bias"], ["logits"], transB=1),
    ]


def _graph(name: str, start: int, keeps: list[int], places: Mapping[str, tuple[int, np.ndarray]]) -> bytes:
    nodes = _nodes(name, start)
    used = dict.fromkeys(each for node in nodes for each in node.input if each in places)
    tensors = []
    for key in used:
        offset, value = places[key]
        tensor = TensorProto(name=key, data_type=TensorProto.FLOAT, dims=value.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for field, text in (("location", "weights.bin"), ("offset", str(offset)), ("length", str(value.nbytes))):
            tensor.external_data.add(key=field, value=text)
        tensors.append(tensor)
    half = SIZE // 2
    given = ("images", 3, SIZE) if start < 0 else (f"f{start}", WIDTH, half)
    feature = lambda key, c, s: helper.make_tensor_value_info(key, TensorProto.FLOAT, ["N", c, s, s])  # noqa: E731
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASSES)])]
    outputs += [feature(f"f{i}", WIDTH, half) for i in keeps]
    graph = helper.make_graph(nodes, name, [feature(*given)], outputs, initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def checksum(path: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


def seal(folder: Path, **changes: Any) -> None:
    """Write anew the checksums of the manifest, and whatever else is to change in it."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    if "files" not in changes:
        manifest["files"] = {f.name: checksum(f) for f in sorted(folder.iterdir()) if f.suffix in (".onnx", ".bin")}
    path.write_text(json.dumps(manifest))


def make(folder: Path, *, resize: int = SIZE, seed: int = 0) -> Path:
    """Write the bundle."""
    folder.mkdir(parents=True)
    places: dict[str, tuple[int, np.ndarray]] = {}
    content = bytearray()
    for key, value in weights(seed).items():
        content += bytes(-len(content) % 64)
        places[key] = (len(content), value)
        content += value.tobytes()
    (folder / "weights.bin").write_bytes(content)
    nets = []
    for k, name in enumerate(PATHS):
        start, keeps = STARTS[name], KEEPS[name]
        begin = -1 if start is None else start[1]
        (folder / f"{name}.onnx").write_bytes(_graph(name, -1, [], places))
        (folder / f"{name}.cascade.onnx").write_bytes(_graph(name, begin, list(keeps.values()), places))
        block = WIDTH * WIDTH * 9 * (SIZE // 2) ** 2
        macs = WIDTH * 27 * (SIZE // 2) ** 2 + block * len(PATHS[name]) + FEATURES * len(CLASSES)
        nets.append(
            {
                "name": name,
                "depths": [len(PATHS[name])],
                "graph": f"{name}.onnx",
                "macs": macs,
                "params": 1000 * (k + 1),
                "top1": 0.6 + 0.1 * k,
                "top5": 0.8 + 0.05 * k,
                "parity": {"max_abs": 0.0},
                "cascade": {
                    "graph": f"{name}.cascade.onnx",
                    "inputs": {"images": "images"} if start is None else {f"f{start[1]}": start[0]},
                    "outputs": {f"f{i}": feature for feature, i in keeps.items()},
                    "macs": macs if start is None else macs - WIDTH * 27 * (SIZE // 2) ** 2 - block * begin,
                },
            }
        )
    manifest = {
        "format": "ddnn-bundle",
        "version": 1,
        "nets": nets,
        "input": {
            "size": SIZE,
            "resize": resize,
            "mean": list(MEAN),
            "std": list(STD),
            "channels": 3,
            "interpolation": "bilinear",
        },
        "classes": list(CLASSES),
        "norm": "private",
        "precision": "float32",
        "versions": {},
        "source": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)
    return folder


def normalised(count: int, seed: int = 1) -> np.ndarray:
    """Images as the nets take them."""
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
