"""Changes made to training images, each drawn from a random stream of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ddnn.recipe import Augment


def stream_key(*parts: int | str) -> int:
    """A 63-bit seed that is a function of the parts alone: equal parts, equal stream; other parts, another one."""
    digest = blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(*parts: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream of these parts."""
    return torch.Generator().manual_seed(stream_key(*parts))


@contextmanager
def global_stream(*parts: int | str) -> Iterator[None]:
    """Let torch's global CPU generator, the only one torchvision's transforms use, follow a stream for a while."""
    with torch.random.fork_rng(devices=[]):
        reseed(*parts)
        yield


def reseed(*parts: int | str) -> None:
    """Set torch's global CPU generator to the start of a stream; `torch.manual_seed` would also set the GPUs'."""
    torch.default_generator.manual_seed(stream_key(*parts))


def padding(augment: Augment, size: int) -> int:
    """Pixels of zero padding around images of side `size`."""
    if augment.crop != "pad":
        return 0
    return size // 8 if augment.padding is None else augment.padding


def goes_by_batch(augment: Augment) -> bool:
    """Whether all of it but erasing can be done to a batch at once, by `crop_and_flip`."""
    return augment.policy == "none" and augment.crop in ("pad", "none")


def crop_and_flip(
    x: Tensor, pad: int, flip: bool, generator: torch.Generator, rows: Tensor | None = None, of: int | None = None
) -> Tensor:
    """Cut each image out of itself padded with zeros, at a place of its own, and mirror half of them.

    `x`: [B, 3, S, S] of any type, and so is what is returned; `pad`: pixels on each side. Where `x` is only a part of a
    batch, `rows` (int64 [B]) are its places in the whole batch of `of` images, and it is changed as there.
    """
    n, _, side, _ = x.shape
    wide = side + 2 * pad
    whole = n if of is None else of
    top, left = torch.randint(0, 2 * pad + 1, (2, whole, 1), generator=generator)
    mirrored = torch.rand(whole, 1, generator=generator) < (0.5 if flip else 0.0)
    if rows is not None:
        top, left, mirrored = top[rows], left[rows], mirrored[rows]
    along = torch.arange(side)
    rows, columns = top + along, left + torch.where(mirrored, along.flip(0), along)
    places = (rows[:, :, None] * wide + columns[:, None, :]).view(n, 1, side * side).to(x.device)
    padded = F.pad(x, [pad] * 4).view(n, 3, wide * wide)
    return padded.gather(2, places.expand(n, 3, side * side)).view(n, 3, side, side)


def for_training(augment: Augment, size: int) -> v2.Transform:
    """PIL image in RGB to uint8 [3, size, size], changed at random by torch's global generator."""
    steps: list[v2.Transform] = []
    if augment.crop == "resized":
        steps.append(v2.RandomResizedCrop(size))
    else:
        steps += [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding=padding(augment, size))]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.policy == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    elif augment.policy == "randaugment":
        steps.append(v2.RandAugment())
    elif augment.policy == "autoaugment":
        # The policies were found on images of 32 and 224 pixels.
        found_on = v2.AutoAugmentPolicy.CIFAR10 if size <= 64 else v2.AutoAugmentPolicy.IMAGENET
        steps.append(v2.AutoAugment(found_on))
    return v2.Compose([*steps, v2.PILToTensor()])


def for_evaluation(size: int, side: int) -> v2.Transform:
    """PIL image in RGB, its shorter side resized to `side` pixels, to the middle of it: uint8 [3, size, size]."""
    return v2.Compose([v2.Resize(side), v2.CenterCrop(size), v2.PILToTensor()])


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, 3, S, S] to float32, (x / 255 - mean) / std by channel."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=x.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=x.device).view(3, 1, 1)
    return x.float().mul_(scale).add_(shift)


def erase(x: Tensor, index: Tensor, probability: float, *parts: int | str) -> None:
    """Set random rectangles of normalised images [B, 3, S, S] to the mean, in place; image i's follows (*parts, i)."""
    transform = v2.RandomErasing(p=probability)
    with torch.random.fork_rng(devices=[]):
        for row, number in enumerate(index.tolist()):
            reseed(*parts, number)
            x[row] = transform(x[row])


def mix(x: Tensor, target: Tensor, classes: int, augment: Augment, *parts: int | str) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour in the batch; target int64 [B] becomes float32 [B, classes]."""
    kinds: list[v2.Transform] = []
    if augment.mixup:
        kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        kinds.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    with global_stream(*parts):
        mixed, probabilities = v2.RandomChoice(kinds)(x, target)
    return mixed, probabilities
