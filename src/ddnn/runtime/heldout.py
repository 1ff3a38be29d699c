"""Labelled images that nothing was trained on, from a folder or a file, cut as the nets take them."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddnn.errors import RequestError
from ddnn.picture import images_under
from ddnn.runtime.manifest import Manifest
from ddnn.runtime.pixels import Pixels, from_file, squares

ALLOWED = (
    "a folder of class folders (<class>/*.jpg), or an .npz file with images, uint8 [N, H, W, 3], and labels, whole "
    "numbers [N]"
)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """N images and their classes."""

    pixels: Pixels
    """uint8 [N, S, S, 3]."""
    labels: npt.NDArray[np.int64]
    """[N]."""
    about: str
    """What they are, for a person."""
    unread: str = ""
    """How many more could not be read and why, for a person; "" where all could."""

    def __len__(self) -> int:
        return len(self.labels)

    def halves(self) -> tuple["HeldOut", "HeldOut"]:
        """Two halves at random, the same at every call."""
        order = np.random.default_rng(0).permutation(len(self))
        first, second = (
            HeldOut(self.pixels[i], self.labels[i], f"half of {self.about}", self.unread)
            for i in (order[::2], order[1::2])
        )
        return first, second


def read(path: Path, manifest: Manifest, limit: int) -> HeldOut:
    """At most `limit` labelled images at random, the same at every call. Raises `RequestError`."""
    if path.is_dir():
        return _folder(path, manifest, limit)
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path, manifest, limit)
    raise RequestError(f"{path} is no held-out data; allowed are {ALLOWED}")


def _folder(root: Path, manifest: Manifest, limit: int) -> HeldOut:
    folders = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    unknown = [each.name for each in folders if each.name not in manifest.classes]
    if unknown or not folders:
        what = f"its folder {unknown[0]} is no class of the bundle" if unknown else "it has no class folders"
        raise RequestError(f"{root} cannot be used: {what}; allowed are folders named {_some(manifest.classes)}")
    files: list[tuple[Path, int]] = []
    for folder in folders:
        try:
            found = sorted(images_under(str(folder)))
        except OSError as error:
            raise RequestError(f"cannot read {error.filename}: {error.strerror}") from None
        files += [(folder / name, manifest.classes.index(folder.name)) for name in found]
    pixels: list[Pixels] = []
    labels: list[int] = []
    failed: list[str] = []
    for number in np.random.default_rng(0).permutation(len(files)):
        if len(pixels) == limit:
            break
        path, label = files[number]
        try:
            pixels.append(from_file(path, manifest.input))
            labels.append(label)
        except RequestError as error:
            failed.append(str(error))
    if not pixels:
        raise RequestError(f"{root} cannot be used: {failed[0] if failed else 'its folders hold no images'}")
    about = f"{len(pixels)} of the {len(files)} images in {root}"
    return HeldOut(np.stack(pixels), np.array(labels, dtype=np.int64), about, unread(failed, len(pixels), str(root)))


def all_unread(*held: HeldOut) -> list[str]:
    """What `unread` says of several, each sentence once."""
    return list(dict.fromkeys(each.unread for each in held if each.unread))


def unread(reasons: Sequence[str], read: int, where: str) -> str:
    """The sentence on images that could not be read, beside so many that could; "" for none."""
    if not reasons:
        return ""
    return f"{len(reasons)} of {len(reasons) + read} images in {where} could not be read, the first: {reasons[0]}"


def _arrays(path: Path, manifest: Manifest, limit: int) -> HeldOut:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file")
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except Exception as error:  # NumPy and zipfile raise nearly anything on a damaged file
        reason = str(error).partition("\n")[0]
        raise RequestError(f"{path} cannot be read: {reason}; allowed is {ALLOWED}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise RequestError(f"{path}: images are {images.dtype} {list(images.shape)}; allowed is uint8 [N, H, W, 3]")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise RequestError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}; allowed are whole numbers [{len(images)}]"
        )
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise RequestError(f"{path}: labels must be numbers of the bundle's classes, 0 to {len(manifest.classes) - 1}")
    chosen = np.random.default_rng(0).permutation(len(images))[:limit]
    about = f"{len(chosen)} of the {len(images)} images in {path}"
    return HeldOut(squares(images[chosen], manifest.input), labels[chosen].astype(np.int64), about)


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (f" ... ({len(classes)} classes)" if len(classes) > 5 else "")
