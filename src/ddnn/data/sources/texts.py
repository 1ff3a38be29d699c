"""Many texts in little memory: one block of bytes, and where each begins."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts by number. A list of a million Python strings would take a hundred bytes for each, and more per worker.

    `block`: uint8, all texts one after the other; `starts`: int64 [n + 1].
    """

    block: NDArray[np.uint8]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Those texts; file names that are no text as well."""
        encoded = [os.fsencode(text) for text in texts]
        starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=starts[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), starts)

    @classmethod
    def joined(cls, parts: list["Texts"]) -> "Texts":
        """The texts of all of them, one after the other."""
        before = np.cumsum([0, *(len(part.block) for part in parts)])
        starts = [part.starts[:-1] + shift for part, shift in zip(parts, before, strict=False)]
        blocks = [part.block for part in parts] or [np.empty(0, np.uint8)]
        return cls(np.concatenate(blocks), np.concatenate([*starts, before[-1:]]).astype(np.int64))

    def packed(self) -> bytes:
        """All of them and where each ends, the same on every machine."""
        return self.starts.astype("<i8").tobytes() + self.block.tobytes()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.block[self.starts[index] : self.starts[index + 1]].tobytes())
