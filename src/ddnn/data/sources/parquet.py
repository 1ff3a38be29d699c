"""Parquet files, read where they lie, a row group at a time, or copied once by the Hugging Face library.

A row can't be read without its row group, which is decompressed as a whole. `data.shuffle='chunks'` reads each of them
once. In any other order a copy in which each row can be read by itself is several times as fast, and is made of what is
not too large; the rest is read in place.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddnn.data.decode import Reader
from ddnn.data.sources import places
from ddnn.data.sources.found import Source, Values, by_splits, train_split
from ddnn.data.sources.hub import class_names, coded, columns, tables
from ddnn.data.sources.recent import Recent
from ddnn.errors import DataError, first_line
from ddnn.picture import FORMATS
from ddnn.recipe import Data

COPIED = 2**34
"""Bytes of images up to which files on this machine are copied for `data.shuffle='global'`."""
SMALL = 2**20
"""Bytes of a row group that may well be read for the sake of one image."""

_log = logging.getLogger("ddnn.data")


@dataclass(frozen=True, eq=False)
class _File:
    place: str
    metadata: Any
    schema: Any


@dataclass(frozen=True, eq=False)
class _Groups(Reader):
    """The rows of the files of one split. `starts`: int64 [groups + 1], the first row of each row group."""

    split: str
    column: str
    files: list[_File]
    starts: NDArray[np.int64]
    first: NDArray[np.int64]
    """int64 [files + 1]: the first row group of each file."""
    recent: Recent[Any]

    def identity(self) -> bytes:
        return _identity(self.files, self.column)

    @property
    def chunks(self) -> Tensor | None:
        return torch.from_numpy(self.starts[:-1])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> str:
        try:
            path = self._cell(index, "path")
        except Exception:  # it is asked for because the row can't be read
            path = None
        return f"{self.split} row {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> Image.Image:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows = int(self.starts[group + 1] - self.starts[group])
        encoded = self.recent.get(group, rows, lambda: self._read(group, "bytes"))[index - int(self.starts[group])]
        if encoded.is_valid:
            return Image.open(io.BytesIO(encoded.as_buffer()), formats=FORMATS)
        path = self._cell(index, "path")
        if not path:
            raise ValueError("the row has no image")
        return Image.open(path, formats=FORMATS)

    def _cell(self, index: int, field: str) -> Any:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._read(group, field)[index - int(self.starts[group])].as_py()

    def _read(self, group: int, field: str) -> Any:
        """One field of the image column of a row group, a pyarrow array; of a plain column of bytes that is `bytes`."""
        import pyarrow as pa

        number = int(np.searchsorted(self.first, group, side="right")) - 1
        file = self.files[number]
        plain = not pa.types.is_struct(file.schema.field(self.column).type)
        if plain and field != "bytes":
            return pa.nulls(int(self.starts[group + 1] - self.starts[group]))
        wanted = [self.column if plain else f"{self.column}.{field}"]

        def read() -> Any:
            with _opened(file.place, file.metadata) as table:
                return table.read_row_group(group - int(self.first[number]), columns=wanted, use_threads=False)

        rows = places.tried(file.place, "read", read)[self.column]
        column = rows.combine_chunks() if rows.num_chunks != 1 else rows.chunk(0)
        # A null in place of the struct is a null in each of its fields.
        return column if plain else column.flatten()[0]


def from_parquet(place: str, splits: Mapping[str, list[str]], data: Data) -> Source:
    """The data set in those files. Raises `DataError` where they can't be read, or hold no images with labels."""
    import datasets

    files = {split: _files(place, paths) for split, paths in splits.items()}
    schema = files[train_split(place, list(files))][0].schema
    features = datasets.Features.from_arrow_schema(schema)
    image, label = columns(place, features, data)
    _check_column(place, schema, image)
    sizes = _bytes(files, image)
    if data.shuffle == "global":
        remote = any(places.is_remote(file.place) for each in files.values() for file in each)
        if not remote and sizes.sum() <= COPIED:
            return _copied(place, splits, data, {split: _identity(each, image) for split, each in files.items()})
        if sizes.mean() > SMALL:
            _log.warning(
                "data %s: %.0f MB are read for each image, as large as its row groups are; set data.shuffle='chunks'",
                place,
                sizes.mean() / 1e6,
            )

    def values(split: str) -> Values:
        return _values(place, split, files[split], label)

    def reader(split: str) -> Reader:
        rows = [
            file.metadata.row_group(group).num_rows
            for file in files[split]
            for group in range(file.metadata.num_row_groups)
        ]
        first = np.cumsum([0, *(file.metadata.num_row_groups for file in files[split])])
        limit = 2 * data.shuffle_window if data.shuffle == "chunks" else max(1024, 4 * max(rows))
        return _Groups(split, image, files[split], np.cumsum([0, *rows]), first, Recent(limit))

    return by_splits(place, list(files), data, f"column {label!r}", class_names(features, label), values, reader)


def _opened(place: str, metadata: Any = None) -> Any:
    """A parquet file, a context manager. Nothing is kept open: workers would share it."""
    import pyarrow.parquet as pq

    if places.is_remote(place):
        return pq.ParquetFile(places.opened(place), metadata=metadata, pre_buffer=True)
    return pq.ParquetFile(place, metadata=metadata, memory_map=True)


def _files(place: str, paths: Sequence[str]) -> list[_File]:
    """The files with what their footers say."""

    def looked_at(path: str) -> _File:
        with _opened(path) as table:
            return _File(path, table.metadata, table.schema_arrow)

    def of(path: str) -> _File:
        try:
            return places.tried(path, "read", lambda: looked_at(path))
        except DataError:
            raise
        except Exception as error:  # of pyarrow, which has many
            raise DataError(f"data {place}: its parquet files cannot be read: {path}: {first_line(error)}") from error

    with ThreadPoolExecutor(16) as pool:
        return [file for file in pool.map(of, paths) if file.metadata.num_rows]


def _check_column(place: str, schema: Any, image: str) -> None:
    import pyarrow as pa

    kind = schema.field(image).type
    fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
    if not ("bytes" in fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"data {place}: column {image!r} holds no images: it is of type {kind}")


def _bytes(files: Mapping[str, list[_File]], image: str) -> NDArray[np.int64]:
    """Bytes of the image column of each row group, decompressed."""
    return np.array([size for each in files.values() for _, size in _groups(each, image)], dtype=np.int64)


def _groups(files: Sequence[_File], image: str) -> list[tuple[int, int]]:
    """Rows of each row group, and bytes of its image column, decompressed."""
    found = []
    for file in files:
        first = file.metadata.row_group(0)
        which = [i for i in range(first.num_columns) if first.column(i).path_in_schema.split(".")[0] == image]
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            found.append((group.num_rows, sum(group.column(i).total_uncompressed_size for i in which)))
    return found


def _identity(files: Sequence[_File], image: str) -> bytes:
    return json.dumps(_groups(files, image)).encode()


def _copied(place: str, splits: Mapping[str, list[str]], data: Data, known: Mapping[str, bytes]) -> Source:
    """By way of the Hugging Face library, which copies them once, into its cache, and shows how it goes on."""
    import datasets

    try:
        loaded = datasets.load_dataset("parquet", data_files=dict(splits))
    except Exception as error:  # it has no base class for its errors
        raise DataError(f"data {place}: its parquet files cannot be read: {first_line(error)}") from error
    return tables(place, loaded, data, known)


def _values(place: str, split: str, files: Sequence[_File], label: str) -> Values:
    import pyarrow as pa

    def of(file: _File) -> Any:
        def read() -> Any:
            with _opened(file.place, file.metadata) as table:
                return table.read(columns=[label])[label]

        return places.tried(file.place, "read", read)

    try:
        with ThreadPoolExecutor(16) as pool:
            column = pa.chunked_array([chunk for each in pool.map(of, files) for chunk in each.chunks])
    except DataError:
        raise
    except Exception as error:  # of pyarrow, which has many
        raise DataError(
            f"data {place}: column {label!r} of split {split} cannot be read: {first_line(error)}"
        ) from error
    return coded(column)
