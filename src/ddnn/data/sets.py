"""A data set ready to train on: split by class, and either decoded into memory or left to be read by workers."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from statistics import median_low
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddnn.cpus import available_cpus
from ddnn.data import decode, sources
from ddnn.data.augment import for_evaluation, stream
from ddnn.data.sources import Labelled
from ddnn.errors import DataError
from ddnn.picture import UnreadableError
from ddnn.recipe import Data

Colour = tuple[float, float, float]
RUNS = 64
"""Places at which a sample of images in chunks is taken."""


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split. `labels`: int64 [n], on the CPU.

    `chunk`: int64 [n], rising, which images are read at once, with `data.shuffle='chunks'`; else None.
    """

    labels: Tensor
    chunk: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """One image in RGB. Raises `UnreadableError`."""
        raise NotImplementedError

    def fetched(self, indices: Sequence[int]) -> "Images":
        """The same images, these of them at hand if they are on another machine."""
        return self

    def take(self, which: Tensor) -> Self:
        """The images at the places `which` (int64)."""
        return replace(self, labels=self.labels[which], chunk=None if self.chunk is None else self.chunk[which])


@dataclass(frozen=True, eq=False)
class Held(Images):
    """Images in memory. `pixels`: uint8 [n, 3, S, S]."""

    pixels: Tensor

    def picture(self, index: int) -> Image.Image:
        """One image in RGB, S x S."""
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())

    def take(self, which: Tensor) -> Self:
        """The images at the places `which` (int64)."""
        return replace(super().take(which), pixels=self.pixels[which])


@dataclass(frozen=True, eq=False)
class Stored(Images):
    """Images left where they are, to be decoded by `workers` processes.

    `side`: pixels of the shorter side that evaluation resizes them to before the centre crop.
    """

    files: Labelled
    skipped: decode.Skipped
    workers: int
    side: int

    def picture(self, index: int) -> Image.Image:
        """One image in RGB, as large as it is stored. Raises `UnreadableError`."""
        return decode.rgb(self.files.reader, int(self.files.index[index]))

    def fetched(self, indices: Sequence[int]) -> "Images":
        """The same images, these of them at hand if they are on another machine."""
        reader = self.files.reader.fetched(self.files.index[list(indices)].tolist())
        return self if reader is self.files.reader else replace(self, files=replace(self.files, reader=reader))

    def take(self, which: Tensor) -> Self:
        """The images at the places `which` (int64)."""
        return replace(super().take(which), files=self.files.take(which))

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
    """Per channel, of the training images in [0, 1]; of a sample of them where they are many."""
    std: Colour
    """As `mean`."""
    train: Images
    validation: Images | None
    """None where `data.validation` is 0."""
    test: Images
    corrupt: tuple[str, ...]
    """Unreadable images found at loading, as 'path: reason'."""
    fingerprint: str
    """`2-` and a hex SHA-256 of the classes and of which images, with which labels, are in each part.

    It is the same wherever they lie. Images are told apart by what their reader knows without reading them.
    """
    former: str = ""
    """As earlier versions made it: without names and sizes, and without the 2-."""

    def is_of(self, fingerprint: str) -> bool:
        """Whether it is the data set that had this fingerprint, of whichever version, as far as that one tells."""
        return fingerprint in (self.fingerprint, self.former)


def load(data: Data, seed: int, *, whole: bool = False) -> DataSet:
    """Find, split and, where they fit in `data.memory_mb`, decode the images.

    The split depends on the data, the fractions and `seed` alone. `data.limit` is applied to every part after the
    split. With `whole`, training images that are not S x S already are never held in memory, where they would lose
    what is outside the centre crop. Raises `DataError` for whatever makes the data set unusable.
    """
    found = sources.find(data)
    sources.check_for_training(data, found)
    train, test, validation = found.train, found.test, None
    if test is None:
        if data.test == 0:
            raise DataError(f"data {data.source}: it has no test split of its own, so data.test must be above 0")
        train, test = _set_aside(data, train, "test", data.test, seed)
    if data.validation > 0 and found.validation is not None:
        validation = found.validation
    elif data.validation > 0:
        train, validation = _set_aside(data, train, "validation", data.validation, seed)
    parts = {"training": train, "test": test} | ({"validation": validation} if validation else {})
    parts = {name: _limited(part, data.limit, seed, name) for name, part in parts.items()}
    former = _former(found.classes, parts)

    skipped = decode.Skipped(data.source, data.corrupt_limit)
    sizes = _sizes(data, parts["training"], skipped) if whole or not data.image_size else []
    size = data.image_size or _usual_size(sizes)
    stored = {"training"} if whole and any(each != (size, size) for each in sizes) else set()
    images = _images(data, parts, size, skipped, stored)
    mean, std = _mean_and_std(_measured(data, parts["training"], images["training"], size, skipped))
    return DataSet(
        name=data.source,
        classes=found.classes,
        image_size=size,
        mean=mean,
        std=std,
        train=images["training"],
        validation=images.get("validation"),
        test=images["test"],
        corrupt=_corrupt(skipped),
        fingerprint=_fingerprint(former, parts),
        former=former,
    )


def load_test(data: Data, *, classes: tuple[str, ...], image_size: int, mean: Colour, std: Colour) -> DataSet:
    """What a net trained on `classes` is evaluated on: all images of the test split or, without one, of the data set.

    Labels are numbers of `classes`, by name. The validation part is None, and the training part is the test part.
    Raises `DataError` where the data set has other classes than `classes`, though it need not have all of them.
    """
    found = sources.find(data.model_copy(update={"validation": 0.0}))
    unknown = [name for name in found.classes if name not in classes]
    if unknown:
        raise DataError(
            f"data {data.source}: it has the unknown classes {', '.join(unknown)}, expected are no others than "
            f"{', '.join(classes)}"
        )
    part = found.train if found.test is None else found.test
    numbers = torch.tensor([classes.index(name) for name in found.classes])
    parts = {"test": Labelled(part.reader, part.index, numbers[part.labels])}
    former = _former(classes, parts)
    skipped = decode.Skipped(data.source, data.corrupt_limit)
    test = _images(data, parts, image_size, skipped)["test"]
    return DataSet(
        name=data.source,
        classes=classes,
        image_size=image_size,
        mean=mean,
        std=std,
        train=test,
        validation=None,
        test=test,
        corrupt=_corrupt(skipped),
        fingerprint=_fingerprint(former, parts),
        former=former,
    )


def _images(
    data: Data, parts: Mapping[str, Labelled], size: int, skipped: decode.Skipped, stored: set[str] | None = None
) -> dict[str, Images]:
    """Each part, in memory where they fit in `data.memory_mb` together; the parts called `stored` never are."""
    held = parts.keys() - (stored or set())
    if sum(len(parts[name]) for name in held) * 3 * size * size > data.memory_mb * 2**20:
        held = set()
    images: dict[str, Images] = {}
    for name, part in parts.items():
        side = size if name == "training" else data.shorter_side(size)
        chunk = _chunk(part) if data.shuffle == "chunks" and part.reader.chunks is not None else None
        if name in held:
            images[name] = _held(part, size, side, skipped, chunk)
        else:
            images[name] = Stored(part.labels, part, skipped, data.workers, side, chunk=chunk)
        if not len(images[name]):
            raise DataError(f"data {data.source}: not one of its {len(part)} {name} images can be read")
    return images


def _corrupt(skipped: decode.Skipped) -> tuple[str, ...]:
    return tuple(f"{name}: {reason}" for name, reason in skipped.reasons.items())


def _fingerprint(former: str, parts: Mapping[str, Labelled]) -> str:
    """Of what is known before a single image is decoded."""
    digest = sha256(former.encode())
    for part in parts.values():
        digest.update(sha256(part.reader.identity()).digest())
    return f"2-{digest.hexdigest()}"


def _former(classes: tuple[str, ...], parts: Mapping[str, Labelled]) -> str:
    digest = sha256(json.dumps(classes).encode())
    for name, part in parts.items():
        digest.update(json.dumps([name, len(part), len(part.reader)]).encode())
        for numbers in (part.labels, part.index):
            digest.update(numbers.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


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


def _chunk(images: Labelled) -> Tensor:
    """Number of the chunk that each image is in."""
    starts = images.reader.chunks
    assert starts is not None
    return torch.searchsorted(starts, images.index, right=True) - 1


def _spread(data: Data, images: Labelled, count: int) -> Labelled:
    """`count` of the images, at even distances; of images in chunks, those at the beginning of a few of them."""
    if count >= len(images):
        return images
    if data.shuffle == "global":
        return images.take(torch.linspace(0, len(images) - 1, count).long())
    runs = min(RUNS, count)
    starts = torch.linspace(0, len(images) - count // runs, runs, dtype=torch.float64).long()
    return images.take((starts[:, None] + torch.arange(count // runs)).flatten().unique())


def _sizes(data: Data, images: Labelled, skipped: decode.Skipped) -> list[tuple[int, int]]:
    """Width and height of a sample."""
    sizes = []
    for index in _spread(data, images, 256).index.tolist():
        try:
            sizes.append(decode.size(images.reader, index))
        except UnreadableError as error:
            skipped.add(images.reader.name(index), str(error))
    if not sizes:
        raise DataError(f"data {data.source}: none of the training images looked at can be read; repair them")
    return sizes


def _usual_size(sizes: list[tuple[int, int]]) -> int:
    """The size that all have if they are square, else the median of their shorter sides; up to 224."""
    return min(median_low(map(min, sizes)), 224)


def _held(images: Labelled, size: int, side: int, skipped: decode.Skipped, chunk: Tensor | None = None) -> Held:
    """Decode into memory: shorter side to `side`, centre crop to `size`. Unreadable images are left out."""
    fit = for_evaluation(size, side)
    numbers = images.index.tolist()
    pixels = np.empty((len(numbers), 3, size, size), dtype=np.uint8)
    readable = torch.ones(len(numbers), dtype=torch.bool)

    def put(places: range) -> list[tuple[int, str]]:
        failed = []
        reader = images.reader.fetched([numbers[place] for place in places])
        for place in places:
            try:
                picture = decode.rgb(reader, numbers[place])
                fits = picture.size == (size, size) == (side, side)
                pixels[place] = np.asarray(picture).transpose(2, 0, 1) if fits else fit(picture).numpy()
            except UnreadableError as error:
                failed.append((place, str(error)))
        return failed

    # Threads do, as PIL decodes outside Python's lock; more than there are cores only wait for it.
    with ThreadPoolExecutor(available_cpus()) as pool:
        tasks = [pool.submit(put, range(i, min(i + 128, len(numbers)))) for i in range(0, len(numbers), 128)]
        try:
            for place, reason in (failure for task in tasks for failure in task.result()):
                skipped.add(images.reader.name(numbers[place]), reason)
                readable[place] = False
        except DataError:
            pool.shutdown(cancel_futures=True)  # too many failures: the rest need not be tried
            raise
    kept = Held(images.labels, torch.from_numpy(pixels), chunk=chunk)
    return kept if readable.all() else kept.take(readable)


def _measured(data: Data, part: Labelled, images: Images, size: int, skipped: decode.Skipped) -> Tensor:
    """Pixels of the training images, or of a sample where they are many: the same ones in memory or not."""
    most = 2**28 // (3 * size * size)  # all of CIFAR
    few = len(part) > max(1024, most)  # an eighth of that is exact to a thousandth of the range already
    if not isinstance(images, Held) or few:
        count = max(1024, most // 8) if few else len(part)
        images = _held(_spread(data, part, count), size, size, skipped)
    if not len(images):
        raise DataError(f"data {data.source}: none of the training images looked at can be read; repair them")
    return images.pixels


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
