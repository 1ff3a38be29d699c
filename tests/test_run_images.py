"""Held-out images of a run: what evaluation in training sees, as a device takes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bundles
from conftest import Quiet
from ddnn.checkpoint import RunFolder
from ddnn.cli.run_images import test_and_validation as images_of  # no test
from ddnn.errors import RequestError
from ddnn.runtime.manifest import Input, Manifest, read
from ddnn.runtime.pixels import normalised
from ddnn.trained import eval_batches, load_data
from ddnn.trainer import train


def manifest_of(run: RunFolder) -> Manifest:
    """A manifest with the classes and the normalisation of a run."""
    about = run.read_json("run.json")
    assert about is not None
    data = about["data"]
    size = data["image_size"]
    wanted = Input(size, round(size * run.recipe.data.zoom), tuple(data["mean"]), tuple(data["std"]))
    return Manifest(run.path, {}, wanted, tuple(data["classes"]), {}, "float32", "")


@pytest.mark.parametrize(("memory", "validation"), [(4000, 0.2), (0, 0.0)])
def test_they_are_those_of_evaluation(
    tiny: Callable[..., RunFolder], tmp_path: Path, memory: int, validation: float
) -> None:
    """Bitwise, in memory or not; thresholds are chosen on validation images where there are some."""
    random = np.random.default_rng(0)
    for kind in ("a", "b"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(60):
            pixels = random.integers(0, 256, (14 + i % 3, 12 + i % 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{i}.png")
    overrides = [f"data.source={tmp_path}/photos", "data.image_size=12", "data.zoom=1.2"]
    overrides += [f"data.memory_mb={memory}", f"data.validation={validation}", "data.workers=0", "train.epochs=1"]
    run = tiny("run", *overrides)
    train(run, Quiet())
    chosen_on, judged_by = images_of(run.path, manifest_of(run), 1000)
    dataset = load_data(run.recipe)
    parts = {"test": (dataset.test, judged_by)}
    if dataset.validation is not None:
        parts["validation"] = (dataset.validation, chosen_on)
    else:
        assert abs(len(chosen_on) - len(judged_by)) <= 1
        assert len(chosen_on) + len(judged_by) == len(dataset.test)
    for part, held in parts.values():
        batches = list(eval_batches(run.recipe, dataset, part, torch.device("cpu")))
        expected = {
            (x.numpy().tobytes(), int(t)) for images, labels in batches for x, t in zip(images, labels, strict=True)
        }
        batch = normalised(held.pixels, manifest_of(run).input)
        found = {(x.tobytes(), int(t)) for x, t in zip(batch, held.labels, strict=True)}
        assert found <= expected if dataset.validation is None else found == expected
    few, fewer = images_of(run.path, manifest_of(run), 20)
    assert len(few) == len(fewer) == 10
    other = read(bundles.make(tmp_path / "bundle"))
    with pytest.raises(RequestError, match="has other classes than the bundle"):
        images_of(run.path, other, 100)
