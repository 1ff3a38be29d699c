"""`data.source` to images that are not decoded yet, with labels, classes and the data set's own test split."""

import os
import re
from pathlib import Path

from ddnn.data.sources import places, shards
from ddnn.data.sources.arrays import cifar, digits
from ddnn.data.sources.folders import class_folders, has_images
from ddnn.data.sources.found import Labelled, Source
from ddnn.data.sources.hub import from_hub
from ddnn.data.sources.parquet import from_parquet
from ddnn.data.sources.tar import from_tar
from ddnn.errors import DataError
from ddnn.recipe import Data

__all__ = ["ALLOWED", "Labelled", "Source", "check", "check_for_training", "find"]

ALLOWED = (
    "digits, cifar10, cifar100, a folder of class folders, parquet files or tar shards (also by its name within "
    "$DDNN_DATA, or at a URL such as s3://bucket/folder), shards such as 'train-{000..146}.tar', or a Hugging Face hub "
    "id such as 'owner/name'"
)


def check(data: Data) -> None:
    """Raises `DataError` where there is no data set to train on; decodes nothing."""
    check_for_training(data, find(data))


def find(data: Data) -> Source:
    """Find the data set. Raises `DataError` where there is none, or where it is not one for classification."""
    name = data.source
    if name == "digits":  # embedded: a run folder that is called digits too must not take its place
        return digits()
    if not name.strip():
        raise DataError(f"data.source is empty; allowed are {ALLOWED}")
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    if places.is_remote(name):
        return _remote(name.rstrip("/"), data)
    folder = next((place for place in _local_places(name) if place.is_dir()), None)
    if folder is not None:
        return _folder(str(folder), data)
    for place in _local_places(name):
        files = shards.named(str(place))
        if files and any(map(os.path.isfile, files)):
            return _shards(name, "", files, data)
    if any(place.is_file() for place in _local_places(name)):
        raise DataError(f"data.source={name!r}: it is a file, not a folder; allowed are {ALLOWED}")
    if name in ("cifar10", "cifar100"):
        return cifar(name)
    mistyped = any(place.is_dir() for place in _local_places(name.partition("/")[0]))  # a path, not somebody on the hub
    if re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", name) and not mistyped:
        return from_hub(name, data, ALLOWED)
    looked = f" in the working folder or in $DDNN_DATA ({os.environ.get('DDNN_DATA') or 'not set'})"
    absent = f"there is no such folder{'' if Path(name).is_absolute() else looked}"
    raise DataError(f"data.source={name!r}: {absent}; allowed are {ALLOWED}")


def _local_places(name: str) -> list[Path]:
    """Where that name may lie: as a path, then within $DDNN_DATA."""
    found = [Path(os.path.expanduser(name))]  # Path.expanduser fails where there is no such user
    if os.environ.get("DDNN_DATA"):
        found.append(Path(os.path.expanduser(os.environ["DDNN_DATA"]), name))
    return found


def _folder(root: str, data: Data) -> Source:
    files = shards.local(root)
    tables = [file for file in files if file.endswith(".parquet")]
    if tables or (files and not has_images(root)):
        return _shards(root, root, tables or files, data)
    return class_folders(root, data)


def _remote(url: str, data: Data) -> Source:
    files = shards.named(url)
    if files:
        return _shards(url, "", files, data)
    listed = places.files_under(url)
    if not listed:
        raise DataError(
            f"data {url}: there are no files, or they can't be listed; name the shards themselves, such as "
            f"{url}/train-{{000..146}}.tar"
        )
    tables = [file for file in listed if file.endswith(".parquet")]
    archives = [file for file in listed if file.endswith(shards.ARCHIVES)]
    if tables or archives:
        return _shards(url, url, tables or archives, data)
    return class_folders(url, data, listed)


def _shards(place: str, root: str, files: list[str], data: Data) -> Source:
    tables = [file for file in files if file.endswith(".parquet")]
    if tables and len(tables) < len(files):
        raise DataError(f"data {place}: parquet files and tar shards together; name one kind")
    return (from_parquet if tables else from_tar)(place, shards.by_split(root, files), data)


def check_for_training(data: Data, found: Source) -> None:
    """Raises `DataError` where there is nothing to tell apart, a split has classes that cannot be learned, or the
    images have no chunks to be mixed by."""
    if data.shuffle == "chunks" and found.train.reader.chunks is None:
        raise DataError(
            f"data {data.source}: data.shuffle='chunks' is for parquet files and tar shards, where images lie side by "
            "side; set data.shuffle='global'"
        )
    known = found.train.labels.unique()
    if len(known) < 2:
        raise DataError(f"data {data.source}: the training images are of {len(known)} class, at least 2 are needed")
    for name, part in (("test", found.test), ("validation", found.validation)):
        strange = sorted(set(part.labels.unique().tolist()) - set(known.tolist())) if part else []
        if strange:
            names = ", ".join(found.classes[label] for label in strange)
            raise DataError(f"data {data.source}: the {name} split has classes without training images: {names}")
