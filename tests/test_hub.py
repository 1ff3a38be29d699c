"""To a folder in the hub's conventions and back; a card that holds the true numbers; nothing unsafe is loaded."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ddnn
from conftest import Quiet
from ddnn.checkpoint import RunFolder
from ddnn.errors import HubError
from ddnn.evaluate import parameters
from ddnn.families.cifar_resnet import resnet
from ddnn.hub import Config, Evidence, Network, Preprocessing, load_config, save_run
from ddnn.hub.card import MARKER
from ddnn.hub.evidence import without_folders
from ddnn.network import DDNN, nest
from ddnn.recipe import changed
from ddnn.trained import eval_batches, load_data, load_trained
from ddnn.trainer import train

TABLE = {"resnet8": (1, 1, 1), "resnet14": (2, 2, 2)}
POLICIES = [(norm, head) for norm in ("private", "shared", "recalibrated") for head in ("shared", "private")]
PICTURES = Preprocessing(size=16, resize=18, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def make(norm: str = "private", head: str = "shared", **names: Any) -> DDNN:
    torch.manual_seed(0)
    net = nest(resnet(20, num_classes=5, width=4), TABLE, norm=norm, head=head, **names)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    return net.eval()


def save(net: DDNN, folder: Path, **settings: Any) -> Config:
    return ddnn.save_pretrained(
        net, folder, network=Network(name="cifar/resnet20", width=4), preprocessing=PICTURES, **settings
    )


def assert_same(a: DDNN, b: DDNN) -> None:
    assert a.depths == b.depths
    x = torch.randn(3, 3, 16, 16)
    theirs = b(x)
    for name, output in a(x).items():
        assert torch.equal(output.logits, theirs[name].logits), name
        assert all(torch.equal(f, g) for f, g in zip(output.features, theirs[name].features, strict=True))


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "head"), POLICIES)
def test_comes_back_bitwise_and_tied_alike(norm: str, head: str, tmp_path: Path) -> None:
    net = make(norm, head)
    if norm == "recalibrated":
        ddnn.recalibrate(net, [torch.randn(8, 3, 16, 16)])
    save(net, tmp_path / "model")
    again = ddnn.from_pretrained(tmp_path / "model")
    assert not again.training
    assert_same(net, again)
    assert (again.norm, again.head) == (norm, head)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert again.state_dict().keys() == net.state_dict().keys()
    first, full = again.nets["resnet8"], again.nets[again.full_name]
    assert first.conv1.weight is full.conv1.weight
    assert (first.layer3[0].bn1.weight is full.layer3[0].bn1.weight) == (norm != "private")
    assert (first.fc.weight is full.fc.weight) == (head == "shared")
    if norm == "recalibrated":
        assert again.calibrated


def test_every_tensor_is_stored_once_in_safetensors(tmp_path: Path) -> None:
    net = make()
    save(net, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in net.state_dict().values())
    assert parameters(net) <= sum(t.numel() for t in stored.values())
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_a_run_comes_back_bitwise(finished: RunFolder, tmp_path: Path) -> None:
    config = save_run(finished, tmp_path)
    assert config.network == Network(name="cifar/resnet20", width=8)
    assert config.classes == tuple(map(str, range(10)))
    assert load_config(tmp_path) == config
    assert_same(load_trained(finished)[0], ddnn.from_pretrained(str(tmp_path)))


def test_a_run_of_one_net_alone_comes_back_too(tiny: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = tiny("alone", "network.alone=resnet14", "train.epochs=1")
    train(run, Quiet())
    save_run(run, tmp_path / "model")
    again = ddnn.from_pretrained(tmp_path / "model")
    assert again.depths == {"resnet14": (2, 2, 2)}
    assert_same(load_trained(run)[0], again)
    assert "The image classifier resnet14 of 10 classes" in (tmp_path / "model" / "README.md").read_text()


def test_the_card_says_whose_the_first_epochs_were(tiny: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = tiny("run", "train.epochs=2", "train.full_net_share=0.5")
    train(run, Quiet())
    save_run(run, tmp_path / "model")
    assert "- epochs: 2, the first 1 of the full-net by itself\n" in (tmp_path / "model" / "README.md").read_text()


def test_names_of_nets_are_kept(tmp_path: Path) -> None:
    save(make(full_name="big"), tmp_path)
    assert list(ddnn.from_pretrained(tmp_path).depths) == ["resnet8", "resnet14", "big"]


def test_images_are_prepared_as_in_the_runs_own_evaluation(finished: RunFolder, tmp_path: Path) -> None:
    prepare = save_run(finished, tmp_path).preprocessing
    assert prepare is not None
    dataset = load_data(finished.recipe)
    x, _ = next(eval_batches(finished.recipe, dataset, dataset.test, torch.device("cpu")))
    for i in range(3):
        assert torch.equal(prepare(dataset.test.picture(i))[0], x[i])
    assert prepare(Image.new("L", (40, 21))).shape == (1, 3, 8, 8)


def test_a_network_made_by_code_is_given_again(tmp_path: Path) -> None:
    net = make()
    ddnn.save_pretrained(net, tmp_path, preprocessing=PICTURES)
    assert json.loads((tmp_path / "config.json").read_text())["network"] is None
    with pytest.raises(HubError, match=r"made by code, which is not kept with it; .*full_net=\.\.\."):
        ddnn.from_pretrained(tmp_path)
    assert_same(net, ddnn.from_pretrained(tmp_path, full_net=resnet(20, num_classes=5, width=4)))
    assert_same(net, ddnn.from_pretrained(tmp_path, full_net=resnet(32, num_classes=5, width=4)))  # a larger one
    for other, sentence in (
        (resnet(14, num_classes=5, width=4), "does not nest: it keeps 3 blocks"),
        (resnet(20, num_classes=6, width=4), "holds other tensors than the network of"),
        (nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(HubError, match=sentence):
            ddnn.from_pretrained(tmp_path, full_net=other)
    assert "full_net = ..." in (tmp_path / "README.md").read_text()


class Own(nn.Module):
    """Of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.end = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.body(self.begin(x)).mean((2, 3)))


def test_a_network_of_no_library_is_given_again(tmp_path: Path) -> None:
    net = nest(Own(), {"small": {"body": 1}}, stages=["body"]).eval()
    config = ddnn.save_pretrained(net, tmp_path, preprocessing=PICTURES)
    assert config.stages == ("body",)
    assert_same(net, ddnn.from_pretrained(tmp_path, full_net=Own()))


@pytest.mark.parametrize(
    ("network", "width", "sentence"),
    [
        ("cifar/resnet20", 8, r"is not the full-net of this DDNN: its conv1.weight is of shape \(8, 3, 3, 3\)"),
        ("cifar/resnet32", 4, "full-net"),
        ("cifar/resnet14", 4, "does not nest"),
        ("cifar/resnet21", 4, "cifar has no network 'resnet21'"),
    ],
)
def test_the_name_of_the_network_is_tried_out(network: str, width: int, sentence: str, tmp_path: Path) -> None:
    if network == "cifar/resnet32":  # the full-net can be cut from it, so this is no mistake
        ddnn.save_pretrained(make(), tmp_path, network=Network(name=network, width=width), preprocessing=PICTURES)
        assert_same(make(), ddnn.from_pretrained(tmp_path))
        return
    with pytest.raises(HubError, match=sentence):
        ddnn.save_pretrained(
            make(), tmp_path / "model", network=Network(name=network, width=width), preprocessing=PICTURES
        )
    assert not (tmp_path / "model").exists()


def test_equal_tensors_do_not_make_an_equal_network(tmp_path: Path) -> None:
    dilated = torchvision.models.resnet50(num_classes=3, replace_stride_with_dilation=[False, False, True])
    net = nest(dilated, {"small": (1, 1, 1, 1)})
    pictures = PICTURES.model_copy(update={"size": 64})
    with pytest.raises(HubError, match="with the same weights it computes something else"):
        ddnn.save_pretrained(net, tmp_path, network="torchvision/resnet50", preprocessing=pictures)


# -- the card ---------------------------------------------------------------------------------------------------------


def cells(card: str) -> dict[str, list[str]]:
    """The rows of the card's table of sub-nets by name."""
    lines = card[card.index("| sub-net |") :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].removesuffix(" (full-net)"): row[1:] for row in rows}


def test_the_card_holds_the_runs_own_numbers(finished: RunFolder, tmp_path: Path) -> None:
    save_run(finished, tmp_path, license="apache-2.0", repo_id="someone/digits")
    summary = json.loads((finished.path / "summary.json").read_text())
    card = ModelCard.load(tmp_path / "README.md")
    assert MARKER in card.content
    table = cells(card.content)
    assert list(table) == list(summary["subnets"])
    for name, row in summary["subnets"].items():
        depths, params, macs, top1, top5, latency = table[name]
        assert depths == "-".join(map(str, row["depths"]))
        assert float(params.split()[0]) == pytest.approx(row["params"] / 1e3, rel=5e-3)
        assert float(macs.split()[0]) == pytest.approx(row["macs"] / {"k": 1e3, "M": 1e6}[macs.split()[1]], rel=5e-3)
        assert (top1, top5) == (f"{100 * row['top1']:.2f}", f"{100 * row['top5']:.2f}")
        assert latency == f"{row['latency_ms']:.2f}"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {f"top-1 of {name}": row["top1"] for name, row in summary["subnets"].items()}
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "ddnn"
    assert card.data.pipeline_tag == "image-classification"
    assert 'ddnn.from_pretrained("someone/digits")' in card.content
    assert f"Test set of digits, {summary['dataset']['test_images']} images" in card.content
    assert "one run with one seed" in card.content
    assert finished.recipe.to_toml().strip() in card.content


def test_the_code_in_the_card_runs(finished: RunFolder, tmp_path: Path) -> None:
    save_run(finished, tmp_path, repo_id=str(tmp_path))
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {"images": torch.zeros(2, 3, 8, 8)}
    exec(compile(code[0], "README.md", "exec"), scope)
    assert torch.equal(scope["logits"], scope["outputs"]["resnet8"].logits)


def comparison_of(run: RunFolder, folder: Path, **changes: Any) -> Path:
    """A `comparison.json` with made-up accuracies of the run's nets."""
    rows = json.loads((run.path / "summary.json").read_text())["subnets"]
    seeds = {"ekd": (0.93, 0.94, 0.95), "alone": (0.90, 0.91, 0.92)}
    content = {
        "dataset": "digits",
        "recipe": "digits data.source=/home/ann/digits",
        "seeds": [0, 1, 2],
        "nets": {
            name: {key: row[key] for key in ("depths", "params", "macs", "latency_ms")} for name, row in rows.items()
        },
        "methods": {
            method: {
                "subnets": {name: list(scores) for name in rows},
                "seconds": 10.0,
                "macs_per_step": 1e6,
                "peak_memory_mb": 10.0,
                "runs": {},
            }
            for method, scores in seeds.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_the_card_quotes_the_comparison(finished: RunFolder, tmp_path: Path) -> None:
    save_run(finished, tmp_path / "model", comparison=comparison_of(finished, tmp_path / "fair"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "DDNN-EKD is above alone on" in card
    assert card.count("94.00 ± 1.00") == 3  # of each net, by ekd
    assert card.count("91.00 ± 1.00") == 3  # of each net, alone
    assert "+3.00" in card
    assert "one run with one seed" not in card
    assert "/home/ann" not in card


def test_a_run_inside_a_comparison_finds_it(finished: RunFolder, tmp_path: Path) -> None:
    comparison_of(finished, tmp_path / "fair")
    shutil.copytree(finished.path, tmp_path / "fair" / "runs" / "ekd-seed0")
    save_run(RunFolder.open(tmp_path / "fair" / "runs" / "ekd-seed0"), tmp_path / "model")
    assert "94.00 ± 1.00" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("other", ["joint-seed0", "alone-resnet8-seed0"])
def test_what_a_comparison_says_of_ekd_is_not_said_of_its_other_runs(
    finished: RunFolder, tmp_path: Path, other: str
) -> None:
    comparison_of(finished, tmp_path / "fair")
    shutil.copytree(finished.path, tmp_path / "fair" / "runs" / other)
    save_run(RunFolder.open(tmp_path / "fair" / "runs" / other), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "94.00 ± 1.00" not in card
    assert "one run with one seed" in card


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [("objective", {"kl": 0.5}, "objective"), ("train", {"epochs": 9, "seed": 7, "threads": 3}, r"train\.epochs")],
)
def test_a_comparison_of_another_recipe_is_refused(
    finished: RunFolder, tmp_path: Path, part: str, change: dict[str, Any], named: str
) -> None:
    comparison_of(finished, tmp_path / "fair")
    (tmp_path / "fair" / "recipe.toml").write_text(changed(finished.recipe, **{part: change}).to_toml())
    with pytest.raises(HubError, match=rf"is of another recipe than the run's, with other settings of {named};"):
        save_run(finished, tmp_path / "model", comparison=tmp_path / "fair")


def test_evidence_about_something_else_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    other = comparison_of(finished, tmp_path / "a", dataset="cifar100")
    with pytest.raises(HubError, match="is about the data cifar100, the run about digits"):
        save_run(finished, tmp_path / "model", comparison=other)
    other = comparison_of(finished, tmp_path / "b", nets={})
    with pytest.raises(HubError, match=r"the comparison in .*b is about the nets \{\}, the run has"):
        save_run(finished, tmp_path / "model", comparison=other)
    with pytest.raises(HubError, match=r"is no comparison: it has no comparison.json"):
        save_run(finished, tmp_path / "model", comparison=tmp_path)
    with pytest.raises(HubError, match="the evidence is about the nets"):
        save(make(), tmp_path / "model", evidence=Evidence(subnets={}, dataset="x", test_images=1))
    assert not (tmp_path / "model").exists()


def test_the_card_tells_nothing_of_the_machines_folders(tiny: Callable[..., RunFolder], tmp_path: Path) -> None:
    photos = tmp_path / "secret_folder" / "photos"
    for kind in ("cat|dog", "<b>fox"):
        (photos / kind).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(photos / kind / f"{i}.png")
    run = tiny("photos", f"data.source={photos}", "train.epochs=1")
    train(run, Quiet())
    config = save_run(run, tmp_path / "model")
    assert set(config.classes or ()) == {"cat|dog", "<b>fox"}
    for file in ("README.md", "config.json"):
        assert "secret_folder" not in (tmp_path / "model" / file).read_text()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Test set of photos" in card
    assert r"cat\|dog" in card
    assert r"\<b>fox" in card  # a class's name is text, whatever it looks like
    ModelCard.load(tmp_path / "model" / "README.md")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('source = "/home/ann/photos"', 'source = "photos"'),
        ("digits data.source=/srv/a/b/ x", "digits data.source=b/ x"),
        ("/photos", "photos"),
        ("owner/name and/or 1/2", "owner/name and/or 1/2"),
        ("https://host/a/b", "https://host/a/b"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, told: str) -> None:
    assert without_folders(text) == told


def test_a_card_of_someones_own_is_kept(finished: RunFolder, tmp_path: Path) -> None:
    save_run(finished, tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "changed by hand\n")
    save_run(finished, tmp_path)
    assert "changed by hand" not in card.read_text()  # with ddnn's line in it, it is ddnn's
    card.write_text(card.read_text().replace(MARKER, "") + "changed by hand\n")
    save_run(finished, tmp_path)
    assert "changed by hand" in card.read_text()


def test_a_card_without_evidence_claims_none(tmp_path: Path) -> None:
    save(make(), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Accuracy was not recorded" in card
    assert "taught" not in card
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


# -- what can be wrong with a folder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(make(), folder)
    return folder


class Payload:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _torn_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-20])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def _pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))


def _torn_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_weights(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))

    return change


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_without_config, "holds no model: it has no config.json"),
        (_torn_config, "config.json is damaged: it is not JSON"),
        (_pickled, r"has no model.safetensors; pytorch_model.bin may hold pickled code and is never loaded"),
        (_pickle_in_disguise, "model.safetensors is damaged or was replaced: its checksum is not the one in config"),
        (_torn_weights, "model.safetensors is damaged or was replaced"),
        (_other_weights, "model.safetensors is damaged or was replaced"),
        (_config(ddnn="gone"), "holds no model of ddnn: its config.json has no key 'ddnn'"),
        (_config(ddnn="gone", architecture="resnet18"), r"but a network of timm, resnet18; load it with timm.create"),
        (_config(ddnn="gone", model_type="vit"), "holds no model of ddnn but one of transformers, vit"),
        (_config(format=2, ddnn="9.0"), "is of format 2, written by ddnn 9.0; .*install a newer one"),
        (_config(norm="odd"), "cannot be used: norm: Input should be 'private'"),
        (_config(depths="gone"), "cannot be used: depths: is missing"),
        (_config(depths={"a": [0]}), r"cannot be used: depths.a.0: .*greater than or equal to 1"),
        (_config(depths={"a": [1, 1, 9]}), "does not nest: it keeps 9 blocks of layer3"),
        (_config(depths={"a b": [1, 1, 1]}), "'a b' can't name a net"),
        (_config(classes=["one"]), "1 names of classes for 5 classes"),
        (_config(network={"name": "cifar/resnet21"}), "cifar has no network 'resnet21'"),
        (_config(network={"name": "/etc/passwd"}), "network.name: String should match pattern"),
        (_config(network={"name": "timm/x", "options": {"checkpoint_path": "/x"}}), "'checkpoint_path' would fetch or"),
        (_config(network={"name": "timm/x", "options": {"pretrained_cfg": "x"}}), "'pretrained_cfg' would fetch or"),
        (_config(network={"name": "cifar/resnet20", "width": 10**9}), "width: .*less than or equal to"),
        (_config(stages=["layer1"]), "net resnet8 has 3 depths for 1 stages"),
        (_config(network={"name": "cifar/resnet20", "width": 8}), "holds other tensors than the network of"),
        (_config(surplus=1), "surplus: Extra inputs are not permitted"),
    ],
)
def test_a_spoilt_folder_is_named_in_one_sentence(
    spoil: Callable[[Path], None], sentence: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(HubError, match=sentence) as caught:
        ddnn.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_a_folder_that_is_not_there_is_told_from_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("/nowhere/model", "someone/nothing-of-that-name", "not an id"):
        with pytest.raises(HubError, match=f"'{name}' is no folder here, and no model of that id can be had"):
            ddnn.from_pretrained(name)


def test_what_cannot_be_written_leaves_what_was_there(finished: RunFolder, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(ddnn.DDNNError, match="cannot write"):
        save_run(finished, blocked)
    assert blocked.read_text() == "mine"
