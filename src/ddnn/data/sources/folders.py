"""Class folders: ``<class>/*.jpg``, or ``train/<class>/*.jpg`` beside ``test/`` and ``val/``."""

import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from ddnn.data.decode import AtHand, Reader
from ddnn.data.sources import places
from ddnn.data.sources.found import SPLITS, TEST_SPLITS, Labelled, Source, all_of, test_and_validation
from ddnn.data.sources.texts import Texts
from ddnn.errors import DataError
from ddnn.picture import EXTENSIONS, FORMATS, images_under
from ddnn.recipe import Data

TEXTS = (".txt", ".xml", ".json", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".ini", ".db", ".log")
"""Endings of files that lie beside images and are not meant to be any."""
ANNOTATIONS = "val_annotations.txt"
"""Lines of file, class and more, by tabs, beside images in one folder: how Tiny ImageNet labels its validation."""
ALIKE = 0.9
"""Share of folder names that splits of one data set have in common at least."""

_log = logging.getLogger("ddnn.data")


@dataclass(frozen=True, eq=False)
class _Files(Reader):
    """One file an image. `paths`: below `root`."""

    root: str
    paths: Texts

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return f"{self.root}/{self.paths[index]}"

    def open(self, index: int) -> Image.Image:
        if places.is_remote(self.root):
            return Image.open(io.BytesIO(places.read(self.name(index))), formats=FORMATS)
        return Image.open(self.name(index), formats=FORMATS)

    def identity(self) -> bytes:
        return self.paths.packed()

    def fetched(self, indices: Sequence[int]) -> Reader:
        if not places.is_remote(self.root):
            return self
        got = places.read_whole([self.name(index) for index in indices])
        return AtHand(self, dict(zip(indices, got, strict=True)))


class _Tree(Protocol):
    """Folders below a root, by their paths within it; the root itself is ''."""

    others: dict[str, Counter[str]]
    """Of each folder that was looked through: files that are no images, by what their names end with."""

    def subfolders(self, folder: str) -> list[str]: ...

    def images(self, folder: str) -> list[str]:
        """Paths within `folder`, at any depth and in any order."""


@dataclass(frozen=True)
class _Local(_Tree):
    root: str
    others: dict[str, Counter[str]] = field(default_factory=dict)

    def subfolders(self, folder: str) -> list[str]:
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def images(self, folder: str) -> list[str]:
        others: Counter[str] = Counter()
        found = images_under(os.path.join(self.root, folder), others=others)
        self.others[folder] = others
        return found


class _Listed(_Tree):
    """Of paths that are all known."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._below: dict[str, dict[str, list[str]]] = {"": {}}
        self._rest: dict[str, Counter[str]] = {}
        self.others = {}
        for path in paths:
            parts = path.split("/")
            if any(part.startswith(".") for part in parts):
                continue
            if not path.lower().endswith(EXTENSIONS):
                for depth in range(1, min(3, len(parts))):
                    rest = self._rest.setdefault("/".join(parts[:depth]), Counter())
                    rest[os.path.splitext(parts[-1])[1].lower()] += 1
                continue
            for depth in range(min(2, len(parts) - 1)):
                below = self._below.setdefault("/".join(parts[:depth]), {})
                below.setdefault(parts[depth], []).append("/".join(parts[depth + 1 :]))

    def subfolders(self, folder: str) -> list[str]:
        return sorted(self._below.get(folder, {}))

    def images(self, folder: str) -> list[str]:
        self.others[folder] = self._rest.get(folder, Counter())
        above, _, name = folder.rpartition("/")
        return self._below[above][name]


def has_images(root: str) -> bool:
    """Whether there is an image in a folder of a local folder."""
    return any(
        name.lower().endswith(EXTENSIONS)
        for sub in _Local(root).subfolders("")
        for _, _, names in os.walk(os.path.join(root, sub), followlinks=True)
        for name in names
    )


def class_folders(root: str, data: Data, listed: Sequence[str] | None = None) -> Source:
    """The data set in a folder; `listed`: all paths within it, where it lies on another machine."""
    tree: _Tree = _Local(root) if listed is None else _Listed(listed)
    within = _training(root, tree)
    found = _by_class(tree, within)
    if not any(map(len, found.values())):
        raise DataError(
            f"data {root}: no images ({' '.join(EXTENSIONS)}) in class folders, no parquet files and no tar shards; "
            "allowed are <class>/*.jpg, or train/<class>/*.jpg and test/<class>/*.jpg, or *.parquet, or *.tar"
        )
    if not within and all(_is_split(name) for name in found):
        raise DataError(
            f"data {root}: its only folders are {', '.join(found)}, which are no classes; images must be in "
            "train/<class>/, and those of other splits in test/<class>/ or val/<class>/"
        )
    empty = [name for name, paths in found.items() if not len(paths)]
    if empty:
        raise DataError(
            f"data {root}: class folders without images: {', '.join(empty)}; fill or remove them{_passed_over(tree)}"
        )
    if not within:
        _check_classes(root, found)
    classes = tuple(found)

    def other(name: str) -> Labelled | None:
        place = f"{root}/{name}"
        held = {each: paths for each, paths in _by_class(tree, name).items() if len(paths)}
        loose = not held and tree.images(name)
        if loose or (len(held) == 1 and not held.keys() & found.keys()):
            lines = _annotations(place, None if listed is None else f"{name}/{ANNOTATIONS}" in listed)
            if lines is None:
                _log.warning(
                    "data %s: passed over, as its images are in no folder of a training class; to use it, sort them "
                    "into %s/<class>/",
                    place,
                    name,
                )
                return None
            held = _by_annotation(place, tree.images(name), lines)
        strange = [each for each in held if each not in found]
        if strange:
            raise DataError(f"data {place}: classes without training images: {', '.join(strange)}")
        if not held:
            raise DataError(f"data {place}: no images ({' '.join(EXTENSIONS)}) in its class folders")
        return _files(place, held, classes)

    tops = tree.subfolders("") if within else []
    others = [
        name
        for word in TEST_SPLITS
        for name in tops
        if name.lower() == word and (tree.subfolders(name) or tree.images(name))
    ]
    train = _files(f"{root}/{within}" if within else root, found, classes)
    source = Source(classes, train, *test_and_validation(others, other, data))
    if passed_over := _passed_over(tree):
        _log.warning("data %s%s", root, passed_over)
    return source


def _passed_over(tree: _Tree) -> str:
    """That there are files which are no images, though they may be meant to be; '' where there are none."""
    outermost = (each for folder, each in tree.others.items() if folder.rpartition("/")[0] not in tree.others)
    others = sorted(sum(outermost, Counter()).items(), key=lambda pair: (-pair[1], pair[0]))
    found = [(ending or "no ending", count) for ending, count in others if ending not in TEXTS]
    if not found:
        return ""
    counts = ", ".join(f"{count} {ending}" for ending, count in found[:5])
    return f": files are passed over that are none of {' '.join(EXTENSIONS)}: {counts}; convert those that are images"


def _is_split(name: str) -> bool:
    return name.lower() in (*SPLITS["train"], *TEST_SPLITS)


def _training(root: str, tree: _Tree) -> str:
    """The folder of the training's class folders; '' where they are in the root, as a class may be called train too.

    By another name than `train` only where no other folder could be a class. Raises `DataError` where there are two.
    """
    tops = tree.subfolders("")
    named = [name for name in tops if name.lower() in SPLITS["train"] and tree.subfolders(name)]
    if "train" not in named and not all(map(_is_split, tops)):
        return ""
    if len(named) > 1:
        raise DataError(f"data {root}: the folders {' and '.join(named)} are all for training; keep one of them")
    return named[0] if named else ""


def _check_classes(root: str, found: dict[str, Texts]) -> None:
    """Raises `DataError` where the folders are rather splits: in each are two or more folders, the same in all."""
    below: list[set[str]] = []
    for paths in found.values():
        parts = [paths[i].split("/") for i in range(len(paths))]
        if any(len(each) == 2 for each in parts) or len(names := {each[1] for each in parts}) < 2:
            return
        below.append(names)
    common = set.intersection(*below)
    if len(below) > 1 and len(common) >= ALIKE * len(set.union(*below)):
        raise DataError(
            f"data {root}: {', '.join(found)} hold but the same folders ({', '.join(sorted(common)[:3])}, ...), "
            "so it isn't clear which are the classes; put the images of splits in train/<class>/ and test/<class>/, "
            "or those of classes in <class>/ itself"
        )


def _annotations(place: str, there: bool | None) -> str | None:
    """The text that labels the images in a folder; `there`: whether there is one, where that is known already."""
    path = f"{place}/{ANNOTATIONS}"
    if not (os.path.isfile(path) if there is None else there):
        return None
    return places.read(path).decode("utf-8", "replace")


def _by_annotation(place: str, paths: list[str], lines: str) -> dict[str, Texts]:
    """Paths, sorted, by class. Raises `DataError` where one has no label."""
    label = dict(fields[:2] for line in lines.splitlines() if len(fields := line.split("\t")) > 1)
    held: dict[str, list[str]] = {}
    for path in sorted(paths):
        name = path.rpartition("/")[2]
        if name not in label:
            raise DataError(f"data {place}: {path} has no line in {ANNOTATIONS}; label it there, or remove it")
        held.setdefault(label[name], []).append(path)
    return {name: Texts.of(held[name]) for name in sorted(held)}


def _by_class(tree: _Tree, within: str) -> dict[str, Texts]:
    """Paths below `within`, sorted, by class; packed class by class, as they are many."""
    return {
        name: _sorted(name, tree.images(f"{within}/{name}" if within else name)) for name in tree.subfolders(within)
    }


def _sorted(name: str, paths: list[str]) -> Texts:
    if any("/" in path for path in paths):
        paths.sort(key=lambda path: path.split("/"))
    else:
        paths.sort()
    return Texts.of(f"{name}/{path}" for path in paths)


def _files(root: str, found: dict[str, Texts], classes: tuple[str, ...]) -> Labelled:
    number = {name: i for i, name in enumerate(classes)}
    labels = np.repeat([number[name] for name in found], [len(paths) for paths in found.values()])
    return all_of(_Files(root, Texts.joined(list(found.values()))), labels)
