"""From an image as it is stored to RGB pixels; what cannot be read is skipped, reported and counted."""

import logging
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from ddnn.errors import DataError

# Formats that PIL decodes by itself. Its others include some that start programs (EPS) or serve no photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

_log = logging.getLogger("ddnn.data")


class Reader(Protocol):
    """Images by number, not decoded before they are asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a report calls the image: its path, or its row."""

    def open(self, index: int) -> Image.Image:
        """The image with its header read; may raise anything where the file is broken."""


class UnreadableError(Exception):
    """An image cannot be decoded; the text says why."""


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
    try:
        with reader.open(index) as image:
            return image.size
    except Exception as error:  # see `rgb`
        raise UnreadableError(_reason(error)) from None


def rgb(reader: Reader, index: int) -> Image.Image:
    """The image upright, in mode RGB; 16-bit grey is scaled down, alpha is dropped. Raises `UnreadableError`."""
    try:
        with reader.open(index) as image:
            limit = Image.MAX_IMAGE_PIXELS  # PIL itself only warns up to twice this
            if limit and image.width * image.height > limit:
                raise UnreadableError(f"{image.width} x {image.height} pixels are more than PIL's limit of {limit}")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnreadableError:
        raise
    except Exception as error:  # PIL raises nearly anything on a broken file: SyntaxError, struct.error, IndexError
        raise UnreadableError(_reason(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255, which turns most pixels white
        grey = np.asarray(image).clip(0, 65535) // 256
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableError("pixels are floats without a known range; store 8 or 16 bits")
    if "transparency" in image.info:  # straight to RGB, PIL warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
