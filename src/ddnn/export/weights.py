"""One weights file for many graphs: every tensor that two of them have in common is in it once."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

NAME = "weights.bin"
ALIGNMENT = 64
"""Bytes that the place of a tensor in the file is a multiple of."""
PAGE = 4096
"""The same for tensors of at least `LARGE` bytes, so that each can be mapped into memory by itself."""
LARGE = 2**20
SMALL = 1024
"""Bytes up to which whole numbers stay in the graphs: they are shapes and axes, which a runtime wants to see there."""


class Place(NamedTuple):
    """Where a tensor is in the file, and its name in all graphs."""

    name: str
    offset: int
    length: int


class Weights:
    """Collects the tensors of graphs by content. Numbers by themselves and shapes stay in the graphs."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._places: dict[tuple[Any, ...], Place] = {}
        self._names: set[str] = set()

    def take(self, model: ir.Model, net: str) -> None:
        """Move the tensors of a graph of `net` out of it. In all graphs the same name then means the same tensor."""
        initializers = model.graph.initializers
        for name, value in list(initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            array = tensor.numpy()
            if array.size <= 1 or (array.dtype == np.int64 and array.nbytes <= SMALL):
                continue
            place = self._place(array, name, net)
            del initializers[name]
            if place.name in initializers:
                ir.convenience.replace_all_uses_with(value, initializers[place.name])
                continue
            value.name = place.name
            value.const_value = ir.ExternalTensor(
                NAME, place.offset, place.length, tensor.dtype, shape=ir.Shape(array.shape), name=place.name
            )
            initializers[place.name] = value

    def write(self, folder: Path) -> None:
        """Write the file to a folder."""
        (folder / NAME).write_bytes(self._content)

    def _place(self, array: npt.NDArray[Any], name: str, net: str) -> Place:
        content = array.tobytes()
        key = (array.dtype, array.shape, hashlib.sha256(content).digest())
        if key not in self._places:
            alignment = PAGE if len(content) >= LARGE else ALIGNMENT
            self._content += bytes(-len(self._content) % alignment)
            name = f"{net}/{name}" if name in self._names else name
            assert name not in self._names
            self._names.add(name)
            self._places[key] = Place(name, len(self._content), len(content))
            self._content += content
        return self._places[key]
