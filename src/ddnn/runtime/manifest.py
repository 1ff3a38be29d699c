"""The manifest of a bundle, read strictly, and the check of the files it names.

Nothing is believed: a manifest may be damaged, of a newer format or made to harm. Whatever it says is checked before it
is used, and the files it names must lie in the bundle's own folder and have the size and checksum it says.
"""

import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ddnn.errors import BundleError
from ddnn.runtime.checks import is_finite
from ddnn.version import __version__

NAME = "manifest.json"
FORMAT = "ddnn-bundle"
VERSION = 1
IMAGES = "images"
LOGITS = "logits"
MOST_BYTES = 64 * 2**20
"""A larger manifest is not read."""
MOST_PIXELS = 8192
"""Longest side of an image that nets may be given; a batch of one takes 800 MB."""
_MOST = 2**63 - 1
"""Whole numbers beyond it are no count of anything."""

_FOR_PEOPLE = ("norm", "int8", "versions", "source")
"""What says where a bundle comes from; nothing here depends on it."""
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Part:
    """What one net adds to a cascade."""

    graph: str
    """Name of its file."""
    inputs: dict[str, str]
    """Tensor of the graph -> the feature of an earlier part, or `images`."""
    outputs: dict[str, str]
    """Tensor of the graph -> the feature that later parts start from."""
    macs: int
    """Multiply-accumulates of one image."""


@dataclass(frozen=True)
class Net:
    """One net of a bundle."""

    name: str
    depths: tuple[int, ...]
    """Blocks kept per stage."""
    graph: str
    """Name of its file."""
    macs: int
    """Multiply-accumulates of one image."""
    params: int
    top1: float | None
    """Share of the test images whose class is the most likely one; None where it was not measured."""
    top5: float | None
    cascade: Part | None


@dataclass(frozen=True)
class Input:
    """How an image becomes what the nets are given."""

    size: int
    """Side in pixels of the square that is given to the nets."""
    resize: int
    """Pixels that the shorter side is resized to before the centre crop."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]


@dataclass(frozen=True)
class File:
    """What a file must be."""

    sha256: str
    bytes: int


class Stamp(NamedTuple):
    """What a file that is opened later is known by; reading all of it again would take as long as loading."""

    inode: int
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Checked:
    """Files whose checksums were right."""

    bundle: Path
    stamps: Mapping[Path, Stamp]

    def unchanged(self) -> None:
        """`BundleError` where a file is not the one that was checked."""
        for path, stamp in self.stamps.items():
            try:
                same = _stamp(path.lstat()) == stamp
            except OSError:
                same = False
            if not same:
                raise BundleError(f"{path} has changed since it was loaded; load {self.bundle} again")


@dataclass(frozen=True)
class Manifest:
    """The content of a bundle."""

    folder: Path
    nets: dict[str, Net]
    """By name, shallow to deep."""
    input: Input
    classes: tuple[str, ...]
    files: dict[str, File]
    precision: str
    digest: str
    """Hex SHA-256 of the manifest, and thereby of the whole bundle."""

    def check_files(self, graphs: Iterable[str]) -> Checked:
        """Check these graphs and all files that are no graphs; `BundleError` names the first that is not as it was."""
        wanted = set(graphs)
        used = {name: file for name, file in self.files.items() if name in wanted or not name.endswith(".onnx")}
        checked = Checked(
            self.folder, {self.folder / name: check_file(self.folder / name, used[name]) for name in used}
        )
        for name in used:
            if name.endswith(".onnx"):
                self._check_sources(self.folder / name)
        checked.unchanged()
        return checked

    def _check_sources(self, graph: Path) -> None:
        """`BundleError` where a graph takes tensors from a file that is not checked."""
        from ddnn.runtime.graphs import files_of  # protobuf takes a while to load

        try:
            sources = files_of(graph.read_bytes())
        except OSError as error:
            raise BundleError(f"cannot read {graph}: {error.strerror}") from None
        except BundleError as error:
            raise BundleError(f"{graph} {error}; export the bundle again") from None
        if others := sorted(sources - {name for name in self.files if not name.endswith(".onnx")}):
            raise BundleError(
                f"{graph} takes weights from {others[0]!r}, which is none of the bundle's files; export it again"
            )


def checksum(content: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a manifest's content but for the checksum itself, wherever its lines break."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def printable(text: str) -> bool:
    """Whether a text can be shown: it has no control characters, line breaks or halves of characters."""
    return not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in text)


def read(folder: Path) -> Manifest:
    """Read and check the manifest of the bundle in `folder`. Raises `BundleError`."""
    path = folder / NAME
    try:
        if _status(path).st_size > MOST_BYTES:
            raise BundleError(f"{path} is too large for a manifest; export the bundle again")
        raw = path.read_bytes()
        content = json.loads(raw.decode())
    except FileNotFoundError:
        raise BundleError(
            f"{folder} is no bundle: it has no {NAME}; make one with: ddnn export RUN -o BUNDLE"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    except BundleError:
        raise
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}; export the bundle again") from None
    top = _Section(path, "", content)
    if top.get("format") != FORMAT:
        top.wrong("format", f"is {top.get('format')!r}, not {FORMAT!r}")
    version = top.whole("version")
    if version > VERSION:
        raise BundleError(
            f"{path} is of format {version}, made by a newer ddnn; this one, {__version__}, reads up to {VERSION}: "
            "update ddnn"
        )
    if "sha256" in top.content and top.content["sha256"] != checksum(top.content):
        raise BundleError(f"{path} is damaged or was changed: its checksum of itself differs; export the bundle again")
    top.only(["format", "version", "nets", "input", "classes", "files", "precision", "sha256", *_FOR_PEOPLE])
    files = {name: _file(top.section("files"), name) for name in top.section("files").content}
    nets: dict[str, Net] = {}
    for section in top.sections("nets"):
        net = _net(section, files, nets)
        nets[net.name] = net
    classes = tuple(top.texts("classes"))
    if len(set(classes)) != len(classes):
        top.wrong("classes", "names a class twice")
    if (precision := top.text("precision")) not in ("float32", "int8"):
        top.wrong("precision", f"is {precision!r}; allowed are float32 and int8")
    return Manifest(
        folder=folder,
        nets=nets,
        input=_input(top.section("input")),
        classes=classes,
        files=files,
        precision=precision,
        digest=hashlib.sha256(raw).hexdigest(),
    )


class _Section:
    """A part of the manifest and where it is; every getter raises `BundleError` for what cannot be."""

    def __init__(self, path: Path, where: str, content: Any) -> None:
        self.path = path
        self.where = where
        if not isinstance(content, dict):
            self.wrong("", "must be an object")
        self.content: dict[str, Any] = content

    def wrong(self, key: str, what: str) -> NoReturn:
        place = ".".join(filter(None, (self.where, key)))
        place = place if printable(place) else repr(place)  # a terminal would obey it
        raise BundleError(f"{self.path} cannot be used: {place + ' ' if place else 'it '}{what}")

    def only(self, keys: Iterable[str]) -> None:
        known = list(keys)
        for key in self.content:
            if key not in known:
                self.wrong(key, f"is unknown in format {VERSION}; known are {', '.join(known)}")

    def get(self, key: str) -> Any:
        if key not in self.content:
            self.wrong(key, "is missing")
        return self.content[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or not value:
            self.wrong(key, "must be a text")
        if not printable(value):
            self.wrong(key, f"is {value!r}; a name has no control characters")
        return str(value)

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            self.wrong(key, "must be a list of texts")
        for each in value:
            if not printable(each):
                self.wrong(key, f"has {each!r}; a name has no control characters")
        return list(value)

    def whole(self, key: str, least: int = 1, most: int = _MOST) -> int:
        value = self.get(key)
        if type(value) is not int or value < least:
            self.wrong(key, f"must be a whole number of at least {least}")
        if value > most:
            self.wrong(key, f"must be a whole number of at most {most}")
        return int(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count or not all(is_finite(each) for each in value):
            self.wrong(key, f"must be a list of {count} numbers")
        return tuple(float(each) for each in value)

    def share(self, key: str) -> float | None:
        value = self.content.get(key)
        if value is not None and not (is_finite(value) and 0 <= value <= 1):
            self.wrong(key, "must be a number from 0 to 1")
        return value

    def section(self, key: str) -> "_Section":
        return _Section(self.path, ".".join(filter(None, (self.where, key))), self.get(key))

    def sections(self, key: str) -> list["_Section"]:
        value = self.get(key)
        if not isinstance(value, list) or not value:
            self.wrong(key, "must be a list with at least one entry")
        return [_Section(self.path, f"{key}[{i}]", each) for i, each in enumerate(value)]

    def mapping(self, key: str) -> dict[str, str]:
        value = self.get(key)
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            self.wrong(key, "must be an object of texts")
        return dict(value)


def _file(files: _Section, name: str) -> File:
    if not _FILE.fullmatch(name):
        files.wrong(name, "is no plain file name; a bundle's files lie in its own folder")
    section = files.section(name)
    section.only(("sha256", "bytes"))
    checksum = section.text("sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", checksum):
        section.wrong("sha256", "must be 64 hexadecimal digits")
    return File(checksum, section.whole("bytes", least=0))


def _net(section: _Section, files: dict[str, File], shallower: dict[str, Net]) -> Net:
    section.only(["name", "depths", "graph", "macs", "params", "top1", "top5", "validation", "parity", "cascade"])
    name = section.text("name")
    if name in shallower:
        section.wrong("name", f"{name!r} is that of another net too")
    depths = section.get("depths")
    if not isinstance(depths, list) or not all(type(kept) is int and 0 < kept <= _MOST for kept in depths):
        section.wrong("depths", "must be a list of whole numbers")
    return Net(
        name=name,
        depths=tuple(depths),
        graph=_graph(section, files),
        macs=section.whole("macs", least=0),
        params=section.whole("params", least=0),
        top1=section.share("top1"),
        top5=section.share("top5"),
        cascade=_part(section.section("cascade"), files, shallower)
        if section.content.get("cascade") is not None
        else None,
    )


def _part(section: _Section, files: dict[str, File], shallower: dict[str, Net]) -> Part:
    section.only(["graph", "inputs", "outputs", "macs"])
    part = Part(
        _graph(section, files), section.mapping("inputs"), section.mapping("outputs"), section.whole("macs", least=0)
    )
    made = {feature for net in shallower.values() if net.cascade for feature in net.cascade.outputs.values()}
    for tensor, feature in part.inputs.items():
        if feature not in made | {IMAGES}:
            section.wrong(f"inputs.{tensor}", f"is the feature {feature!r}, which no shallower net makes")
    for tensor, feature in part.outputs.items():
        if feature in made | {IMAGES}:
            section.wrong(f"outputs.{tensor}", f"is the feature {feature!r}, which a shallower net makes already")
    if not part.inputs:
        section.wrong("inputs", "must name at least one tensor")
    return part


def _graph(section: _Section, files: dict[str, File]) -> str:
    name = section.text("graph")
    if name not in files or not name.endswith(".onnx"):
        section.wrong("graph", f"is {name!r}, which is no graph (.onnx) among the bundle's files")
    return name


def _input(section: _Section) -> Input:
    section.only(["size", "resize", "mean", "std", "channels", "interpolation"])
    if section.get("channels") != 3:
        section.wrong("channels", f"is {section.get('channels')!r}; this ddnn reads bundles for RGB images, 3 channels")
    if section.get("interpolation") != "bilinear":
        section.wrong("interpolation", f"is {section.get('interpolation')!r}; this ddnn resizes bilinearly only")
    size, std = section.whole("size", most=MOST_PIXELS), section.numbers("std", 3)
    if min(std) <= 0:
        section.wrong("std", "must be above 0")
    return Input(size, section.whole("resize", least=size, most=MOST_PIXELS), section.numbers("mean", 3), std)


def check_file(path: Path, file: File) -> Stamp:
    """Check size and checksum of a file; `BundleError` says how it differs."""
    if path.is_symlink():
        raise BundleError(f"{path} is a link; onnxruntime reads no weights through links: copy the file itself")
    try:
        _status(path)
        with path.open("rb") as opened:
            stamp = _stamp(os.fstat(opened.fileno()))
            size = stamp.bytes
            if size != file.bytes:
                what = "is truncated" if size < file.bytes else "is too long"
                raise BundleError(f"{path} {what}: {size} bytes instead of {file.bytes}; copy the bundle again")
            checksum = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; copy the whole bundle, or export it again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    if checksum != file.sha256:
        raise BundleError(f"{path} is damaged or was replaced: its checksum differs; copy the bundle again")
    return stamp


def _status(path: Path) -> os.stat_result:
    """Of a file; `BundleError` for anything else, such as a pipe, of which reading would never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is no file; copy the bundle again")
    return status


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)
