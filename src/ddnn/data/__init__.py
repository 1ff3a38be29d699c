"""Images in, batches out: where they come from, how they are split, decoded, augmented and normalised.

Everything random here is a pure function of (seed, epoch, step or image), so that a run can stop and resume within an
epoch, and read with any number of workers, and still see the same batches bit by bit.
"""

from ddnn.data.augment import stream_key
from ddnn.data.batches import eval_batches, steps_per_epoch, train_batches
from ddnn.data.sets import DataSet, Images, load, load_test
from ddnn.data.sources import check

__all__ = [
    "DataSet",
    "Images",
    "check",
    "eval_batches",
    "load",
    "load_test",
    "steps_per_epoch",
    "stream_key",
    "train_batches",
]
