"""From images to what the nets are given: the same numbers, bit for bit, as evaluation in training has them."""

import io
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddnn import picture
from ddnn.errors import RequestError
from ddnn.runtime.manifest import Input

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_BEYOND = 10
"""Normalised pixels this many times beyond the largest there can be are no normalised pixels."""


def open_rgb(path: str | Path) -> Image.Image:
    """The image in a file, upright, in RGB. Raises `RequestError` for what is none, or larger than PIL allows."""
    return _opened(path, str(path))


def from_bytes(content: bytes, wanted: Input, most: int) -> Pixels:
    """The image in the bytes of a file as `square` cuts it, which may have `most` pixels. Raises `RequestError`."""
    return square(_opened(io.BytesIO(content), "the body", most), wanted, most=most)


def _opened(file: str | Path | BinaryIO, what: str, most: int | None = None) -> Image.Image:
    try:
        return picture.rgb(partial(Image.open, file, formats=picture.FORMATS), most)
    except picture.UnreadableError as error:
        raise RequestError(f"{what} cannot be read as an image: {error}") from None


def from_file(path: str | Path, wanted: Input) -> Pixels:
    """The image in a file as `square` cuts it. Raises `RequestError`, which names the file."""
    return square(open_rgb(path), wanted, f"{path}: an image")


def square(image: Image.Image, wanted: Input, what: str = "an image", most: int | None = None) -> Pixels:
    """The middle of an image in RGB, its shorter side resized to `wanted.resize`: uint8 [S, S, 3].

    Raises `RequestError` for one too long and narrow, calling it `what`: resized, it would have more pixels than PIL
    allows, or than `most`.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(wanted.resize * long / short)
    limit = most or Image.MAX_IMAGE_PIXELS
    if limit and wanted.resize * longer > limit:
        raise RequestError(f"{what} of {width} x {height} pixels is too long and narrow to be resized; crop it")
    size = (wanted.resize, longer) if width <= height else (longer, wanted.resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - wanted.size) / 2) for side in size)
    return np.asarray(image.crop((left, top, left + wanted.size, top + wanted.size)))


def normalised(pixels: Pixels, wanted: Input) -> Floats:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S]: (x / 255 - mean) / std by channel."""
    scale = np.array([1 / (255 * s) for s in wanted.std], dtype=np.float32).reshape(3, 1, 1)
    shift = np.array([-m / s for m, s in zip(wanted.mean, wanted.std, strict=True)], dtype=np.float32).reshape(3, 1, 1)
    batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    batch *= scale
    batch += shift
    return batch


def squares(pixels: Pixels, wanted: Input) -> Pixels:
    """Raw pixels, uint8 [N, H, W, 3], to uint8 [N, S, S, 3]."""
    if pixels.shape[1:3] == (wanted.size, wanted.size) == (wanted.resize, wanted.resize):
        return pixels
    cut = [square(Image.fromarray(np.ascontiguousarray(each)), wanted) for each in pixels]
    return np.stack(cut) if cut else np.empty((0, wanted.size, wanted.size, 3), dtype=np.uint8)


def batch_of(images: Any, wanted: Input) -> Floats:
    """What a caller gives to a model, as float32 [N, 3, S, S], checked. Raises `RequestError`.

    Allowed are uint8 [N, H, W, 3], raw RGB pixels, and float32 [N, 3, S, S], normalised.
    """
    size = wanted.size
    allowed = f"allowed are uint8 [N, H, W, 3], raw RGB pixels, and float32 [N, 3, {size}, {size}], normalised"
    try:
        array = np.asarray(images)
    except Exception as error:  # whatever refuses to be an array
        raise RequestError(f"the images are no array ({type(error).__name__}: {error}); {allowed}") from None
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3 and min(array.shape[1:3]) > 0:
        return normalised(squares(array, wanted), wanted)
    if array.dtype != np.float32 or array.shape[1:] != (3, size, size):
        raise RequestError(f"the images are {array.dtype} {list(array.shape)}; {allowed}")
    batch: Floats = np.ascontiguousarray(array)
    if len(batch):
        largest = float(np.maximum(batch.max(), -batch.min()))  # NaN if one pixel is
        if not np.isfinite(largest):
            bad = np.flatnonzero(~np.isfinite(batch).all(axis=(1, 2, 3)))
            raise RequestError(f"image {bad[0]} of the batch has pixels that are NaN or infinite")
        edge = max(max(abs(m / s), abs((1 - m) / s)) for m, s in zip(wanted.mean, wanted.std, strict=True))
        if largest > _BEYOND * edge:
            raise RequestError(
                f"the float32 images reach {largest:.4g}, while normalised ones lie within {edge:.3g} of 0; give raw "
                "pixels as uint8, or normalise"
            )
    return batch
