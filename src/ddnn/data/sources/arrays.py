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


def digits() -> Source:
    """The embedded set of scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)  # 0..16 as stored
    images = _Pixels(np.repeat(grey[..., None], 3, axis=3))
    return Source(tuple(map(str, found.target_names)), all_of(images, found.target))


def cifar(name: str) -> Source:
    """`cifar10` or `cifar100`, downloaded where it is not there yet. Raises `DataError` where that fails."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = Path(os.path.expanduser(os.environ.get("DDNN_DATA") or "~/.cache/ddnn"))
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
