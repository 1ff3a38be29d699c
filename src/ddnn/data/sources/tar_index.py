"""Where the images in a tar shard lie: read once from its headers, and kept in a cache folder.

`$DDNN_CACHE`, or else `ddnn` in `$XDG_CACHE_HOME` or `~/.cache`, holds an index per shard, by place, size, time of
change and label. A cache folder that can't be written is done without.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ddnn.data.sources import places
from ddnn.data.sources.found import LABEL_COLUMNS, Values
from ddnn.data.sources.texts import Texts
from ddnn.errors import DataError, RunError
from ddnn.files import cache_folder, write_atomic
from ddnn.picture import EXTENSIONS

VERSION = 2
LABELS = (".cls", ".json")
BLOCK = 512
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of a shard, in order. `starts`, `sizes`: int64 [n], bytes of the images; `names`: their members."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: Texts
    labels: Values


def index(place: str, label_column: str | None) -> Index:
    """The index of a shard, from the cache or anew. Raises `DataError` where it is no sound shard."""
    try:
        size, mark = places.signature(place)
    except OSError as error:
        raise DataError(f"data {place}: it cannot be read ({error.strerror})") from error
    where = place if places.is_remote(place) else os.path.abspath(place)
    key = sha256(json.dumps([VERSION, where, mark, label_column]).encode()).hexdigest()
    kept = cache_folder() / "tar-index" / f"{key[:32]}.safetensors"
    found = _load(kept)
    if found is None:
        found = _scan(place, size, label_column)
        _save(kept, found)
    return found


def _load(path: Path) -> Index | None:
    try:
        # not as npz: numpy reads a header by Python's parser, which fails now and then in threads under Python 3.11
        held = load(path.read_bytes())
        names = Texts(held["block"], held["name_starts"])
        distinct = json.loads(held["distinct"].tobytes())
        return Index(held["starts"], held["sizes"], names, Values(held["codes"], distinct))
    except (OSError, ValueError, KeyError, SafetensorError):  # none, or a damaged one
        return None


def _save(path: Path, index: Index) -> None:
    held: dict[str, NDArray[Any]] = {
        "starts": index.starts,
        "sizes": index.sizes,
        "block": index.names.block,
        "name_starts": index.names.starts,
        "codes": index.labels.codes,
        "distinct": np.frombuffer(json.dumps(index.labels.distinct).encode(), dtype=np.uint8),
    }
    with contextlib.suppress(RunError):
        write_atomic(path, save(held))


class _Bytes:
    """A file read from front to back, in large pieces where what is wanted lies close together."""

    def __init__(self, place: str, size: int) -> None:
        self.place, self.size = place, size
        self._start, self._held, self._last = 0, b"", 0
        self._piece, self._close = (2**23, 2**23) if places.is_remote(place) else (2**18, 2**14)

    def get(self, start: int, count: int) -> bytes:
        """Bytes from `start` on; fewer than `count` at the end of the file."""
        at = start - self._start
        if at < 0 or at + count > len(self._held):
            piece = self._piece if start - self._last <= self._close else 2**12
            try:
                self._held = places.read(self.place, start, min(self.size, start + max(count, piece)))
            except OSError as error:
                raise DataError(f"data {self.place}: it cannot be read ({error.strerror})") from error
            self._start, at = start, 0
        self._last = start + count
        return self._held[at : at + count]


def _members(file: _Bytes) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and bytes of every file in a tar. Raises `DataError` where it isn't whole."""
    position, name, size = 0, None, None  # the last two where an extended header gave them
    while True:
        head = file.get(position, BLOCK) if position < file.size else b""
        packed = next((how for begin, how in PACKED.items() if position == 0 and head.startswith(begin)), None)
        if packed is not None:
            raise DataError(
                f"data {file.place}: it is compressed by {packed}, so that no image can be read without all before it; "
                "uncompress it"
            )
        if len(head) < BLOCK:
            raise DataError(
                f"data {file.place}: the shard is cut short: it ends at byte {file.size} without an end mark"
            )
        if not head[0]:
            if head.count(0) == BLOCK:
                return
            raise DataError(f"data {file.place}: no tar header where one should be, at byte {position}")
        if head[257:262] != b"ustar" and not _sums_up(head):
            raise DataError(f"data {file.place}: no tar header where one should be, at byte {position}")
        kind = head[156:157]
        length = _number(head[124:136]) if size is None or kind in b"xgLK" else size
        content = position + BLOCK
        if content + length > file.size:
            shown = name or _text(head[:100])
            raise DataError(f"data {file.place}: the shard is cut short: {shown} goes on beyond byte {file.size}")
        if kind == b"L":
            name = _text(file.get(content, length))
        elif kind == b"x":
            given = dict(_records(file.get(content, length)))
            name = given.get("path", name)
            size = int(given["size"]) if "size" in given else size
        elif kind not in (b"g", b"K"):
            if kind in (b"0", b"\0", b"7"):
                before = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
                yield name or (f"{before}/" if before else "") + _text(head[:100]), content, length
            name = size = None
        position = content + -(-length // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    return os.fsdecode(field.split(b"\0", 1)[0])


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # more than its digits can hold: as a binary number
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    return int(field.strip(b" \0") or b"0", 8)


def _sums_up(head: bytes) -> bool:
    """Whether it is a header of the time before `ustar`."""
    try:
        return _number(head[148:156]) == sum(head[:148]) + 8 * 32 + sum(head[156:])
    except ValueError:
        return False


def _records(content: bytes) -> Iterator[tuple[str, str]]:
    while content:
        length = int(content.split(b" ", 1)[0])
        key, _, value = content[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        yield os.fsdecode(key), os.fsdecode(value)
        content = content[length:]


class _Sample:
    """What the members of one key have told so far."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.extensions: list[str] = []
        self.image: tuple[str, int, int] | None = None
        self.labels: dict[str, bytes] = {}


def _samples(file: _Bytes) -> Iterator[_Sample]:
    """Members that follow each other and are called alike up to the first dot. Raises `DataError` for others."""
    seen: set[str] = set()
    sample = _Sample("")
    for name, start, length in _members(file):
        folder, _, base = name.rpartition("/")
        if base.startswith((".", "__")):  # what some systems and libraries leave beside the samples
            continue
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}/{stem}" if folder else stem, f".{extension.lower()}"
        if key != sample.key:
            if sample.extensions:
                yield sample
            if key in seen:
                raise DataError(f"data {file.place}: two samples are called {key}, or its members lie apart")
            seen.add(key)
            sample = _Sample(key)
        if extension in sample.extensions:
            raise DataError(f"data {file.place}: sample {key} has two members {extension}")
        sample.extensions.append(extension)
        if extension in EXTENSIONS:
            if sample.image is not None:
                raise DataError(f"data {file.place}: sample {key} has two images, {', '.join(sample.extensions)}")
            sample.image = extension, start, length
        elif extension in LABELS:
            sample.labels[extension] = file.get(start, length)
    if sample.extensions:
        yield sample


def _scan(place: str, size: int, label_column: str | None) -> Index:
    starts, sizes, names, labels = [], [], [], []
    try:
        for sample in _samples(_Bytes(place, size)):
            if sample.image is None:
                others = ", ".join(sample.extensions)
                raise DataError(
                    f"data {place}: sample {sample.key} has no image ({' '.join(EXTENSIONS)}), only {others}"
                )
            extension, start, length = sample.image
            starts.append(start)
            sizes.append(length)
            names.append(sample.key + extension)
            labels.append(_label(place, sample, label_column))
    except ValueError as error:  # of `int`
        if isinstance(error, DataError):
            raise
        raise DataError(f"data {place}: a tar header is damaged ({error})") from error
    values = Values.of(labels)
    return Index(np.array(starts, np.int64), np.array(sizes, np.int64), Texts.of(names), values)


def _label(place: str, sample: _Sample, column: str | None) -> str:
    """The label as it is written. Raises `DataError` where there is none."""
    if ".cls" in sample.labels and column is None:
        written = sample.labels[".cls"].decode("utf-8", "replace").strip()
        if written:
            return written
        raise DataError(f"data {place}: the label of sample {sample.key}, its .cls, is empty")
    columns = (column,) if column else (*LABEL_COLUMNS, "cls")
    if ".json" in sample.labels:
        try:
            about = json.loads(sample.labels[".json"])
        except ValueError as error:
            raise DataError(f"data {place}: the .json of sample {sample.key} is none ({error})") from error
        given = next((about[key] for key in columns if isinstance(about, dict) and key in about), None)
        if isinstance(given, int | str) and not isinstance(given, bool):
            return str(given)
        raise DataError(
            f"data {place}: the .json of sample {sample.key} has no whole number or text called {' or '.join(columns)}"
            + ("" if column else "; name another by data.label_column")
        )
    raise DataError(
        f"data {place}: sample {sample.key} has no label, only {', '.join(sample.extensions)}; it must be in "
        + ("its .json" if column else "its .cls or its .json")
    )
