"""Images by number as they are stored; what cannot be read is skipped, reported and counted."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from PIL import Image
from torch import Tensor

from ddnn import picture
from ddnn.errors import DataError

_log = logging.getLogger("ddnn.data")


class Reader(Protocol):
    """Images by number, not decoded before they are asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a report calls the image: its path, or its row."""

    def open(self, index: int) -> Image.Image:
        """The image with its header read; may raise anything where the file is broken.

        A `DataError` is not about the image but about the way to it, and ends the training.
        """

    @property
    def chunks(self) -> Tensor | None:
        """First image of each chunk, int64 [m], rising from 0: what is read at once. None where each is by itself."""
        return None

    def identity(self) -> bytes:
        """What tells these images from others, wherever they lie, without reading them; empty where nothing does.

        It is made of their names within the data set, or of their sizes.
        """
        return b""

    def fetched(self, indices: Sequence[int]) -> "Reader":
        """A reader of the same images that has these at hand, fetched all at once from another machine."""
        return self


@dataclass(frozen=True, eq=False)
class AtHand(Reader):
    """Images of another reader, some of them fetched already, encoded."""

    reader: Reader
    encoded: Mapping[int, bytes]

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:  # noqa: D102
        return self.reader.name(index)

    def open(self, index: int) -> Image.Image:  # noqa: D102
        if index not in self.encoded:
            return self.reader.open(index)
        return Image.open(io.BytesIO(self.encoded[index]), formats=picture.FORMATS)


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
