"""Int8: what the manifest says is so, integers are shared, and too great a loss is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import ddnn
from ddnn.errors import ExportError
from ddnn.evaluate import accuracy
from ddnn.export import About, Int8, bundle, export_bundle
from ddnn.export.int8 import Sharing
from ddnn.export.parts import Part
from ddnn.families import build
from ddnn.network import DDNN
from nets import cascade, coloured, run, shaken

ABOUT = About(classes=("v", "w", "x", "y", "z"), mean=(0.5,) * 3, std=(0.2,) * 3)


trace = bundle._traced
graphs: dict[str, Any] = {}


def cached(net: DDNN, part: Part, image: torch.Tensor) -> Any:
    """Tracing takes seconds, and the network is one."""
    if part.name not in graphs:
        graphs[part.name] = trace(net, part, image)
    return graphs[part.name]


@pytest.fixture(scope="module")
def net() -> DDNN:
    """Some scales of the shallower net's norms are negative, where the full-net's are not."""
    torch.manual_seed(0)
    net = shaken(ddnn.nest(build("cifar/resnet14", 5, 8)[0], {"a": (1, 1, 1)}, full_name="b"))
    with torch.no_grad():
        for block in ("layer2.0.bn1", "layer3.0.bn2"):
            net.nets["a"].get_submodule(block).weight[::3] *= -1
        logits = net.nets["b"](coloured(200))  # which see one class everywhere, before this:
        head = net.nets["b"].get_submodule("fc")
        head.weight *= 1 / logits.std(0)[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))
    return net


@pytest.fixture(scope="module")
def labelled(net: DDNN) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images with the class that the full-net sees in them, but for every tenth."""
    x = coloured(200, seed=2)
    with torch.no_grad():
        target = net.nets["b"](x).argmax(1)
    target[::10] = (target[::10] + 1) % 5
    return list(zip(x.split(64), target.split(64), strict=True))


@pytest.fixture(scope="module")
def exported(
    net: DDNN, labelled: list[tuple[torch.Tensor, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bundles") / "int8"
    about = About(**{**vars(ABOUT), "accuracy": {"a": {"top1": 0.1, "validation": {"top1": 0.1, "top5": 0.2}}}})
    int8 = Int8(coloured(128), lambda: labelled, allowed_loss=20.0, split="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "_traced", cached)
        return folder, export_bundle(net, folder, coloured(16), about, int8)


def test_the_manifest_tells_the_truth(
    net: DDNN, labelled: list[tuple[torch.Tensor, torch.Tensor]], exported: tuple[Path, dict[str, Any]]
) -> None:
    folder, manifest = exported
    assert manifest["precision"] == "int8"
    section = manifest["int8"]
    told = {key: section[key] for key in ("calibration_images", "accuracy_images", "split", "allowed_loss")}
    assert told == {"calibration_images": 128, "accuracy_images": 200, "split": "test", "allowed_loss": 20.0}
    before = accuracy(net, labelled)
    for entry in manifest["nets"]:
        tried = section["nets"][entry["name"]]
        assert tried["before"] == before[entry["name"]]
        logits = [run(folder / entry["graph"], images=x.numpy())["logits"] for x, _ in labelled]
        target = np.concatenate([t.numpy() for _, t in labelled])
        right = np.concatenate(logits).argmax(1) == target
        assert tried["after"]["top1"] == right.mean() == entry["top1"]
        assert entry["top5"] == 1
        assert tried["speedup"] > 0
        assert "validation" not in entry  # float32's
    assert before["b"]["top1"] == 0.9
    assert len(np.unique(np.concatenate(logits).argmax(1))) == 5


def test_int8_is_near_the_network(net: DDNN, exported: tuple[Path, dict[str, Any]]) -> None:
    """A wrong sign or scale anywhere makes a difference about as large as the spread of a class's logits."""
    folder, manifest = exported
    x = coloured(64)
    for entry in manifest["nets"]:
        with torch.no_grad():
            expected = net.nets[entry["name"]](x).numpy()
        got = run(folder / entry["graph"], images=x.numpy())["logits"]
        difference = np.sqrt(((got - expected) ** 2).mean(axis=0)) / expected.std(axis=0)
        assert difference.max() < 0.45
        assert entry["parity"]["max_abs"] > 0
        assert entry["parity"]["tolerance"] is None


def test_graphs_compute_in_int8(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = exported
    for name in ("a.onnx", "b.onnx", "a.cascade.onnx", "b.cascade.onnx"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it advises against keeping what it lays out for this machine
        options.optimized_model_filepath = str(tmp_path / name)
        onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in onnx.load(tmp_path / name, load_external_data=False).graph.node]
        assert "QLinearConv" in operators
        assert not {"Conv", "FusedConv", "Add", "Relu"} & set(operators)


def test_two_products_fit_into_16_bits(exported: tuple[Path, dict[str, Any]]) -> None:
    """Which processors without VNNI add them in (VPMADDUBSW); what doesn't fit is cut off, in silence."""
    folder, _ = exported
    greatest = 0
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path).graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
                greatest = max(greatest, int(np.abs(numpy_helper.to_array(tensor).astype(int)).max()))
    assert 2 * 255 * greatest < 2**15
    assert greatest >= 63  # and no bit is wasted


def test_the_cascade_is_the_same_in_int8(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = exported
    x = coloured(8).numpy()
    for name, logits in cascade(folder, manifest, x).items():
        np.testing.assert_allclose(logits, run(folder / f"{name}.onnx", images=x)["logits"], rtol=0, atol=1e-5)


def test_all_depths_share_one_set_of_integers(net: DDNN, exported: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = exported
    places: dict[str, int] = {}
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
                about = {entry.key: entry.value for entry in tensor.external_data}
                places[about["offset"]] = int(about["length"])
    full = [p for p in net.nets["b"].parameters() if p.ndim > 1]
    filled = 8 * 9  # the fourth input channel of the first convolution
    assert len(places) == len(full)
    assert sum(places.values()) == sum(p.numel() for p in full) + filled


def test_too_great_a_loss_is_refused(
    net: DDNN, labelled: list[tuple[torch.Tensor, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges calibrated on images a hundred times too dark cut nearly everything off."""
    monkeypatch.setattr(bundle, "_traced", cached)
    int8 = Int8(coloured(16) / 100, lambda: labelled, split="test")
    sentence = r"more than the 0.5 points of top-1 allowed, on 200 test images: .*b [0-9.]+ \(90.00 to [0-9.]+ %\)"
    with pytest.raises(ExportError, match=sentence):
        export_bundle(net, tmp_path / "bundle", coloured(4), ABOUT, int8)
    assert list(tmp_path.iterdir()) == []


def quantised(weight: np.ndarray) -> Any:
    """A graph with one convolution by this weight, quantised by channel as the quantiser does it."""
    import onnx_ir as ir

    scale = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    values = {
        "w_quantized": np.round(weight / scale[:, None, None, None]).astype(np.int8),
        "w_scale": scale,
        "b_quantized": np.arange(1, 5, dtype=np.int32),
        "b_scale": scale * np.float32(0.5),
    }
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w_quantized", "w_scale"], ["w"], axis=0),
            helper.make_node("DequantizeLinear", ["b_quantized", "b_scale"], ["b"], axis=0),
            helper.make_node("Conv", ["x", "w", "b"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(model)


def values(model: Any) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def test_weights_that_differ_by_a_factor_per_channel_share_their_integers() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    factors = np.array([0.7, -1.3, 2.1, -0.2], dtype=np.float32)
    other = weight * factors[:, None, None, None]
    sharing, first, second = Sharing(), quantised(weight), quantised(other)
    was = values(second)
    sharing.take(first, {"w": weight})
    sharing.take(second, {"w": other})
    one, two = values(first), values(second)
    assert np.array_equal(one["w_quantized"], two["w_quantized"])
    assert np.array_equal(two["w_scale"], was["w_scale"] * np.sign(factors))
    for name in ("w", "b"):  # and stand for what they stood for
        scale = two[f"{name}_scale"].reshape([-1] + [1] * (two[f"{name}_quantized"].ndim - 1))
        before = was[f"{name}_scale"].reshape(scale.shape) * was[f"{name}_quantized"]
        step = np.abs(scale)
        assert (np.abs(scale * two[f"{name}_quantized"] - before) <= 1.001 * step).all()
    assert (two["w_scale"] * 0.5 == two["b_scale"]).all()  # which onnxruntime takes for granted


def test_other_weights_keep_their_own_integers() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    other = weight.copy()
    other[2, 0, 0, 0] += 0.1
    dead = weight.copy()
    dead[1] *= 0
    for changed in (other, dead):
        sharing, first, second = Sharing(), quantised(weight), quantised(np.where(changed == 0, 1e-30, changed))
        was = values(second)
        sharing.take(first, {"w": weight})
        sharing.take(second, {"w": changed})
        assert all(np.array_equal(was[name], now) for name, now in values(second).items())
