"""Images that are arrays already: the digits, and CIFAR as torchvision downloads it."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddnn.data.decode import Reader
from ddnn.data.sources.found import Source, all_of
from ddnn.errors import DataError
from ddnn.files import cache_folder


@dataclass(frozen=True, eq=False)
class _Pixels(Reader):
    """Decoded images, uint8 [n, height, width, 3]."""

    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


_DIGITS = Path(__file__).parents[1] / "digits.npz"
"""1797 handwritten digits of 8 x 8 pixels from 0 to 16, in the order of `sklearn.datasets.load_digits`.

The test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak 1998, UCI Machine Learning
Repository, doi 10.24432/C50P49, CC BY 4.0). Kept here because importing scikit-learn takes seconds.
"""


def digits() -> Source:
    """The embedded set, for a first try."""
    with np.load(_DIGITS) as stored:
        images, classes = stored["images"], stored["classes"]
    grey = np.rint(images * (255 / 16)).astype(np.uint8)
    return Source(tuple(map(str, range(10))), all_of(_Pixels(np.repeat(grey[..., None], 3, axis=3)), classes))


def cifar(name: str) -> Source:
    """`cifar10` or `cifar100`, downloaded where it is not there yet. Raises `DataError` where that fails."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    given = os.environ.get("DDNN_DATA")
    root = Path(os.path.expanduser(given)) if given else cache_folder()
    try:
        parts = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data {name}: no folder {name} in the working folder or in $DDNN_DATA "
            f"({os.environ.get('DDNN_DATA') or 'not set'}), and the download to {root} failed ({error}); set DDNN_DATA "
            f"to a folder that holds {name}/ with class folders, parquet files or tar shards"
        ) from error
    train, test = (all_of(_Pixels(part.data), part.targets) for part in parts)
    return Source(tuple(parts[0].classes), train, test)
