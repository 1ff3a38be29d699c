"""SIGTERM, by which a scheduler takes a machine back: the training keeps a checkpoint and ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from ddnn.errors import Preempted
from ddnn.wording import resuming


class _AtOnce(BaseException):
    """Raised wherever the process happens to be, so nothing that handles errors may take it for one."""


class Notice:
    """Whether the process was asked to end. Elsewhere than inside `held_back` it then ends at once."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.given = False
        self._held_back = False

    def take(self, *_signal: object) -> None:
        """The signal's handler."""
        self.given = True
        if not self._held_back:
            raise _AtOnce

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """For work that looks at `given` itself, as soon as it can stop without loss."""
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False

    def end(self, kept: str) -> None:
        """Raise `Preempted`; `kept` says what was saved just now."""
        raise Preempted(f"stopped by SIGTERM{kept}; go on with: {resuming(self.run)}")


@contextlib.contextmanager
def heeded(run: Path) -> Iterator[Notice]:
    """Heed SIGTERM while this lasts; does nothing outside of the main thread, where Python has no signals."""
    notice = Notice(run)
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    before = signal.signal(signal.SIGTERM, notice.take)
    try:
        yield notice
    except _AtOnce:
        notice.end("")
    finally:
        signal.signal(signal.SIGTERM, before)
