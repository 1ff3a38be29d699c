"""A data set ready to train on: split by class, and either decoded into memory or left to be read by workers."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median_low

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ddnn.data import decode, sources
from ddnn.data.augment import stream
from ddnn.data.sources import Labelled
from ddnn.errors import DataError
from ddnn.recipe import Data

Colour = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split. `labels`: int64 [n], on the CPU."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """One image in RGB. Raises `UnreadableError`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Held(Images):
    """Images in memory. `pixels`: uint8 [n, 3, S, S]."""

    pixels: Tensor

    def picture(self, index: int) -> Image.Image:
        """One image in RGB, S x S."""
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


@dataclass(frozen=True, eq=False)
class Stored(Images):
    """Images left where they are, to be decoded by `workers` processes."""

    files: Labelled
    skipped: decode.Skipped
    workers: int

    def picture(self, index: int) -> Image.Image:
        """One image in RGB, as large as it is stored. Raises `UnreadableError`."""
        return decode.rgb(self.files.reader, int(self.files.index[index]))

    def skip(self, index: int, reason: str) -> None:
        """Report an image that could not be read. Raises `DataError` once there are too many."""
        self.skipped.add(self.files.reader.name(int(self.files.index[index])), reason)


@dataclass(frozen=True, eq=False)
class DataSet:
    """What a recipe's data section stands for."""

    name: str
    """`data.source` as given."""
    classes: tuple[str, ...]
    image_size: int
    """S: side in pixels of the square images given to the network."""
    mean: Colour
    """Per channel, of the training images in [0, 1]; of a sample of them where they are not held in memory."""
    std: Colour
    """As `mean`."""
    train: Images
    validation: Images | None
    """None where `data.validation` is 0."""
    test: Images
    corrupt: tuple[str, ...]
    """Unreadable images found at loading, as 'path: reason'."""


def load(data: Data, seed: int) -> DataSet:
    """Find, split and, where they fit in `data.memory_mb`, decode the images.

    The split depends on the data, the fractions and `seed` alone. `data.limit` is applied to every part after the
    split. Raises `DataError` for whatever makes the data set unusable.
    """
    found = sources.find(data)
    train, test, validation = found.train, found.test, None
    if test is None:
        if data.test == 0:
            raise DataError(f"data {data.source}: it has no test split of its own, so data.test must be above 0")
        train, test = _set_aside(data, train, "test", data.test, seed)
    if data.validation > 0:
        train, validation = _set_aside(data, train, "validation", data.validation, seed)
    parts = {"training": train, "test": test} | ({"validation": validation} if validation else {})
    parts = {name: _limited(part, data.limit, seed, name) for name, part in parts.items()}

    skipped = decode.Skipped(data.source, data.corrupt_limit)
    size = data.image_size or _usual_size(data, parts["training"], skipped)
    hold = sum(len(part) for part in parts.values()) * 3 * size * size <= data.memory_mb * 2**20
    images: dict[str, Images] = {}
    for name, part in parts.items():
        images[name] = _held(part, size, skipped) if hold else Stored(part.labels, part, skipped, data.workers)
        if not len(images[name]):
            raise DataError(f"data {data.source}: not one of its {len(part)} {name} images can be read")
    measured = images["training"]
    if not isinstance(measured, Held):
        measured = _held(_spread(parts["training"], 1024), size, skipped)
    mean, std = _mean_and_std(measured.pixels)
    return DataSet(
        name=data.source,
        classes=found.classes,
        image_size=size,
        mean=mean,
        std=std,
        train=images["training"],
        validation=images.get("validation"),
        test=images["test"],
        corrupt=tuple(f"{name}: {reason}" for name, reason in skipped.reasons.items()),
    )


def _ranks(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image's place in a random order of its class, and the size of that class; both int64 [n]."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return ranks, sizes[labels]


def _set_aside(data: Data, images: Labelled, name: str, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Take `share` of each class away, rounded, yet at least one image and never all; keeps the order."""
    ranks, sizes = _ranks(images.labels, stream(seed, "split", name))
    counts = (sizes * share).round().clamp(min=1).minimum(sizes - 1)
    away = ranks < counts
    if not away.any():
        raise DataError(
            f"data {data.source}: no class has 2 images, so none can be set aside for the {name} (data.{name})"
        )
    return images.take(~away), images.take(away)


def _limited(images: Labelled, limit: int | None, seed: int, name: str) -> Labelled:
    """At most `limit` images, with an equal share of every class as far as that goes; keeps the order."""
    if limit is None or limit >= len(images):
        return images
    generator = stream(seed, "limit", name)
    ranks, sizes = _ranks(images.labels, generator)
    shuffled = torch.randperm(len(images), generator=generator)  # else the first classes would win every tie
    chosen = shuffled[(ranks / sizes)[shuffled].argsort(stable=True)[:limit]]
    return images.take(chosen.sort().values)


def _spread(images: Labelled, count: int) -> Labelled:
    """`count` of the images, at even distances."""
    return images.take(torch.linspace(0, len(images) - 1, min(count, len(images))).long())


def _usual_size(data: Data, images: Labelled, skipped: decode.Skipped) -> int:
    """The size that all of a sample have if they are square, else the median of their shorter sides; up to 224."""
    sizes = []
    for index in _spread(images, 256).index.tolist():
        try:
            sizes.append(decode.size(images.reader, index))
        except decode.UnreadableError as error:
            skipped.add(images.reader.name(index), str(error))
    if not sizes:
        raise DataError(f"data {data.source}: none of the training images looked at can be read; repair them")
    return min(median_low(map(min, sizes)), 224)


def _held(images: Labelled, size: int, skipped: decode.Skipped) -> Held:
    """Decode into memory: shorter side to `size`, centre crop. Unreadable images are left out."""
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    numbers = images.index.tolist()
    pixels = np.empty((len(numbers), 3, size, size), dtype=np.uint8)
    readable = torch.ones(len(numbers), dtype=torch.bool)

    def put(places: range) -> list[tuple[int, str]]:
        failed = []
        for place in places:
            try:
                picture = decode.rgb(images.reader, numbers[place])
                picture = picture if picture.size == (size, size) else fit(picture)
                pixels[place] = np.asarray(picture).transpose(2, 0, 1)
            except decode.UnreadableError as error:
                failed.append((place, str(error)))
        return failed

    # Threads do, as PIL decodes outside Python's lock; more than there are cores only wait for it.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [pool.submit(put, range(i, min(i + 128, len(numbers)))) for i in range(0, len(numbers), 128)]
        try:
            for place, reason in (failure for task in tasks for failure in task.result()):
                skipped.add(images.reader.name(numbers[place]), reason)
                readable[place] = False
        except DataError:
            pool.shutdown(cancel_futures=True)  # too many failures: the rest need not be tried
            raise
    kept = torch.from_numpy(pixels)
    return Held(images.labels[readable], kept if readable.all() else kept[readable])


def _mean_and_std(pixels: Tensor) -> tuple[Colour, Colour]:
    # From counts of the 256 values: exact, and without a copy of the pixels in floating point.
    counts = torch.stack([channel.reshape(-1).bincount(minlength=256) for channel in pixels.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    std = torch.where(variance > 0, variance.sqrt(), 1.0)  # a constant channel is only centred
    (r, g, b), (s, t, u) = mean.tolist(), std.tolist()
    return (r, g, b), (s, t, u)
