"""Exports of finished runs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddnn.checkpoint import RunFolder
from ddnn.data import DataSet
from ddnn.export.bundle import export_bundle
from ddnn.trained import check_same_data, eval_batches, load_data, load_trained

PARITY_IMAGES = 32


def export_run(run: RunFolder, out: Path) -> dict[str, Any]:
    """Write the bundle of a finished run, checked on images of its own test set, and return its manifest."""
    net, about = load_trained(run)
    summary = run.read_json("summary.json")
    assert summary is not None
    dataset = load_data(run.recipe)
    check_same_data(run, dataset)
    accuracy = {}
    for name, row in summary["subnets"].items():
        accuracy[name] = {"top1": row["top1"], "top5": row["top5"]}
        if "validation" in summary:
            accuracy[name]["validation"] = summary["validation"][name]
    size = dataset.image_size
    return export_bundle(
        net,
        out,
        some_images(run, dataset),
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        resize=round(size * run.recipe.data.zoom),
        accuracy=accuracy,
        source={"dataset": about["data"]["source"], "commit": about["commit"], "recipe_sha256": run.recipe_digest()},
    )


def some_images(run: RunFolder, dataset: DataSet) -> Tensor:
    """Images of the test set, normalised, float32 [N, 3, S, S]."""
    recipe = run.recipe.model_copy(
        update={"train": run.recipe.train.model_copy(update={"eval_batch_size": PARITY_IMAGES, "channels_last": False})}
    )
    return next(eval_batches(recipe, dataset, dataset.test, torch.device("cpu")))[0]
