"""A finished run as a network: to evaluate it, or to take a sub-net out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ddnn import data
from ddnn.build import build
from ddnn.checkpoint import RunFolder
from ddnn.data import DataSet
from ddnn.errors import RunError
from ddnn.evaluate import evaluate, latency_conditions
from ddnn.files import write_atomic
from ddnn.network import DDNN
from ddnn.recipe import Recipe


def load_trained(run: RunFolder) -> tuple[DDNN, dict[str, Any]]:
    """The trained net of a finished run on the CPU, in eval mode, and what `run.json` says of it."""
    about, summary = run.finished()
    try:
        classes, size, digest = len(about["data"]["classes"]), about["data"]["image_size"], summary["weights_sha256"]
    except (LookupError, TypeError):
        raise RunError(f"run.json or summary.json in {run.path} is damaged: it lacks what a training writes") from None
    net = build(run.recipe.network.unweighted(), classes, size)
    run.load_weights(net, digest)
    return net.eval(), about


def load_data(recipe: Recipe) -> DataSet:
    """The recipe's data; the split is the same for all training seeds."""
    return data.load(recipe.data, seed=0, whole=recipe.augment.crop == "resized")


def data_of(run: RunFolder) -> DataSet:
    """The run's data; `RunError` if they are not those it began with: split, and so test set, would be others."""
    dataset = load_data(run.recipe)
    about = run.read_json("run.json")
    if about is not None and not dataset.is_of(about["data"]["fingerprint"]):
        raise RunError(
            f"the data of {dataset.name} have changed since the run in {run.path} began, and with them what it is "
            "trained and tested on; restore them or start a new run"
        )
    return dataset


def eval_batches(
    recipe: Recipe, dataset: DataSet, images: data.Images, device: torch.device, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches to evaluate on, laid out in memory as in training; `part` as in `data.eval_batches`."""
    return data.eval_batches(dataset, images, recipe.train.eval_batch_size, device, recipe.train.channels_last, part)


def evaluate_run(run: RunFolder, source: str | None, device: torch.device) -> dict[str, Any]:
    """Evaluate a finished run on its own test set, or on all images of another data set with the same classes.

    Of another data set that has a test split, on that.
    """
    net, about = load_trained(run)
    recipe, trained = run.recipe, about["data"]
    if source is None:
        dataset = data_of(run)
    else:
        other = recipe.data.model_copy(update={"source": source, "image_column": None, "label_column": None})
        dataset = data.load_test(
            other,
            classes=tuple(trained["classes"]),
            image_size=trained["image_size"],
            mean=tuple(trained["mean"]),
            std=tuple(trained["std"]),
        )
    batches = eval_batches(recipe, dataset, dataset.test, device)
    return {
        "subnets": evaluate(net.to(device), batches, dataset.image_size, device),
        "dataset": {"source": dataset.name, "test_images": len(dataset.test)},
        "latency": latency_conditions(device),
    }


def extract(run: RunFolder, name: str, path: Path) -> None:
    """Write one sub-net of a finished run as safetensors with the names of its library; metadata says what it needs."""
    if path.resolve() == (run.path / "model.safetensors").resolve():
        raise RunError(f"{path} holds the run's own weights and is not overwritten; give another place")
    net, about = load_trained(run)
    subnet = net.subnet(name)
    trained = about["data"]
    metadata = {
        "format": "pt",
        "subnet": name,
        "network": run.recipe.network.name,
        "depths": json.dumps(net.depths[name]),
        **{key: json.dumps(trained[key]) for key in ("classes", "image_size", "mean", "std")},
    }
    weights = {key: tensor.contiguous() for key, tensor in subnet.state_dict().items()}
    write_atomic(path, save_safetensors(weights, metadata))
