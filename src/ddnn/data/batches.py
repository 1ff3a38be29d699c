"""Batches for training and evaluation, on the device, normalised."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from ddnn.data import augment
from ddnn.data.order import epoch_order
from ddnn.data.sets import DataSet, Held, Images, Stored
from ddnn.errors import DataError
from ddnn.picture import UnreadableError
from ddnn.recipe import Recipe


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """Whole batches in an epoch; the images left over sit this epoch out. Raises `DataError` if there is none."""
    if len(images) < batch_size:
        raise DataError(f"train.batch_size={batch_size} is more than the {len(images)} training images; lower it")
    return len(images) // batch_size


def train_batches(
    dataset: DataSet,
    recipe: Recipe,
    *,
    epoch: int,
    start: int = 0,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches `start`, `start` + 1, ... of one epoch: a function of the recipe and the epoch, wherever it starts.

    Yields images, float32 [B, 3, S, S], in the memory format of `train.channels_last`, and targets: int64 [B], or class
    probabilities float32 [B, classes] under mixup and cutmix. A batch has fewer images where some cannot be read.
    With `part`, (k, n), these are the images that the k-th of n processes takes of each batch: the same ones, changed
    in the same way, as a single process has at `own_rows`. Only mixup and cutmix then mix within the part.
    Raises `DataError` where there are fewer images than a batch, or too many unreadable ones.
    """
    images, changes, size = dataset.train, recipe.augment, dataset.image_size
    key = (recipe.train.seed, "augment", epoch)
    steps = steps_per_epoch(images, recipe.train.batch_size)
    order = epoch_order(images, recipe, epoch)
    rows = own_rows(recipe.train.batch_size, recipe.train.accumulate, part)
    chosen = [batch[rows] for batch in order.split(recipe.train.batch_size)[start:steps]]
    if isinstance(images, Held) and augment.goes_by_batch(changes):
        pad = augment.padding(changes, size)
        places = rows, recipe.train.batch_size
        batches = _cropped_at_once(images, chosen, start, pad, changes.flip, device, (*key, "crop"), *places)
    else:
        transform = augment.for_training(changes, size)
        batches = _one_by_one(images, chosen, transform, recipe.data.workers, device, (*key, "image"))
    for step, (index, pixels) in enumerate(batches, start):
        if not len(index):
            raise DataError(f"data {dataset.name}: not one image of a training batch can be read; repair them")
        x, target = augment.normalise(pixels, dataset.mean, dataset.std), images.labels[index].to(device)
        if changes.erasing:
            augment.erase(x, index, changes.erasing, *key, "erase")
        if changes.mixup or changes.cutmix:
            x, target = augment.mix(x, target, len(dataset.classes), changes, *key, "mix", step)
        yield _laid_out(x, recipe.train.channels_last), target


def own_rows(batch_size: int, accumulate: int, part: tuple[int, int]) -> Tensor:
    """The rows of a batch, int64, that the k-th of n processes takes; `part` is (k, n).

    Each of the batch's `accumulate` pieces is shared among the processes, so that the pieces hold the same images
    whatever the number of processes. All get the same number, as n x `accumulate` divides `batch_size`.
    """
    which, count = part
    return torch.arange(batch_size).view(accumulate, count, -1)[:, which].reshape(-1)


def eval_batches(
    dataset: DataSet,
    images: Images,
    batch_size: int,
    device: torch.device,
    channels_last: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, unchanged but for the resizing and centre crop; the last batch may be smaller.

    Yields images, float32 [B, 3, S, S], and labels, int64 [B]. Images that cannot be read are left out; raises
    `DataError` where they are too many, or all. With `part`, (k, n), only every n-th batch from the k-th on: n
    processes together have every image once, and some may have none.
    """
    which, count = part
    chosen = list(torch.arange(len(images)).split(batch_size))[which::count]
    batches: Iterator[tuple[Tensor, Tensor]]
    nothing_read = bool(chosen)
    if isinstance(images, Held):
        batches = ((index, images.pixels[index].to(device)) for index in chosen)
    else:
        assert isinstance(images, Stored)
        transform = augment.for_evaluation(dataset.image_size, images.side)
        batches = _one_by_one(images, chosen, transform, images.workers, device, ())
    for index, pixels in batches:
        if len(index):
            nothing_read = False
            x = augment.normalise(pixels, dataset.mean, dataset.std)
            yield _laid_out(x, channels_last), images.labels[index].to(device)
    if nothing_read:
        raise DataError(
            f"data {dataset.name}: not one of the {len(images)} images to evaluate can be read; repair them"
        )


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _cropped_at_once(
    images: Held,
    chosen: list[Tensor],
    start: int,
    pad: int,
    flip: bool,
    device: torch.device,
    key: tuple[int | str, ...],
    rows: Tensor,
    of: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    for step, index in enumerate(chosen, start):
        pixels = images.pixels[index].to(device)
        yield index, augment.crop_and_flip(pixels, pad, flip, augment.stream(*key, step), rows, of)


Item = tuple[int, Tensor | str | DataError]
"""Number of an image, and its pixels or the reason why it cannot be read; an error where the training can't go on."""


class _Steps(Sampler[list[int]]):
    """The images of each step, made into Python numbers when their turn comes: of all at once they would be many."""

    def __init__(self, chosen: list[Tensor]) -> None:
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self._chosen)


class _Pictures(Dataset[Item]):
    """Number of an image to that number and its pixels, uint8 [3, S, S], or the reason why it cannot be read.

    With a key, image i is changed by the stream (*key, i), whichever process reads it.
    """

    def __init__(self, images: Images, transform: v2.Transform, key: tuple[int | str, ...]) -> None:
        self._images, self._transform, self._key = images, transform, key

    def __getitems__(self, indices: list[int]) -> list[Item]:
        try:
            images = self._images.fetched(indices)
        except DataError as error:
            return [(indices[0], error)]
        return [self._item(images, index) for index in indices]

    def _item(self, images: Images, index: int) -> Item:
        try:
            picture = images.picture(index)
        except DataError as error:  # raised by a worker it would come with the worker's traceback
            return index, error
        except UnreadableError as error:
            return index, str(error)
        with augment.global_stream(*self._key, index):
            return index, self._transform(picture)


def _one_by_one(
    images: Images,
    chosen: list[Tensor],
    transform: v2.Transform,
    workers: int,
    device: torch.device,
    key: tuple[int | str, ...],
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        _Pictures(images, transform, key),
        batch_sampler=_Steps(chosen),
        num_workers=min(workers, len(chosen)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from torch's global one
    )
    for index, pixels, failed in loader:
        for number, reason in failed:
            if isinstance(reason, DataError):
                raise reason
            assert isinstance(images, Stored)
            images.skip(number, reason)
        yield index, pixels.to(device, non_blocking=True)


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, list[tuple[int, str | DataError]]]:
    read = [(number, pixels) for number, pixels in items if isinstance(pixels, Tensor)]
    failed = [(number, reason) for number, reason in items if not isinstance(reason, Tensor)]
    pixels = torch.stack([pixels for _, pixels in read]) if read else torch.empty(0, dtype=torch.uint8)
    return torch.tensor([number for number, _ in read], dtype=torch.int64), pixels, failed
