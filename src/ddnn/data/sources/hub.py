"""Data sets of the Hugging Face hub, by its own library, which keeps a copy of them on this disk."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ddnn.data.decode import Reader
from ddnn.data.sources.found import LABEL_COLUMNS, Source, Values, by_splits, train_split
from ddnn.errors import DataError, first_line
from ddnn.picture import FORMATS
from ddnn.recipe import Data


@dataclass(frozen=True, eq=False)
class _Rows(Reader):
    """One split of a Hugging Face data set, its image column cast to ``Image(decode=False)``."""

    split: str
    column: str
    rows: Any
    known: bytes
    """Its `identity`."""

    def identity(self) -> bytes:
        return self.known

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        path = (self.rows[index][self.column] or {}).get("path")
        return f"{self.split} row {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> Image.Image:
        cell = self.rows[index][self.column]
        if not cell:
            raise ValueError("the row has no image")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"], formats=FORMATS)


def from_hub(name: str, data: Data, allowed: str) -> Source:
    """The data set `owner/name`. Raises `DataError` where there is none."""
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # it has no base class for its errors
        raise DataError(
            f"data.source={name!r}: not a folder, and the Hugging Face hub gave no data set of that id "
            f"({first_line(error)}); allowed are {allowed}"
        ) from error
    return tables(name, splits, data)


def tables(place: str, splits: Mapping[str, Any], data: Data, known: Mapping[str, bytes] | None = None) -> Source:
    """A data set as `datasets.load_dataset` gives it; `known`: of each split, what tells its images from others."""
    import datasets

    features = splits[train_split(place, list(splits))].features
    image, label = columns(place, features, data)

    def values(split: str) -> Values:
        return coded(splits[split].select_columns([label]).with_format("arrow")[:][label])

    def reader(split: str) -> Reader:
        try:
            rows = splits[split].select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # it has no base class for its errors
            raise DataError(f"data {place}: column {image!r} holds no images: {first_line(error)}") from error
        return _Rows(split, image, rows, (known or {}).get(split, b""))

    return by_splits(place, list(splits), data, f"column {label!r}", class_names(features, label), values, reader)


def columns(place: str, features: Mapping[str, Any], data: Data) -> tuple[str, str]:
    """Names of the columns with the images and the labels. Raises `DataError` where they are not clear."""
    image = data.image_column or _image_column(place, features)
    label = data.label_column or _label_column(place, features)
    for key, column in (("image_column", image), ("label_column", label)):
        if column not in features:
            raise DataError(f"data {place}: data.{key}={column!r} is not one of its columns: {', '.join(features)}")
    return image, label


def coded(column: Any) -> Values:
    """The labels in a column of pyarrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    distinct = pc.unique(column.drop_null())
    codes = pc.fill_null(pc.index_in(column, value_set=distinct), -1)
    return Values(codes.to_numpy().astype(np.int64), distinct.to_pylist())


def class_names(features: Mapping[str, Any], label: str) -> Sequence[str] | None:
    """Of a column of type ClassLabel; None of another."""
    return getattr(features[label], "names", None)


def _image_column(place: str, features: Mapping[str, Any]) -> str:
    import datasets

    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        what = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise DataError(f"data {place}: {what} among {', '.join(features)}; name one by data.image_column")
    return found[0]


def _label_column(place: str, features: Mapping[str, Any]) -> str:
    import datasets

    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) == 1:
        return found[0]
    for name in LABEL_COLUMNS:
        if name in (found or features):
            return name
    what = f"several label columns ({', '.join(found)})" if found else "no label column"
    raise DataError(
        f"data {place}: {what} among {', '.join(features)}; name one by data.label_column, or call it one of "
        f"{', '.join(LABEL_COLUMNS)}"
    )
