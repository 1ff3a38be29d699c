"""Files and folders that are never half written."""

import contextlib
import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddnn.errors import ExportError, RunError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it holds, whatever happens, either what it held before or all of `content`."""
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync(path.parent)  # the rename itself
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


def fingerprint(path: Path) -> dict[str, Any]:
    """Checksum and size of a file, as manifests have them."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def cache_folder() -> Path:
    """Where what can be had again is kept: `$DDNN_CACHE`, else `ddnn` in the user's cache folder."""
    given = os.environ.get("DDNN_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ddnn")
    return Path(os.path.expanduser(given)) if given else usual


def check_writable(folder: Path) -> None:
    """`RunError` where no file can be written in a folder, which is made if need be: to be known before long work."""
    trial = _beside(folder / "trial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise RunError(f"cannot write in {folder}: {error.strerror}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when all is in it and on the disk; after an error it is removed.

    Raises `ExportError` where `path` exists already, but for an empty folder, or cannot be written.
    """
    check_free(path)
    place = Path(os.path.abspath(path))
    beside, lock = _beside(place), None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):  # by those that were killed
            if _TOKEN.fullmatch(left.name.removeprefix(f".{place.name}.").removesuffix(".tmp")):
                remove_unused(left)
        while lock is None:
            beside.mkdir()
            lock = hold(beside, alone=True)  # None where another swept it in this very moment
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
        if lock is not None:
            os.close(lock)


def check_free(path: Path) -> None:
    """`ExportError` where something is at `path` already; an empty folder is nothing, if another can take its place."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ExportError(f"{path} exists already and is not overwritten; give another place or remove it")
    if path.is_dir() and (os.path.ismount(path) or path.samefile(Path.cwd())):
        what = "a mount point" if os.path.ismount(path) else "the working directory"
        raise ExportError(
            f"{path} is {what}, which cannot be replaced; give a new folder in it, such as {path / 'new'}"
        )


def hold(folder: Path, *, alone: bool) -> int | None:
    """Lock a folder so that `remove_unused` leaves it alone until the handle is closed or the process ends.

    Returns None where the folder no longer exists.

    `alone`: nobody else may hold it; otherwise many may. Waits while another holds it the other way. The lock is one of
    the system's, so it does not matter in which container or on which host the other is. Where a file system or an
    operating system knows none, nothing is ever removed as unused.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    if folder.exists():
        return handle
    os.close(handle)
    return None


@contextlib.contextmanager
def held_alone(folder: Path, wait_s: float) -> Iterator[bool]:
    """Hold a folder as `hold` does; False where another still holds it after so many seconds."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _locked(handle, time.monotonic() + wait_s)
    finally:
        os.close(handle)


def _locked(handle: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        except OSError:  # there are no locks here
            return True
        else:
            return True


def remove_unused(folder: Path) -> None:
    """Remove a folder if nobody holds it, as far as that can be told and done."""
    if fcntl is None:
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # somebody does, or there are no locks here
        pass
    finally:
        os.close(handle)


_TOKEN = re.compile("[0-9a-f]{16}")


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that nobody else makes: equal process numbers are no rarity among containers."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
