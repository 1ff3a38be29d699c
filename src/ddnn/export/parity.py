"""Whether what is exported computes what the network computes, on real images."""

from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddnn.errors import ExportError
from ddnn.network import DDNN

Array = npt.NDArray[np.float32]

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit, that float32 in another order may make."""


class Parity(TypedDict):
    """What was seen."""

    max_abs: float
    """Largest difference of a logit."""
    tolerance: float
    """Largest that is let through."""
    top1_agreement: float
    """Share of the images with the same most likely class; one that lies within the tolerance counts as the same."""
    images: int


@torch.no_grad()
def eager_logits(net: DDNN, images: Tensor) -> dict[str, Array]:
    """The logits [N, classes] of every net by itself, in eager float32."""
    return {name: sub(images).numpy() for name, sub in net.nets.items()}


def compare(what: str, expected: Array, got: Array, tolerance: float = TOLERANCE) -> Parity:
    """Measure, and raise `ExportError` where it differs. Both [N, classes]; `what` is what the error names."""
    allowed = tolerance * float(np.abs(expected).max())
    if got.shape != expected.shape:
        raise ExportError(f"{what} gives outputs of shape {got.shape}, the network {expected.shape}; not written")
    difference = float(np.abs(got - expected).max())
    best = expected.max(axis=1)
    chosen = expected[np.arange(len(got)), got.argmax(axis=1)]
    agreement = float((best - chosen <= 2 * allowed).mean())
    if not difference <= allowed or agreement < 1:  # `not <=`, as a NaN is in no order
        raise ExportError(
            f"{what} differs from the network on real images: by up to {difference:.3g} in a logit, allowed is "
            f"{allowed:.3g}, with the same class for {agreement:.1%} of {len(got)} images; not written"
        )
    return {"max_abs": difference, "tolerance": allowed, "top1_agreement": agreement, "images": len(got)}
