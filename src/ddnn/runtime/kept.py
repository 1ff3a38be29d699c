"""What a bundle keeps of a machine: where it lies, how it is read, when it was measured."""

import datetime
import stat
from pathlib import Path

from ddnn.errors import BundleError
from ddnn.runtime.machine import Machine


def machine_folder(bundle: Path, machine: Machine) -> Path:
    """Where a bundle keeps what belongs to a machine."""
    return bundle / "machines" / machine.key


def text_of(path: Path) -> str:
    """What a file says that was measured earlier. Raises `OSError`, `BundleError` for what is no file."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise BundleError(f"{path} is no file; remove it and measure again")
    return path.read_text(encoding="utf-8")


def now() -> str:
    """Date and time here."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
