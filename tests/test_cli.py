"""The command line as a user meets it: exit codes, sentences, JSON."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import TINY, Quiet
from ddnn import recipe as recipes
from ddnn.build import build, check
from ddnn.checkpoint import RunFolder
from ddnn.errors import RecipeError
from ddnn.families.cifar_resnet import resnet as cifar_resnet
from ddnn.trained import load_trained
from ddnn.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    from ddnn import recipe

    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", recipe.load("digits", TINY))
    train(run, Quiet())
    return run


def test_train_ends_with_the_table_and_the_run_folder(
    ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = ddnn("train", *TINY, "--set", "train.seed=3", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    for text in ("resnet8", "resnet14", "resnet20 (full-net)", "parameters", "MACs", "top-1 %", "latency ms", "1-1-1"):
        assert text in out
    assert out.rstrip().endswith(f"run folder: {tmp_path / 'run'}")
    assert "epoch   2" in out
    assert RunFolder.open(tmp_path / "run").recipe.train.seed == 3
    code, out, _ = ddnn("train", "--resume", tmp_path / "run")
    assert code == 0
    assert "resnet20 (full-net)" in out


def test_it_is_said_when_the_sub_nets_join(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    _, out, _ = ddnn("train", *TINY, "train.full_net_share=0.5", "--out", tmp_path / "run")
    joined = out.index("the sub-nets join: from here on the loss is the sum")
    assert out.index("epoch   1") < joined < out.index("epoch   2")


def test_evaluate_prints_json(ddnn: Callable[..., tuple[int, str, str]], finished: RunFolder) -> None:
    code, out, _ = ddnn("evaluate", finished.path, "--json")
    measured = json.loads(out)
    summary = json.loads((finished.path / "summary.json").read_text())
    assert code == 0
    for name, row in measured["subnets"].items():
        for key in ("top1", "top5", "params", "macs"):
            assert row[key] == summary["subnets"][name][key]
        assert row["latency_ms"] > 0
    code, out, _ = ddnn("evaluate", finished.path)
    assert "digits, " in out


def test_extract_writes_an_ordinary_network(
    ddnn: Callable[..., tuple[int, str, str]], finished: RunFolder, tmp_path: Path
) -> None:
    path = tmp_path / "resnet14.safetensors"
    assert ddnn("extract", finished.path, "resnet14", "-o", path)[0] == 0
    cifar_resnet(14, num_classes=10, width=8).load_state_dict(load_file(path), strict=True)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert json.loads(about["depths"]) == [2, 2, 2]
    assert json.loads(about["classes"]) == [str(d) for d in range(10)]


def test_an_extracted_resnet18_is_torchvisions(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["network.name=resnet18-34", "data.limit=32", "train.epochs=1", "train.batch_size=16"]
    assert ddnn("train", *overrides, "--out", run)[0] == 0
    path = tmp_path / "resnet18.safetensors"
    assert ddnn("extract", run, "resnet18", "-o", path)[0] == 0
    plain = torchvision.models.resnet18(num_classes=10)
    plain.load_state_dict(load_file(path), strict=True)
    net, _ = load_trained(RunFolder.open(run))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain.eval()(x), net(x)["resnet18"].logits)


def test_recipes_and_presets_are_listed(ddnn: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ddnn("recipes")
    assert code == 0
    assert "cifar100-resnet8-14-20" in out
    assert "Not yet run" in out
    code, out, _ = ddnn("recipes", "--presets")
    assert "resnet50-101-152" in out
    code, out, _ = ddnn("recipes", "digits")
    assert "[train]" in out


def test_help_names_every_verb(ddnn: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ddnn("--help")
    assert code == 0
    for verb in ("train", "evaluate", "extract", "recipes"):
        assert verb in out
    assert ddnn("--version")[1].startswith("ddnn ")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("train", "digits", "optim.momentun=1"), 2, "error: recipe digits: 1 mistake\n  optim.momentun: unknown key"),
        (("train", "nothing"), 2, "error: no recipe nothing: No such file or directory; give a TOML file or one of"),
        (("train", "digits", "folder"), 2, "one recipe at a time"),
        (("train", "--resume", "/nowhere"), 1, "error: /nowhere is no run folder: it has no recipe.toml"),
        (("train", "digits", "--resume", "/nowhere"), 2, "--resume goes on with the recipe in the run folder"),
        (("evaluate", "/nowhere"), 1, "error: /nowhere is no run folder"),
        (("recipes", "nothing"), 2, "error: no recipe 'nothing'; there are: "),
        (("evaluate", "/nowhere", "--device", "tpu"), 2, "--device tpu"),
    ],
)
def test_mistakes_end_in_a_sentence(
    ddnn: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    got, _, err = ddnn(*arguments)
    assert got == code
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("data.source=/nowhere",), "/nowhere"),
        (("network.name=resnet19",), "network.name: no network 'resnet19'; presets: cifar-resnet8-14-20"),
        (("network.subnets.a=[4,1,1]",), "sub-net a does not nest: it keeps 4 blocks of layer1"),
        (("network.weights=/nowhere.pt",), "network.weights: there is no file /nowhere.pt"),
        (("train.batch_size=4096",), "4096"),
    ],
)
def test_mistakes_found_later_end_in_a_sentence_too(
    ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    code, _, err = ddnn("train", *TINY, *overrides, "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith("error: ")
    assert sentence in err


def test_what_the_system_refuses_ends_in_a_sentence_wherever_it_was_asked(
    ddnn: Callable[..., tuple[int, str, str]],
) -> None:
    longest = "a" * 300
    for given in (["train", "--resume", longest], ["evaluate", longest], ["train", "digits", "--out", longest]):
        code, _, err = ddnn(*given)
        assert code == 1
        assert err.startswith(f"error: {longest}")
        assert err.endswith(": File name too long\n")


def test_a_refused_recipe_leaves_no_folder_behind(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for overrides in (("network.name=resnet19",), ("network.subnets.a=[4,1,1]",), ("objective.subnet_weight.x=1",)):
        assert ddnn("train", *TINY, *overrides, "--out", tmp_path / "run")[0] == 2
        assert not (tmp_path / "run").exists()
    for overrides in (("data.source=/nowhere",), ("network.subnets.a=[3,3,3]",), ("train.batch_size=4096",)):
        assert ddnn("train", *TINY, *overrides, "--out", tmp_path / "run")[0] == 2
        assert not (tmp_path / "run").exists()


def test_a_run_that_can_go_on_keeps_its_folder(
    ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to end before it has trained anything."""
    with monkeypatch.context() as at_first:
        at_first.setattr("ddnn.trainer.data_of", lambda _: signal.raise_signal(signal.SIGTERM))
        assert ddnn("train", *TINY, "--out", tmp_path / "run")[0] == 75
    assert ddnn("train", "--resume", tmp_path / "run")[0] == 0


def test_a_run_of_one_net_can_still_be_built() -> None:
    """As earlier versions trained it, though a new one is refused."""
    recipe = recipes.load("digits", ["network.subnets.only=[3,3,3]"])
    with pytest.raises(RecipeError, match=r"network\.subnets: only has all blocks of cifar-resnet8-14-20"):
        check(recipe)
    assert list(build(recipe.network, 10).depths) == ["only"]


def test_names_are_printed_as_they_are(ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    from PIL import Image

    for kind in ("a", "b"):
        (tmp_path / "[red]x[/y]" / kind).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(tmp_path / "[red]x[/y]" / kind / f"{i}.png")
    code, out, err = ddnn("train", *TINY, f"data.source={tmp_path}/[red]x[/y]", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "[red]x[/y]: " in out


def test_a_run_is_not_overwritten(ddnn: Callable[..., tuple[int, str, str]], finished: RunFolder) -> None:
    code, _, err = ddnn("train", "--out", finished.path)
    assert code == 1
    assert f"{finished.path} exists already; give another --out, or go on with --resume {finished.path}" in err


def test_another_data_set_must_have_the_same_classes(
    ddnn: Callable[..., tuple[int, str, str]], finished: RunFolder, tmp_path: Path
) -> None:
    from PIL import Image

    for kind in ("a", "b"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / kind / f"{i}.png")
    code, _, err = ddnn("evaluate", finished.path, "--data", tmp_path / "images")
    assert code == 2
    assert "a, b" in err


def test_another_data_set_may_have_its_classes_in_any_order(
    ddnn: Callable[..., tuple[int, str, str]], finished: RunFolder, tmp_path: Path
) -> None:
    """The digits, as a parquet file whose labels are in another order: the same accuracy on all of them."""
    import datasets
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = [str(d) for d in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    pixels = [np.repeat(np.rint(i * (255 / 16)).astype(np.uint8)[..., None], 3, 2) for i in digits.images[:200]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
    rows = {"image": pixels, "label": [order.index(str(t)) for t in digits.target[:200]]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    measured = json.loads(ddnn("evaluate", finished.path, "--data", tmp_path / "set", "--json")[1])
    assert measured["dataset"]["test_images"] == 200
    net, about = load_trained(finished)
    mean, std = (torch.tensor(about["data"][key]).view(3, 1, 1) for key in ("mean", "std"))
    x = torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pixels])
    right = net((x - mean) / std)["resnet8"].logits.argmax(1) == torch.from_numpy(digits.target[:200])
    assert measured["subnets"]["resnet8"]["top1"] == pytest.approx(right.float().mean().item(), abs=0.011)


def test_damaged_weights_are_named(
    ddnn: Callable[..., tuple[int, str, str]], finished: RunFolder, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, _, err = ddnn("evaluate", copy)
    assert code == 1
    assert f"{weights} is damaged or was replaced" in err
    (copy / "summary.json").unlink()
    assert "is not finished; go on with: ddnn train --resume" in ddnn("evaluate", copy)[2]
    code, _, err = ddnn("extract", finished.path, "resnet9", "-o", tmp_path / "x")
    assert "no net 'resnet9' in this DDNN; it has resnet8, resnet14, resnet20" in err


def test_a_full_disk_is_a_sentence(
    ddnn: Callable[..., tuple[int, str, str]], tmp_path: Path, finished: RunFolder
) -> None:
    code, _, err = ddnn("extract", finished.path, "resnet8", "-o", "/dev/full/file")
    assert code == 1
    assert "cannot write /dev/full/file" in err
