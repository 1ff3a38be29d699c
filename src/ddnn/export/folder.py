"""A folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddnn.errors import ExportError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when all is in it and on the disk; after an error it is removed.

    Raises `ExportError` where `path` exists already, but for an empty folder, or cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists already; give another place or remove it")
    place = path.absolute()
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
        beside.replace(place)
        _sync(place.parent)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove what exports to the same place that were killed have left."""
    for left in place.parent.glob(f".{place.name}.*.tmp"):
        number = left.name.removeprefix(f".{place.name}.").removesuffix(".tmp")
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
