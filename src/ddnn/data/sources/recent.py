"""What was read last, so that images that lie beside each other are not read one by one."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The chunks read last, up to `limit` images together, but always one; each process has its own."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._clear()

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._chunks: OrderedDict[int, tuple[int, T]] = OrderedDict()
        self._images = 0

    def get(self, number: int, images: int, load: Callable[[], T]) -> T:
        """Chunk `number`, which holds that many images, read by `load` unless it is at hand."""
        with self._lock:
            if number in self._chunks:
                self._chunks.move_to_end(number)
                return self._chunks[number][1]
            while self._chunks and self._images + images > self._limit:
                self._images -= self._chunks.popitem(last=False)[1][0]
            chunk = load()
            self._chunks[number] = images, chunk
            self._images += images
            return chunk

    def __getstate__(self) -> dict[str, Any]:  # another process starts with none
        return {"_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._limit = state["_limit"]
        self._clear()
