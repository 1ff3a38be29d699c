"""Files and folders that are never half written."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ddnn.errors import ExportError, RunError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it holds, whatever happens, either what it held before or all of `content`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync(path.parent)  # the rename itself
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when all is in it and on the disk; after an error it is removed.

    Raises `ExportError` where `path` exists already, but for an empty folder, or cannot be written.
    """
    check_free(path)
    place = Path(os.path.abspath(path))
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
        _sync(place.parent)  # the rename itself
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_free(path: Path) -> None:
    """`ExportError` where something is at `path` already; an empty folder is nothing."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ExportError(f"{path} exists already and is not overwritten; give another place or remove it")


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
