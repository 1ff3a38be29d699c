"""Held-out images of a finished run, as the runtime takes them. The one place where a device's verb meets training."""

from pathlib import Path

import numpy as np

from ddnn.checkpoint import RunFolder
from ddnn.data import Images
from ddnn.data.sets import Held
from ddnn.errors import RequestError
from ddnn.picture import UnreadableError
from ddnn.runtime.heldout import HeldOut, unread
from ddnn.runtime.manifest import Manifest
from ddnn.runtime.pixels import Pixels, square
from ddnn.trained import data_of


def test_and_validation(folder: Path, manifest: Manifest, limit: int) -> tuple[HeldOut, HeldOut]:
    """Validation images to choose by and test images to judge by, or halves of the test images where there are none.

    At most `limit` in all. Raises `RequestError` where the bundle is of other classes than the run.
    """
    dataset = data_of(RunFolder.open(folder))
    if dataset.classes != manifest.classes:
        raise RequestError(f"the run in {folder} has other classes than the bundle in {manifest.folder}")
    if dataset.validation is None:
        return _taken(dataset.test, "test images", dataset.name, manifest, limit).halves()
    validation = _taken(dataset.validation, "validation images", dataset.name, manifest, limit // 2)
    return validation, _taken(dataset.test, "test images", dataset.name, manifest, limit - limit // 2)


def _taken(images: Images, what: str, name: str, manifest: Manifest, limit: int) -> HeldOut:
    chosen = np.random.default_rng(0).permutation(len(images))[:limit]
    pixels: list[Pixels] = []
    kept: list[int] = []
    failed: list[str] = []
    for i in map(int, chosen):
        try:
            picture = images.picture(i)
        except UnreadableError as error:
            failed.append(f"number {i}: {error}")
            continue
        # what is held in memory is cut already
        pixels.append(np.asarray(picture) if isinstance(images, Held) else square(picture, manifest.input))
        kept.append(i)
    if not pixels:
        raise RequestError(f"data {name}: not one of its {what} can be read")
    about = f"{len(kept)} of the {len(images)} {what} of {name}"
    return HeldOut(
        np.stack(pixels), images.labels.numpy()[kept], about, unread(failed, len(kept), f"the {what} of {name}")
    )
