"""Images on a device: bit for bit what evaluation in training makes of them; anything else is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bundles
import ddnn
from ddnn import picture as training
from ddnn.data.augment import for_evaluation, normalise
from ddnn.errors import RequestError
from ddnn.runtime.manifest import Input
from ddnn.runtime.pixels import batch_of, normalised, open_rgb, square


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


SIZES = [(32, 32), (33, 47), (47, 33), (8, 200), (201, 9), (64, 63), (100, 75), (31, 31), (1, 5), (223, 224)]


@pytest.mark.parametrize("resize", [32, 36, 37, 64])
@pytest.mark.parametrize("size", SIZES)
def test_cutting_is_that_of_training(size: tuple[int, int], resize: int) -> None:
    image = picture(*size)
    expected = for_evaluation(32, resize)(image)
    assert np.array_equal(square(image, Input(32, resize, (0,) * 3, (1,) * 3)), expected.permute(1, 2, 0).numpy())


def test_normalising_is_that_of_training() -> None:
    """Bitwise, for every value there is."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    expected = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), mean, std)
    assert np.array_equal(normalised(pixels, Input(16, 16, mean, std)), expected.numpy())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_decoding_is_that_of_training(tmp_path: Path, mode: str) -> None:
    image = picture(19, 11, mode)
    path = tmp_path / ("x.jpg" if mode in ("RGB", "L", "CMYK") else "x.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(path, **({"exif": exif} if path.suffix == ".jpg" else {}))
    assert np.array_equal(
        np.asarray(open_rgb(path)), np.asarray(training.rgb(lambda: Image.open(path, formats=training.FORMATS)))
    )


def test_files_and_arrays_come_to_the_same(tmp_path: Path) -> None:
    model = ddnn.load(bundles.make(tmp_path / "bundle", resize=10))
    image = picture(23, 17)
    image.save(tmp_path / "x.png")
    batch = np.asarray(image)[None]
    expected = model.read(tmp_path / "x.png")[None]
    assert np.array_equal(batch_of(batch, model.manifest.input), expected)
    for name in model.depths:
        assert np.array_equal(model(batch, name), model(expected, name))
        assert np.array_equal(model(batch[:, ::-1, :, :], name), model(np.ascontiguousarray(batch[:, ::-1]), name))


WANTED = Input(8, 8, bundles.MEAN, bundles.STD)
ALLOWED = r"allowed are uint8 \[N, H, W, 3\], raw RGB pixels, and float32 \[N, 3, 8, 8\], normalised"
NAN = np.zeros((3, 3, 8, 8), np.float32)
NAN[1, 2, 3, 4] = np.nan
INF = np.zeros((3, 3, 8, 8), np.float32)
INF[2, 0, 0, 0] = -np.inf

ARRAYS = {
    "grey": (np.zeros((2, 8, 8, 1), np.uint8), rf"uint8 \[2, 8, 8, 1\]; {ALLOWED}"),
    "alpha": (np.zeros((2, 8, 8, 4), np.uint8), r"uint8 \[2, 8, 8, 4\]"),
    "channels first": (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \[2, 3, 8, 8\]"),
    "one image": (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]"),
    "no pixels": (np.zeros((1, 0, 8, 3), np.uint8), r"uint8 \[1, 0, 8, 3\]"),
    "one channel": (np.zeros((2, 1, 8, 8), np.float32), r"float32 \[2, 1, 8, 8\]"),
    "another size": (np.zeros((2, 3, 9, 8), np.float32), r"float32 \[2, 3, 9, 8\]"),
    "one float image": (np.zeros((3, 8, 8), np.float32), r"float32 \[3, 8, 8\]"),
    "channels last": (np.zeros((2, 8, 8, 3), np.float32), r"float32 \[2, 8, 8, 3\]"),
    "doubles": (np.zeros((2, 3, 8, 8)), r"float64 \[2, 3, 8, 8\]"),
    "whole numbers": (np.zeros((2, 8, 8, 3), np.int64), r"int64 \[2, 8, 8, 3\]"),
    "objects": (np.array([None]), r"object \[1\]"),
    "nothing": (None, r"object \[\]"),
    "text": ("photo.jpg", "the images are <U9"),
    "ragged": ([np.zeros((2, 2)), np.zeros(3)], "the images are no array"),
    "NaN": (NAN, "image 1 of the batch has pixels that are NaN or infinite"),
    "infinite": (INF, "image 2 of the batch has pixels that are NaN or infinite"),
    "raw pixels as floats": (
        np.full((1, 3, 8, 8), 200, np.float32),
        "reach 200, while normalised ones lie within 3 of 0; give raw pixels as uint8, or normalise",
    ),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_other_arrays_are_refused(tmp_path: Path, what: str) -> None:
    images, sentence = ARRAYS[what]
    model = ddnn.load(bundles.make(tmp_path / "bundle"))
    for call in (model, lambda images: model.cascade(images, 0.5)):
        with pytest.raises(RequestError, match=sentence):
            call(images)


def test_torch_tensors_are_arrays_too() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert np.array_equal(batch_of(images, WANTED), images.numpy())


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size, and is small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


FILES = {
    "text": (b"no image", "cannot be read as an image: it is none of JPEG, PNG"),
    "empty": (b"", "cannot be read as an image: it is none of JPEG, PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as an image"),
    "bomb": (png_of(60_000, 60_000), r"cannot be read as an image: .*3600000000 pixels"),
    "small bomb": (png_of(10_000, 10_000), "cannot be read as an image: 10000 x 10000 pixels are more than"),
    "cut short": (png_of(50, 50)[:60], "cannot be read as an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # up to twice the limit PIL warns only
@pytest.mark.parametrize("what", FILES)
def test_files_that_are_no_images_are_named(tmp_path: Path, what: str) -> None:
    content, sentence = FILES[what]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=rf"x.png {sentence}"):
        open_rgb(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere.png cannot be read as an image: FileNotFoundError"):
        open_rgb(tmp_path / "nowhere.png")
    with pytest.raises(RequestError, match=r"cannot be read as an image: IsADirectoryError"):
        open_rgb(tmp_path)


def test_a_bomb_of_another_shape_is_refused() -> None:
    """Few pixels, but a great many once the shorter side is resized."""
    with pytest.raises(RequestError, match="1 x 1000000 pixels is too long and narrow"):
        square(Image.new("RGB", (1, 1_000_000)), Input(224, 256, (0,) * 3, (1,) * 3))
