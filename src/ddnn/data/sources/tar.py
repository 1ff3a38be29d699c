"""Tar shards in WebDataset's layout: ``key.jpg`` beside ``key.cls``, or beside ``key.json`` that has a label.

Any image can be read by itself, as an index says where it lies, so the order of training is as free as with files. With
`data.shuffle='chunks'` the images that lie beside each other are read at once.
"""

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddnn.data.decode import AtHand, Reader
from ddnn.data.sources import places
from ddnn.data.sources.found import Source, Values, by_splits
from ddnn.data.sources.recent import Recent
from ddnn.data.sources.tar_index import Index, index
from ddnn.data.sources.texts import Texts
from ddnn.errors import DataError
from ddnn.picture import FORMATS
from ddnn.recipe import Data

CHUNK = 2**23
"""Bytes that a chunk has at most."""


@dataclass(frozen=True, eq=False)
class _Members(Reader):
    """The images in the shards of one split, all together by number.

    `first`: int64 [shards + 1], the first image of each shard; `starts`, `sizes`: int64 [n], bytes in their shard.
    `spans`: int64 [chunks + 1], the first image of each chunk; None where images are read one by one.
    """

    shards: list[str]
    first: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: Texts
    spans: NDArray[np.int64] | None
    recent: Recent[bytes]

    @property
    def chunks(self) -> Tensor | None:
        return None if self.spans is None else torch.from_numpy(self.spans[:-1])

    def __len__(self) -> int:
        return len(self.starts)

    def _shard(self, index: int) -> str:
        return self.shards[int(np.searchsorted(self.first, index, side="right")) - 1]

    def _part(self, index: int) -> places.Part:
        start = int(self.starts[index])
        return self._shard(index), start, start + int(self.sizes[index])

    def name(self, index: int) -> str:
        return f"{self._shard(index)}:{self.names[index]}"

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self._bytes(index)), formats=FORMATS)

    def _bytes(self, index: int) -> bytes:
        if self.spans is None:
            return places.read(*self._part(index))
        chunk = int(np.searchsorted(self.spans, index, side="right")) - 1
        first, end = int(self.spans[chunk]), int(self.spans[chunk + 1])
        shard, start, _ = self._part(first)
        _, _, stop = self._part(end - 1)
        held = self.recent.get(chunk, end - first, lambda: places.read(shard, start, stop))
        begin = int(self.starts[index]) - start
        return held[begin : begin + int(self.sizes[index])]

    def identity(self) -> bytes:
        return self.names.packed() + self.sizes.astype("<i8").tobytes()

    def fetched(self, indices: Sequence[int]) -> Reader:
        if self.spans is not None or not places.is_remote(self.shards[0]):
            return self
        got = places.read_many([self._part(index) for index in indices])
        return AtHand(self, dict(zip(indices, got, strict=True)))


def from_tar(place: str, splits: Mapping[str, list[str]], data: Data) -> Source:
    """The data set in those shards. Raises `DataError` where one of them isn't sound."""
    with ThreadPoolExecutor(16) as pool:  # reading waits for the disk, or for another machine
        files = [file for each in splits.values() for file in each]
        indices = dict(zip(files, pool.map(lambda file: index(file, data.label_column), files), strict=True))
    found = {split: [(file, indices[file]) for file in each] for split, each in splits.items()}
    found = {split: [(file, each) for file, each in parts if len(each.starts)] for split, parts in found.items()}
    found = {split: parts for split, parts in found.items() if parts}
    if not found:
        raise DataError(f"data {place}: not one sample in its {len(files)} shards")
    numbers = all(_is_number(label) for each in indices.values() for label in each.labels.distinct)
    what = "column " + repr(data.label_column) if data.label_column else "their .cls or .json"

    def values(split: str) -> Values:
        return _joined([each.labels for _, each in found[split]], numbers)

    def reader(split: str) -> Reader:
        parts = [each for _, each in found[split]]
        first = np.cumsum([0, *(len(each.starts) for each in parts)])
        chunked = data.shuffle == "chunks"
        return _Members(
            [file for file, _ in found[split]],
            first,
            np.concatenate([each.starts for each in parts]),
            np.concatenate([each.sizes for each in parts]),
            Texts.joined([each.names for each in parts]),
            _spans(parts, first, data.shuffle_window) if chunked else None,
            Recent(2 * data.shuffle_window),
        )

    return by_splits(place, list(found), data, what, None, values, reader)


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdigit()


def _joined(parts: list[Values], numbers: bool) -> Values:
    """Labels of several shards, as whole numbers where all of them are."""
    number: dict[str, int] = {}
    codes = []
    for part in parts:
        table = np.array([number.setdefault(label, len(number)) for label in part.distinct], dtype=np.int64)
        codes.append(table[part.codes])
    if not numbers:
        return Values(np.concatenate(codes), list(number))
    again = Values.of([int(label) for label in number])  # 7 and 07 are one
    return Values(again.codes[np.concatenate(codes)], again.distinct)


def _spans(parts: list[Index], first: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Where chunks begin: images of one shard that follow each other, few of a window's and few bytes."""
    most = max(1, window // 32)
    spans = []
    for part, begin in zip(parts, first, strict=False):
        ends = part.starts + part.sizes
        at = 0
        while at < len(ends):
            spans.append(int(begin) + at)
            wide = int(np.searchsorted(ends, part.starts[at] + CHUNK, side="right"))
            at = max(at + 1, min(wide, at + most))
    return np.array([*spans, int(first[-1])], dtype=np.int64)
