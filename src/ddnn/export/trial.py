"""What int8 costs in accuracy and gains in speed, measured here and now."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ddnn.errors import ExportError
from ddnn.evaluate import accuracy, hits, ratio, side_by_side
from ddnn.network import DDNN


@dataclass(frozen=True)
class Int8:
    """What quantisation needs to know."""

    BATCH: ClassVar[int] = 8
    """Images that are calibrated on at a time: ranges are means of those of batches.

    In large batches a single unusual image sets the range, which costs deep networks points; from single images ranges
    come out so narrow that small networks lose.
    """

    calibration: Tensor
    """Training images in random order, normalised, float32 [M, 3, S, S]: their activations set the ranges."""
    labelled: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    """Gives, anew at each call, batches of images [N, 3, S, S] and classes [N] that accuracy is measured on."""
    allowed_loss: float = 0.5
    """Percentage points of top-1 that a net may lose."""
    split: str = "test"
    """What the labelled images are called."""


def try_out(net: DDNN, graphs: Mapping[str, str], int8: Path, float32: Path, how: Int8) -> dict[str, Any]:
    """The manifest's section on int8. `graphs`: file names, by net, in the folders `int8` and `float32`.

    Raises `ExportError` where a net loses more than is allowed.
    """
    before = accuracy(net, how.labelled())
    after, images = _accuracy({name: _session(int8 / graph) for name, graph in graphs.items()}, how.labelled())
    lost = {name: 100 * (before[name]["top1"] - after[name]["top1"]) for name in graphs}
    too_much = [
        f"{name} {lost[name]:.2f} ({100 * before[name]['top1']:.2f} to {100 * after[name]['top1']:.2f} %)"
        for name in graphs
        if lost[name] > how.allowed_loss
    ]
    if too_much:
        few = f", of which one is {100 / images:.2f} points" if how.allowed_loss < 100 / images else ""
        raise ExportError(
            f"int8 costs more than the {how.allowed_loss:g} points of top-1 allowed, on {images} {how.split} "
            f"images{few}: {', '.join(too_much)}; allow more, or export in float32 (ranges were calibrated on "
            f"{len(how.calibration)} training images)"
        )
    x = next(iter(how.labelled()))[0][:1]
    return {
        "calibration_images": len(how.calibration),
        "accuracy_images": images,
        "split": how.split,
        "allowed_loss": how.allowed_loss,
        "nets": {
            name: {
                "before": before[name],
                "after": after[name],
                "speedup": _speedup(float32 / graph, int8 / graph, x),
            }
            for name, graph in graphs.items()
        },
    }


def _session(graph: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _accuracy(
    sessions: Mapping[str, onnxruntime.InferenceSession], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, dict[str, float]], int]:
    """Top-1 and top-5 of every graph, and the number of images they were measured on."""
    right = {name: torch.zeros(2, dtype=torch.int64) for name in sessions}
    images = 0
    for x, target in batches:
        pixels = np.ascontiguousarray(x.numpy())
        for name, session in sessions.items():
            (logits,) = session.run(["logits"], {"images": pixels})
            right[name] += hits(torch.from_numpy(logits), target)
        images += len(x)
    return {name: {"top1": int(n[0]) / images, "top5": int(n[1]) / images} for name, n in right.items()}, images


def _speedup(float32: Path, int8: Path, x: Tensor) -> float:
    """How many times faster int8 is on this machine, one image at a time, one thread, in turns."""
    image = {"images": np.ascontiguousarray(x.numpy())}

    def call(graph: Path) -> Callable[[], object]:
        session = _session(graph, threads=1)
        return lambda: session.run(None, image)

    calls = {"float32": call(float32), "int8": call(int8)}
    return ratio(side_by_side(calls, x.device, budget_s=1.0), ["float32"], ["int8"])
