"""Files that lie on this machine or, by fsspec, anywhere else: listed, measured and read in parts.

A place is a path, or a URL such as ``s3://bucket/folder`` or ``https://host/train-{000..146}.tar``. Whatever goes wrong
on the way to another machine is a `DataError`, after a few tries; it never counts as an unreadable image.
"""

import itertools
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from ddnn.errors import DataError

TRIES = 4
PAUSE = 0.5
"""Seconds before the second try; doubled before each of the others."""
PATIENCE = 30
"""Seconds that a host reached by http may stay silent."""

Part = tuple[str, int, int]
"""Place, first byte, and the byte after the last."""


def is_remote(place: str) -> bool:
    """Whether it is a URL."""
    return "://" in place


def expanded(place: str) -> list[str]:
    """The places that braces stand for: ``{0..9}`` counts, with leading zeros where given; ``{train,val}`` lists."""
    braces = re.search(r"\{([^{}]*)\}", place)
    if braces is None:
        return [place]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        options = [f"{number:0{width}}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = braces[1].split(",")
    rests = expanded(place[braces.end() :])
    return [place[: braces.start()] + option + rest for option, rest in itertools.product(options, rests)]


def files_under(place: str) -> list[str]:
    """Paths of all files below a folder on another machine, sorted. Raises `DataError` where it can't be listed."""
    filesystem, path = _reached(place)
    found = tried(place, "listed", lambda: filesystem.find(path))
    if not found and place.startswith("http"):  # what it says of a host that can't be reached as well
        read(place)
    return sorted(each.removeprefix(path).lstrip("/") for each in found)


def signature(place: str) -> tuple[int, str]:
    """Bytes of a file, and a text that changes when it is written again."""
    if not is_remote(place):
        about = os.stat(place)
        return about.st_size, f"{about.st_size} {about.st_mtime_ns}"
    filesystem, path = _reached(place)
    about = tried(place, "read", lambda: filesystem.info(path))
    if about.get("size") is None:
        raise DataError(f"data {place}: its host does not say how large it is, so no part of it can be asked for")
    marks = (about.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"))
    return int(about["size"]), " ".join(str(mark) for mark in (about["size"], *marks) if mark is not None)


def read(place: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes from `start` up to `stop`, or all. Raises `OSError` of a local file, `DataError` of another machine's."""
    if is_remote(place):
        filesystem, path = _reached(place)
        got = tried(place, "read", lambda: filesystem.cat_file(path, start=start or None, end=stop))
        return _whole(place, got, None if stop is None else stop - start)
    handle = os.open(place, os.O_RDONLY)  # opened anew each time: no state that workers would share
    try:
        return os.pread(handle, (os.fstat(handle).st_size if stop is None else stop) - start, start)
    finally:
        os.close(handle)


def read_many(parts: Sequence[Part]) -> list[bytes]:
    """Several parts of files of one other machine, asked for at once; those that fail are tried again one by one."""
    filesystem, _ = _reached(parts[0][0])
    paths = [filesystem._strip_protocol(place) for place, _, _ in parts]
    starts, stops = [start for _, start, _ in parts], [stop for _, _, stop in parts]
    got = filesystem.cat_ranges(paths, starts, stops, on_error="return")
    return [
        _whole(place, one, stop - start) if isinstance(one, bytes) else read(place, start, stop)
        for (place, start, stop), one in zip(parts, got, strict=True)
    ]


def read_whole(places: Sequence[str]) -> list[bytes]:
    """Several whole files of one other machine, asked for at once."""
    filesystem, _ = _reached(places[0])
    paths = [filesystem._strip_protocol(place) for place in places]
    got = filesystem.cat(paths, on_error="return") if len(paths) > 1 else {}
    return [
        got[path] if isinstance(got.get(path), bytes) else read(place)
        for place, path in zip(places, paths, strict=True)
    ]


def opened(place: str) -> Any:
    """A file of another machine, open for reading."""
    filesystem, path = _reached(place)
    return tried(place, "opened", lambda: filesystem.open(path, "rb"))


def _reached(place: str) -> tuple[Any, str]:
    """The file system of a URL, and its name for the place; fsspec keeps one per process."""
    import fsspec

    protocol = place.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
        }
    try:
        filesystem, path = fsspec.core.url_to_fs(place, **options)
    except ImportError as error:
        raise DataError(
            f"data.source={place!r}: fsspec needs another package for {protocol}:// ({error}); install it"
        ) from error
    except ValueError as error:
        raise DataError(
            f"data.source={place!r}: {error}; allowed are https://, s3://, gs://, hf:// and others that fsspec knows"
        ) from error
    return filesystem, path


def tried(place: str, what: str, action: Callable[[], Any]) -> Any:
    """Its result, after at most `TRIES` tries. A file that is not there is not asked for twice.

    What lies on this machine is tried once, and its errors are whoever's asked.
    """
    if not is_remote(place):
        return action()
    for number in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            raise DataError(f"data {place}: it cannot be {what} ({type(error).__name__}: {error})") from error
        except Exception as error:  # each file system has its own errors
            if number == TRIES - 1:
                raise DataError(
                    f"data {place}: it cannot be {what} after {TRIES} tries ({type(error).__name__}: {error}); "
                    "check the address, the network and your credentials"
                ) from error
            time.sleep(PAUSE * 2**number)
    raise AssertionError


def _whole(place: str, got: bytes, size: int | None) -> bytes:
    if size is not None and len(got) != size:
        more = len(got) > size
        raise DataError(
            f"data {place}: {size} bytes were asked for and {len(got)} came; "
            + ("its server does not serve parts of a file (range requests)" if more else "the file is cut short")
        )
    return got
