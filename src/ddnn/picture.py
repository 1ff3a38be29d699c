"""From an image file to upright RGB pixels, the same in training and on a device."""

import os
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddnn.errors import DataError

# Formats that PIL decodes by itself. Its others include some that start programs (EPS) or serve no photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")


def images_under(folder: str, within: str = "", others: Counter[str] | None = None) -> list[str]:
    """Paths within `folder` of its images, at any depth and in any order; nothing hidden. Raises `OSError`.

    `others` counts the files that are no images by their names, by what these end with.
    """
    found: list[str] = []
    with os.scandir(os.path.join(folder, within)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += images_under(folder, f"{within}{entry.name}/", others)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(within + entry.name)
            elif others is not None:
                others[os.path.splitext(entry.name)[1].lower()] += 1
    return found


class UnreadableError(Exception):
    """An image cannot be decoded; the text says why."""


def size(open_image: Callable[[], Image.Image]) -> tuple[int, int]:
    """Width and height in pixels as the header has them. Raises `UnreadableError`."""
    try:
        with open_image() as image:
            return image.size
    except DataError:
        raise
    except Exception as error:  # see `rgb`
        raise UnreadableError(_reason(error)) from None


def rgb(open_image: Callable[[], Image.Image], most: int | None = None) -> Image.Image:
    """The image upright, in mode RGB; 16-bit grey is scaled down, alpha is dropped. Raises `UnreadableError`.

    `open_image` reads the header of an image whose pixels are not decoded yet. `most`: pixels, if not as many as PIL
    allows.
    """
    try:
        with open_image() as image:
            limit = most or Image.MAX_IMAGE_PIXELS  # PIL itself only warns up to twice this
            if limit and image.width * image.height > limit:
                whose = "the" if most else "PIL's"
                raise UnreadableError(f"{image.width} x {image.height} pixels are more than {whose} limit of {limit}")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (UnreadableError, DataError):  # the latter is not about the image: its host can't be reached
        raise
    except Exception as error:  # PIL raises nearly anything on a broken file: SyntaxError, struct.error, IndexError
        raise UnreadableError(_reason(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" and image.format == "TIFF":  # of PNG and PPM this mode means 16 bits
        raise UnreadableError("pixels are 32-bit integers without a known range; store 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255, which turns most pixels white
        grey = np.asarray(image).clip(0, 65535) // 256
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableError("pixels are floats without a known range; store 8 or 16 bits")
    if "transparency" in image.info:  # straight to RGB, PIL warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"
