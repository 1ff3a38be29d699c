"""Images by number as they are stored; what cannot be read is skipped, reported and counted."""

import logging
from functools import partial
from typing import Protocol

from PIL import Image

from ddnn import picture
from ddnn.errors import DataError

_log = logging.getLogger("ddnn.data")


class Reader(Protocol):
    """Images by number, not decoded before they are asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a report calls the image: its path, or its row."""

    def open(self, index: int) -> Image.Image:
        """The image with its header read; may raise anything where the file is broken."""


class Skipped:
    """The images of one data set that could not be read, each counted once."""

    def __init__(self, source: str, limit: int) -> None:
        self._source, self._limit = source, limit
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Log and count one image. Raises `DataError` once there are more than the limit."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        _log.warning("skipped unreadable image %s: %s", name, reason)
        if len(self.reasons) > self._limit:
            first = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3])
            raise DataError(
                f"data {self._source}: {len(self.reasons)} unreadable images so far, more than "
                f"data.corrupt_limit={self._limit} allows, the first: {first}; repair or remove them, or raise "
                "data.corrupt_limit"
            )


def size(reader: Reader, index: int) -> tuple[int, int]:
    """Width and height in pixels as the header has them. Raises `UnreadableError`."""
    return picture.size(partial(reader.open, index))


def rgb(reader: Reader, index: int) -> Image.Image:
    """The image upright, in mode RGB; 16-bit grey is scaled down, alpha is dropped. Raises `UnreadableError`."""
    return picture.rgb(partial(reader.open, index))
