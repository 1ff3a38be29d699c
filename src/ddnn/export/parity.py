"""Whether what is exported computes what the network computes, on real images."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import onnxruntime
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
    tolerance: float | None
    """Largest that is let through; None: any."""
    top1_agreement: float
    """Share of the images with the same most likely class; classes within the tolerance of each other are the same."""
    images: int


@torch.no_grad()
def eager_logits(net: DDNN, images: Tensor) -> dict[str, Array]:
    """The logits [N, classes] of every net by itself, in eager float32."""
    return {name: sub(images).numpy() for name, sub in net.nets.items()}


def run(graph: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a graph for one batch, by onnxruntime."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def measure(expected: Array, got: Array, tolerance: float | None) -> Parity:
    """Compare logits [N, classes]."""
    best = expected.max(axis=1)
    chosen = np.take_along_axis(expected, got.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "max_abs": float(np.abs(got - expected).max()),
        "tolerance": tolerance,
        "top1_agreement": float((best - chosen <= 2 * (tolerance or 0)).mean()),
        "images": len(got),
    }


def compare(what: str, expected: Array, got: Array) -> Parity:
    """Measure, and raise `ExportError` where it differs. Both [N, classes]; `what` is what the error names."""
    allowed = TOLERANCE * float(np.abs(expected).max())
    if got.shape != expected.shape:
        raise ExportError(f"{what} gives outputs of shape {got.shape}, the network {expected.shape}; not written")
    parity = measure(expected, got, allowed)
    if not (parity["max_abs"] <= allowed and parity["top1_agreement"] == 1):  # a NaN is not
        raise ExportError(
            f"{what} differs from the network on real images, by up to {parity['max_abs']:.3g} in a logit where "
            f"{allowed:.3g} is allowed, with the same class for {parity['top1_agreement']:.1%} of {len(got)} images; "
            "not written"
        )
    return parity
