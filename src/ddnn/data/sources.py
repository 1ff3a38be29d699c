"""`data.source` to images that are not decoded yet, with labels, classes and the data set's own test split."""

import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddnn.data.decode import Reader
from ddnn.errors import DataError
from ddnn.picture import FORMATS
from ddnn.recipe import Data

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")
VALIDATION_SPLITS = ("validation", "val", "valid")
TEST_SPLITS = ("test", *VALIDATION_SPLITS)
LABEL_COLUMNS = ("fine_label", "label", "labels", "class", "target")
ALLOWED = (
    "digits, cifar10, cifar100, a folder of class folders or parquet files (also by its name within $DDNN_DATA), "
    "or a Hugging Face hub id such as 'owner/name'"
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images not decoded yet: those of `reader` that `index` (int64 [n]) names, with `labels` (int64 [n])."""

    reader: Reader
    index: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Tensor) -> "Labelled":
        """The images at the places `which` (int64 or bool)."""
        return Labelled(self.reader, self.index[which], self.labels[which])


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as it is found; `test` is None where it has no test split of its own.

    `validation` is None where it has no validation split beside the test split, or where `data.validation` is 0.
    """

    classes: tuple[str, ...]
    train: Labelled
    test: Labelled | None = None
    validation: Labelled | None = None


def find(data: Data) -> Source:
    """Find the data set. Raises `DataError` where there is none, or where it is not one for classification."""
    name = data.source
    if name == "digits":  # embedded: a run folder that is called digits too must not take its place
        return _digits()
    if not name.strip():
        raise DataError(f"data.source is empty; allowed are {ALLOWED}")
    folder = next((place for place in _places(name) if place.is_dir()), None)
    if folder is not None:
        has_parquet = any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))
        return _parquet(folder, data) if has_parquet else _class_folders(folder, data)
    if any(place.is_file() for place in _places(name)):
        raise DataError(f"data.source={name!r}: it is a file, not a folder; allowed are {ALLOWED}")
    if name in ("cifar10", "cifar100"):
        return _cifar(name)
    mistyped = any(place.is_dir() for place in _places(name.partition("/")[0]))  # a path, not somebody on the hub
    if re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", name) and not mistyped:
        return _hub(name, data)
    looked = f" in the working folder or in $DDNN_DATA ({os.environ.get('DDNN_DATA') or 'not set'})"
    absent = f"there is no such folder{'' if Path(name).is_absolute() else looked}"
    raise DataError(f"data.source={name!r}: {absent}; allowed are {ALLOWED}")


def _places(name: str) -> list[Path]:
    """Where that name may lie: as a path, then within $DDNN_DATA."""
    places = [Path(os.path.expanduser(name))]  # Path.expanduser fails where there is no such user
    if os.environ.get("DDNN_DATA"):
        places.append(Path(os.path.expanduser(os.environ["DDNN_DATA"]), name))
    return places


def check_for_training(data: Data, found: Source) -> None:
    """Raises `DataError` where there is nothing to tell apart, or where a split has classes that cannot be learned."""
    known = set(found.train.labels.tolist())
    if len(known) < 2:
        raise DataError(f"data {data.source}: the training images are of {len(known)} class, at least 2 are needed")
    for name, part in (("test", found.test), ("validation", found.validation)):
        strange = sorted(set(part.labels.tolist()) - known) if part else []
        if strange:
            names = ", ".join(found.classes[label] for label in strange)
            raise DataError(f"data {data.source}: the {name} split has classes without training images: {names}")


def _test_and_validation(
    names: list[str], read: Callable[[str], Labelled | None], data: Data
) -> tuple[Labelled | None, Labelled | None]:
    """The first split with labels is the test; after one called test, the next is for validation. Reads no others."""
    found = ((name, part) for name, part in ((name, read(name)) for name in names) if part is not None)
    name, test = next(found, ("", None))
    own = name == "test" and data.validation > 0
    return test, next(found, ("", None))[1] if own else None


# ---- arrays: digits, CIFAR as torchvision downloads it


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Decoded images, uint8 [n, height, width, 3]."""

    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def _labelled(reader: Reader, labels: Any) -> Labelled:
    return Labelled(reader, torch.arange(len(reader)), torch.as_tensor(labels, dtype=torch.int64))


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 as stored
    images = _Pixels(np.repeat(grey[..., None], 3, axis=3))
    return Source(tuple(map(str, digits.target_names)), _labelled(images, digits.target))


def _cifar(name: str) -> Source:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = Path(os.path.expanduser(os.environ.get("DDNN_DATA") or "~/.cache/ddnn"))
    try:
        parts = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data {name}: no folder {name} in the working folder or in $DDNN_DATA "
            f"({os.environ.get('DDNN_DATA') or 'not set'}), and the download to {root} failed ({error}); set DDNN_DATA "
            f"to a folder that holds {name}/ with class folders or parquet files"
        ) from error
    train, test = (_labelled(_Pixels(part.data), part.targets) for part in parts)
    return Source(tuple(parts[0].classes), train, test)


# ---- class folders


@dataclass(frozen=True, eq=False)
class _Files:
    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index], formats=FORMATS)


def _class_folders(root: Path, data: Data) -> Source:
    split = bool(_subfolders(root / "train"))  # but a class may be called train, too
    found = _images_by_class(root / "train" if split else root)
    if not any(found.values()):
        raise DataError(
            f"data {root}: no images ({' '.join(EXTENSIONS)}) in class folders and no parquet files; allowed are "
            "<class>/*.jpg, or train/<class>/*.jpg and test/<class>/*.jpg, or *.parquet"
        )
    if not split and all(name.lower() in ("train", *TEST_SPLITS) for name in found):
        raise DataError(
            f"data {root}: its only folders are {', '.join(found)}, which are no classes; images must be in "
            "train/<class>/, and those of other splits in test/<class>/ or val/<class>/"
        )
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(f"data {root}: class folders without images: {', '.join(empty)}; fill or remove them")
    classes = tuple(found)
    others = [name for name in TEST_SPLITS if split and _subfolders(root / name)]
    parts = _test_and_validation(others, lambda name: _split_folder(root / name, classes), data)
    return Source(classes, _files(found, classes), *parts)


def _split_folder(folder: Path, classes: tuple[str, ...]) -> Labelled:
    found = {name: paths for name, paths in _images_by_class(folder).items() if paths}
    strange = [name for name in found if name not in classes]
    if strange:
        raise DataError(f"data {folder}: classes without training images: {', '.join(strange)}")
    if not found:
        raise DataError(f"data {folder}: no images ({' '.join(EXTENSIONS)}) in its class folders")
    return _files(found, classes)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    return {sub.name: sorted(_images_under(sub)) for sub in _subfolders(folder)}


def _images_under(folder: Path) -> list[Path]:
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk enters what is left here
        found += [Path(where, f) for f in files if not f.startswith(".") and f.lower().endswith(EXTENSIONS)]
    return found


def _files(found: Mapping[str, list[Path]], classes: tuple[str, ...]) -> Labelled:
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[name] for name, paths in found.items() for _ in paths]
    return _labelled(_Files([path for paths in found.values() for path in paths]), labels)


# ---- parquet files and the Hugging Face hub


@dataclass(frozen=True, eq=False)
class _Rows:
    """One split of a Hugging Face data set, its image column cast to ``Image(decode=False)``."""

    split: str
    column: str
    rows: Any

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


def _parquet(folder: Path, data: Data) -> Source:
    import datasets

    try:
        splits = datasets.load_dataset(str(folder))
    except Exception as error:  # it has no base class for its errors
        raise DataError(f"data {folder}: its parquet files cannot be read: {_first_line(error)}") from error
    return _tables(str(folder), splits, data)


def _hub(name: str, data: Data) -> Source:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # it has no base class for its errors
        raise DataError(
            f"data.source={name!r}: not a folder, and the Hugging Face hub gave no data set of that id "
            f"({_first_line(error)}); allowed are {ALLOWED}"
        ) from error
    return _tables(name, splits, data)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _tables(place: str, splits: Mapping[str, Any], data: Data) -> Source:
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"data {place}: no split called train among: {', '.join(splits)}")
    train_name = "train" if "train" in splits else next(iter(splits))
    features = splits[train_name].features
    image = data.image_column or _image_column(place, features)
    label = data.label_column or _label_column(place, features)
    for key, column in (("image_column", image), ("label_column", label)):
        if column not in features:
            raise DataError(f"data {place}: data.{key}={column!r} is not one of its columns: {', '.join(features)}")

    names: list[str] | None = getattr(features[label], "names", None)  # of a ClassLabel
    values = _label_values(place, train_name, splits[train_name], label, names)
    if values is None:
        raise DataError(f"data {place}: no training image has a label in column {label!r}")
    known = list(range(len(names))) if names else sorted(set(values))
    classes = tuple(names) if names else tuple(map(str, known))
    train = _rows(place, train_name, splits[train_name], image, values, known)

    def read(name: str) -> Labelled | None:
        values = _label_values(place, name, splits[name], label, names)
        if values is None:  # the way of the hub to keep a test secret
            return None
        return _rows(place, name, splits[name], image, values, known)

    others = [name for name in TEST_SPLITS if name in splits and name != train_name]
    return Source(classes, train, *_test_and_validation(others, read, data))


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


def _label_values(place: str, split: str, rows: Any, column: str, names: list[str] | None) -> list[Any] | None:
    """The labels as they are stored; None where not one image has a label."""
    values = list(rows.select_columns([column])[:][column])
    missing = sum(value is None or (names is not None and value == -1) for value in values)
    if missing == len(values):
        return None
    if missing:
        raise DataError(f"data {place}: {missing} of {len(values)} images of split {split} have no label in {column!r}")
    if not all(isinstance(value, int | str) for value in values):
        raise DataError(f"data {place}: the labels in column {column!r} are neither whole numbers nor texts")
    return values


def _rows(place: str, split: str, rows: Any, column: str, values: list[Any], known: list[Any]) -> Labelled:
    import datasets

    number = {value: i for i, value in enumerate(known)}
    strange = sorted({str(value) for value in values if value not in number})
    if strange:
        raise DataError(f"data {place}: split {split} has labels that are not training classes: {', '.join(strange)}")
    try:
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # it has no base class for its errors
        raise DataError(f"data {place}: column {column!r} holds no images: {_first_line(error)}") from error
    return _labelled(_Rows(split, column, rows), [number[value] for value in values])
