"""Starting shallow, going deeper only where unsure.

Every net's part of the cascade starts at the deepest feature that its path has in common with a shallower net, which
has run before; so what the paths have in common is computed once. Only the images whose answer is unsure go on.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddnn.errors import BundleError, RequestError
from ddnn.runtime.manifest import IMAGES, LOGITS, Net
from ddnn.runtime.pixels import Floats
from ddnn.runtime.sessions import Array, Sessions

Threshold = float | Sequence[float]
NEVER = 2.0
"""A threshold no confidence reaches: all images go on."""


class Cascaded(NamedTuple):
    """What a cascade makes of N images."""

    logits: Floats
    """[N, classes]: of each image, those of the net that answered."""
    answered: npt.NDArray[np.intp]
    """[N]: the number of that net, 0 for the shallowest."""


def cascade(
    sessions: Sessions, nets: Sequence[Net], classes: int, batch: Floats, thresholds: Sequence[float]
) -> Cascaded:
    """Run checked images [N, 3, S, S], N at least 1, with one threshold for every net but the last.

    A net answers where its confidence, the probability of its most likely class, reaches its threshold; the last net
    answers for the rest.
    """
    features: dict[str, Array] = {IMAGES: batch}
    active = np.arange(len(batch))
    logits: Floats | None = None
    answered = np.zeros(len(batch), dtype=np.intp)
    for k, net in enumerate(nets):
        part = net.cascade
        assert part is not None
        needed = {feature for later in nets[k + 1 :] if later.cascade for feature in later.cascade.inputs.values()}
        wanted = [tensor for tensor, feature in part.outputs.items() if feature in needed]
        inputs = {tensor: features[feature] for tensor, feature in part.inputs.items()}
        got, *made = sessions.run(part.graph, [LOGITS, *wanted], inputs)
        own = answer_of(got, len(active), classes, net)
        logits = own if logits is None else logits
        logits[active], answered[active] = own, k
        if k == len(nets) - 1:
            break
        unsure = confidence(own) < thresholds[k]
        if not unsure.any():
            break
        features |= {part.outputs[tensor]: feature for tensor, feature in zip(wanted, made, strict=True)}
        features = {name: feature for name, feature in features.items() if name in needed}
        if not unsure.all():
            active = active[unsure]
            features = {name: feature[unsure] for name, feature in features.items()}
    assert logits is not None
    return Cascaded(logits, answered)


def checked(threshold: Threshold, nets: Sequence[Net]) -> list[float]:
    """One threshold for every net but the last. Raises `RequestError` for what is none, or not as many."""
    if missing := [net.name for net in nets if net.cascade is None]:
        raise BundleError(f"the bundle has no cascade: none is given for {missing[0]}; export it again")
    wanted = len(nets) - 1
    given = [threshold] * wanted if isinstance(threshold, int | float | np.floating) else list(threshold)
    if len(given) != wanted:
        names = ", ".join(net.name for net in nets[:-1])
        raise RequestError(f"{len(given)} thresholds are given; allowed are one for all, or one for each of: {names}")
    for each in given:
        if not (isinstance(each, int | float | np.floating) and each >= 0):  # a NaN is not
            raise RequestError(f"{each!r} is no threshold; allowed is a probability, 0 stops all images, above 1 none")
    return [float(each) for each in given]


def parts_of(nets: Iterable[Net]) -> list[str]:
    """The graphs that a cascade of these nets runs."""
    return [net.cascade.graph for net in nets if net.cascade]


def probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    """Softmax by row: logits [N, classes] to float64 [N, classes]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def confidence(logits: Floats) -> npt.NDArray[np.float64]:
    """Probability of the most likely class: logits [N, classes] to float64 [N]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(1 / shifted.sum(axis=1))


def answer_of(got: Array, images: int, classes: int, net: Net) -> Floats:
    """Checked logits [images, classes] of a net.

    Raises `BundleError` for another shape, and `RequestError` where the images have led to numbers that are none.
    """
    logits: Floats = np.asarray(got, dtype=np.float32)
    if logits.shape != (images, classes):
        raise BundleError(
            f"{net.name} gives {list(logits.shape)} logits for {images} images of {classes} classes; export the bundle "
            "again"
        )
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise RequestError(f"{net.name} finds no answer to image {bad} of the batch: its pixels are out of range")
    return logits
