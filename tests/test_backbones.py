"""Networks of the libraries through the whole of it: recipe, training, table, extraction, back into the library."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from ddnn.checkpoint import RunFolder
from ddnn.trained import load_trained
from small_networks import SMALL, images
from test_families import nested

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir()
        for i in range(12):
            pixels = noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("network", "size", "options", "subnet", "stages"),
    [
        ("timm/test_convnext", 32, {}, "[1,1,2,1]", None),
        (
            "timm/vit_tiny_patch16_224",
            16,
            {"patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 4},
            "[1,1]",
            ["blocks[0:2]", "blocks[2:4]"],
        ),
        pytest.param("torchvision/shufflenet_v2_x0_5", 32, {}, "{stage3 = 2}", None, marks=pytest.mark.slow),
    ],
)
def test_train_and_extract(
    ddnn: Command,
    photos: Path,
    tmp_path: Path,
    network: str,
    size: int,
    options: dict[str, int],
    subnet: str,
    stages: list[str] | None,
) -> None:
    run = tmp_path / "run"
    changes = [f"network.name={network}", f"network.subnets.small={subnet}", f"data.image_size={size}"]
    changes += [f"network.options.{key}={value}" for key, value in options.items()]
    changes += [f"network.stages={json.dumps(stages)}"] if stages else []
    quick = ["train.epochs=1", "train.batch_size=8", "data.validation=0.0", "train.precision=float32"]
    code, out, err = ddnn("train", "folder", f"data.source={photos}", *changes, *quick, "--out", run)
    assert (code, err) == (0, "")
    full = network.rpartition("/")[2]
    assert f"{full} (full-net)" in out
    assert ddnn("extract", run, "small", "-o", tmp_path / "small.safetensors")[0] == 0
    net, about = load_trained(RunFolder.open(run))
    assert about["data"]["classes"] == ["ant", "bee", "cat"]
    assert net.whole is None
    x = images(2, size)
    weights = load_file(tmp_path / "small.safetensors")
    if network.startswith("timm/vit"):
        plain = timm.create_model(full, num_classes=3, img_size=size, **{**options, "depth": 2})
    elif network.startswith("timm/"):
        plain = timm.create_model(full, num_classes=3)
        for stage, kept in zip(plain.stages, (1, 1, 2, 1), strict=True):
            del stage.blocks[kept:]
    else:
        plain = net.subnet("small")
    plain.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), net(x)["small"].logits)


def test_a_network_whose_nets_run_whole_trains_too(ddnn: Command, photos: Path, tmp_path: Path) -> None:
    """Its forward asks for numbers that only images have; the warning says so and the training goes on."""
    changes = [
        "network.name=timm/pvt_v2_b0",
        "network.subnets.small=[1,1,1,1]",
        "data.image_size=32",
        "train.lean=true",
    ]
    quick = ["train.epochs=1", "train.batch_size=8", "data.validation=0.0", "data.limit=9", "train.precision=float32"]
    with pytest.warns(UserWarning, match="share weights but no work"):
        code, out, _ = ddnn("train", "folder", f"data.source={photos}", *changes, *quick, "--out", tmp_path / "run")
    assert code == 0
    assert "least possible by MACs: 1.00" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm Swin", "timm EVA", "torchvision VGG-BN", "torchvision DenseNet"])
def test_a_taken_apart_network_compiles_as_one_graph(name: str) -> None:
    net = nested(SMALL[name]).eval()
    x = images(2, SMALL[name].size)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for output, expected in zip(compiled(x).values(), net(x).values(), strict=True):
        torch.testing.assert_close(output.logits, expected.logits)
