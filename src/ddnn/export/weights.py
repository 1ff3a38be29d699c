"""One weights file for many graphs: every tensor that two of them have in common is in it once."""

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

NAME = "weights.bin"
ALIGNMENT = 64
"""Bytes that the place of a tensor in the file is a multiple of."""
PAGE = 4096
"""The same for tensors of at least `LARGE` bytes, so that each can be mapped into memory by itself."""
LARGE = 2**20


class Weights:
    """Collects the tensors of graphs by content. Numbers by themselves and shapes stay in the graphs."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._places: dict[tuple[Any, ...], str] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        """By name: dtype, shape and the tensor's first byte in the file."""

    def take(self, model: ir.Model, net: str) -> None:
        """Move the tensors of a graph of `net` out of it. In all graphs the same name then means the same tensor."""
        graph = model.graph
        renamed = {}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            if tensor.dtype == ir.DataType.INT64 or tensor.size <= 1:
                continue
            place = self._place(tensor, name, net)
            about = self.tensors[place]
            value.const_value = ir.ExternalTensor(
                NAME, about["offset"], about["bytes"], tensor.dtype, shape=tensor.shape, name=place
            )
            renamed[name] = place
        values = {name: graph.initializers.pop(name) for name in renamed}
        for name, place in renamed.items():
            values[name].name = place
            graph.initializers[place] = values[name]

    def _place(self, tensor: ir.TensorProtocol, name: str, net: str) -> str:
        array = np.ascontiguousarray(tensor.numpy())
        content = array.tobytes()
        key = (str(array.dtype), array.shape, hashlib.sha256(content).digest())
        if key not in self._places:
            name = name.removeprefix("own.").removeprefix("full.")
            name = f"{net}/{name}" if name in self.tensors else name
            alignment = PAGE if len(content) >= LARGE else ALIGNMENT
            self._content += bytes(-len(self._content) % alignment)
            self.tensors[name] = {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "offset": len(self._content),
                "bytes": len(content),
            }
            self._places[key] = name
            self._content += content
        return self._places[key]

    @property
    def content(self) -> bytes:
        """The file."""
        return bytes(self._content)
