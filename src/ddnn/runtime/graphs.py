"""ONNX files without the onnx package: which tensors lie in a file beside, and a graph cut down to some of its outputs.

The few fields of ONNX's messages that this needs are declared to protobuf, which comes with onnxruntime; it carries the
others along unread. Numbers and names are those of onnx.proto.
"""

import math
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf import message as protobuf

from ddnn.errors import BundleError

KINDS = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    10: "float16",
    11: "float64",
}
"""NumPy's names of TensorProto.DataType."""
_EXTERNAL = 1  # TensorProto.DataLocation


class External(NamedTuple):
    """A tensor in a file of its own."""

    name: str
    kind: str
    """As NumPy calls it."""
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def externals(graph: bytes) -> list[External]:
    """The tensors of a graph file that lie in another file. Raises `BundleError` for those this can't read."""
    model = _parsed(graph)
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_location != _EXTERNAL:
            continue
        about = {entry.key: entry.value for entry in tensor.external_data}
        kind, shape = KINDS.get(tensor.data_type), tuple(tensor.dims)
        length = int(about["length"])
        if kind is None or math.prod(shape) * np.dtype(kind).itemsize != length:
            raise BundleError(f"tensor {tensor.name} is of a kind that cannot be shared; load without shared")
        found.append(External(tensor.name, kind, shape, about["location"], int(about.get("offset", 0)), length))
    return found


def files_of(graph: bytes) -> set[str]:
    """What a graph file calls the files its tensors lie in, wherever it has tensors. Raises `BundleError`."""
    return {entry.value for entry in _entries(_parsed(graph)) if entry.key == "location"}


def _parsed(graph: bytes) -> Any:
    model = _model_message()()
    try:
        model.ParseFromString(graph)
    except protobuf.DecodeError:
        raise BundleError("is no ONNX graph") from None
    return model


def _entries(message: Any) -> Iterator[Any]:
    """All that is said of tensors in files, in nested graphs, attributes and functions too."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.name == "Entry":
                yield each
            else:
                yield from _entries(each)


def cut_to(graph: bytes, outputs: Collection[str]) -> bytes:
    """The graph with these of its outputs and what computes them, and no other outputs or nodes."""
    model = _parsed(graph)
    needed = set(outputs)
    kept = []
    for node in reversed(model.graph.node):  # nodes come after those they depend on
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    ends = [output for output in model.graph.output if output.name in outputs]
    for field, wanted in (("node", kept[::-1]), ("output", ends)):
        copies = [type(each).FromString(each.SerializeToString()) for each in wanted]
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(copies)
    return bytes(model.SerializeToString())


@cache
def _model_message() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="ddnn/onnx.proto", package="ddnn.onnx", syntax="proto2")
    kind = descriptor_pb2.FieldDescriptorProto
    fields = {
        "Model": [
            ("graph", 7, kind.TYPE_MESSAGE, "Graph", False),
            ("functions", 25, kind.TYPE_MESSAGE, "Function", True),
        ],
        "Function": [("node", 7, kind.TYPE_MESSAGE, "Node", True)],
        "Graph": [
            ("node", 1, kind.TYPE_MESSAGE, "Node", True),
            ("initializer", 5, kind.TYPE_MESSAGE, "Tensor", True),
            ("output", 12, kind.TYPE_MESSAGE, "Value", True),
            ("sparse_initializer", 15, kind.TYPE_MESSAGE, "Sparse", True),
        ],
        "Node": [
            ("input", 1, kind.TYPE_STRING, "", True),
            ("output", 2, kind.TYPE_STRING, "", True),
            ("attribute", 5, kind.TYPE_MESSAGE, "Attribute", True),
        ],
        "Attribute": [
            ("t", 5, kind.TYPE_MESSAGE, "Tensor", False),
            ("g", 6, kind.TYPE_MESSAGE, "Graph", False),
            ("tensors", 10, kind.TYPE_MESSAGE, "Tensor", True),
            ("graphs", 11, kind.TYPE_MESSAGE, "Graph", True),
            ("sparse_tensor", 22, kind.TYPE_MESSAGE, "Sparse", False),
            ("sparse_tensors", 23, kind.TYPE_MESSAGE, "Sparse", True),
        ],
        "Sparse": [
            ("values", 1, kind.TYPE_MESSAGE, "Tensor", False),
            ("indices", 2, kind.TYPE_MESSAGE, "Tensor", False),
        ],
        "Value": [("name", 1, kind.TYPE_STRING, "", False)],
        "Tensor": [
            ("dims", 1, kind.TYPE_INT64, "", True),
            ("data_type", 2, kind.TYPE_INT32, "", False),
            ("name", 8, kind.TYPE_STRING, "", False),
            ("external_data", 13, kind.TYPE_MESSAGE, "Entry", True),
            ("data_location", 14, kind.TYPE_INT32, "", False),
        ],
        "Entry": [("key", 1, kind.TYPE_STRING, "", False), ("value", 2, kind.TYPE_STRING, "", False)],
    }
    for message, its in fields.items():
        declared = file.message_type.add(name=message)
        for name, number, of, refers, repeated in its:
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            declared.field.add(
                name=name, number=number, type=of, label=label, type_name=f".ddnn.onnx.{refers}" if refers else None
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ddnn.onnx.Model"))
