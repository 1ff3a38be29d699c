"""In which order an epoch goes through the training images: a function of seed and epoch, each image once."""

import torch
from torch import Tensor

from ddnn.data.augment import stream
from ddnn.data.sets import Images
from ddnn.recipe import Recipe


def epoch_order(images: Images, recipe: Recipe, epoch: int) -> Tensor:
    """The places of all images, int64 [n], in the order of that epoch.

    With `data.shuffle='chunks'` the chunks are put in a random order and cut into windows of about
    `data.shuffle_window` images, whole chunks each, and the images of a window are put in a random order. So whoever
    reads along the order needs the chunks of one window at a time, or of two where a batch reaches into the next.
    """
    generator = stream(recipe.train.seed, "order", epoch)
    mixed = torch.randperm(len(images), generator=generator)
    if images.chunk is None:
        return mixed
    _, chunk, counts = images.chunk.unique_consecutive(return_inverse=True, return_counts=True)
    chunks = torch.randperm(len(counts), generator=generator)
    before = counts[chunks].cumsum(0) - counts[chunks]
    window = torch.empty_like(chunks)
    window[chunks] = before // recipe.data.shuffle_window
    return mixed[window[chunk[mixed]].argsort(stable=True)]
