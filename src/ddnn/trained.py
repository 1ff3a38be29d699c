"""A finished run as a network: to evaluate it, or to take a sub-net out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from ddnn import data
from ddnn.build import build
from ddnn.checkpoint import RunFolder, write_atomic
from ddnn.device import threads
from ddnn.errors import DataError, RunError
from ddnn.evaluate import evaluate
from ddnn.network import DDNN


def load_trained(run: RunFolder) -> tuple[DDNN, dict[str, Any]]:
    """The trained net of a finished run on the CPU, in eval mode, and what `run.json` says of it."""
    about, summary = run.read_json("run.json"), run.read_json("summary.json")
    if about is None or summary is None:
        raise RunError(f"the run in {run.path} is not finished; go on with: ddnn train --resume {run.path}")
    unweighted = run.recipe.network.model_copy(update={"weights": None})
    net = build(unweighted, len(about["data"]["classes"]))
    run.load_weights(net, summary["weights_sha256"])
    return net.eval(), about


def evaluate_run(run: RunFolder, source: str | None, device: torch.device) -> dict[str, Any]:
    """Evaluate a finished run on its own test set, or on that of another data set with the same classes."""
    net, about = load_trained(run)
    trained = about["data"]
    wanted = {"image_size": trained["image_size"]} | ({} if source is None else {"source": source})
    dataset = data.load(run.recipe.data.model_copy(update=wanted), seed=0)
    if len(dataset.classes) != len(trained["classes"]):
        raise DataError(
            f"{dataset.name} has {len(dataset.classes)} classes, the run in {run.path} was trained on "
            f"{len(trained['classes'])}; evaluate on a data set with the same classes"
        )
    dataset = dataclasses.replace(dataset, mean=tuple(trained["mean"]), std=tuple(trained["std"]))
    batches = data.eval_batches(dataset, dataset.test, run.recipe.train.eval_batch_size, device)
    subnets = evaluate(net.to(device), batches, dataset.image_size, device)
    return {
        "subnets": subnets,
        "dataset": {"source": dataset.name, "test_images": len(dataset.test)},
        "latency": f"batch 1, eager float32, {threads(device)}",
    }


def extract(run: RunFolder, name: str, path: Path) -> None:
    """Write one sub-net of a finished run as safetensors with the names of its library; metadata says what it needs."""
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
