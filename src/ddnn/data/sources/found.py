"""What a source gives: images not decoded yet, numbered labels, classes, and the data set's own splits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddnn.data.decode import Reader
from ddnn.errors import DataError
from ddnn.recipe import Data

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words that say of which split images are."""
TEST_SPLITS = (*SPLITS["test"], *SPLITS["validation"])
"""Names of what may be the test set, the best first."""
LABEL_COLUMNS = ("fine_label", "label", "labels", "class", "target")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images not decoded yet: those of `reader` that `index` (int64 [n]) names, with `labels` (int64 [n])."""

    reader: Reader
    index: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Tensor) -> "Labelled":
        """The images at the places `which` (int64 or bool)."""
        return Labelled(self.reader, self.index[which], self.labels[which])


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as it is found; `test` is None where it has no test split of its own.

    `validation` is None where it has no validation split beside the test split, or where `data.validation` is 0.
    """

    classes: tuple[str, ...]
    train: Labelled
    test: Labelled | None = None
    validation: Labelled | None = None


@dataclass(frozen=True, eq=False)
class Values:
    """Labels as they are stored: image i has `distinct[codes[i]]`, or none where its code is -1."""

    codes: NDArray[np.int64]
    distinct: list[Any]

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Values":
        """Of a label per image; None is no label."""
        codes: dict[Any, int] = {}
        numbers = np.fromiter(
            (-1 if value is None else codes.setdefault(value, len(codes)) for value in values), np.int64, len(values)
        )
        return cls(numbers, list(codes))


def all_of(reader: Reader, labels: Any) -> Labelled:
    """Every image of a reader."""
    return Labelled(reader, torch.arange(len(reader)), torch.as_tensor(labels, dtype=torch.int64))


def test_and_validation(
    names: list[str], read: Callable[[str], Labelled | None], data: Data
) -> tuple[Labelled | None, Labelled | None]:
    """The first split with labels is the test set; if it is named as one, the next with labels is for validation.

    Splits after these are not read.

    `names` are in the order of `TEST_SPLITS`, in upper or lower case.
    """
    found = ((name, part) for name, part in ((name, read(name)) for name in names) if part is not None)
    name, test = next(found, ("", None))
    own = name.lower() in SPLITS["test"] and data.validation > 0
    return test, next(found, ("", None))[1] if own else None


def train_split(place: str, splits: Sequence[str]) -> str:
    """Which of the splits is for training. Raises `DataError` where that is not clear."""
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"data {place}: no split called train among: {', '.join(splits)}")
    return "train" if "train" in splits else splits[0]


def by_splits(
    place: str,
    splits: Sequence[str],
    data: Data,
    what: str,
    names: Sequence[str] | None,
    values: Callable[[str], Values],
    reader: Callable[[str], Reader],
) -> Source:
    """A data set that comes in splits, from the labels and the reader of each.

    `names`: of the classes, where labels are their numbers; else the training labels, sorted, are the classes. `what`
    is what an error calls the labels. A split other than the training's without any label is passed over.
    """
    train_name = train_split(place, splits)
    found = _checked(place, train_name, values(train_name), what, names)
    if found is None:
        raise DataError(f"data {place}: no training image has a label in {what}")
    known = list(range(len(names))) if names else sorted(found.distinct)

    def read(name: str) -> Labelled | None:
        given = found if name == train_name else _checked(place, name, values(name), what, names)
        if given is None:  # the way of the hub to keep a test secret
            return None
        number = {value: i for i, value in enumerate(known)}
        strange = sorted({str(value) for value in given.distinct if value not in number})
        if strange:
            raise DataError(
                f"data {place}: split {name} has labels that are not training classes: {', '.join(strange)}"
            )
        table = np.array([number[value] for value in given.distinct], dtype=np.int64)
        return all_of(reader(name), table[given.codes])

    train = read(train_name)
    assert train is not None
    others = [name for name in TEST_SPLITS if name in splits and name != train_name]
    return Source(tuple(names) if names else tuple(map(str, known)), train, *test_and_validation(others, read, data))


def _checked(place: str, split: str, values: Values, what: str, names: Sequence[str] | None) -> Values | None:
    """The labels, of which every image has one; None where not one image has."""
    if names is not None and -1 in values.distinct:  # which stands for no label beside class names
        at = values.distinct.index(-1)
        codes = np.where(values.codes == at, -1, values.codes - (values.codes > at))
        values = Values(codes, [value for value in values.distinct if value != -1])
    missing = int((values.codes < 0).sum())
    if missing == len(values.codes):
        return None
    if missing:
        raise DataError(
            f"data {place}: {missing} of {len(values.codes)} images of split {split} have no label in {what}"
        )
    kinds = {str if isinstance(value, str) else int for value in values.distinct if isinstance(value, int | str)}
    if len(kinds) != 1 or not all(isinstance(value, int | str) for value in values.distinct):
        raise DataError(f"data {place}: the labels in {what} are neither whole numbers nor texts")
    return values
