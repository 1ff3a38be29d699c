"""A sub-net as an ordinary network: timm creates it by name, and torchvision's network of that name loads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

import ddnn
from conftest import Quiet
from ddnn.checkpoint import RunFolder
from ddnn.errors import HubError
from ddnn.families import build
from ddnn.hub import Network, Preprocessing, save_for_timm, save_subnet_of_run
from ddnn.network import DDNN
from ddnn.trained import load_trained
from ddnn.trainer import train

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'ddnn[examples]'")

CLASSES = list("abcde")
PICTURES = Preprocessing(size=48, resize=60, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def make(preset: str, **more: tuple[int, ...]) -> DDNN:
    torch.manual_seed(0)
    full_net, table = build(preset, len(CLASSES))
    net = ddnn.nest(full_net, {**table, **more}).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


@pytest.mark.parametrize(
    ("preset", "name", "architecture"),
    [
        ("resnet18-34", "resnet18", None),
        pytest.param("resnet18-34", "resnet34", None, marks=pytest.mark.slow),
        pytest.param("resnet26-50", "resnet26", None, marks=pytest.mark.slow),
        ("resnet18-34", "odd", "resnet18"),
    ],
)
def test_timm_creates_it_bitwise(preset: str, name: str, architecture: str | None, tmp_path: Path) -> None:
    net = make(preset, odd=(1, 2, 3, 1))
    assert save_for_timm(net, name, tmp_path, architecture=architecture, classes=CLASSES, preprocessing=PICTURES) == (
        architecture or name
    )
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(theirs(x), net(x)[name].logits)
    prepared = timm.data.resolve_model_data_config(theirs)
    assert prepared["input_size"] == (3, 48, 48)
    assert (tuple(prepared["mean"]), tuple(prepared["std"])) == (PICTURES.mean, PICTURES.std)
    assert prepared["crop_pct"] == pytest.approx(48 / 60)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == CLASSES
    assert not {"origin_url", "paper_ids", "license", "tag", "url", "hf_hub_id"} & set(config["pretrained_cfg"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "timm"
    assert f"This repository holds\n{name} alone" in card.content


def test_a_subnet_of_torchvision_loads_torchvisions_way_and_timms(tmp_path: Path) -> None:
    net = make("resnet18-34")
    save_for_timm(net, "resnet18", tmp_path)
    x = torch.randn(2, 3, 64, 64)
    for plain in (torchvision.models.resnet18(num_classes=5), timm.create_model("resnet18", num_classes=5)):
        plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
        assert torch.equal(plain.eval()(x), net(x)["resnet18"].logits)


def test_timm_takes_it_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache on the disk, as it is after a download."""
    net = make("resnet18-34", odd=(1, 2, 1, 1))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place, commit = tmp_path / "models--someone--odd", "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    save_for_timm(net, "odd", place / "snapshots" / commit, architecture="resnet18", repo_id="someone/odd")
    theirs = timm.create_model("hf-hub:someone/odd", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(theirs(x), net(x)["odd"].logits)
    assert (
        'timm.create_model("hf-hub:someone/odd", pretrained=True)'
        in (place / "snapshots" / commit / "README.md").read_text()
    )


def test_a_network_timm_does_not_have_is_named(tmp_path: Path) -> None:
    net = make("cifar-resnet8-14-20")
    with pytest.raises(HubError, match="timm has no network 'resnet8'; timm has no ResNets for CIFAR, so this one"):
        save_for_timm(net, "resnet8", tmp_path, preprocessing=PICTURES)
    with pytest.raises(HubError, match=r"timm's resnet18 is another network: its conv1.weight is of shape"):
        save_for_timm(net, "resnet8", tmp_path, architecture="resnet18", preprocessing=PICTURES)
    with pytest.raises(HubError, match=r"timm's resnet26d is another network.*; give the name of one that is the same"):
        save_for_timm(make("resnet26-50"), "resnet26", tmp_path, architecture="resnet26d", preprocessing=PICTURES)
    with pytest.raises(ddnn.DDNNError, match="no net 'resnet9'"):
        save_for_timm(net, "resnet9", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "depths"),
    [
        ("resnet34", {"channels": [8, 16, 32, 64]}, (1, 2, 2, 1)),
        ("vit_tiny_patch16_224", {"embed_dim": 48, "num_heads": 3, "depth": 4}, (2,)),
        ("convnext_atto", {"dims": [8, 16, 32, 64], "depths": [2, 2, 3, 2]}, (1, 1, 2, 1)),
    ],
)
def test_networks_of_timm_go_to_timm_and_to_a_folder(
    name: str, options: dict[str, Any], depths: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    full_net, _ = build(f"timm/{name}", 5, image_size=48, options=options)
    net = ddnn.nest(full_net, {"shallow": depths}).eval()
    x = torch.randn(2, 3, 48, 48)
    expected = net(x)
    named = Network(name=f"timm/{name}", options=options)
    ddnn.save_pretrained(net, tmp_path / "all", network=named, preprocessing=PICTURES)
    again = ddnn.from_pretrained(tmp_path / "all")
    assert all(torch.equal(output.logits, expected[net_name].logits) for net_name, output in again(x).items())
    save_for_timm(net, "shallow", tmp_path / "one", architecture=name, options=options, preprocessing=PICTURES)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True).eval()
    assert torch.equal(theirs(x), expected["shallow"].logits)


@pytest.mark.slow
def test_a_run_gives_one(tiny: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = tiny("run", "network.name=torchvision/resnet34", "network.subnets.small=[1,1,1,1]", "train.epochs=1")
    train(run, Quiet())
    assert save_subnet_of_run(run, "small", tmp_path) == "resnet34"
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(theirs(x), load_trained(run)[0](x)["small"].logits)
    summary = json.loads((run.path / "summary.json").read_text())
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert result.metric_value == summary["subnets"]["small"]["top1"]
