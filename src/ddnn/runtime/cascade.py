"""Starting shallow, going deeper only where unsure.

Every net's part of the cascade starts at the deepest feature that its path has in common with a shallower net, which
has run before; so what the paths have in common is computed once. Only the images whose answer is unsure go on.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddnn.errors import BundleError, RequestError
from ddnn.runtime.manifest import IMAGES, LOGITS, Net, Part
from ddnn.runtime.pixels import Floats
from ddnn.runtime.sessions import Array, Sessions

Threshold = float | Sequence[float]
UNREACHED = 1.5
"""A threshold that no confidence reaches: the net is asked, and all images go on."""
NEVER = 2.0
"""From this threshold on a net is not asked: all images go on, and only what later nets start from is computed."""


class Cascaded(NamedTuple):
    """What a cascade makes of N images."""

    logits: Floats
    """[N, classes]: of each image, those of the net that answered."""
    answered: npt.NDArray[np.intp]
    """[N]: the number of that net, 0 for the shallowest."""


class Step(NamedTuple):
    """One graph of a cascade that is to run."""

    number: int
    """Of the net, 0 for the shallowest."""
    part: Part
    asked: bool
    """Whether the net gives an answer, or only features for others."""
    features: tuple[str, ...]
    """Tensors that later steps start from."""


def plan(nets: Sequence[Net], thresholds: Sequence[float]) -> list[Step]:
    """What has to run under these thresholds at the most, in order."""
    last = next((k for k, threshold in enumerate(thresholds) if threshold == 0), len(nets) - 1)
    needed: set[str] = set()
    steps: list[Step] = []
    for k in reversed(range(last + 1)):
        part = nets[k].cascade
        assert part is not None
        asked = k == last or thresholds[k] < NEVER
        features = tuple(tensor for tensor, feature in part.outputs.items() if feature in needed)
        if asked or features:
            steps.append(Step(k, part, asked, features))
            needed |= set(part.inputs.values())
    return steps[::-1]


def cascade(
    sessions: Sessions, nets: Sequence[Net], classes: int, batch: Floats, thresholds: Sequence[float]
) -> Cascaded:
    """Run checked images [N, 3, S, S], N at least 1, with one threshold for every net but the last.

    A net answers where its confidence, the probability of its most likely class, reaches its threshold; the last net
    answers for the rest.
    """
    steps = plan(nets, thresholds)
    features: dict[str, Array] = {IMAGES: batch}
    active = np.arange(len(batch))
    logits: Floats | None = None
    answered = np.zeros(len(batch), dtype=np.intp)
    for i, step in enumerate(steps):
        part = step.part
        inputs = {tensor: features[feature] for tensor, feature in part.inputs.items()}
        wanted = [LOGITS, *step.features] if step.asked else list(step.features)
        made = sessions.run(part.graph, wanted, inputs, nothing_else=not step.asked)
        unsure = None
        if step.asked:
            own = answer_of(made.pop(0), len(active), classes, nets[step.number])
            logits = own if logits is None else logits
            logits[active], answered[active] = own, step.number
            if i == len(steps) - 1:
                break
            unsure = confidence(own) < thresholds[step.number]
            if not unsure.any():
                break
        features |= {part.outputs[tensor]: feature for tensor, feature in zip(step.features, made, strict=True)}
        needed = {feature for later in steps[i + 1 :] for feature in later.part.inputs.values()}
        features = {name: feature for name, feature in features.items() if name in needed}
        if unsure is not None and not unsure.all():
            active = active[unsure]
            features = {name: feature[unsure] for name, feature in features.items()}
    assert logits is not None
    return Cascaded(logits, answered)


def checked(threshold: Threshold, nets: Sequence[Net]) -> list[float]:
    """One threshold for every net but the last. Raises `RequestError` for what is none, or not as many."""
    if missing := [net.name for net in nets if net.cascade is None]:
        raise BundleError(f"the bundle has no cascade: none is given for {missing[0]}; export it again")
    wanted = len(nets) - 1
    plain: Any = threshold.tolist() if isinstance(threshold, np.ndarray | np.generic) else threshold
    if isinstance(plain, int | float):
        given = [plain] * wanted
    elif isinstance(plain, Iterable):
        given = [each.tolist() if isinstance(each, np.ndarray | np.generic) else each for each in plain]
    else:
        raise _no_threshold(plain)
    if len(given) != wanted:
        names = ", ".join(net.name for net in nets[:-1])
        raise RequestError(f"{len(given)} thresholds are given; allowed are one for all, or one for each of: {names}")
    for each in given:
        if not (isinstance(each, int | float) and each >= 0):  # a NaN is not
            raise _no_threshold(each)
    return [float(each) for each in given]


def _no_threshold(given: object) -> RequestError:
    return RequestError(
        f"{given!r} is no threshold; allowed is a probability, or 0 to stop all images, above 1 none, 2 to leave the "
        "net out"
    )


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
        raise RequestError(
            f"{net.name} finds no answer to image {bad} of the batch: its pixels are out of range, or weights of the "
            "network are no numbers"
        )
    return logits
