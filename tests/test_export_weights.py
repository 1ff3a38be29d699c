"""One weights file: whatever tensors are called, every graph finds its own."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from ddnn.export.weights import LARGE, PAGE, Weights
from nets import run


def added(**tensors: np.ndarray) -> ir.Model:
    """A graph that gives every tensor plus zero."""
    graph = helper.make_graph(
        [helper.make_node("Add", [name, "zero"], [f"{name}.out"]) for name in tensors],
        "graph",
        [helper.make_tensor_value_info("zero", onnx.TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(f"{name}.out", onnx.TensorProto.FLOAT, t.shape) for name, t in tensors.items()],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(model)


def test_names_that_cross_mix_nothing_up(tmp_path: Path) -> None:
    a, b, c = (np.full(20, k, dtype=np.float32) for k in range(3))
    graphs = {"deep": {"x": a, "y": b}, "middle": {"x": b, "y": a, "z": a}, "shallow": {"y": c, "z": b, "x": a}}
    weights = Weights()
    for net, tensors in graphs.items():
        model = added(**tensors)
        weights.take(model, net)
        ir.save(model, tmp_path / f"{net}.onnx")
    weights.write(tmp_path)
    for net, tensors in graphs.items():
        made = run(tmp_path / f"{net}.onnx", zero=np.zeros(1, dtype=np.float32))
        for name, tensor in tensors.items():
            assert np.array_equal(made[f"{name}.out"], tensor), (net, name)
    content = (tmp_path / "weights.bin").read_bytes()
    assert [content.count(tensor.tobytes()) for tensor in (a, b, c)] == [1, 1, 1]


def test_a_number_in_the_graph_keeps_apart_from_a_tensor_of_its_name(tmp_path: Path) -> None:
    """As of two traces, which number their constants by themselves."""
    tensor, number = np.arange(20, dtype=np.float32), np.array([7], dtype=np.float32)
    weights = Weights()
    for net, tensors in {"deep": {"val_1": tensor}, "shallow": {"val_1": number, "val_2": tensor}}.items():
        model = added(**tensors)
        weights.take(model, net)
        ir.save(model, tmp_path / f"{net}.onnx")
    weights.write(tmp_path)
    made = run(tmp_path / "shallow.onnx", zero=np.zeros(1, dtype=np.float32))
    assert np.array_equal(made["val_1.out"], number)
    assert np.array_equal(made["val_2.out"], tensor)


def test_large_tensors_begin_at_pages(tmp_path: Path) -> None:
    model = added(a=np.ones(5, dtype=np.float32), b=np.ones(LARGE // 4, dtype=np.float32))
    Weights().take(model, "net")
    places = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert isinstance(places["b"], ir.ExternalTensor)
    assert places["b"].offset == PAGE
