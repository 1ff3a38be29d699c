"""Exports of finished runs, checked on images of their own data."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddnn.checkpoint import RunFolder
from ddnn.data import DataSet, Images, eval_batches
from ddnn.data.augment import stream
from ddnn.data.sets import Stored
from ddnn.errors import ExportError
from ddnn.export import alone
from ddnn.export.bundle import export_bundle
from ddnn.export.manifest import About
from ddnn.export.trial import Int8
from ddnn.files import check_free
from ddnn.trained import data_of, load_trained

PARITY_IMAGES = 32
"""Test images that what is exported has to agree on with the network."""


def export_run(
    run: RunFolder,
    out: Path,
    kind: str = "bundle",
    *,
    subnets: Sequence[str] = (),
    int8: bool = False,
    allowed_loss: float = 0.5,
    calibration_images: int = 512,
) -> dict[str, Any]:
    """Export a finished run to the folder `out` and return the manifest that is in it.

    `kind` is `bundle`, or a format of `ddnn.export.alone.FORMATS`, in which every net, or those of `subnets`, becomes a
    file of its own. `int8` quantises a bundle: ranges are calibrated on training images, the accuracy is measured on
    all test images, and a net may lose `allowed_loss` percentage points of top-1.

    Raises `ExportError` and `RunError`; then nothing is written.
    """
    if kind != "bundle" and int8:
        raise ExportError(f"int8 comes as a bundle only, not as {kind}; leave out the one or the other")
    if kind == "bundle" and subnets:
        raise ExportError("a bundle holds all sub-nets; to export some of them alone, choose another format")
    check_free(out)  # this and the next before the data are loaded
    if kind != "bundle":
        alone.format_of(kind)
    net, _ = load_trained(run)
    dataset = data_of(run)
    images = _images(dataset, dataset.test, PARITY_IMAGES)
    about = _about(run, dataset)
    if kind != "bundle":
        return alone.export_alone(net, out, images, about, kind, subnets)
    if not int8:
        return export_bundle(net, out, images, about)

    def labelled() -> Iterable[tuple[Tensor, Tensor]]:
        return eval_batches(dataset, dataset.test, run.recipe.train.eval_batch_size, torch.device("cpu"))

    training = dataset.train
    if isinstance(training, Stored):
        training = replace(training, side=about.resize or dataset.image_size)  # as evaluation sees them
    calibration = _images(dataset, training, calibration_images)
    return export_bundle(net, out, images, about, Int8(calibration, labelled, allowed_loss))


def _images(dataset: DataSet, images: Images, count: int) -> Tensor:
    """Some of the images, in random order, always the same, normalised: float32 [count, 3, S, S]."""
    chosen = torch.randperm(len(images), generator=stream(0, "export"))[:count]
    batches = eval_batches(dataset, images.take(chosen), 64, torch.device("cpu"))
    return torch.cat([x for x, _ in batches])


def _about(run: RunFolder, dataset: DataSet) -> About:
    ran, summary = run.finished()
    accuracy: dict[str, dict[str, Any]] = {}
    for name, row in summary["subnets"].items():
        accuracy[name] = {"top1": row["top1"], "top5": row["top5"]}
        if "validation" in summary:
            accuracy[name]["validation"] = summary["validation"][name]
    return About(
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        resize=run.recipe.data.shorter_side(dataset.image_size),
        accuracy=accuracy,
        source={
            "dataset": dataset.name,
            "network": run.recipe.network.name,
            "recipe_sha256": run.recipe_digest(),
            "weights_sha256": summary["weights_sha256"],
            "commit": ran["commit"],
        },
    )
