"""Files that are never half written."""

import contextlib
import os
from pathlib import Path

from ddnn.errors import RunError


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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error
